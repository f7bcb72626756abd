"""The pytest side of the MPI tests: a pool of workers, one for each rank, started by one `mpirun`.

This process never initializes MPI (tests/conftest.py): some MPI libraries refuse to start an `mpirun` below it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.mpi import pmpi

LAUNCH_LIMIT = 60.0  # seconds for all ranks to start, and for the first import of a test module
FAILURE_LIMIT = 2.0  # seconds for the other ranks to finish once one has failed
END_LIMIT = 5.0  # seconds for mpirun to end
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}  # ranks share the cores
YIELD = {"MPIR_CVAR_POLLS_BEFORE_YIELD": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}  # a rank that waits leaves its core
INSTALL = 'MPI tests need mpi4py and mpirun in this environment; install both with: pip install -e ".[test]"'


class Settings(NamedTuple):
    """What `@pytest.mark.mpi(...)` takes."""

    ranks: int | tuple[int, ...] = (1, 2, 3, 4)
    timeout: float = 20.0
    counted: bool = False

    def counts(self) -> tuple[int, ...]:
        """Return the numbers of ranks to run on."""
        return (self.ranks,) if isinstance(self.ranks, int) else tuple(self.ranks)


class Rank(NamedTuple):
    """One worker as the pool sees it."""

    connection: Connection
    number: int
    world: int  # the size of the world it sees
    pid: int
    shared_memory: list[str]


class Report(NamedTuple):
    """How a test went on one rank."""

    outcome: str  # "passed", "skipped", or what befell the rank: "raised ValueError", "died" ...
    text: str  # the traceback, the stack, or the reason of a skip


def settings(node: Any) -> Settings | None:
    """Return the settings of a test's marker, or None for a test without MPI."""
    marker = node.get_closest_marker("mpi")
    return Settings(*marker.args, **marker.kwargs) if marker else None


def rank_count(item: Any) -> int:
    """Return the number of ranks that a test runs on, 0 without MPI."""
    return item.callspec.params["comm"] if item.get_closest_marker("mpi") else 0


@functools.cache
def launcher() -> list[str]:
    """Return the command that starts ranks: this environment's own mpirun if it has one, and the flags it needs."""
    # An environment used without activation is not on PATH, where another MPI's mpirun may be.
    mpirun = shutil.which("mpirun", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")]))
    if mpirun is None or importlib.util.find_spec("mpi4py") is None:
        pytest.fail(INSTALL, pytrace=False)
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True).stdout
    if "Open MPI" not in version and "OpenRTE" not in version:
        return [mpirun]
    # Open MPI must be allowed more ranks than cores, and to run as root; other launchers know no such flags.
    return [mpirun, "--oversubscribe", "--bind-to", "none", *["--allow-run-as-root"] * (os.geteuid() == 0)]


def environment() -> dict[str, str]:
    """Return the environment of the ranks: this process's import path, sharing, and the counter if it builds."""
    variables = {**os.environ, **ONE_THREAD, **YIELD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if pmpi.compiler():
        with contextlib.suppress(RuntimeError):  # a test that counts will tell
            variables["LD_PRELOAD"] = f"{pmpi.build()} {os.environ.get('LD_PRELOAD', '')}".strip()
    return variables


def readable(text: str) -> str:
    """Return a traceback or stack without the frames below the test's, and alike on ranks that went the same way."""
    lines = (line for line in text.splitlines() if not re.search(r"mpi/worker\.py|<frozen |^Extension modules", line))
    return re.sub("0x[0-9a-f]+", "0x...", "\n".join(lines))


def shared_files() -> set[Path]:
    """Return the files of ours through which MPI ranks of one host share memory."""
    shared = Path("/dev/shm")
    files = {*shared.glob("mpich_shm_*"), *shared.glob("sm_segment.*")}
    return {file for file in files if file.exists() and file.stat().st_uid == os.getuid()}


def sweep(before: set[Path]) -> None:
    """Remove the shared files that have come since and that no process uses: an aborted job leaves its behind."""
    used = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # a process that has ended meanwhile, or is another user's
            used += maps.read_text()
    for file in shared_files() - before:
        if str(file) not in used:
            file.unlink(missing_ok=True)


class Pool:
    """A running `mpirun` with its workers."""

    def __init__(self, size: int, rootdir: Path):
        command = [*launcher(), "-n", str(size), sys.executable, "-m", "tests.mpi.worker"]
        self.size = size
        self.ranks: list[Rank] = []
        self.imported: set[str] = set()
        self.idle = False  # every rank waits for a test
        self.logged = 0  # how much of mpirun's output is older than the present test
        self.folder = Path(tempfile.mkdtemp(prefix="npnorm-mpi-"))
        with socket.socket(socket.AF_UNIX) as server, open(self.folder / "log", "wb") as log:
            server.bind(str(self.folder / "socket"))
            server.listen(size)
            self.mpirun = subprocess.Popen(
                [*command, str(self.folder)],
                cwd=rootdir,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # an interrupt from the keyboard is for pytest, which then ends the ranks
            )
            try:
                self.connect(server)
            except BaseException:
                self.close()
                raise

    def connect(self, server: socket.socket) -> None:
        """Wait until every rank has called."""
        server.settimeout(0.1)
        deadline = time.monotonic() + LAUNCH_LIMIT
        while len(self.ranks) < self.size:
            try:
                connection = Connection(server.accept()[0].detach())
            except TimeoutError:
                code = self.mpirun.poll()
                if code is None and time.monotonic() < deadline:
                    continue
                how = f"did not start within {LAUNCH_LIMIT:g} s" if code is None else f"ended with exit code {code}"
                pytest.fail(f"mpirun with {self.size} ranks {how}\n{INSTALL}\n{self.read('log')}", pytrace=False)
            self.ranks.append(Rank(connection, *connection.recv()))
        self.ranks.sort(key=lambda rank: rank.number)
        if (world := self.ranks[0].world) != self.size:
            mixed = f"{launcher()[0]} started {self.size} ranks, but mpi4py, with another MPI library, sees {world}"
            pytest.fail(f"{mixed}\n{INSTALL}", pytrace=False)
        self.idle = True

    def run(self, module: str, names: list[str], arguments: bytes, limit: float) -> None:
        """Run a test on all ranks; pytest.fail or pytest.skip tells if it did not pass."""
        if module not in self.imported:  # a first import may take long, and is not the test's time
            self.ask((module, [], b"", LAUNCH_LIMIT))
            self.imported.add(module)
        self.ask((module, names, arguments, limit))

    def ask(self, job: tuple[str, list[str], bytes, float]) -> None:
        """Give a job to all ranks and judge their reports."""
        self.idle = False
        self.logged = (self.folder / "log").stat().st_size
        for rank in self.ranks:
            with contextlib.suppress(OSError):  # a dead rank shows when its report is read
                rank.connection.send(job)
        reports = self.collect(job[-1])
        outcomes = {report.outcome for report in reports.values()}
        if outcomes == {"skipped"}:
            pytest.skip(reports[0].text)
        if outcomes != {"passed"}:
            text = self.failure(reports)
            if not self.idle:
                self.close()
            pytest.fail(text, pytrace=False)

    def collect(self, limit: float) -> dict[int, Report]:
        """Return what became of the ranks; once one has died, mpirun ends the others, which tell no more."""
        reports: dict[int, Report] = {}
        lost: dict[int, Report] = {}
        deadline, patience = time.monotonic() + limit, f"{limit:g} s"
        while not lost and len(reports) < self.size:
            silent = {rank.connection: number for number, rank in enumerate(self.ranks) if number not in reports}
            ready = wait(list(silent), max(0.0, deadline - time.monotonic()))
            for rank in (silent[connection] for connection in ready):
                try:
                    reports[rank] = Report(*self.ranks[rank].connection.recv())
                except (EOFError, OSError):
                    lost[rank] = Report("died", self.read(f"stack.{rank}"))
            if not ready:
                stacks = self.ask_stacks(sorted(silent.values()))
                lost = {rank: Report(f"did not finish within {patience}", text) for rank, text in stacks.items()}
            if "after" not in patience and any(report.outcome != "passed" for report in reports.values()):
                deadline = min(deadline, time.monotonic() + FAILURE_LIMIT)
                patience = f"{FAILURE_LIMIT:g} s after that"
        # Ranks that ended alike are in step. Others may have left something half done: the next test gets fresh ranks.
        self.idle = not lost and len({report.outcome for report in reports.values()}) == 1
        return dict(sorted(reports.items())) | lost

    def ask_stacks(self, ranks: list[int]) -> dict[int, str]:
        """Make ranks that hang write down where they are."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.ranks[rank].pid, signal.SIGUSR1)
        deadline = time.monotonic() + FAILURE_LIMIT
        while time.monotonic() < deadline and not all("_as_main" in self.read(f"stack.{rank}") for rank in ranks):
            time.sleep(0.05)  # the last line of a stack is Python's own _run_module_as_main
        return {rank: self.read(f"stack.{rank}") for rank in ranks}

    def failure(self, reports: dict[int, Report]) -> str:
        """Return a headline, what each rank tells, and what was printed."""
        lines = ["; ".join(self.told({rank: report.outcome for rank, report in reports.items()}))]
        told = {
            rank: f"{report.outcome} ---\n{readable(report.text)}" for rank, report in reports.items() if report.text
        }
        printed = {rank: f"printed ---\n{text}" for rank in range(self.size) if (text := self.read(f"output.{rank}"))}
        lines += [f"--- {text.rstrip()}" for text in self.told(told) + self.told(printed)]
        if any(report.outcome == "died" for report in reports.values()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                lines.append(f"--- mpirun ended with exit code {self.mpirun.wait(END_LIMIT)} ---")
        if log := self.read("log", self.logged).strip():
            lines.append(f"--- mpirun printed ---\n{log}")
        return "\n".join(lines)

    def told(self, texts: dict[int, str]) -> list[str]:
        """Return each text once, behind the ranks that have it."""
        groups: dict[str, list[int]] = {}
        for rank, text in texts.items():
            groups.setdefault(text, []).append(rank)
        return [f"{self.named(ranks)} {text}" for text, ranks in groups.items()]

    def named(self, ranks: list[int]) -> str:
        """Return ranks in words."""
        if len(ranks) == self.size > 1:
            return f"all {self.size} ranks"
        return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} of {self.size}"

    def read(self, name: str, offset: int = 0) -> str:
        """Return what a rank or mpirun wrote into a file of the pool's folder."""
        path = self.folder / name
        return path.read_bytes()[offset:].decode(errors="replace") if path.exists() else ""

    def close(self) -> None:
        """End the ranks, and remove what they left."""
        for rank in self.ranks:
            rank.connection.close()  # an idle rank ends with its connection
        if not self.idle:
            self.kill(signal.SIGTERM)
        try:
            self.mpirun.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            self.kill(signal.SIGKILL)
            self.mpirun.wait()
        for path in {path for rank in self.ranks for path in rank.shared_memory}:
            Path(path).unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def kill(self, number: signal.Signals) -> None:
        """Kill the ranks and send mpirun a signal, which alone may not reach ranks in sessions of their own."""
        if self.mpirun.poll() is None:
            for rank in self.ranks:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)
            os.killpg(self.mpirun.pid, number)


class Pools:
    """The pool of the present number of ranks: one at a time, started by the first test that needs it."""

    def __init__(self, rootdir: Path):
        self.rootdir = rootdir
        self.pool: Pool | None = None
        self.refused: set[int] = set()

    def run(self, item: pytest.Function) -> None:
        """Run a test on its ranks."""
        launcher()  # tells what is not installed
        marked = settings(item)
        if marked.counted:
            if pmpi.compiler() is None:
                pytest.skip("no C compiler")
            pmpi.build()
        arguments = {name: item.funcargs[name] for name in item._fixtureinfo.argnames if name != "comm"}
        try:
            pickled = pickle.dumps(arguments)
        except Exception as error:
            reason = f"the arguments of an MPI test travel to its ranks by pickle: {error}"
            raise pytest.fail.Exception(reason, pytrace=False) from None
        names = [node.name for node in item.listchain() if isinstance(node, pytest.Class)] + [item.originalname]
        self.of_size(rank_count(item)).run(item.module.__name__, names, pickled, marked.timeout)

    def of_size(self, size: int) -> Pool:
        """Return a pool of this size that is ready for a test."""
        if self.pool and self.pool.size == size and self.pool.idle and self.pool.mpirun.poll() is None:
            return self.pool
        self.close()
        if size in self.refused:  # each test would wait for a launch of its own
            pytest.fail(f"mpirun with {size} ranks did not start for an earlier test", pytrace=False)
        self.refused.add(size)
        self.pool = Pool(size, self.rootdir)
        self.refused.remove(size)
        return self.pool

    def close(self) -> None:
        """End the pool, if there is one."""
        if self.pool:
            self.pool.close()
        self.pool = None
