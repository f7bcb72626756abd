import re

import numpy as np
import pytest
import torch

from npnorm.layers import Linear
from tests.check import check_backward, check_finite_differences, close, same_bits

BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


def draw(rng, outputs, inputs, bias):
    params = {"weight": rng.standard_normal((outputs, inputs))}
    return params | {"bias": rng.standard_normal(outputs)} if bias else params


def make(params):
    return Linear(**params)


def test_two_rows_worked_by_hand():
    layer = Linear(np.array([[1.0, 2.0], [0.0, -1.0], [4.0, 0.5]]), np.array([10.0, 20.0, 30.0]))
    y, saved = layer.forward(np.array([[1.0, 2.0], [3.0, -4.0]]))
    np.testing.assert_array_equal(y, [[15, 18, 35], [5, 24, 40]])
    dx, grads = layer.backward(np.array([[1.0, 0.0, 2.0], [-1.0, 3.0, 0.0]]), saved)
    np.testing.assert_array_equal(dx, [[9, 3], [-1, -5]])
    np.testing.assert_array_equal(grads["weight"], [[-2, 6], [9, -12], [2, 4]])
    np.testing.assert_array_equal(grads["bias"], [0, 3, 2])


@BIAS
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 3, 4, 5)])
def test_backward_is_the_derivative(bias, shape):
    rng = np.random.default_rng(1)
    check_backward(make, draw(rng, 7, 5, bias), rng.standard_normal(shape), rng)


def test_backward_agrees_with_finite_differences():
    rng = np.random.default_rng(2)
    check_finite_differences(make, draw(rng, 2, 4, True), rng.standard_normal((2, 3, 4)), rng)


@BIAS
def test_torch_gives_the_same(bias):
    rng = np.random.default_rng(3)
    x, dy, params = rng.standard_normal((4, 3, 5)), rng.standard_normal((4, 3, 7)), draw(rng, 7, 5, bias)
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in {"x": x, **params}.items()}
    expected = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors.get("bias"))
    expected.backward(torch.tensor(dy))
    layer = Linear(**params)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    close(y, expected.detach())
    close(dx, tensors["x"].grad)
    for name in params:
        close(grads[name], tensors[name].grad)


def test_float32_stays_float32():
    rng = np.random.default_rng(4)
    layer = Linear(rng.standard_normal((2, 3)).astype("float32"), rng.standard_normal(2).astype("float32"))
    y, saved = layer.forward(rng.standard_normal((4, 3)).astype("float32"))
    dx, grads = layer.backward(y, saved)
    assert {a.dtype for a in (y, dx, *grads.values())} == {np.dtype("float32")}


def test_a_split_of_the_outputs_gives_parts_of_y_and_a_sum_for_dx():
    rng = np.random.default_rng(5)
    params, x, dy = draw(rng, 6, 5, True), rng.standard_normal((3, 5)), rng.standard_normal((3, 6))
    layer = Linear(**params)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    partial = 0
    for part in (slice(0, 2), slice(2, 6)):
        shard = Linear(params["weight"][part], params["bias"][part])
        y_part, saved_part = shard.forward(x)
        close(y_part, y[:, part])
        dx_part, grads_part = shard.backward(dy[:, part], saved_part)
        partial = partial + dx_part
        close(grads_part["weight"], grads["weight"][part])
    close(partial, dx)


def test_parameters_are_held_as_they_came():
    weight = np.random.default_rng(6).standard_normal((2, 3))
    assert Linear(weight).params["weight"] is weight
    assert Linear(weight, np.zeros(2)).shards == {"weight": None, "bias": None}
    same_bits(Linear(weight).forward(weight)[0], weight @ weight.T)


@pytest.mark.parametrize(
    ("weight", "bias", "came"),
    [
        (np.ones(3), None, "weight (3,) float64"),
        (np.ones((2, 3, 4)), None, "weight (2, 3, 4) float64"),
        (np.ones((2, 3)), np.ones(3), "weight (2, 3) float64, bias (3,) float64"),
        (np.ones((2, 3)), np.ones((1, 2)), "weight (2, 3) float64, bias (1, 2) float64"),
    ],
)
def test_parameters_of_a_wrong_shape_are_refused(weight, bias, came):
    message = f"Linear: weight must have shape (outputs, inputs), bias (outputs,); got {came}."
    with pytest.raises(ValueError, match=re.escape(message)):
        Linear(weight, bias)


@pytest.mark.parametrize("shape", [(4, 2), ()])
def test_an_input_of_another_width_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"Linear takes 3 features; x has shape {shape}.")):
        Linear(np.ones((2, 3))).forward(np.ones(shape))


@pytest.mark.parametrize("dtype", ["int64", "float16"])
def test_an_input_of_another_dtype_is_refused(dtype):
    with pytest.raises(TypeError, match=f"Linear works in float32 or float64; the dtype of x is {dtype}"):
        Linear(np.ones((2, 3))).forward(np.ones((4, 3), dtype))


def test_a_gradient_of_another_width_is_refused():
    layer = Linear(np.ones((2, 3)))
    _, saved = layer.forward(np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"Linear\.backward takes 2 features; dy has shape \(4, 3\)"):
        layer.backward(np.ones((4, 3)), saved)


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"got a list.*numpy\.asarray"):
        Linear([[1.0, 2.0]])
    with pytest.raises(TypeError, match=r"got a list.*numpy\.asarray"):
        Linear(np.ones((1, 2))).forward([1.0, 2.0])


@pytest.mark.parametrize(("of_x", "of_weight"), [("float32", "float64"), ("float64", "float32"), ("float32", "int64")])
def test_another_dtype_than_that_of_the_parameters_is_refused(of_x, of_weight):
    with pytest.raises(TypeError, match=f"Linear: weight is {of_weight}, x is {of_x}. Convert one of them"):
        Linear(np.ones((2, 3), of_weight)).forward(np.ones((4, 3), of_x))
