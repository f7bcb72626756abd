"""The programs of mpi_examples, as a user starts them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mpi.pool import launcher

EXAMPLES = Path(__file__).parents[2] / "mpi_examples"
NORMS = ["layer_norm_tensor_parallel.py", "rms_norm_tensor_parallel.py"]
TRANSFORMERS = ["post_layernorm_transformer.py", "pre_rmsnorm_transformer.py"]
README = EXAMPLES.parent / "README.md"
SMALL = ["--text", str(README), *"--steps 3 --width 32 --depth 1 --context 32 --rows 4 --sample 20".split()]
LIMIT = 60  # seconds


def start(name, *arguments, ranks, code=None):
    """Run an example, or `code` in its place, and return its status and what it printed."""
    program = ["-c", code] if code else [str(EXAMPLES / name), *arguments]
    done = subprocess.run(
        [*launcher(), "-n", str(ranks), sys.executable, *program],
        env={**os.environ, "PYTHONPATH": f"{EXAMPLES}{os.pathsep}{EXAMPLES.parent}"},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(("name", "sums"), [(NORMS[0], 2), (NORMS[1], 1)])
def test_a_norm_shows_its_messages_and_equals_serial(name, sums, ranks):
    status, printed, complaints = start(name, ranks=ranks)
    assert (status, complaints) == (0, "")
    title, _, forward, backward = printed.splitlines()
    assert f"on {ranks} rank" in title
    assert f" {sums} sum " in forward
    assert " 1 sum " in backward


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_equals_serial_and_trains(name, ranks):
    status, printed, complaints = start(name, *SMALL, ranks=ranks)
    assert status == 0, complaints
    assert "  forward   5 sum " in printed
    assert "  backward  5 sum " in printed
    assert printed.count("held-out loss") == printed.count("sample, after") == 1
    assert "loss=" in complaints
    assert "tokens/s" in complaints


@pytest.mark.parametrize("name", NORMS)
def test_a_difference_from_serial_is_an_error(name):
    code = f"""
import sys
from npnorm.engine import Row
mean = Row.mean
def faulty(self, *arrays):
    means = mean(self, *arrays)
    wrong = 1 + 1e-9 * (self.layout.group.size > 1)
    return means * wrong if len(arrays) == 1 else tuple(m * wrong for m in means)
Row.mean = faulty
from npnorm.mpi import run
run(__import__("{name.removesuffix(".py")}").main)
"""
    status, _, complaints = start(name, ranks=2, code=code)
    assert status != 0
    assert "[all 2 ranks] differs from serial by more than 1e-12: y by" in complaints


@pytest.mark.parametrize(
    ("layer", "part"),
    [("layers.mlp.SwiGLU", "gate_proj"), ("layers.embedding.Embedding", None)],
    ids=["SwiGLU", "Embedding"],
)
def test_a_wrong_gradient_of_any_array_is_an_error(layer, part):
    module, _, name = layer.rpartition(".")
    code = f"""
import sys
from npnorm.{module} import {name} as Layer
backward = Layer.backward
def faulty(self, dy, saved):
    dx, grads = backward(self, dy, saved)
    wrong = grads[{part!r}] if {part!r} else grads
    if self.group.size > 1:
        wrong["weight"] = wrong["weight"] * (1 + 1e-9)
    return dx, grads
Layer.backward = faulty
from npnorm.mpi import run
from npnorm.config import Config
from transformer_check import check_transformer
run(lambda group: check_transformer(group, Config.modern))
"""
    status, _, complaints = start("", ranks=2, code=code)
    assert status != 0
    assert "[all 2 ranks] differs from serial by more than 1e-12: gradients by" in complaints


def test_help_is_printed_once():
    status, printed, complaints = start(TRANSFORMERS[0], "--help", ranks=4)
    assert (status, complaints) == (0, "")
    assert printed.count("usage:") == 1
    for setting in ("--steps", "--seed", "--text"):
        assert setting in printed


def test_a_wrong_setting_is_told_once():
    status, _, complaints = start(TRANSFORMERS[1], "--steps", "none", ranks=4)
    assert status == 2
    assert complaints.count("usage:") == 1


def test_heads_that_the_ranks_do_not_divide_are_one_error():
    status, _, complaints = start(TRANSFORMERS[1], *SMALL, "--heads", "2", ranks=4)
    assert status == 1
    assert complaints.count("4 ranks cannot share 2 heads equally") == 1
