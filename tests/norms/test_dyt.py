import numpy as np
import pytest

from npnorm import DyT
from tests.check import BFLOAT16, close, rounded, same_bits


def test_a_row_worked_by_hand():
    # tanh(ln 2) = (2 - 1/2) / (2 + 1/2) = 3/5, tanh(-ln 3) = -(3 - 1/3) / (3 + 1/3) = -4/5; u = x / 2
    ln2, ln3 = np.log(2), np.log(3)
    layer = DyT(np.array(0.5), np.array([5.0, 10.0, 1.0]), np.array([0.0, 1.0, 2.0]))
    y, saved = layer.forward(np.array([[2 * ln2, -2 * ln3, 0.0]]))
    close(y, [[3, -7, 2]], 1e-15)
    # dz = (5, -10, 2), 1 - z^2 = (16, 9, 25) / 25, du = (16/5, -18/5, 2), dx = du / 2, dalpha = sum(x du)
    dx, grads = layer.backward(np.array([[1.0, -1.0, 2.0]]), saved)
    close(dx, [[8 / 5, -9 / 5, 1]], 1e-15)
    close(grads["alpha"], 32 / 5 * ln2 + 36 / 5 * ln3, 1e-15)
    close(grads["weight"], [3 / 5, 4 / 5, 0], 1e-15)
    np.testing.assert_array_equal(grads["bias"], [1, -1, 2])


@pytest.mark.parametrize("alpha", [1e3, 1e308, -1e308])
@pytest.mark.parametrize("size", [1e3, 1e308])
def test_far_from_zero_it_saturates(alpha, size):
    x, w, b = np.array([[size, -size, size]]), np.array([2.0, 3.0, 4.0]), np.array([0.5, 0.25, 0.0])
    layer = DyT(np.array(alpha), w, b)
    y, saved = layer.forward(x)
    sign = np.sign(alpha) * np.array([[1, -1, 1]])
    np.testing.assert_array_equal(y, sign * w + b)
    dx, grads = layer.backward(np.array([[1.0, 2.0, 3.0]]), saved)
    np.testing.assert_array_equal(dx, np.zeros((1, 3)))
    assert grads["alpha"] == 0
    np.testing.assert_array_equal(grads["weight"], (sign * [[1.0, 2.0, 3.0]])[0])


def test_near_zero_it_is_a_linear_layer():
    x = 1e-9 * np.random.default_rng(2).standard_normal((4, 5))
    close(DyT(np.array(0.5)).forward(x)[0], 0.5 * x, 1e-15)


def test_the_scale_of_the_input_is_seen():
    x = np.random.default_rng(3).standard_normal((4, 5))
    close(DyT(np.array(0.5)).forward(2 * x)[0], DyT(np.array(1.0)).forward(x)[0], 1e-15)
    assert np.abs(DyT(np.array(0.5)).forward(2 * x)[0] - DyT(np.array(0.5)).forward(x)[0]).max() > 0.1


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)
def test_narrow_floats_are_rounded_once(dtype):
    rng = np.random.default_rng(4)
    x, dy = (rng.standard_normal((20, 9)).astype(dtype) for _ in range(2))
    w, b = rng.standard_normal((2, 9)).astype(dtype)
    alpha = np.array([0.7], dtype)
    layer = DyT(alpha, w, b)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    wide_x, wide_dy, wide_w, wide_b, wide_alpha = (a.astype("float64") for a in (x, dy, w, b, alpha))
    z = np.tanh(wide_alpha * wide_x)
    du = wide_dy * wide_w * (1 - z * z)
    same_bits(y, rounded(z * wide_w + wide_b, dtype))
    same_bits(dx, rounded(wide_alpha * du, dtype))
    same_bits(grads["alpha"], rounded(np.sum(wide_x * du)[None], dtype))
    same_bits(grads["weight"], rounded(np.sum(wide_dy * z, axis=0), dtype))
    same_bits(grads["bias"], rounded(np.sum(wide_dy, axis=0), dtype))


def test_over_two_axes_weight_and_bias_have_two():
    rng = np.random.default_rng(5)
    x, dy, w, b = rng.standard_normal((5, 3, 4)), rng.standard_normal((5, 3, 4)), *rng.standard_normal((2, 3, 4))
    layer, flat = DyT(np.array(0.5), w, b), DyT(np.array(0.5), w.ravel(), b.ravel())
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    flat_y, saved = flat.forward(x.reshape(5, 12))
    flat_dx, flat_grads = flat.backward(dy.reshape(5, 12), saved)
    same_bits({"y": y.reshape(5, 12), "dx": dx.reshape(5, 12)}, {"y": flat_y, "dx": flat_dx})
    same_bits({n: g.ravel() for n, g in grads.items()}, {n: g.ravel() for n, g in flat_grads.items()})


def test_init_starts_as_the_paper_does():
    layer = DyT.init(3)
    same_bits(
        layer.params,
        {"alpha": np.full(1, 0.5, "float32"), "weight": np.ones(3, "float32"), "bias": np.zeros(3, "float32")},
    )
    assert layer.shards == {"alpha": None, "weight": None, "bias": None}


def test_float32_does_not_compute_float64():
    with pytest.raises(TypeError, match=r"compute='float32' would cut float64 arrays short"):
        DyT(np.array(0.5), compute="float32").forward(np.ones((2, 3)))


@pytest.mark.parametrize("x", [0.5, 12.0, 18.0, 40.0, -40.0])
def test_the_slope_keeps_its_digits_far_out(x):
    layer, at = DyT(np.array(1.0)), np.array([[x]], "float32")
    dx, _ = layer.backward(np.ones((1, 1), "float32"), layer.forward(at)[1])
    same_bits(dx, (1 / np.cosh(at.astype("float64")) ** 2).astype("float32"))
