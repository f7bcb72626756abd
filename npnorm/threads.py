"""Threads that share pieces of work, and the scratch memory that each of them keeps.

NumPy lets go of Python's lock inside its loops, so that plain threads run side by side. What is computed, and in which
pieces, never depends on how many there are: any number of threads gives the same bits.
"""

import contextvars
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

LAUNCHERS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")
"""Set by the launcher of an MPI job, whose ranks share the cores already."""


class _Settings:
    threads: int | None = None  # None: `default_threads`


class _Helper(threading.Thread):
    """A thread that waits for a task. Two bare locks hand it over in 15 us; a queue takes 50 us."""

    def __init__(self) -> None:
        super().__init__(name="npnorm", daemon=True)
        self.given, self.done = threading.Lock(), threading.Lock()
        self.given.acquire()
        self.done.acquire()
        self.task: Callable[[], None] = lambda: None
        self.problem: BaseException | None = None
        self.finished, self.idle = True, True

    def run(self) -> None:
        while True:
            self.given.acquire()
            try:
                self.task()
            except BaseException as problem:  # raised again where the work was given
                self.problem = problem
            del self.task  # and the arrays that it holds
            self.done.release()
            self.finished = True

    def begin(self, task: Callable[[], None]) -> None:
        self.task, self.problem, self.finished, self.idle = task, None, False, False
        self.given.release()

    def wait(self) -> None:
        """Wait for the end of the task, if one was begun, whatever interrupts: it writes into the caller's arrays."""
        interrupted: BaseException | None = None
        while not self.idle:
            try:
                self.done.acquire()
                self.idle = True
            except BaseException as problem:
                interrupted = problem
                while not self.finished:
                    time.sleep(0.001)
                self.idle = self.done.locked()  # the interrupt came after the lock was taken
        if interrupted:
            raise interrupted


_helpers: list[_Helper] = []
_in_use = threading.Lock()
_scratch = threading.local()


def default_threads() -> int:
    """Return `NPNORM_THREADS`, or 1 in an MPI job, or the number of cores that this process may use."""
    chosen = os.environ.get("NPNORM_THREADS")
    if chosen is not None:
        if not chosen.isdecimal() or int(chosen) < 1:
            raise ValueError(f"NPNORM_THREADS is {chosen!r}. It must be an integer, 1 or more.")
        return int(chosen)
    if any(name in os.environ for name in LAUNCHERS):
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_threads(n: int | None) -> None:
    """Let norms and layers use up to `n` threads; None: the default, see `default_threads`.

    Results have the same bits for any number. Small arrays are computed on the caller's thread alone.

    Examples
    --------
    >>> set_threads(2)
    >>> get_threads()
    2
    >>> set_threads(None)
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1):
        raise ValueError(f"set_threads: n is {n!r}. It must be an integer, 1 or more, or None for the default.")
    _Settings.threads = None if n is None else int(n)


def get_threads() -> int:
    """Return how many threads are used at most."""
    return default_threads() if _Settings.threads is None else _Settings.threads


def parallel_for(work: Callable[[int], None], count: int, threads: int | None = None) -> None:
    """Call `work(i)` for each i below `count`, on several threads; whichever is free takes the next i.

    Each thread sees the caller's context, `np.errstate` included. If a call raises, no further one is begun, and the
    error is raised here. Work that is shared from within work, or while another thread shares some, runs on the thread
    it comes from.

    Parameters
    ----------
    threads : int or None
        At most so many; None: `get_threads()`.

    Examples
    --------
    >>> squares = [0, 0, 0]
    >>> parallel_for(lambda i: squares.__setitem__(i, i * i), 3)
    >>> squares
    [0, 1, 4]
    """
    items = iter(range(count))  # taking the next of a range is one step for Python's lock
    n = min(get_threads() if threads is None else threads, count)
    if n < 2 or not _in_use.acquire(blocking=False):
        for i in items:
            work(i)
        return

    def some(items: Iterator[int] = items) -> None:
        try:
            for i in items:
                work(i)
        finally:
            for _ in items:  # after an error nothing more is begun
                pass

    try:
        while len(_helpers) < n - 1:
            _helpers.append(_Helper())
            _helpers[-1].start()
        helpers = _helpers[: n - 1]
        try:
            for helper in helpers:
                context = contextvars.copy_context()
                helper.begin(lambda context=context: context.run(some))  # type: ignore[misc]
            some()
        finally:
            for helper in helpers:
                helper.wait()
        for helper in helpers:
            if helper.problem is not None:
                raise helper.problem
    finally:
        _in_use.release()


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return memory to be written to, which this thread keeps for `name`: the same at each call, so it is in cache."""
    kept: dict[Any, np.ndarray] = _scratch.__dict__
    size, key = math.prod(shape), (name, dtype)
    if key not in kept or kept[key].size < size:
        kept[key] = np.empty(size, dtype)
    return kept[key][:size].reshape(shape)


def _after_fork() -> None:
    """Forget the threads, which a forked process does not have, and the lock that one of them may have held."""
    global _in_use
    _helpers.clear()
    _in_use = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
