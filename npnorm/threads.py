"""Threads that work on pieces of one call, and the scratch memory that each of them keeps.

NumPy lets go of Python's lock inside its loops, so that plain threads run side by side. What is computed, and in which
pieces, never depends on how many there are: any number of threads gives the same bits.

A hand-over takes 8 us on 2 cores; with `concurrent.futures` 30 to 60 us, and two tasks of 1 ms take 5 to 9 % longer.
"""

import collections
import contextlib
import contextvars
import functools
import math
import os
import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import DTypeLike

LAUNCHERS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MPI_LOCALRANKID")
"""The launcher of an MPI job sets one of these. Its ranks share the cores already."""

KEPT = 1 << 24
"""Bytes of scratch memory that a thread keeps at most: a single huge row must not stay for ever."""


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


class Scratch:
    """Memory that one use after another has, see `scratch`."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, np.dtype], np.ndarray] = {}

    def empty(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> np.ndarray:
        """Return an array to be written to; all arrays of one `name` and `dtype` may be the same memory."""
        size, dtype = math.prod(shape), np.dtype(dtype)
        memory = self._kept.get((name, dtype))
        if memory is None or memory.size < size:
            memory = np.empty(size, dtype)
            if memory.nbytes <= KEPT:
                if memory.nbytes + sum(kept.nbytes for kept in self._kept.values()) > KEPT:
                    self._kept.clear()
                self._kept[name, dtype] = memory
        return memory[:size].reshape(shape)


_local = threading.local()


@contextlib.contextmanager
def scratch() -> Iterator[Scratch]:
    """Lend this thread its scratch memory. It is in cache, since the thread keeps it from one use to the next.

    While it is lent, another use on the thread gets fresh memory: a signal handler, or `__del__`, may evaluate a norm
    in the midst of another.

    Examples
    --------
    >>> with scratch() as memory:
    ...     square = memory.empty("square", (2, 3), "float32")
    """
    free: list[Scratch] = _local.__dict__.setdefault("free", [])
    try:
        memory = free.pop()  # one step, which no signal divides
    except IndexError:
        memory = Scratch()
    try:
        yield memory
    finally:
        free[:] = [memory]  # one is kept: the outermost of those that were lent
