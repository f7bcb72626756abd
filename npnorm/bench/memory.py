"""The largest extra memory of a call: what it allocates beyond what was there before, its results included.

Of NumPy by tracemalloc, which NumPy tells of every array. Of torch by its profiler, whose trace lists every allocation
of a tensor. Both after a first call, so that scratch memory which is kept for the next call is not counted.
"""

import json
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from npnorm.bench.grid import Case
from npnorm.bench.needs import need
from npnorm.bench.peers import contenders
from npnorm.bench.records import MemoryUse

MEASURED = ("f64", "f32", "out", "naive", "torch")
"""The peers whose memory is measured."""


def memory(case: Case, peers: Sequence[str]) -> list[MemoryUse]:
    """Measure forward and backward of each peer; results of forward are there before backward begins."""
    found = []
    for name in (name for name in MEASURED if name in peers):
        forward, backward = contenders(case, [name], copies=False)[name]
        if backward is None:
            continue
        backward(forward())  # scratch memory, and whatever is made once
        peak = _peak_of_torch if name == "torch" else _peak
        state, there = peak(forward)
        _, back = peak(partial(backward, state))
        found.append(MemoryUse(case.norm, case.shape, name, there, back))
    return found


def _peak(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return what a call returns, and its largest extra memory in bytes."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        result = call()
        return result, tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def _peak_of_torch(call: Callable[[], Any]) -> tuple[Any, int]:
    profiler = need("torch.profiler").profiler
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return result, highest(events)


def highest(events: Iterable[dict[str, Any]]) -> int:
    """Return the largest sum of the bytes that the memory events of a trace allocate and free, in order of time.

    Examples
    --------
    >>> some = [{"name": "[memory]", "ts": ts, "args": {"Bytes": n}} for ts, n in ((3, -8), (1, 8), (2, 4), (4, 2))]
    >>> highest(some)
    12
    """
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"]
    now = most = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        now += nbytes
        most = max(most, now)
    return most
