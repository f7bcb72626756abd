"""Contenders take turns in one process, so that what disturbs the machine disturbs all of them alike."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from npnorm.bench.grid import Effort

PAUSE = 1e-3
"""Seconds before a turn in which threads of the last contender that spin may go to sleep."""

Times = dict[str, float]
"""Seconds of a call by operation: "forward", "backward", "both", the pair with the release of its memory."""


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


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Return the median of the rounds, the tenth and ninetieth percentile, and how many rounds there were.

    Examples
    --------
    >>> spread([5, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11])
    {'median': 6, 'p10': 2, 'p90': 10, 'rounds': 11}
    """
    ordered = sorted(samples)
    p10, p90 = (ordered[round(part * (len(ordered) - 1))] for part in (0.1, 0.9))
    return {"median": statistics.median(ordered), "p10": p10, "p90": p90, "rounds": len(ordered)}


def turns(names: Sequence[str], round_: int) -> list[str]:
    """Return the order of a round: forwards and backwards by turns, so that nobody always follows the same one.

    Examples
    --------
    >>> [turns(["a", "b", "c"], i) for i in range(3)]
    [['a', 'b', 'c'], ['c', 'b', 'a'], ['a', 'b', 'c']]
    """
    return list(names) if round_ % 2 == 0 else list(reversed(names))


def interleave(
    contenders: Mapping[str, Contender], effort: Effort, clock: Callable[[], float] = time.perf_counter
) -> list[dict[str, Any]]:
    """Time all contenders in turns, round by round.

    Returns
    -------
    list of dict
        A line for each contender and operation: "peer", "op", and what `spread` returns.
    """
    names, warm = list(contenders), max(1, effort.warm)
    for i in range(warm):
        once = {name: _calls(contenders[name], 1, clock)["both"] for name in turns(names, i)}
    calls = {name: max(1, min(10_000, int(effort.turn / max(once[name], 1e-7)))) for name in names}
    samples: dict[str, list[Times]] = {name: [] for name in names}
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        start, rounds = clock(), 0
        while rounds < effort.least or (rounds < effort.most and clock() - start < effort.seconds):
            for name in turns(names, rounds):
                samples[name].append(_turn(contenders[name], calls[name], clock))
            rounds += 1
    finally:
        if collects:
            gc.enable()
    return [
        {"peer": name, "op": op, **spread([times[op] for times in samples[name]])}
        for name in names
        for op in samples[name][0]
    ]


def _turn(contender: Contender, calls: int, clock: Callable[[], float]) -> Times:
    time.sleep(PAUSE)
    if calls > 1:
        _calls(contender, 1, clock)
    return _calls(contender, calls, clock)


def _calls(contender: Contender, count: int, clock: Callable[[], float]) -> Times:
    """Return the mean seconds of a call."""
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
