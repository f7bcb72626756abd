"""Threads that work on pieces of one call, and the scratch memory that each of them keeps.

NumPy lets go of Python's lock inside its loops, so that plain threads run side by side. What is computed, and in which
pieces, never depends on how many there are: any number of threads gives the same bits.

A hand-over takes 8 us on 2 cores; with `concurrent.futures` 30 to 60 us, and two tasks of 1 ms take 5 to 9 % longer.
"""

import collections
import contextvars
import functools
import math
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

LAUNCHERS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")
"""The launcher of an MPI job sets one of these. Its ranks share the cores already."""


class _Settings:
    threads: int | None = None  # None: `default_threads`


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


def parallel_for(work: Callable[[int], object], count: int, threads: int | None = None) -> None:
    """Call `work(i)` for each i below `count`, on several threads; whichever is free takes the next i.

    Each thread sees a copy of the caller's context, `np.errstate` included. If a call raises, no further one is begun,
    and the error is raised here, as an interrupt is, once no helper is in `work` any more. Within `work`,
    `parallel_for` runs on the thread that calls it.

    Parameters
    ----------
    threads : int or None
        At most so many threads take part; None: `get_threads()`.

    Examples
    --------
    >>> squares = [0, 0, 0]
    >>> parallel_for(lambda i: squares.__setitem__(i, i * i), 3)
    >>> squares
    [0, 1, 4]
    """
    n = min(get_threads() if threads is None else threads, count)
    if n < 2 or _in_work.get():
        for i in range(count):
            work(i)
        return
    job = _Job(work, count)
    while True:  # an interrupt may come at any step, and is caught at each from which helpers may be at work
        try:
            if job.left:
                _ask_helpers(job, n - 1)
                contextvars.copy_context().run(job.take_part)
            while job.at_work:
                for leaving in list(job.at_work):
                    leaving.acquire()
            break
        except BaseException as problem:
            job.left.clear()
            job.problems.insert(0, problem)
    del job.work  # and the arrays that it holds: a helper that comes late still has the job
    if job.problems:
        del job.problems[1:]
        raise job.problems.pop()  # the job must forget it, since its traceback has the job


class _Job:
    """The calls of one `parallel_for`. Each has its own: a helper that is late with an old one does no harm."""

    def __init__(self, work: Callable[[int], object], count: int) -> None:
        self.work, self.left = work, collections.deque(range(count))
        self.at_work: list[threading.Lock] = []  # each helper that takes part holds one
        self.problems: list[BaseException] = []

    def take_part(self) -> None:
        """Make calls until none is left."""
        _in_work.set(True)  # in the copy of the context
        while True:
            try:
                i = self.left.popleft()
            except IndexError:
                return
            self.work(i)

    def help(self) -> None:
        """Take part on a helper, which says so before its first call and after its last."""
        leaving = threading.Lock()
        with leaving:
            self.at_work.append(leaving)
            try:
                self.take_part()
            except BaseException as problem:
                self.left.clear()
                self.problems.append(problem)
            self.at_work.remove(leaving)


_in_work = contextvars.ContextVar("npnorm.threads: in work", default=False)
_helpers: list[threading.Thread] = []
_scratch = threading.local()
_tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()


def _ask_helpers(job: _Job, n: int) -> None:
    """Ask n helpers to take part. Nobody waits for one that comes late: it finds no call left."""
    while len(_helpers) < n:
        helper = threading.Thread(target=_serve, args=(_tasks,), name="npnorm", daemon=True)
        helper.start()
        _helpers.append(helper)  # after its start: what the list counts is there, whatever interrupts
    for _ in range(n):
        _tasks.put(functools.partial(contextvars.copy_context().run, job.help))


def _serve(tasks: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        tasks.get()()  # a variable would hold the task until the next


def _after_fork() -> None:
    """Forget the helpers, which a forked process does not have."""
    global _tasks
    _tasks = queue.SimpleQueue()
    _helpers.clear()
    _in_work.set(False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def scratch(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return memory to be written to, which this thread keeps for `name`: the same at each call, so it is in cache."""
    kept: dict[Any, np.ndarray] = _scratch.__dict__
    size, key = math.prod(shape), (name, dtype)
    if key not in kept or kept[key].size < size:
        kept[key] = np.empty(size, dtype)
    return kept[key][:size].reshape(shape)
