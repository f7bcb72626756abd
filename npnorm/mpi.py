"""The group of MPI ranks, and the last line of every program that uses it.

The only file that names MPI; nothing else in the package imports it. `Ranks` has the names of `npnorm.group.Group` over
an mpi4py communicator. `run(main)` calls `main(group)` and sees to it that a rank that fails takes the job with it.

A group checks before it sends. Each operation is preceded by one 16-byte all-reduce of a checksum of what the rank is
about to do; if the ranks are about to do different things, all of them raise the same `RankError`. Without the check
MPI would wait for ever, or return other numbers on each rank.
"""

import contextlib
import os
import sys
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, describe, dtype_name, from_numpy, to_numpy
from npnorm.group import RankError, shard_slice

try:
    from mpi4py import MPI
    from threadpoolctl import threadpool_limits
except (ImportError, RuntimeError) as problem:  # a RuntimeError if there is no MPI library to load
    raise ImportError(
        f"npnorm.mpi needs mpi4py, an MPI library and threadpoolctl, and could not load them ({problem}). "
        'Install all: pip install -e ".[mpi]". On a cluster, which has an MPI library: pip install -e ".[cluster]".'
    ) from problem

WAIT = 0.5
"""Seconds that a failing rank waits for the others to fail, too, before it ends the job."""

THREAD_SETTINGS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


class Ranks:
    """The ranks of an MPI communicator as a group.

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
    check : bool
        Whether the ranks compare what they are about to do before each operation. Without it a program in which ranks
        disagree may hang or compute something else; it saves one small message per operation.

    Attributes
    ----------
    rank, size : int
    calls, bytes : collections.Counter
        How often this rank did each operation, and the bytes that it sent for it. "check" counts the comparisons.

    Notes
    -----
    Only `run` ends the other ranks when this one fails; without it they would wait for ever at their next message.

    Arrays of 16 bits travel as float32: MPI would add them in 16 bits. Arrays on a device travel through the host.
    """

    def __init__(self, comm: MPI.Comm, check: bool = True) -> None:
        check_launcher()
        self.comm = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.check = check
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __repr__(self) -> str:
        return f"Ranks(rank={self.rank}, size={self.size})"

    def sum(self, *arrays: Array, label: str = "") -> Any:
        """Turn partial arrays into replicated ones: one all-reduce, however many arrays of one dtype.

        Every rank gets the same bits.
        """
        self._require_same(f"sum of {' and '.join(map(describe, arrays))} for {label or 'the caller'}")
        flat = [_to_host(x).ravel() for x in arrays]
        mine = flat[0] if len(flat) == 1 else np.concatenate(flat)
        total = np.empty_like(mine)
        self._count("sum", mine)
        self.comm.Allreduce(mine, total, op=MPI.SUM)
        ends = np.cumsum([x.size for x in arrays])[:-1]
        sums = tuple(_from_host(t, x) for t, x in zip(np.split(total, ends), arrays, strict=True))
        return sums[0] if len(sums) == 1 else sums

    def max(self, x: Array, label: str = "") -> Any:
        """Return the largest value over the ranks, element by element; a NaN on any rank stays.

        One all-gather: MPI's own maximum loses a NaN on some ranks and not on others.
        """
        self._require_same(f"max of {describe(x)} for {label or 'the caller'}")
        return _from_host(np.max(self._allgather("max", _to_host(x)), axis=0), x)

    def gather(self, x: Array, axis: int, label: str = "") -> Any:
        """Turn an array sharded along `axis` into a replicated one: one all-gather."""
        self._require_same(f"gather of {describe(x)} along axis {axis} for {label or 'the caller'}")
        shards = self._allgather("gather", _to_host(x))
        return array_module(x).concat([_from_host(shard, x) for shard in shards], axis=axis)

    def shard(self, x: Array, axis: int | None) -> Any:
        """Return a copy of this rank's part of the replicated `x` along `axis` (None: of all of it)."""
        xp = array_module(x)
        if axis is None:
            return xp.astype(x, x.dtype)
        index = [slice(None)] * x.ndim
        index[axis] = shard_slice(self, x.shape[axis], f"an array of shape {tuple(x.shape)} along axis {axis}")
        return xp.astype(x[tuple(index)], x.dtype)

    def require_same(self, label: str) -> None:
        """Raise the same `RankError` on every rank unless all ranks call it with the same text."""
        digest = zlib.crc32(label.encode())
        mine = np.array([digest, -digest], np.int64)
        largest = np.empty_like(mine)
        self._count("check", mine)
        self.comm.Allreduce(mine, largest, op=MPI.MAX)
        if largest[0] != -largest[1]:  # the largest is not the smallest
            raise RankError(_disagreement(self.comm.allgather(label), self.comm.allgather(_caller())))

    def shared_error(self, problem: Exception) -> Exception:
        """Return `problem`, to be raised, once every rank has it; raise a `RankError` on all if only some have it.

        The other ranks learn of it at their next operation, before they send anything.
        """
        self._require_same(f"{type(problem).__name__}: {problem}")
        return problem

    def _require_same(self, label: str) -> None:
        if self.check:
            self.require_same(label)

    def _allgather(self, name: str, mine: np.ndarray) -> np.ndarray:
        everyone = np.empty((self.size, *mine.shape), mine.dtype)
        self._count(name, mine)
        self.comm.Allgather(mine, everyone)
        return everyone

    def _count(self, name: str, sent: np.ndarray) -> None:
        self.calls[name] += 1
        self.bytes[name] += sent.nbytes


def _to_host(x: Array) -> np.ndarray:
    """Return `x` as MPI can take it: C order (it would permute a transposed array), at least 32 bits."""
    host = np.ascontiguousarray(to_numpy(x)).reshape(x.shape)  # ascontiguousarray turns () into (1,)
    host = host.astype(host.dtype.newbyteorder("="), copy=False)
    return host.astype(np.float32) if dtype_name(x) in ("float16", "bfloat16") else host


def _from_host(values: np.ndarray, like: Array) -> Array:
    """Return a message's values as an array of the module and dtype of `like`."""
    array = from_numpy(values.reshape(like.shape), like)
    return array_module(like).astype(array, like.dtype, copy=False)


def _caller() -> str:
    """Return file and line of the innermost frame outside this package, and outside its context managers."""
    package = os.path.dirname(__file__) + os.sep
    inside = (package, contextlib.__file__)
    outside = [frame for frame in traceback.extract_stack() if not frame.filename.startswith(inside)]
    return f"{os.path.basename(outside[-1].filename)}, line {outside[-1].lineno}" if outside else "an unknown place"


def _disagreement(without_place: list[str], places: list[str]) -> str:
    texts = [f"{text.rstrip('.')}, at {place}" for text, place in zip(without_place, places, strict=True)]
    usual, times = Counter(without_place).most_common(1)[0]
    odd = [times > len(texts) / 2 and text != usual for text in without_place]  # without a majority nobody is odd
    lines = [f"  rank {rank}: {text}{'   <-- differs' * odd[rank]}" for rank, text in enumerate(texts)]
    return "\n".join(["the ranks disagree about what comes next; nothing was sent.", *lines])


def check_launcher() -> None:
    """Raise if the mpirun that started this process belongs to another MPI than mpi4py.

    Each process then sees a world of its own, and N ranks would be N serial runs.
    """
    for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PALS_SIZE"):
        started = int(os.environ.get(name, "1"))
        if started > 1 and MPI.COMM_WORLD.Get_size() == 1:
            library = " ".join(MPI.Get_library_version().splitlines()[0].strip("\0").partition(",")[0].split())
            raise RankError(
                f"mpirun started {started} processes ({name}={started}), but mpi4py sees a world of 1 rank: "
                f"it uses {library}, and this mpirun belongs to another MPI. "
                f"Use the mpirun beside this Python ({os.path.join(os.path.dirname(sys.executable), 'mpirun')}), "
                "or install one MPI only."
            )


def run(main: Callable[[Ranks], Any]) -> None:
    """Call `main(Ranks(COMM_WORLD))` so that the job ends when a rank does, with one message and a non-zero status.

    An exception, or `sys.exit`, on one rank ends all of them at once; without this the others would wait for ever. If
    all ranks fail alike, the message is printed once. A rank that returns from main while others still communicate is
    an error, too. BLAS gets the cores of this host divided by its ranks, unless the environment says otherwise.
    """
    world = MPI.COMM_WORLD
    failures = world.Dup()
    try:
        with threadpool_limits(_blas_threads(world), user_api="blas"):
            group = Ranks(world)
            try:
                main(group)
            except SystemExit as leave:
                if leave.code not in (None, 0):
                    raise
            group.require_same("the end of the program")
    except BaseException as problem:
        _end(failures, problem)


def _blas_threads(world: MPI.Comm) -> int | None:
    """Return the BLAS threads for each rank, None to leave the environment's setting."""
    host = world.Split_type(MPI.COMM_TYPE_SHARED)  # on all ranks, whatever the environment of each
    ranks = host.Get_size()
    cores = set().union(*host.allgather(_cores()))
    host.Free()
    return None if any(name in os.environ for name in THREAD_SETTINGS) else max(1, len(cores) // ranks)


def _cores() -> set[int]:
    """Return the cores that this process may use; ranks may be bound to different ones."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _end(failures: MPI.Comm, problem: BaseException) -> None:
    """Say what ended this rank, once for the whole job if every rank failed, and end the job."""
    with contextlib.suppress(OSError, ValueError):  # a closed pipe must not keep this rank from ending the job
        sys.stdout.flush()
    rank, size = failures.Get_rank(), failures.Get_size()
    code, text = _explain(problem)
    everyone = failures.Ibarrier()
    deadline = time.monotonic() + WAIT
    while not (together := everyone.Test()) and time.monotonic() < deadline:
        time.sleep(0.005)
    if not together:
        _print_for(f"rank {rank} of {size}", text or f"sys.exit({code})")
        time.sleep(0.1)  # for mpirun to pass the message on before it ends this process
        failures.Abort(code)
    texts = failures.allgather(text)
    if rank == 0 and _launched_rank() == 0:
        for text in filter(None, dict.fromkeys(texts)):
            who = [str(r) for r, t in enumerate(texts) if t == text]
            _print_for(f"all {size} ranks" if len(who) == size > 1 else f"rank {', '.join(who)} of {size}", text)
    sys.exit(code)


def _explain(problem: BaseException) -> tuple[int, str]:
    """Return exit status and message; sys.exit(3) has no message, whoever called it has said why."""
    if isinstance(problem, SystemExit):
        return (problem.code, "") if isinstance(problem.code, int) else (1, str(problem.code))
    if isinstance(problem, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(problem, RankError):
        return 1, f"RankError: {problem}"  # it names the place on each rank
    frames = problem.__traceback__ and problem.__traceback__.tb_next  # without the frame of run
    return 1, "".join(traceback.format_exception(type(problem), problem, frames)).rstrip()


def _launched_rank() -> int:
    """Return the rank that mpirun gave this process, which is not MPI's if the two do not belong together."""
    return int(os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or 0)


def _print_for(who: str, text: str) -> None:
    sys.stderr.write(f"[{who}] {text}\n")
    sys.stderr.flush()
