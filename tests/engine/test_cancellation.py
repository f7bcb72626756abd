from fractions import Fraction

import numpy as np
import pytest

from npnorm import GroupNorm, LayerNorm, RMSNorm
from npnorm.engine.cancellation import accurate_sum, two_product, two_sum
from tests.check import exact_norm


def exactly(*summands):
    return [sum(Fraction(float(a)) for a in together) for together in zip(*summands, strict=True)]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_sum_and_what_rounding_took_are_the_exact_sum(dtype):
    rng = np.random.default_rng(1)
    a, b = (rng.standard_normal((2, 500)) * 10.0 ** rng.integers(-9, 9, (2, 500))).astype(dtype)
    s, rest = two_sum(a, b)
    assert s.dtype == rest.dtype == dtype
    np.testing.assert_array_equal(s, a + b)
    assert exactly(s, rest) == exactly(a, b)
    assert np.count_nonzero(rest) > 300


def test_a_product_and_what_rounding_took_are_the_exact_product():
    a, b = np.random.default_rng(2).standard_normal((2, 500))
    p, rest = two_product(a, b)
    np.testing.assert_array_equal(p, a * b)
    assert exactly(p, rest) == [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)]
    assert np.count_nonzero(rest) > 300


def test_complex_numbers_keep_the_derivative():
    a, b = np.random.default_rng(3).standard_normal((2, 50))
    for f, derivative in ((two_sum, 1 + 0 * b), (two_product, b)):
        result, rest = f(a + 1e-30j, b)
        np.testing.assert_allclose((result + rest).imag / 1e-30, derivative, rtol=1e-15)


def test_a_sum_of_many_is_right_to_twice_the_digits():
    rng = np.random.default_rng(4)
    parts = [rng.standard_normal(200) * 10.0**k for k in (16, 0, -9, 3)]
    parts.append(-parts[0])  # 16 digits cancel
    s, rest = accurate_sum(*parts)
    right = exactly(*parts)
    for found, a in zip(exactly(s, rest), right, strict=True):
        assert abs(found - a) <= Fraction(2) ** -100 * 10**16


def units(found, expected):
    """Return by how many units in the last place of its largest number each row is off."""
    return abs(found - expected).max(-1) / np.spacing(abs(expected).max(-1).astype(found.dtype))


@pytest.mark.parametrize("outlier", [1e4, 1e9, 1e14, 1e19])
@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_what_is_far_below_the_rounding_of_dz_is_found(norm, outlier):
    x = np.random.default_rng(5).standard_normal((4, 9)).astype("float32")
    x[:, 2] = outlier
    layer = norm(eps=1e-12)
    y, saved = layer.forward(x)
    if norm is RMSNorm:
        y = np.where(abs(y) < 1, 0, y)
    dx, _ = layer.backward(y, saved)
    expected = exact_norm(x, np.ones(9), np.zeros(9), 1e-12, y, norm is LayerNorm)[1]
    assert units(dx, expected).max() <= 0.51


@pytest.mark.parametrize("groups", [1, 2])
def test_a_product_that_rounding_makes_constant_is_not_constant(groups):
    rng = np.random.default_rng(6)
    x, w = rng.standard_normal((3, 4, 6)), rng.uniform(0.5, 1.5, 99)
    w = w[w * (1 / w) == 1][:4]
    dy = np.broadcast_to((1 / w)[:, None], x.shape)
    layer = GroupNorm(groups, w)
    dx, _ = layer.backward(dy, layer.forward(x)[1])
    rows, wide = (3 * groups, -1), np.broadcast_to(w[:, None], x.shape)
    expected = exact_norm(x.reshape(rows), wide.reshape(rows), 0, 1e-5, dy.reshape(rows), True)[1]
    assert units(dx.reshape(rows), expected).max() <= 8


@pytest.mark.parametrize("far", [1.0, 1e4, 1e15])
def test_what_is_left_of_rows_far_from_zero_has_its_digits(far):
    x = far + np.random.default_rng(7).integers(-9, 9, (5, 40)) * np.spacing(far)
    layer = LayerNorm(eps=1e-12)
    y, saved = layer.forward(x)
    dx, _ = layer.backward(y, saved)
    assert units(dx, exact_norm(x, np.ones(40), np.zeros(40), 1e-12, y, True)[1]).max() <= 8


@pytest.mark.parametrize("spread", [1e-2, 1e-6, 1e-10, 1e-13])
def test_what_is_left_of_rows_along_dz_has_its_digits(spread):
    x = 0.7 * (1 + spread * np.random.default_rng(8).standard_normal((5, 60)))
    dy = x + np.spacing(0.7)  # along x, but for some 1e-16 spread of it
    layer = RMSNorm(eps=0)
    dx, _ = layer.backward(dy, layer.forward(x)[1])
    expected = exact_norm(x, np.ones(60), np.zeros(60), 0, dy, False)[1]
    assert (abs(expected).max(-1) < 1e-15 * spread).all()
    assert units(dx, expected).max() <= 8
