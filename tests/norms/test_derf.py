import math

import numpy as np
import pytest
import scipy.special

from npnorm import Derf
from tests.check import BFLOAT16, close, rounded, same_bits


def test_a_row_worked_by_hand():
    # u = x / 2 - 1 = (0, 10), z = (0, 1): erf(10) is 1 in float64; the slope in the middle is c = 2 / sqrt(pi)
    c = 2 / math.sqrt(math.pi)
    layer = Derf(np.array(0.5), np.array(-1.0), np.array([3.0, 2.0]), np.array([1.0, 1.0]))
    y, saved = layer.forward(np.array([[2.0, 22.0]]))
    np.testing.assert_array_equal(y, [[1, 3]])
    # dz = (3, 4), du = (3 c, 4e-44), dx = du / 2, dalpha = sum(x du), dshift = sum(du)
    dx, grads = layer.backward(np.array([[1.0, 2.0]]), saved)
    close(dx, [[1.5 * c, 0]], 1e-15)
    close(grads["alpha"], 6 * c, 1e-15)
    close(grads["shift"], 3 * c, 1e-15)
    np.testing.assert_array_equal(grads["weight"], [0, 2])
    np.testing.assert_array_equal(grads["bias"], [1, 2])


def test_it_is_the_error_function_of_scipy():
    x = np.linspace(-6, 6, 201).reshape(3, 67)
    y, _ = Derf(np.array(1.3), np.array(-0.4)).forward(x)
    same_bits(y, scipy.special.erf(1.3 * x - 0.4))


def test_the_slope_is_right_far_out():
    x = np.array([[0.5, 3.0, 6.0, 20.0, -26.0]])
    layer = Derf(np.array(1.0), np.array(0.0))
    dx, _ = layer.backward(np.ones((1, 5)), layer.forward(x)[1])
    expected = [[2 / math.sqrt(math.pi) * math.exp(-u * u) for u in x[0]]]
    np.testing.assert_allclose(dx, expected, rtol=1e-15)


@pytest.mark.parametrize("alpha", [1e3, 1e308, -1e308])
@pytest.mark.parametrize("size", [1e3, 1e308])
def test_far_from_zero_it_saturates(alpha, size):
    x, w = np.array([[size, -size]]), np.array([2.0, 3.0])
    layer = Derf(np.array(alpha), np.array(0.5), w)
    y, saved = layer.forward(x)
    np.testing.assert_array_equal(y, np.sign(alpha) * np.array([[2, -3]]))
    dx, grads = layer.backward(np.array([[1.0, 2.0]]), saved)
    np.testing.assert_array_equal(dx, np.zeros((1, 2)))
    assert grads["alpha"] == grads["shift"] == 0


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)
def test_narrow_floats_are_rounded_once(dtype):
    rng = np.random.default_rng(2)
    x, dy = (rng.standard_normal((20, 9)).astype(dtype) for _ in range(2))
    w, b = rng.standard_normal((2, 9)).astype(dtype)
    alpha, shift = np.array([0.7], dtype), np.array([-0.3], dtype)
    layer = Derf(alpha, shift, w, b)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    wide_x, wide_dy, wide_w, wide_b, a, s = (v.astype("float64") for v in (x, dy, w, b, alpha, shift))
    u = a * wide_x + s
    du = wide_dy * wide_w * 2 / math.sqrt(math.pi) * np.exp(-u * u)
    z = scipy.special.erf(u)
    same_bits(y, rounded(z * wide_w + wide_b, dtype))
    same_bits(dx, rounded(a * du, dtype))
    same_bits(grads["alpha"], rounded(np.sum(wide_x * du)[None], dtype))
    same_bits(grads["shift"], rounded(np.sum(du)[None], dtype))
    same_bits(grads["weight"], rounded(np.sum(wide_dy * z, axis=0), dtype))


def test_without_a_shift_it_is_odd():
    x = np.random.default_rng(3).standard_normal((4, 5))
    layer = Derf(np.array(0.5), np.array(0.0))
    same_bits(layer.forward(-x)[0], -layer.forward(x)[0])


def test_init_starts_as_the_paper_does():
    layer = Derf.init(3)
    half, zero = np.full(1, 0.5, "float32"), np.zeros(1, "float32")
    one = {"weight": np.ones(3, "float32"), "bias": np.zeros(3, "float32")}
    same_bits(layer.params, {"alpha": half, "shift": zero, **one})
    assert layer.shards == {"alpha": None, "shift": None, "weight": None, "bias": None}
