"""Contenders take turns in one process, so that what disturbs the machine disturbs all of them alike.

A turn is calm if the threads of this process did not wait for a core meanwhile. Only calm turns count, where there are
enough of them: a contender of many threads suffers more from another process than one of a single thread.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from npnorm.bench.grid import Effort

CALM = 0.05
"""The largest part of a turn that threads may wait for a core."""

PATIENCE = 4
"""How many times its seconds a case may take until there are enough calm turns."""

PAUSE = 1e-3
"""Seconds before a turn in which threads of the last contender that spin may go to sleep."""

TASKS = Path("/proc/self/task")


class Contender(NamedTuple):
    """What is timed.

    Parameters
    ----------
    forward : callable
        Returns what backward needs, or keeps alive what a user would keep.
    backward : callable or None
        Takes what forward returned. None: there is one operation only, which counts as "both".
    """

    forward: Callable[[], Any]
    backward: Callable[[Any], Any] | None = None


class Spread(NamedTuple):
    """Seconds of one call: the median of the rounds that count, and the tenth and ninetieth percentile.

    `calm` says that these are calm ones; else there were too few of them, and all rounds count.
    """

    median: float
    p10: float
    p90: float
    rounds: int
    calm: bool = True


Times = dict[str, Spread]
"""By operation: "forward", "backward", "both"; the last is the pair and the release of the memory that it took."""


def spread(samples: Sequence[float], calm: bool = True) -> Spread:
    """Return median and percentiles.

    Examples
    --------
    >>> spread([5, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11])[:3]
    (6, 2, 10)
    """
    ordered = sorted(samples)
    last = len(ordered) - 1
    p10, p90 = (ordered[round(part * last)] for part in (0.1, 0.9))
    return Spread(statistics.median(ordered), p10, p90, len(ordered), calm)


def turns(names: Sequence[str], round_: int) -> list[str]:
    """Return the order of a round: forwards and backwards by turns, so that nobody always follows the same one.

    Examples
    --------
    >>> [turns(["a", "b", "c"], i) for i in range(3)]
    [['a', 'b', 'c'], ['c', 'b', 'a'], ['a', 'b', 'c']]
    """
    return list(names) if round_ % 2 == 0 else list(reversed(names))


def waited() -> float:
    """Return the seconds that the threads of this process have waited for a core so far; 0 where nothing tells."""
    nanoseconds = 0
    for task in TASKS.glob("*/schedstat"):
        try:
            nanoseconds += int(task.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended, or the system does not count
            continue
    return nanoseconds / 1e9


def interleave(
    contenders: Mapping[str, Contender],
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
    waited: Callable[[], float] = waited,
) -> dict[str, Times]:
    """Time all contenders in turns, round by round.

    Parameters
    ----------
    clock, waited : callables
        Return seconds: of the time, and of the waiting for a core.

    Returns
    -------
    dict
        For each contender, in its order, its times.
    """
    names = list(contenders)
    for i in range(effort.warm):
        for name in turns(names, i):
            _calls(contenders[name], 1, clock)
    calls = {name: _calls_in_a_turn(contenders[name], effort.turn, clock) for name in names}
    everything: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    calm: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        start, rounds = clock(), 0
        while rounds < effort.most:
            seconds, fewest = clock() - start, min(map(len, calm.values()))
            if rounds >= effort.least and seconds >= effort.seconds * (1 if fewest >= effort.least else PATIENCE):
                break
            for name in turns(names, rounds):
                sample, was_calm = _turn(contenders[name], calls[name], clock, waited)
                everything[name].append(sample)
                if was_calm:
                    calm[name].append(sample)
            rounds += 1
    finally:
        if collects:
            gc.enable()
    return {name: _times(everything[name], calm[name], effort.least) for name in names}


def _times(everything: list[dict[str, float]], calm: list[dict[str, float]], least: int) -> Times:
    enough = len(calm) >= least
    some = calm if enough else everything
    return {op: spread([sample[op] for sample in some], enough) for op in some[0]}


def _turn(
    contender: Contender, calls: int, clock: Callable[[], float], waited: Callable[[], float]
) -> tuple[dict[str, float], bool]:
    """Return the mean seconds of a call, by operation, and whether the turn was calm."""
    time.sleep(PAUSE)
    if calls > 1:
        _calls(contender, 1, clock)
    before, start = waited(), clock()
    sample = _calls(contender, calls, clock)
    seconds = clock() - start
    return sample, waited() - before <= CALM * seconds


def _calls_in_a_turn(contender: Contender, turn: float, clock: Callable[[], float]) -> int:
    once = _calls(contender, 1, clock)["both"]
    return max(1, min(10_000, int(turn / max(once, 1e-7))))


def _calls(contender: Contender, count: int, clock: Callable[[], float]) -> dict[str, float]:
    """Return the mean seconds of a call, by operation."""
    forward, backward = contender
    there, back, both = 0.0, 0.0, 0.0
    for _ in range(count):
        result = None
        begin = clock()
        state = forward()
        middle = clock()
        if backward is not None:
            result = backward(state)
        end = clock()
        del state, result
        both += clock() - begin
        there += middle - begin
        back += end - middle
    if backward is None:
        return {"both": both / count}
    return {"forward": there / count, "backward": back / count, "both": both / count}
