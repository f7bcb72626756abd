"""The pool's promise: what went wrong on ranks is told readably, nothing stays behind, and the next test runs."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.mpi import pool

WRONG = """
import os, signal, sys, warnings
import numpy as np
import pytest

@pytest.mark.mpi(ranks=3)
def test_one_fails(comm):
    print("rank", comm.rank, "was here")
    assert comm.rank != 1, "gives up"
    comm.Barrier()

@pytest.mark.mpi(ranks=2)
def test_all_fail(comm):
    total = comm.size + 1
    assert total == 7

@pytest.mark.mpi(ranks=2, timeout=1)
def test_hang(comm):
    comm.Recv(np.empty(1), source=1 - comm.rank)

@pytest.mark.mpi(ranks=2)
def test_killed(comm):
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.Barrier()

@pytest.mark.mpi(ranks=2)
def test_exit(comm):
    if comm.rank == 0:
        sys.exit("had enough")
    comm.Barrier()

@pytest.mark.mpi(ranks=2)
def test_warning(comm):
    warnings.warn("unwanted")

@pytest.mark.mpi(ranks=2)
def test_one_skips(comm):
    if comm.rank == 0:
        pytest.skip("not on rank 0")

@pytest.mark.mpi(ranks=2)
@pytest.mark.parametrize("function", [lambda: None])
def test_no_pickle(comm, function):
    pass

@pytest.mark.mpi(ranks=(2, 3))
def test_afterwards(comm):
    total = np.empty(())
    comm.Allreduce(np.ones(()), total)
    assert total == comm.size

@pytest.mark.mpi(ranks=2)
def test_all_skip(comm):
    pytest.importorskip("no_such_module")

@pytest.mark.mpi(ranks=2, counted=True)
def test_counted(comm):
    pass

def test_parent():
    assert "mpi4py.MPI" not in sys.modules
"""

SETTINGS = """
from tests.mpi import pmpi, pool
pmpi.compiler = lambda: None
pool.FAILURE_LIMIT = 1.0
"""


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, pytestconfig):
    """Run pytest, with this project's hooks, on tests that go wrong; return its output."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "test_wrong.py").write_text(WRONG)
    (folder / "conftest.py").write_text(SETTINGS)
    command = [sys.executable, "-m", "pytest", "-v", "-rs", "-p", "tests.conftest", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as temporary:
        environment = os.environ | {"PYTHONPATH": str(pytestconfig.rootpath), "TMPDIR": temporary, "COLUMNS": "200"}
        start = time.monotonic()
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
        assert time.monotonic() - start < 60
        assert os.listdir(temporary) == []
        commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
        assert not [command for command in commands if temporary.encode() in command]
    assert done.returncode == pytest.ExitCode.TESTS_FAILED, done.stdout + done.stderr
    return done.stdout


def told(output, test):
    """Return what the output tells about one failed test."""
    return re.search(rf"^_+ {re.escape(test)} _+\n(.*?)(?=^_+ test_|^=)", output, re.MULTILINE | re.DOTALL)[1]


def test_one_rank_fails(wrong):
    text = told(wrong, "test_one_fails[3ranks]")
    assert text.startswith("rank 1 of 3 raised AssertionError; ranks 0, 2 of 3 did not finish within 1 s after that\n")
    assert "AssertionError: gives up\nassert 1 != 1\n" in text
    assert "--- rank 2 of 3 printed ---\nrank 2 was here" in text
    stack = text.split("--- ranks 0, 2 of 3 did not finish within 1 s after that ---\n")[1].split("---")[0]
    assert re.fullmatch(r'Current .*\n  File ".*test_wrong.py", line 10 in test_one_fails\n', stack)
    assert "tests/mpi" not in text


def test_all_ranks_fail_alike(wrong):
    text = told(wrong, "test_all_fail[2ranks]")
    assert text.startswith("all 2 ranks raised AssertionError\n")
    assert text.count("AssertionError: assert 3 == 7") == 1
    assert text.count("Traceback") == 1


def test_hang(wrong):
    text = told(wrong, "test_hang[2ranks]")
    assert text.startswith("all 2 ranks did not finish within 1 s\n")
    assert text.count("in test_hang") == 1


def test_killed_rank(wrong):
    text = told(wrong, "test_killed[2ranks]")
    assert re.match("(rank 1 of 2|all 2 ranks) died\n", text)
    assert re.search(r"mpirun ended with exit code (9|137)\b", text)


def test_exit(wrong):
    text = told(wrong, "test_exit[2ranks]")
    assert text.startswith("rank 0 of 2 raised SystemExit; rank 1 of 2 did not finish within 1 s after that\n")
    assert "SystemExit: had enough" in text


def test_warnings_are_errors(wrong):
    assert told(wrong, "test_warning[2ranks]").startswith("all 2 ranks raised UserWarning\n")


def test_a_skip_is_for_all_ranks(wrong):
    assert told(wrong, "test_one_skips[2ranks]").startswith("rank 0 of 2 skipped; rank 1 of 2 passed\n")
    assert re.search(r"SKIPPED \[1\] .*could not import 'no_such_module'", wrong)


def test_arguments_must_be_picklable(wrong):
    assert re.match(
        "the arguments of an MPI test travel to its ranks by pickle: ", told(wrong, "test_no_pickle[2ranks-<lambda>]")
    )


def test_no_compiler(wrong):
    assert re.search(r"SKIPPED \[1\] .*: no C compiler", wrong)


def test_other_tests_run(wrong):
    passed = re.findall(r"::(\S+) PASSED", wrong)
    assert passed == ["test_parent", "test_afterwards[2ranks]", "test_afterwards[3ranks]"]
    assert "8 failed, 3 passed, 2 skipped" in wrong


def test_killed_job_leaves_nothing(pytestconfig):
    started = pool.Pool(2, pytestconfig.rootpath)
    files = [Path(path) for rank in started.ranks for path in rank.shared_memory]
    os.kill(started.ranks[1].pid, signal.SIGKILL)
    with pytest.raises(pytest.fail.Exception, match="died"):
        started.run("tests.mpi.test_pool", [], b"", 5)
    assert started.mpirun.poll() is not None
    assert not [path for path in [*files, started.folder] if path.exists()]


def fake_mpirun(folder, monkeypatch, script):
    """Put an mpirun of our own into the environment's folder of programs."""
    program = folder / "mpirun"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(folder))
    monkeypatch.setattr(pool, "launcher", pool.launcher.__wrapped__)
    return str(program)


@pytest.mark.parametrize(("version", "flags"), [("HYDRA build details:", False), ("mpirun (Open MPI) 5.0.11", True)])
def test_only_open_mpi_gets_flags(tmp_path, monkeypatch, version, flags):
    program = fake_mpirun(tmp_path, monkeypatch, f"echo '{version}'")
    command = pool.launcher()
    assert command[0] == program
    assert ("--oversubscribe" in command) is flags
    assert ("--allow-run-as-root" in command) is (flags and os.geteuid() == 0)


def test_missing_mpirun_fails(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    with pytest.raises(pytest.fail.Exception, match=r'pip install -e "\.\[test\]"'):
        pool.launcher.__wrapped__()


def test_launch_that_fails(tmp_path, monkeypatch):
    fake_mpirun(tmp_path, monkeypatch, "echo not enough slots >&2; exit 3")
    pools = pool.Pools(tmp_path)
    with pytest.raises(
        pytest.fail.Exception, match=r"with 2 ranks ended with exit code 3\n.*pip install.*\nnot enough"
    ):
        pools.of_size(2)
    with pytest.raises(pytest.fail.Exception, match="did not start for an earlier test"):
        pools.of_size(2)


def test_launcher_of_another_mpi(tmp_path, monkeypatch, pytestconfig):
    fake_mpirun(tmp_path, monkeypatch, 'test "$1" = -n || exit; shift 2; "$@" & "$@"; wait')
    with pytest.raises(pytest.fail.Exception, match="started 2 ranks, but mpi4py, with another MPI library, sees 1"):
        pool.Pool(2, pytestconfig.rootpath)


@pytest.fixture
def words():
    return ["from", "a", "fixture"]


class TestArguments:
    @pytest.mark.mpi(ranks=2)
    @pytest.mark.parametrize("number", [3])
    def test_arguments_arrive(self, comm, number, words, tmp_path):
        assert (comm.size, number, words) == (2, 3, ["from", "a", "fixture"])
        assert tmp_path.is_dir()

    @pytest.mark.mpi
    def test_ranks(self, comm):
        assert sorted(comm.allgather(comm.rank)) == list(range(comm.size))
        assert os.environ["OPENBLAS_NUM_THREADS"] == "1"
        with pytest.raises(ValueError, match="invalid literal"):
            int("x")
