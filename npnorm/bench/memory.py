"""The largest extra memory of a call: what it allocates beyond what was there before, its results included.

Of NumPy by tracemalloc, which NumPy tells of every array. Of torch by its profiler, whose trace lists every allocation
of a tensor. Both after a first call, so that scratch memory which is kept for the next call is not counted.
"""

import json
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from npnorm.bench.grid import Case
from npnorm.bench.peers import contenders

MEASURED = ("f64", "f32", "out", "naive", "torch")
"""The peers whose memory is measured."""


def memory(case: Case, peers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield a line for each peer and operation; results of forward are there before backward begins."""
    for name in (name for name in MEASURED if name in peers):
        forward, backward = contenders(case, [name], copies=False)[name]
        if backward is None:
            continue
        backward(forward())  # scratch memory, and whatever is made once
        measure = peak_of_torch if name == "torch" else peak
        state, there = measure(forward)
        _, back = measure(partial(backward, state))
        yield {"peer": name, "op": "forward", "extra": there}
        yield {"peer": name, "op": "backward", "extra": back}


def peak(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return what a call returns, and its largest extra memory in bytes."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        result = call()
        return result, tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


def peak_of_torch(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return the same of a call to torch."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
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
