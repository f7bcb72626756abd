import re

import numpy as np
import pytest
import torch

from npnorm import LayerNorm, RMSNorm
from tests.check import BFLOAT16, check_backward, check_finite_differences, close, exact_norm, rounded, same_bits

AFFINE = pytest.mark.parametrize("names", [(), ("weight",), ("bias",), ("weight", "bias")], ids="+".join)
NARROW = pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)


def draw(rng, names, n, dtype="float64"):
    return {name: rng.standard_normal(n).astype(dtype) for name in names}


def make(eps):
    return lambda params: RMSNorm(**params, eps=eps)


def test_a_row_worked_by_hand():
    # mean(x^2) = (1 + 1 + 9 + 25) / 4 = 9, rstd = 1 / sqrt(9 + 7) = 1/4, z = (1, -1, 3, 5) / 4
    x = np.array([[1.0, -1.0, 3.0, 5.0]])
    layer = RMSNorm(np.array([2.0, 4.0, 1.0, -2.0]), np.array([0.0, 1.0, 2.0, -1.0]), eps=7)
    y, saved = layer.forward(x)
    np.testing.assert_array_equal(y, [[1 / 2, 0, 11 / 4, -7 / 2]])
    # dz = dy w = (4, -4, 4, -2), dz z = (1, 1, 3, -5/2), mean(dz z) = 5/8
    # dx = 1/4 ((4, -4, 4, -2) - 5/8 z)
    dx, grads = layer.backward(np.array([[2.0, -1.0, 4.0, 1.0]]), saved)
    np.testing.assert_array_equal(dx, [[123 / 128, -123 / 128, 113 / 128, -89 / 128]])
    np.testing.assert_array_equal(grads["weight"], [1 / 2, 1 / 4, 3, 5 / 4])
    np.testing.assert_array_equal(grads["bias"], [2, -1, 4, 1])


@AFFINE
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 5), (2, 4, 3, 5)])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.9])
def test_backward_is_the_derivative(names, shape, eps):
    rng = np.random.default_rng(1)
    check_backward(make(eps), draw(rng, names, shape[-1]), rng.standard_normal(shape), rng)


@pytest.mark.parametrize("size", [1e-3, 1e-2, 1e3])
def test_backward_is_the_derivative_where_eps_is_near_or_far_from_the_mean_square(size):
    rng = np.random.default_rng(2)
    check_backward(make(1e-5), draw(rng, ("weight",), 6), size * rng.standard_normal((4, 3, 6)), rng)


def test_backward_agrees_with_finite_differences():
    rng = np.random.default_rng(3)
    check_finite_differences(make(0.3), draw(rng, ("weight", "bias"), 5), rng.standard_normal((2, 3, 5)), rng)


@pytest.mark.parametrize("names", [(), ("weight",)], ids="+".join)
@pytest.mark.parametrize("shape", [(11,), (4, 11), (3, 2, 11), (2, 3, 4, 11)])
def test_torch_gives_the_same(names, shape):
    rng = np.random.default_rng(4)
    x, dy, params = rng.standard_normal(shape) + 1, rng.standard_normal(shape), draw(rng, names, 11)
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in {"x": x, **params}.items()}
    expected = torch.nn.functional.rms_norm(tensors["x"], (11,), tensors.get("weight"), eps=0.1)
    expected.backward(torch.tensor(dy))
    layer = RMSNorm(**params, eps=0.1)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    close(y, expected.detach())
    close(dx, tensors["x"].grad)
    for name in names:
        close(grads[name], tensors[name].grad)


@NARROW
@pytest.mark.parametrize("size", [1e-4, 0.01, 1.0, 300.0])
def test_narrow_floats_are_rounded_once(dtype, size):
    rng = np.random.default_rng(5)
    x = (rng.standard_normal((20, 13)) * size).astype(dtype)
    dy = rng.standard_normal((20, 13)).astype(dtype)
    params = draw(rng, ("weight", "bias"), 13, dtype)
    layer = RMSNorm(**params)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    expected = exact_norm(x, params["weight"], params["bias"], 1e-6, dy, centred=False)
    for came, right in zip((y, dx, grads["weight"], grads["bias"]), expected, strict=True):
        same_bits(came, rounded(right, dtype))


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e20, 1e38])
def test_float32_is_rounded_once_over_its_whole_range(size):
    rng = np.random.default_rng(6)
    x = (rng.uniform(-3, 3, (5, 12)) * size).astype("float32")
    dy = rng.standard_normal((5, 12)).astype("float32")
    y, saved = RMSNorm(eps=1e-5).forward(x)
    dx, _ = RMSNorm(eps=1e-5).backward(dy, saved)
    expected_y, expected_dx, _, _ = exact_norm(x, np.ones(12), np.zeros(12), 1e-5, dy, centred=False)
    assert y.dtype == dx.dtype == np.float32
    np.testing.assert_array_equal(y, expected_y.astype("float32"))
    np.testing.assert_array_equal(dx, expected_dx.astype("float32"))


def test_float32_is_nearer_to_the_truth_than_torch():
    rng = np.random.default_rng(7)
    x, w = rng.standard_normal((30, 64)).astype("float32"), rng.standard_normal(64).astype("float32")
    truth = exact_norm(x, w, np.zeros(64), 1e-6, x, centred=False)[0]
    y, _ = RMSNorm(w).forward(x)
    theirs = torch.nn.functional.rms_norm(torch.tensor(x), (64,), torch.tensor(w), eps=1e-6).numpy()
    assert np.abs(y - truth).max() < np.abs(theirs - truth).max()
    same_bits(y, truth.astype("float32"))


def test_statistics_do_not_leave_the_range_of_float16():
    x = np.array([[60000, -60000, 59968, 300, 1], [6e-8, -6e-8, 1.2e-7, 0, 6e-8]], "float16")
    w = np.array([3, 1, 2, 5, 4], "float16")
    expected = exact_norm(x, w, np.zeros(5), 1e-20, x, centred=False)[0]
    same_bits(RMSNorm(w, eps=1e-20).forward(x)[0], expected.astype("float16"))


@pytest.mark.parametrize("factor", [3.0, -3.0, 1e-9, 1e200])
def test_a_factor_changes_only_the_sign_without_eps(factor):
    rng = np.random.default_rng(8)
    x = rng.standard_normal((4, 9))
    close(RMSNorm(eps=0).forward(x * factor)[0], np.sign(factor) * RMSNorm(eps=0).forward(x)[0], 1e-14)


def test_a_shift_does_change_the_result():
    x = np.random.default_rng(9).standard_normal((4, 9))
    assert np.abs(RMSNorm().forward(x + 1)[0] - RMSNorm().forward(x)[0]).max() > 0.1


def test_the_gradient_stands_upright_on_the_row_without_eps():
    rng = np.random.default_rng(10)
    x, dy = rng.standard_normal((4, 9)), rng.standard_normal((4, 9))
    layer = RMSNorm(rng.standard_normal(9), eps=0)
    dx, _ = layer.backward(dy, layer.forward(x)[1])
    close(np.sum(dx * x, axis=-1) + np.abs(dx * x).sum(), np.full(4, np.abs(dx * x).sum()), 1e-15)


def test_a_permutation_of_features_permutes_the_result():
    rng = np.random.default_rng(11)
    x, dy, order = rng.standard_normal((3, 8)), rng.standard_normal((3, 8)), rng.permutation(8)
    w = rng.standard_normal(8)
    layer, other = RMSNorm(w), RMSNorm(w[order])
    y, saved = layer.forward(x)
    y_other, saved_other = other.forward(x[:, order])
    close(y_other, y[:, order], 1e-14)
    close(other.backward(dy[:, order], saved_other)[0], layer.backward(dy, saved)[0][:, order], 1e-14)


def test_rows_do_not_see_each_other():
    rng = np.random.default_rng(12)
    x, dy, order = rng.standard_normal((6, 8)), rng.standard_normal((6, 8)), rng.permutation(6)
    layer = RMSNorm(rng.standard_normal(8))
    y, saved = layer.forward(x)
    y_other, saved_other = layer.forward(x[order])
    same_bits(y_other, y[order])
    same_bits(layer.backward(dy[order], saved_other)[0], layer.backward(dy, saved)[0][order])


def test_leading_axes_are_rows():
    rng = np.random.default_rng(13)
    x, layer = rng.standard_normal((2, 3, 4, 5)), RMSNorm(rng.standard_normal(5))
    same_bits(layer.forward(x)[0].reshape(24, 5), layer.forward(x.reshape(24, 5))[0])


@pytest.mark.parametrize("value", [1e-300, 0.1, -1.1e7, 1.1e200, -1.1e306])
def test_a_constant_row_gives_plus_or_minus_the_weight_without_eps(value):
    w = np.random.default_rng(14).standard_normal(100)
    close(RMSNorm(w, eps=0).forward(np.full((2, 100), value))[0], np.sign(value) * np.stack([w, w]), 1e-15)


def test_a_row_of_zeros_gives_the_bias():
    rng = np.random.default_rng(15)
    params, dy = draw(rng, ("weight", "bias"), 6), rng.standard_normal((2, 6))
    layer = RMSNorm(**params, eps=0.25)
    y, saved = layer.forward(np.zeros((2, 6)))
    np.testing.assert_array_equal(y, np.stack([params["bias"]] * 2))
    np.testing.assert_array_equal(layer.backward(dy, saved)[0], 2 * dy * params["weight"])


def test_dtypes_may_differ():
    rng = np.random.default_rng(16)
    x, dy = rng.standard_normal((3, 6)).astype("float16"), rng.standard_normal((3, 6))
    w, b = rng.standard_normal(6).astype("float32"), rng.standard_normal(6).astype(BFLOAT16)
    layer = RMSNorm(w, b)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    assert (y.dtype, dx.dtype, grads["weight"].dtype, grads["bias"].dtype) == (
        "float16",
        "float16",
        "float32",
        BFLOAT16,
    )
    expected = exact_norm(x, w, b, 1e-6, dy, centred=False)
    same_bits(y, expected[0].astype("float16"))
    same_bits(dx, expected[1].astype("float16"))
    same_bits(grads["weight"], expected[2].astype("float32"))
    same_bits(grads["bias"], rounded(expected[3], BFLOAT16))


def test_bfloat16_is_not_rounded_twice():
    near_a_tie = 1 + 2**-8 + 2**-40  # by way of float32 it would become a tie, and then 1
    x, w, b = np.zeros((1, 2), BFLOAT16), np.ones(2, BFLOAT16), np.full(2, near_a_tie)
    layer = RMSNorm(w, b, eps=1)
    y, saved = layer.forward(x)
    same_bits(y, np.full((1, 2), 1 + 2**-7, BFLOAT16))
    dy = np.array([[near_a_tie, -near_a_tie]])
    same_bits(layer.backward(dy, saved)[0], np.array([[1 + 2**-7, -1 - 2**-7]], BFLOAT16))
    _, grads = RMSNorm(w, b.astype(BFLOAT16)).backward(dy, saved)
    same_bits(grads["bias"], np.array([1 + 2**-7, -1 - 2**-7], BFLOAT16))


def test_the_default_eps():
    x = np.random.default_rng(17).standard_normal((2, 9)) * 0.001
    close(RMSNorm().forward(x)[0], torch.nn.functional.rms_norm(torch.tensor(x), (9,), eps=1e-6))


def test_init_makes_ones():
    layer = RMSNorm.init(4, "float16", eps=3)
    same_bits(layer.params, {"weight": np.ones(4, "float16")})
    np.testing.assert_array_equal(layer.forward(np.array([1.0, -1.0, 1.0, -1.0]))[0], [0.5, -0.5, 0.5, -0.5])
    assert RMSNorm.init(4).params["weight"].dtype == np.float32


def test_parameters_are_held_as_they_came():
    w = np.random.default_rng(18).standard_normal(4)
    assert RMSNorm(w).params["weight"] is w
    assert RMSNorm(w).shards == {"weight": None}
    assert RMSNorm().params == {}


@pytest.mark.parametrize("eps", [-1e-9, np.nan, np.inf, "1e-5", None, 1j])
def test_a_bad_eps_is_refused(eps):
    with pytest.raises(ValueError, match=re.escape(f"RMSNorm: eps is {eps!r}. It must be a finite number")):
        RMSNorm(np.ones(3), eps=eps)


@pytest.mark.parametrize(
    ("weight", "bias", "came"),
    [
        (np.ones(3), np.zeros(4), "weight (3,), bias (4,)."),
        (np.ones(0), None, "weight (0,)."),
    ],
)
def test_parameters_of_a_wrong_shape_are_refused(weight, bias, came):
    message = "RMSNorm: each parameter must have shape (features,), the same for all; got " + came
    with pytest.raises(ValueError, match=re.escape(message)):
        RMSNorm(weight, bias)


def test_parameters_that_are_not_floats_are_refused():
    with pytest.raises(TypeError, match=r"RMSNorm works on float16.*; weight is int64\. Convert it first"):
        RMSNorm(np.ones(3, "int64"))


@pytest.mark.parametrize("dtype", ["int32", "bool"])
def test_an_input_that_is_not_of_floats_is_refused(dtype):
    with pytest.raises(TypeError, match=rf"RMSNorm works on float16.*; x is {dtype}\. Convert it first"):
        RMSNorm(np.ones(3)).forward(np.ones((2, 3), dtype))


def test_a_gradient_that_is_not_of_floats_is_refused():
    layer = RMSNorm(np.ones(3))
    _, saved = layer.forward(np.ones((2, 3)))
    with pytest.raises(TypeError, match=r"RMSNorm works on float16.* is int64"):
        layer.backward(np.ones((2, 3), "int64"), saved)


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"weight must be an array of shape .*; got a list.*numpy\.asarray"):
        RMSNorm([1.0, 2.0])
    with pytest.raises(TypeError, match=r"got a list.*numpy\.asarray"):
        RMSNorm(np.ones(2)).forward([[1.0, 2.0]])
    with pytest.raises(TypeError, match=r"got a list.*numpy\.asarray"):
        RMSNorm().backward([[1.0, 2.0]], RMSNorm().forward(np.ones((1, 2)))[1])


@pytest.mark.parametrize("shape", [(3, 4), (4,), ()])
def test_an_input_of_another_width_is_refused(shape):
    message = f"RMSNorm holds 3 features; x has shape {shape}. The last axis must be 3."
    with pytest.raises(ValueError, match=re.escape(message)):
        RMSNorm(np.ones(3)).forward(np.ones(shape))


@pytest.mark.parametrize("shape", [(3, 4), (4,), (1, 2, 4)])
def test_a_gradient_of_another_shape_is_refused(shape):
    layer = RMSNorm(np.ones(4))
    _, saved = layer.forward(np.ones((2, 4)))
    message = f"RMSNorm: dy has shape {shape}, and the x that was saved (2, 4). Hand backward the gradient of the y"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.backward(np.ones(shape), saved)


def test_what_another_layer_saved_is_refused():
    x = np.random.default_rng(40).standard_normal((2, 3))
    _, saved = LayerNorm(np.ones(3)).forward(x)
    with pytest.raises(TypeError, match=r"takes what RMSNorm\.forward saved; got npnorm\.norms\..*Saved\."):
        RMSNorm(np.ones(3)).backward(x, saved)


def test_a_communicator_that_is_not_wrapped_is_refused():
    with pytest.raises(TypeError, match=r"group is a object\. Wrap a communicator first: npnorm\.mpi\.Ranks"):
        RMSNorm(np.ones(3), group=object())
