from fractions import Fraction

import numpy as np
import pytest

from npnorm.norms.pairs import two_product, two_sum


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


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_product_and_what_rounding_took_are_the_exact_product(dtype):
    a, b = np.random.default_rng(2).standard_normal((2, 500)).astype(dtype)
    p, rest = two_product(a, b)
    assert p.dtype == rest.dtype == dtype
    np.testing.assert_array_equal(p, a * b)
    assert exactly(p, rest) == [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(a, b, strict=True)]
    assert np.count_nonzero(rest) > 300


def test_complex_numbers_keep_the_derivative():
    a, b = np.random.default_rng(3).standard_normal((2, 50))
    for f, derivative in ((two_sum, 1 + 0 * b), (two_product, b)):
        result, rest = f(a + 1e-30j, b)
        np.testing.assert_allclose((result + rest).imag / 1e-30, derivative, rtol=1e-15)
