"""The rank side of the pool: run each test that arrives and report how it went, until the connection closes.

Jobs and reports travel through a local socket, not through MPI: an idle rank sleeps in `recv`, a dead rank shows as
a closed connection, and the message counter sees nothing but the test's own calls.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import os
import pickle
import signal
import sys
import traceback
import warnings
from multiprocessing.connection import Client
from pathlib import Path

import _pytest
import pytest
from _pytest.config import _prepareconfig
from mpi4py import MPI

ORPHAN_LIMIT = 10.0  # seconds beyond its time limit after which a test has no parent any more
HARNESS = (__file__, "<frozen ", importlib.__file__, os.path.dirname(_pytest.__file__))


def shared_memory() -> list[str]:
    """Return the files that the MPI library shares between its ranks, because a killed job leaves them behind."""
    maps = Path("/proc/self/maps")
    paths = {line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
    return [path for path in paths if path.startswith(("/dev/shm/mpich_shm_", "/dev/shm/sm_segment."))]


def run(module: str, names: list[str], arguments: bytes) -> None:
    """Import the test's module and call the function that the names lead to; without names, import only."""
    target = importlib.import_module(module)
    for name in names:
        target = getattr(target, name)
        target = target() if isinstance(target, type) else target
    if names:
        comm = MPI.COMM_WORLD.Dup()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            target(comm=comm, **pickle.loads(arguments))
        comm.Free()


def report(module: str, names: list[str], arguments: bytes) -> tuple[str, str]:
    """Run a test and return its outcome, with the traceback or the reason of a skip."""
    try:
        run(module, names, arguments)
    except pytest.skip.Exception as skipped:
        return "skipped", str(skipped)
    except BaseException as error:  # sys.exit too: a rank that leaves would make the others wait for ever
        told = traceback.TracebackException.from_exception(error)
        told.stack = traceback.StackSummary.from_list([f for f in told.stack if not f.filename.startswith(HARNESS)])
        return f"raised {type(error).__name__}", "".join(told.format())
    return "passed", ""


def main() -> None:
    """Connect to the pool and serve it."""
    folder = Path(sys.argv[1])
    rank = MPI.COMM_WORLD.rank
    stacks = open(folder / f"stack.{rank}", "w")  # stays open: faulthandler writes to its descriptor
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)  # how the pool asks where a rank hangs
    _prepareconfig(["--noconftest"])  # assert statements show their values, as in the pytest process
    with Client(str(folder / "socket")) as connection, contextlib.suppress(EOFError, ConnectionError):
        connection.send((rank, MPI.COMM_WORLD.size, os.getpid(), shared_memory()))
        while True:
            *job, limit = connection.recv()
            with open(folder / f"output.{rank}", "w", buffering=1) as output:
                faulthandler.dump_traceback_later(limit + ORPHAN_LIMIT, exit=True, file=stacks)
                with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                    result = report(*job)
                faulthandler.cancel_dump_traceback_later()
            connection.send(result)


if __name__ == "__main__":
    main()
