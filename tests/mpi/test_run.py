"""Whole jobs under mpirun: none hangs, each ends with one message and a status."""

import functools
import os
import subprocess
import sys
import time

import pytest

from tests.mpi.pool import launcher

LIMIT = 30  # seconds; a job that waits for ever is a failure, and does not stop the run


@functools.cache
def job(what, ranks=3, prefix=None, **environment):
    """Start the program, once for each setting; return its status, what it printed, and the seconds that it took."""
    command = [*launcher(), "-n", str(ranks)] if prefix is None else prefix
    start = time.monotonic()
    done = subprocess.run(
        [*command, sys.executable, "-m", "tests.mpi.jobs", what],
        env={**os.environ, "PYTHONPATH": ".", **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - start


def test_a_job_that_succeeds_ends_with_status_0_and_prints_nothing_else():
    status, printed, _ = job("succeed")
    assert (status, printed) == (0, "sum 3\n")


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("raise on one", "[rank 2 of 3] Traceback"),
        ("raise on all", "[all 3 ranks] Traceback"),
        ("exit on one", "[rank 2 of 3] sys.exit(3)"),
        ("exit with a message on one", "[rank 2 of 3] the file is missing"),
        ("exit as if well on one", "rank 2: the end of the program, at jobs.py"),
        ("return early on one", "rank 2: the end of the program, at jobs.py"),
        ("raise while another has returned", "[rank 2 of 3] Traceback"),
        ("other collectives", "rank 2: max of (1,) float64"),
        ("shards that disagree", "rank 2: LayerNorm with eps=1e-05, statistics=two-pass, weight (5,) float64"),
        ("a width that the ranks do not divide", "3 ranks cannot share an array of shape (7,)"),
    ],
)
def test_a_job_that_fails_ends_at_once_with_one_message(what, expected):
    status, printed, seconds = job(what)
    assert status != 0
    assert printed.count(expected) == 1
    assert printed.count("Error: ") <= 1
    assert seconds < 15


def test_the_status_is_that_of_sys_exit():
    status, printed, _ = job("exit on all")
    assert status == 4
    assert "rank 0" not in printed
    assert "ranks]" not in printed
    assert printed == "" or "--oversubscribe" in launcher()  # Open MPI's mpirun has its own say
    assert job("exit on one")[0] != 0


def test_a_message_names_the_line_of_the_program():
    _, printed, _ = job("raise on one")
    assert 'raise KeyError("only here")' in printed
    assert "npnorm/mpi.py" not in printed


def test_one_rank_needs_no_mpirun():
    status, printed, _ = job("succeed", prefix=())
    assert (status, printed) == (0, "sum 1\n")


def test_an_mpirun_of_another_mpi_is_an_error_not_n_serial_runs():
    # What a process sees that another MPI's mpirun started: the launcher's variable, and a world of its own.
    status, printed, _ = job("succeed", prefix=(), OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="0")
    assert status == 1
    assert "mpirun started 4 processes" in printed
    assert "Use the mpirun beside this Python" in printed
    status, printed, _ = job("succeed", prefix=(), OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="1")
    assert status == 1
    assert "mpirun started" not in printed  # one of them says it


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_cores(ranks):
    unset = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"))
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    command = [*launcher(), "-n", str(ranks), sys.executable, "-m", "tests.mpi.jobs", "blas threads"]
    done = subprocess.run(command, env=kept | {"PYTHONPATH": "."}, capture_output=True, text=True, timeout=LIMIT)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert done.stdout == f"threads {{{max(1, cores // ranks)}}}\n"


def test_a_setting_of_the_environment_is_kept():
    _, printed, _ = job("blas threads", ranks=2, OPENBLAS_NUM_THREADS="2")
    assert printed.endswith("threads {2}\n")


def test_a_setting_on_one_rank_only_does_not_hang():
    program = [sys.executable, "-m", "tests.mpi.jobs", "succeed"]
    one = [*launcher(), "-n", "1", "env", "OMP_NUM_THREADS=1", *program]
    done = subprocess.run(
        [*one, ":", "-n", "1", *program],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout) == (0, "sum 2\n")
