"""Times that can be compared: one thread, and contenders that take turns within one process."""

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module

import numpy as np
from threadpoolctl import threadpool_limits

from npnorm.threads import default_threads, get_threads, set_threads


@contextlib.contextmanager
def one_thread(torch: bool) -> Iterator[None]:
    """Within it npnorm, BLAS and, if wanted, torch use one thread."""
    before, default = get_threads(), default_threads()
    with contextlib.ExitStack() as stack:
        stack.callback(set_threads, None if before == default else before)
        set_threads(1)
        if torch:
            library = import_module("torch")
            stack.callback(library.set_num_threads, library.get_num_threads())
            library.set_num_threads(1)
        stack.enter_context(threadpool_limits(1, user_api="blas"))
        yield


def interleaved(calls: Mapping[str, Callable[[], object]], turn: float, rounds: int) -> dict[str, np.ndarray]:
    """Return the seconds of a call, round by round. All take turns; every other round runs backwards.

    What is faster than `turn`, in seconds, is called several times in its turn. It is the time of the processor, so
    that what else runs does not count; with one thread it is that of the clock on a quiet machine.
    """

    def timed(name: str, count: int) -> float:
        start = time.process_time()
        for _ in range(count):
            calls[name]()
        return (time.process_time() - start) / count

    names = list(calls)
    for _ in range(2):  # the first is to warm up
        once = {name: timed(name, 1) for name in names}
    counts = {name: min(math.ceil(turn / max(seconds, 1e-6)), 1000) for name, seconds in once.items()}
    samples: dict[str, list[float]] = {name: [] for name in names}
    collects = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            for name in names if i % 2 == 0 else reversed(names):
                samples[name].append(timed(name, counts[name]))
    finally:
        if collects:
            gc.enable()
    return {name: np.array(times) for name, times in samples.items()}
