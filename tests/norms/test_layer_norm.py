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
    return lambda params: LayerNorm(**params, eps=eps)


def test_a_row_worked_by_hand():
    # mean(x) = 3, c = (-3, -1, 1, 3), var = (9 + 1 + 1 + 9) / 4 = 5, rstd = 1 / sqrt(5 + 11) = 1/4
    # z = (-3, -1, 1, 3) / 4
    x = np.array([[0.0, 2.0, 4.0, 6.0]])
    w, b = np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 0.0, -1.0, 2.0])
    layer = LayerNorm(w, b, eps=11)
    y, saved = layer.forward(x)
    np.testing.assert_array_equal(y, [[1 / 4, -1 / 2, 0, 8]])
    # dz = dy w = (4, 4, -4, 4), mean(dz) = 2, dz z = (-3, -1, -1, 3), mean(dz z) = -1/2
    # dx = 1/4 ((4, 4, -4, 4) - 2 + z / 2)
    dx, grads = layer.backward(np.array([[4.0, 2.0, -1.0, 0.5]]), saved)
    np.testing.assert_array_equal(dx, [[13 / 32, 15 / 32, -47 / 32, 19 / 32]])
    np.testing.assert_array_equal(grads["weight"], [-3, -1 / 2, -1 / 4, 3 / 8])
    np.testing.assert_array_equal(grads["bias"], [4, 2, -1, 1 / 2])


@AFFINE
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 5), (2, 4, 3, 5)])
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.9])
def test_backward_is_the_derivative(names, shape, eps):
    rng = np.random.default_rng(1)
    check_backward(make(eps), draw(rng, names, shape[-1]), rng.standard_normal(shape), rng)


@pytest.mark.parametrize("spread", [1e-3, 1e-2, 1e3])
def test_backward_is_the_derivative_where_eps_is_near_or_far_from_the_variance(spread):
    rng = np.random.default_rng(2)
    x = 1 + spread * rng.standard_normal((4, 3, 6))
    check_backward(make(1e-5), draw(rng, ("weight", "bias"), 6), x, rng)


def test_backward_agrees_with_finite_differences():
    rng = np.random.default_rng(3)
    check_finite_differences(make(0.3), draw(rng, ("weight", "bias"), 5), rng.standard_normal((2, 3, 5)), rng)


@AFFINE
@pytest.mark.parametrize("shape", [(11,), (4, 11), (3, 2, 11), (2, 3, 4, 11)])
def test_torch_gives_the_same(names, shape):
    rng = np.random.default_rng(4)
    x, dy, params = rng.standard_normal(shape) + 3, rng.standard_normal(shape), draw(rng, names, 11)
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in {"x": x, **params}.items()}
    expected = torch.nn.functional.layer_norm(tensors["x"], (11,), tensors.get("weight"), tensors.get("bias"), eps=0.1)
    expected.backward(torch.tensor(dy))
    layer = LayerNorm(**params, eps=0.1)
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
    x = (rng.standard_normal((20, 13)) * size + size).astype(dtype)
    dy = rng.standard_normal((20, 13)).astype(dtype)
    params = draw(rng, ("weight", "bias"), 13, dtype)
    layer = LayerNorm(**params)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    expected = exact_norm(x, params["weight"], params["bias"], 1e-5, dy, centred=True)
    for came, right in zip((y, dx, grads["weight"], grads["bias"]), expected, strict=True):
        same_bits(came, rounded(right, dtype))


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e20, 1e38])
def test_float32_is_rounded_once_over_its_whole_range(size):
    rng = np.random.default_rng(6)
    x = (rng.uniform(-3, 3, (5, 12)) * size).astype("float32")
    dy = rng.standard_normal((5, 12)).astype("float32")
    y, saved = LayerNorm(eps=1e-5).forward(x)
    dx, _ = LayerNorm(eps=1e-5).backward(dy, saved)
    expected_y, expected_dx, _, _ = exact_norm(x, np.ones(12), np.zeros(12), 1e-5, dy, centred=True)
    assert y.dtype == dx.dtype == np.float32
    np.testing.assert_array_equal(y, expected_y.astype("float32"))
    np.testing.assert_array_equal(dx, expected_dx.astype("float32"))


def test_float32_is_nearer_to_the_truth_than_torch():
    rng = np.random.default_rng(7)
    x = (rng.standard_normal((30, 64)) + 10).astype("float32")
    truth = exact_norm(x, np.ones(64), np.zeros(64), 1e-5, x, centred=True)[0]
    y, _ = LayerNorm().forward(x)
    theirs = torch.nn.functional.layer_norm(torch.tensor(x), (64,)).numpy()
    assert np.abs(y - truth).max() < np.abs(theirs - truth).max() / 2


def test_statistics_do_not_leave_the_range_of_float16():
    x = np.array([[60000, -60000, 59968, 60000, 60000], [60000, 60000, 60000, 60000, 59968]], "float16")
    w, b = np.array([3, 1, 2, 5, 4], "float16"), np.array([1, 2, 3, 4, 5], "float16")
    expected = exact_norm(x, w, b, 1e-5, x, centred=True)[0]
    same_bits(LayerNorm(w, b).forward(x)[0], expected.astype("float16"))


@pytest.mark.parametrize(("dtype", "offset"), [("float32", 1e7), ("float32", 1e4), ("float64", 1e7), ("float64", 1e15)])
def test_a_row_far_from_zero_loses_nothing(dtype, offset):
    rng = np.random.default_rng(8)
    x = (rng.standard_normal((3, 40)) * 4 + offset).astype(dtype)
    dy = rng.standard_normal((3, 40)).astype(dtype)
    y, saved = LayerNorm().forward(x)
    dx, _ = LayerNorm().backward(dy, saved)
    truth_y, truth_dx, _, _ = exact_norm(x, np.ones(40), np.zeros(40), 1e-5, dy, centred=True)
    if dtype == "float32":
        same_bits(y, truth_y.astype(dtype))
        same_bits(dx, truth_dx.astype(dtype))
    else:
        close(y, truth_y, 1e-15)
        close(dx, truth_dx, 2e-15)


def test_a_shift_changes_nothing():
    rng = np.random.default_rng(9)
    x = rng.integers(-4000, 4000, (4, 9)) / 2.0**10
    close(LayerNorm().forward(x + 1024)[0], LayerNorm().forward(x)[0], 1e-14)


@pytest.mark.parametrize("factor", [3.0, 1e-9, 1e200])
def test_a_factor_changes_nothing_without_eps(factor):
    rng = np.random.default_rng(10)
    x = rng.standard_normal((4, 9))
    close(LayerNorm(eps=0).forward(x * factor)[0], LayerNorm(eps=0).forward(x)[0], 1e-14)


def test_a_permutation_of_features_permutes_the_result():
    rng = np.random.default_rng(11)
    x, dy, order = rng.standard_normal((3, 8)), rng.standard_normal((3, 8)), rng.permutation(8)
    params = draw(rng, ("weight", "bias"), 8)
    layer, other = LayerNorm(**params), LayerNorm(**{name: a[order] for name, a in params.items()})
    y, saved = layer.forward(x)
    y_other, saved_other = other.forward(x[:, order])
    close(y_other, y[:, order], 1e-14)
    close(other.backward(dy[:, order], saved_other)[0], layer.backward(dy, saved)[0][:, order], 1e-14)


def test_rows_do_not_see_each_other():
    rng = np.random.default_rng(12)
    x, dy, order = rng.standard_normal((6, 8)), rng.standard_normal((6, 8)), rng.permutation(6)
    layer = LayerNorm(**draw(rng, ("weight", "bias"), 8))
    y, saved = layer.forward(x)
    y_other, saved_other = layer.forward(x[order])
    same_bits(y_other, y[order])
    same_bits(layer.backward(dy[order], saved_other)[0], layer.backward(dy, saved)[0][order])


def test_leading_axes_are_rows():
    rng = np.random.default_rng(13)
    x, layer = rng.standard_normal((2, 3, 4, 5)), LayerNorm(**draw(rng, ("weight",), 5))
    same_bits(layer.forward(x)[0].reshape(24, 5), layer.forward(x.reshape(24, 5))[0])


@pytest.mark.parametrize("n", [1, 7, 100, 2000])
@pytest.mark.parametrize("value", [0.0, 0.1, -1.1e7, 1.1e30, -1.1e200, 1.1e284, 1.1e-300])
def test_a_constant_row_gives_the_bias(value, n):
    rng = np.random.default_rng(14)
    params, dy = draw(rng, ("weight", "bias"), n), rng.standard_normal((2, n))
    layer = LayerNorm(**params, eps=1e-5)
    y, saved = layer.forward(np.full((2, n), value))
    np.testing.assert_array_equal(y, np.stack([params["bias"]] * 2))
    dz = dy * params["weight"]
    close(layer.backward(dy, saved)[0], (dz - dz.mean(axis=-1, keepdims=True)) / np.sqrt(1e-5))


def test_dtypes_may_differ():
    rng = np.random.default_rng(15)
    x, dy = rng.standard_normal((3, 6)).astype("float16"), rng.standard_normal((3, 6))
    w, b = rng.standard_normal(6).astype("float32"), rng.standard_normal(6)
    layer = LayerNorm(w, b)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    assert (y.dtype, dx.dtype, grads["weight"].dtype, grads["bias"].dtype) == (
        "float16",
        "float16",
        "float32",
        "float64",
    )
    expected = exact_norm(x, w, b, 1e-5, dy, centred=True)
    same_bits(y, expected[0].astype("float16"))
    same_bits(dx, expected[1].astype("float16"))
    same_bits(grads["weight"], expected[2].astype("float32"))


def test_bfloat16_is_not_rounded_twice():
    near_a_tie = 1 + 2**-8 + 2**-40  # by way of float32 it would become a tie, and then 1
    x, w, b = np.zeros((1, 2), BFLOAT16), np.ones(2, BFLOAT16), np.full(2, near_a_tie)
    layer = LayerNorm(w, b, eps=1)
    y, saved = layer.forward(x)
    same_bits(y, np.full((1, 2), 1 + 2**-7, BFLOAT16))
    dy = np.array([[near_a_tie, -near_a_tie]])
    same_bits(layer.backward(dy, saved)[0], np.array([[1 + 2**-7, -1 - 2**-7]], BFLOAT16))
    _, grads = LayerNorm(w, b.astype(BFLOAT16)).backward(dy, saved)
    same_bits(grads["bias"], np.array([1 + 2**-7, -1 - 2**-7], BFLOAT16))


def test_the_default_eps_is_that_of_torch():
    x = np.random.default_rng(16).standard_normal((2, 9)) * 0.01
    close(LayerNorm().forward(x)[0], torch.nn.LayerNorm(9, elementwise_affine=False)(torch.tensor(x)))


def test_init_makes_ones_and_zeros():
    layer = LayerNorm.init(4, "float16", eps=0.5)
    same_bits(layer.params, {"weight": np.ones(4, "float16"), "bias": np.zeros(4, "float16")})
    assert layer.forward(np.array([1.0, -1.0, 1.0, -1.0]))[0][0] == 1 / np.sqrt(1.5)
    assert LayerNorm.init(4).params["weight"].dtype == np.float32


def test_parameters_are_held_as_they_came():
    w = np.random.default_rng(17).standard_normal(4)
    assert LayerNorm(w).params["weight"] is w
    assert LayerNorm(w).shards == {"weight": None}
    assert LayerNorm().params == {}


@pytest.mark.parametrize("eps", [-1e-9, np.nan, np.inf, "1e-5", None, 1j])
def test_a_bad_eps_is_refused(eps):
    with pytest.raises(ValueError, match=re.escape(f"LayerNorm: eps is {eps!r}. It must be a finite number")):
        LayerNorm(np.ones(3), eps=eps)


@pytest.mark.parametrize(
    ("weight", "bias", "came"),
    [
        (np.ones(3), np.zeros(4), "weight (3,), bias (4,)."),
        (np.ones((2, 3)), np.zeros(3), "weight (2, 3), bias (3,)."),
        (np.ones(0), None, "weight (0,)."),
        (np.array(1.0), None, "weight ()."),
    ],
)
def test_parameters_of_a_wrong_shape_are_refused(weight, bias, came):
    message = "LayerNorm: each parameter must have shape (features,), the same for all; got " + came
    with pytest.raises(ValueError, match=re.escape(message)):
        LayerNorm(weight, bias)


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64"])
def test_parameters_that_are_not_floats_are_refused(dtype):
    with pytest.raises(
        TypeError, match=rf"LayerNorm works on float16.*; weight is {dtype}\. (Convert it first|Take .*real)"
    ):
        LayerNorm(np.ones(3, dtype))


@pytest.mark.parametrize("dtype", ["int32", "bool", "object", "complex64"])
def test_an_input_that_is_not_of_floats_is_refused(dtype):
    with pytest.raises(
        TypeError, match=rf"LayerNorm works on float16.*; x is {dtype}\. (Convert it first|Take .*real)"
    ):
        LayerNorm(np.ones(3)).forward(np.ones((2, 3), dtype))


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"weight must be an array of shape .*; got a list.*numpy\.asarray"):
        LayerNorm([1.0, 2.0])
    with pytest.raises(TypeError, match=r"got a list.*numpy\.asarray"):
        LayerNorm(np.ones(2)).forward([[1.0, 2.0]])
    with pytest.raises(TypeError, match=r"got a list.*numpy\.asarray"):
        LayerNorm().backward([[1.0, 2.0]], LayerNorm().forward(np.ones((1, 2)))[1])


@pytest.mark.parametrize("shape", [(3, 4), (4,), ()])
def test_an_input_of_another_width_is_refused(shape):
    message = f"LayerNorm holds 3 features; x has shape {shape}. The last axis must be 3."
    with pytest.raises(ValueError, match=re.escape(message)):
        LayerNorm(np.ones(3)).forward(np.ones(shape))


@pytest.mark.parametrize("shape", [(3, 0), ()])
def test_an_input_without_features_is_refused(shape):
    with pytest.raises(
        ValueError, match=r"LayerNorm needs at least one feature; x has shape \(.*\)\. The last axis must"
    ):
        LayerNorm().forward(np.ones(shape))


@pytest.mark.parametrize("shape", [(3, 4), (4,), (1, 2, 4)])
def test_a_gradient_of_another_shape_is_refused(shape):
    layer = LayerNorm(np.ones(4))
    _, saved = layer.forward(np.ones((2, 4)))
    message = f"LayerNorm: dy has shape {shape}, and the x that was saved (2, 4). Hand backward the gradient of the y"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.backward(np.ones(shape), saved)


def test_what_another_layer_saved_is_refused():
    x = np.random.default_rng(40).standard_normal((2, 3))
    _, saved = RMSNorm(np.ones(3)).forward(x)
    with pytest.raises(TypeError, match=r"takes what LayerNorm\.forward saved; got npnorm\.norms\..*Saved\."):
        LayerNorm(np.ones(3)).backward(x, saved)


def test_a_communicator_that_is_not_wrapped_is_refused():
    with pytest.raises(TypeError, match=r"group is a object\. Wrap a communicator first: npnorm\.mpi\.Ranks"):
        LayerNorm(np.ones(3), group=object())
