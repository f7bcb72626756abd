import numpy as np
import pytest

from npnorm.conformance.ulps import DTYPES, ulps, unit

EACH = pytest.mark.parametrize("dtype", DTYPES)


@EACH
def test_a_number_and_the_next_one_are_an_ulp_apart(dtype):
    rng = np.random.default_rng(0)
    x = rng.uniform(1, 2, 50).astype(dtype)
    up = np.nextafter(x, np.dtype(dtype).type(np.inf))
    np.testing.assert_array_equal(ulps(up[:, None], x[:, None].astype("float64")), 1.0)
    np.testing.assert_array_equal(2.0 ** unit(x.astype("float64"), dtype), (up.astype("float64") - x.astype("float64")))


@EACH
def test_the_unit_is_that_of_the_largest_of_the_row(dtype):
    exact = np.array([[1024.0, 1.0], [1.0, 1.0]])
    came = exact.astype(dtype)
    came[:, 1] = np.nextafter(came[:, 1], came.dtype.type(np.inf))
    large, small = ulps(came, exact)
    assert (large, small) == (2.0**-10, 1.0)
    assert ulps(came, exact, axis=None) == 2.0**-10


@EACH
def test_rounding_once_costs_half_an_ulp(dtype):
    exact = np.random.default_rng(1).standard_normal((20, 500))
    error = ulps(exact.astype(dtype), exact)
    assert np.all(error <= 0.5)
    assert dtype == "float64" or error.max() > 0.45


@EACH
def test_the_unit_of_subnormal_numbers_and_of_zero_is_the_smallest_number(dtype):
    smallest = np.nextafter(np.zeros((1, 1), dtype), np.ones((1, 1), dtype))
    assert ulps(smallest, np.zeros((1, 1))) == 1.0
    assert ulps(3 * smallest, 2 * smallest.astype("float64")) == 1.0


def test_the_whole_range_of_float64_is_measured():
    exact = np.array([[1.5e308, 1e-300]])
    assert ulps(-exact, exact) > 2.0**53
    assert ulps(exact, exact) == 0


def test_what_is_no_number_is_seen_and_another_shape_is_refused():
    np.testing.assert_array_equal(ulps(np.array([[np.nan, 1], [np.inf, 1]], "f4"), np.ones((2, 2))), [np.nan, np.inf])
    with pytest.raises(ValueError, match=r"came has shape \(2,\), exact \(1, 2\)"):
        ulps(np.ones(2, "f4"), np.ones((1, 2)))
