import gc

import pytest

from npnorm.bench.grid import Effort
from npnorm.bench.timing import Contender, interleave, spread, turns

ONCE = Effort(seconds=0, least=3, most=3, warm=0, turn=0)


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


def medians(lines):
    return {(line["peer"], line["op"]): line["median"] for line in lines}


def test_spread_is_the_median_and_what_is_between_the_tenth_and_the_ninetieth_percentile():
    assert spread([3.0]) == {"median": 3, "p10": 3, "p90": 3, "rounds": 1}
    assert spread([100, *range(1, 21)]) == {"median": 11, "p10": 3, "p90": 19, "rounds": 21}


def test_turns_go_forwards_and_backwards():
    assert turns("abc", 0) == turns("abc", 2) == ["a", "b", "c"]
    assert turns("abc", 1) == ["c", "b", "a"]


def test_contenders_take_turns_in_both_orders():
    clock, log = Clock(), []
    interleave({name: clock.contender(1, 1, log, name) for name in "AB"}, ONCE, clock)
    calls = [a + b for a, b in zip(log[::2], log[1::2], strict=True)]
    warm = ["AfAb", "BfBb"]
    assert calls == [*warm, "AfAb", "BfBb", "BfBb", "AfAb", "AfAb", "BfBb"]


def test_times_are_those_of_forward_backward_and_both():
    clock = Clock()
    lines = interleave({"a": clock.contender(2, 3), "copy": clock.contender(5)}, ONCE, clock)
    expected = {("a", "forward"): 2, ("a", "backward"): 3, ("a", "both"): 5, ("copy", "both"): 5}
    assert medians(lines) == expected
    assert {line["rounds"] for line in lines} == {3}


def test_what_disturbs_one_round_moves_no_median():
    clock, slow = Clock(), iter([1, 1, 1, 50, 1, 1, 1, 1, 1, 1, 1, 1])
    contender = Contender(lambda: setattr(clock, "now", clock.now + next(slow)))
    (line,) = interleave({"a": contender}, ONCE._replace(least=11, most=11), clock)
    assert (line["median"], line["p10"], line["p90"]) == (1, 1, 1)


def test_backward_is_given_what_forward_returned_and_its_release_counts_for_both():
    clock, seen = Clock(), []

    class State:
        def __del__(self):
            clock.now += 7

    found = medians(interleave({"a": Contender(State, lambda state: seen.append(type(state)))}, ONCE, clock))
    assert set(seen) == {State}
    assert found == {("a", "forward"): 0, ("a", "backward"): 0, ("a", "both"): 7}


def test_a_fast_contender_is_called_several_times_in_its_turn():
    clock, log = Clock(), []
    lines = interleave({"a": clock.contender(0.5, 0.5, log)}, ONCE._replace(turn=10.0), clock)
    assert log.count("f") == 1 + 3 * (1 + 10)  # the first of a turn does not count
    assert medians(lines)["a", "forward"] == 0.5


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 3), (10, 5), (1000, 8)])
def test_rounds_end_when_time_is_up_but_not_below_the_least_nor_above_the_most(seconds, rounds):
    clock = Clock()
    effort = Effort(seconds=seconds, least=3, most=8, warm=0, turn=0)
    assert interleave({"a": clock.contender(2)}, effort, clock)[0]["rounds"] == rounds


def test_warm_rounds_do_not_count():
    clock, log = Clock(), []
    (line,) = interleave({"a": clock.contender(1, log=log)}, ONCE._replace(warm=4), clock)
    assert (len(log), line["rounds"]) == (4 + 3, 3)


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
