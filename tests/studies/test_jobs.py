"""Jobs of several ranks."""

import subprocess

import numpy as np
import pytest

from npnorm.studies.jobs import on_ranks


def work(group, numbers):
    """Return how many ranks there are, and what they sum; both as JSON has it."""
    return {"size": group.size, "sum": group.sum((1.0 + group.rank) * np.array(numbers)).tolist()}


def test_the_first_rank_tells_what_the_function_returns():
    assert on_ranks(2, work, [1.0, 2.0]) == {"size": 2, "sum": [3.0, 6.0]}


def test_without_mpirun_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r'no mpirun. The extra .*"npnorm\[mpi\]"'):
        on_ranks(2, work, [1.0])


def test_without_mpi4py_the_extra_is_named(monkeypatch, tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('not installed')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(ValueError, match=r'could not load npnorm.mpi. The extra .*"npnorm\[mpi\]"'):
        on_ranks(2, work, [1.0])


def test_a_job_that_fails_tells_why(monkeypatch):
    failed = subprocess.CompletedProcess((), 3, stdout="", stderr="the reason")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="mpirun -n 2 ended with status 3:\nthe reason"):
        on_ranks(2, work, [1.0])
