import gc

import pytest

from npnorm.bench.grid import Effort
from npnorm.bench.timing import PATIENCE, Contender, Spread, interleave, spread, turns, waited

ONCE = Effort(seconds=0, least=3, most=3, warm=0, turn=0)


def calmly(contenders, effort, clock):
    """Time on a machine where nobody ever waits for a core."""
    return interleave(contenders, effort, clock, lambda: 0.0)


class Clock:
    """Time that passes only where a contender says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def contender(self, forward, backward=None, log=None, name=""):
        def run(seconds, op):
            self.now += seconds
            if log is not None:
                log.append(name + op)
            return op

        back = None if backward is None else lambda state: run(backward, "b")
        return Contender(lambda: run(forward, "f"), back)


def test_spread_is_the_median_and_what_is_between_the_tenth_and_the_ninetieth_percentile():
    assert spread([3.0]) == Spread(3, 3, 3, 1)
    assert spread([100, *range(1, 21)]) == Spread(11, 3, 19, 21)


def test_turns_go_forwards_and_backwards():
    assert turns("abc", 0) == turns("abc", 2) == ["a", "b", "c"]
    assert turns("abc", 1) == ["c", "b", "a"]


def test_contenders_take_turns_in_both_orders():
    clock, log = Clock(), []
    calmly({name: clock.contender(1, 1, log, name) for name in "AB"}, ONCE, clock)
    calls = [a + b for a, b in zip(log[::2], log[1::2], strict=True)]
    to_see_how_long = ["AfAb", "BfBb"]
    assert calls == [*to_see_how_long, "AfAb", "BfBb", "BfBb", "AfAb", "AfAb", "BfBb"]


def test_times_are_those_of_forward_backward_and_both():
    clock = Clock()
    times = calmly({"a": clock.contender(2, 3), "copy": clock.contender(5)}, ONCE, clock)
    assert {op: s.median for op, s in times["a"].items()} == {"forward": 2, "backward": 3, "both": 5}
    assert {op: s.median for op, s in times["copy"].items()} == {"both": 5}
    assert times["a"]["both"].rounds == 3


def test_backward_is_given_what_forward_returned_and_its_release_counts_for_both():
    clock, seen = Clock(), []

    class State:
        def __del__(self):
            clock.now += 7

    times = calmly({"a": Contender(State, lambda state: seen.append(type(state)))}, ONCE, clock)
    assert set(seen) == {State}
    assert (times["a"]["forward"].median, times["a"]["backward"].median, times["a"]["both"].median) == (0, 0, 7)


def test_a_fast_contender_is_called_several_times_in_its_turn():
    clock, log = Clock(), []
    effort = ONCE._replace(turn=10.0)
    times = calmly({"a": clock.contender(0.5, 0.5, log)}, effort, clock)
    assert log.count("f") == 1 + 3 * (1 + 10)  # the first of a turn does not count
    assert times["a"]["forward"].median == 0.5


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 3), (10, 5), (1000, 8)])
def test_rounds_end_when_time_is_up_but_not_below_the_least_nor_above_the_most(seconds, rounds):
    clock = Clock()
    effort = Effort(seconds=seconds, least=3, most=8, warm=0, turn=0)
    times = calmly({"a": clock.contender(2)}, effort, clock)
    assert times["a"]["both"].rounds == rounds


def test_warm_rounds_do_not_count():
    clock, log = Clock(), []
    times = calmly({"a": clock.contender(1, log=log)}, ONCE._replace(warm=4), clock)
    assert len(log) == 4 + 1 + 3
    assert times["a"]["both"].rounds == 3


@pytest.mark.parametrize("on", [True, False])
def test_the_garbage_collector_rests_meanwhile_and_is_left_as_it_was(on):
    before, seen = gc.isenabled(), []
    (gc.enable if on else gc.disable)()
    try:
        interleave({"a": Contender(lambda: seen.append(gc.isenabled()))}, ONCE)
        assert gc.isenabled() == on
        assert seen[-3:] == [False] * 3
    finally:
        (gc.enable if before else gc.disable)()


def test_only_calm_turns_count():
    clock, wait = Clock(), iter([0, 0, 0, 9, 0, 0, 0, 9, 0, 0])  # before and after each turn
    slow = iter([1, 1, 5, 1, 5, 1])
    contender = Contender(lambda: setattr(clock, "now", clock.now + next(slow)))
    effort = Effort(seconds=100, least=2, most=5, warm=0, turn=0)
    times = interleave({"a": contender}, effort, clock, lambda: next(wait))
    assert times["a"]["both"] == Spread(1, 1, 1, 3, calm=True)


def test_without_enough_calm_turns_all_of_them_count_after_some_patience():
    clock, wait = Clock(), iter(range(1000))
    effort = Effort(seconds=2, least=2, most=100, warm=0, turn=0)
    times = interleave({"a": clock.contender(1)}, effort, clock, lambda: next(wait))
    assert times["a"]["both"] == Spread(1, 1, 1, PATIENCE * 2, calm=False)


def test_waiting_is_counted_up():
    first = waited()
    assert 0 <= first <= waited()
