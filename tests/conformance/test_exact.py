import gmpy2
import numpy as np
import pytest
import torch

from npnorm.conformance import exact as exact_module
from npnorm.conformance.cases import SMALL, Case, cases
from npnorm.conformance.exact import exact, exact_norm
from npnorm.conformance.problems import pose
from npnorm.conformance.textbook import NORMS
from npnorm.conformance.ulps import DTYPES, unit
from npnorm.studies.accuracy_peers import PEERS
from tests.check import close

OF_NORMS = pytest.mark.parametrize("norm", NORMS)


def small(dtype, name):
    """Return the case of a dtype whose name begins so."""
    return next(case for case in cases(dtype, SMALL) if case.name.startswith(name))


@OF_NORMS
@pytest.mark.parametrize("name", ["normal", "near the largest", "of every size", "constant + 1 ulp, eps = 0", "n = 3"])
def test_four_hundred_bits_are_enough(norm, name, monkeypatch):
    problem = pose(norm, small("float64", name))
    right = exact(problem)
    monkeypatch.setattr(exact_module, "BITS", 3000)
    for few, many in zip(right.values(), exact(problem).values(), strict=True):
        zero = abs(many.units) < 1e-60  # an exact zero that cancels leaves a rest of that size
        np.testing.assert_array_equal(np.where(zero, 0, few.nearest), np.where(zero, 0, many.nearest))
        np.testing.assert_array_equal(few.ulp, many.ulp)
        assert np.all(abs((few.units - many.units) + (few.rest - many.rest)) < 1e-15)


@OF_NORMS
def test_torch_gives_the_exact_results_of_plain_rows_in_the_layout_of_the_norm(norm):
    problem = pose(norm, small("float64", "normal"))
    came = PEERS["torch"].load()(problem)
    for name, right in exact(problem).items():
        close(came.pop(name), right.nearest)
        np.testing.assert_array_equal(right.nearest.shape, right.scale.shape)
    assert not came


def test_by_hand():
    """x = (1, 7): mean 4, c = (-3, 3), var 9, with eps = 16 rstd = 1/5, z = (-3/5, 3/5)."""
    y, dx, dw, db = exact_norm([[1, 7]], [1, 2], [0, 1], 16, [[5, 0]], centred=True)
    np.testing.assert_array_equal(y, [[-0.6, 2.2]])
    # dz = (5, 0), mean(dz) = 5/2, mean(dz z) = -3/2: dz - mean(dz) - z mean(dz z) = (5/2 - 9/10, -5/2 + 9/10)
    np.testing.assert_array_equal(dx, [[1.6 / 5, -1.6 / 5]])
    np.testing.assert_array_equal((dw, db), ([-3, 0], [5, 0]))


def test_by_hand_without_a_mean():
    y, dx, dw, _ = exact_norm([[1, 7]], 1, 0, 0, [[5, 0]], centred=False)
    np.testing.assert_array_equal(y, [[0.2, 1.4]])
    np.testing.assert_allclose(dx, [[(5 - 0.2 * 0.5) / 5, -1.4 * 0.5 / 5]], rtol=1e-15)
    np.testing.assert_array_equal(dw, [1, 0])


def test_both_doors_lead_to_the_same_numbers():
    problem = pose("LayerNorm", small("float64", "mean 1e7"))
    expected = exact_norm(problem.x, problem.weight, problem.bias, problem.eps, problem.dy, centred=True)
    for right, other in zip(exact(problem).values(), expected, strict=True):
        np.testing.assert_array_equal(right.nearest, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_nearest_number_is_the_one_that_the_cast_gives(dtype):
    info = exact_module.ml_dtypes.finfo(dtype)
    exponents = np.random.default_rng(0).uniform(info.minexp - info.nmant - 3, info.maxexp - 1, 1000)
    a = (np.exp2(exponents / 2) * np.exp2(exponents / 2)).astype("float32" if dtype == "bfloat16" else "float64")
    with gmpy2.context(precision=400), np.errstate(over="ignore"):
        nearest = exact_module._nearest(exact_module._numbers(a), np.dtype(dtype))
    np.testing.assert_array_equal(nearest, a.astype(dtype))


def test_parts_of_float64_sum_to_more_than_float64():
    right = exact(pose("LayerNorm", small("float64", "normal")))["y"]
    assert np.any(right.rest != 0)
    assert np.all(abs(right.rest) <= 2.0**-1)
    assert np.all(right.ulp == unit(np.ldexp(right.scale, right.ulp), "float64"))


def test_a_result_beyond_the_range_is_refused():
    case = Case("too far", 0, np.full((2, 3), 1e-30, "f4"), np.array([[1e30, -1e30, 1e30]] * 2, "f4"), 0.0, False)
    with pytest.raises(ValueError, match="smaller dy"):
        exact(pose("RMSNorm", case))


def test_torch_and_numpy_round_as_mpfr():
    a = np.random.default_rng(0).standard_normal(2000)
    with gmpy2.context(precision=400):
        nearest = exact_module._nearest(exact_module._numbers(a.astype("f4")), np.dtype("bfloat16"))
    theirs = torch.tensor(a.astype("f4")).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(nearest.astype("f4"), theirs)
