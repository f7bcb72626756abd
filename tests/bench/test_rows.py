import numpy as np
import pytest

from npnorm.bench.grid import GRIDS, Case
from npnorm.bench.rows import INPUTS, KINDS, _memory, contender, nbytes, rows
from npnorm.bench.timing import Contender


@pytest.mark.parametrize("norm", KINDS)
@pytest.mark.parametrize("given", INPUTS)
def test_every_norm_takes_every_input(norm, given):
    forward, backward = contender(Case(norm, KINDS[norm].small), given, "float64")
    dx = backward(forward())[0]
    first = dx[0] if isinstance(dx, tuple) else dx
    assert first.shape == KINDS[norm].small
    assert np.isfinite(first).all()


def test_a_gradient_of_ones_vanishes_in_a_norm_that_centres():
    forward, backward = contender(Case("LayerNorm", (8, 64)), "dy of ones", "float64")
    assert abs(backward(forward())[0]).max() < 1e-7
    forward, backward = contender(Case("LayerNorm", (8, 64)), "ordinary", "float64")
    assert abs(backward(forward())[0]).max() > 0.1


@pytest.mark.parametrize("norm", ["RMSNorm", "PartialRMSNorm", "ScaleNorm", "L2Norm", "AddRMSNorm", "QKNorm"])
def test_a_gradient_of_y_all_but_vanishes_in_a_norm_that_does_not(norm):
    forward, backward = contender(Case(norm, KINDS[norm].small), "dy = y", "float64")
    state = forward()
    dx = backward(state)[0]
    other = contender(Case(norm, KINDS[norm].small), "ordinary", "float64")
    if norm == "AddRMSNorm":
        return  # dh is added to it
    first, ordinary = (a[0] if isinstance(a, tuple) else a for a in (dx, other.backward(other.forward())[0]))
    assert abs(first).max() < 1e-3 * abs(ordinary).max()


@pytest.mark.parametrize("norm", ["LayerNorm", "BatchNorm", "GroupNorm", "InstanceNorm"])
@pytest.mark.parametrize("given", ["constant", "mean 5", "ordinary"])
def test_rows_have_the_spread_that_they_should(norm, given):
    forward, _ = contender(Case(norm, KINDS[norm].small), given, "float64")
    _, saved = forward()
    expected = 1e-5**-0.5 if given == "constant" else 1.0
    np.testing.assert_allclose(saved.rstd, expected, rtol=1e-9 if given == "constant" else 0.5)


def test_a_line_for_each_input_and_operation_with_time_and_memory():
    lines = list(rows(Case("RMSNorm", (256, 1024)), "f64", GRIDS["tiny"].rows_effort))
    assert [(line["input"], line["op"]) for line in lines] == [
        (i, op) for i in INPUTS for op in ("forward", "backward")
    ]
    assert all(line["peer"] == "f64" and line["median"] > 0 for line in lines)
    assert all(0 <= line["extra"] < 64 * 2**20 for line in lines)


def test_extra_memory_is_what_is_beyond_the_result():
    mib = 2**20

    def forward():
        scratch = np.zeros(3 * mib, np.uint8)
        return np.zeros(mib, np.uint8), scratch[:1].copy()

    def backward(state):
        return np.zeros(mib, np.uint8) + np.zeros(mib, np.uint8), {}

    extra = _memory(Contender(forward, backward))
    assert extra["forward"] == pytest.approx(3 * mib, rel=0.01)
    assert extra["backward"] == pytest.approx(mib, rel=0.01) or extra["backward"] == pytest.approx(2 * mib, rel=0.01)


def test_the_bytes_of_a_result_are_those_of_all_its_arrays():
    assert nbytes(((np.zeros(3), np.zeros(4)), {"weight": np.zeros(5)})) == 8 * 12
