import math

import numpy as np
import pytest
import torch

from npnorm.layers import MLP, ReLU, SiLU, SwiGLU
from npnorm.tree import leaves, map_tree
from tests.check import check_backward, check_finite_differences, close, same_bits

NAMES = {MLP: ("up_proj", "down_proj"), SwiGLU: ("gate_proj", "up_proj", "down_proj")}
BOTH = pytest.mark.parametrize("kind", [MLP, SwiGLU])


def draw(rng, kind, width, hidden, bias=True):
    def linear(outputs, inputs):
        params = {"weight": rng.standard_normal((outputs, inputs))}
        return params | {"bias": rng.standard_normal(outputs)} if bias else params

    return {name: linear(width, hidden) if name == "down_proj" else linear(hidden, width) for name in NAMES[kind]}


def single(weight, bias=None):
    params = {"weight": np.array([[float(weight)]])}
    return params if bias is None else params | {"bias": np.array([float(bias)])}


def test_a_gated_feature_worked_by_hand():
    # gate = x log 3 with x = 1: silu = 3/4 log 3, up = 2 x, y = 5 silu up
    # dy/dx = 5 (2 silu' log 3 + 2 silu), silu' = 3/4 (1 + log(3)/4)
    log3 = math.log(3)
    layer = SwiGLU({"gate_proj": single(log3), "up_proj": single(2), "down_proj": single(5)})
    y, saved = layer.forward(np.array([[1.0]]))
    close(y, [[7.5 * log3]], 1e-15)
    dx, grads = layer.backward(np.array([[3.0]]), saved)
    slope = 0.75 * (1 + log3 / 4)
    close(dx, [[30 * (slope * log3 + 0.75 * log3)]], 1e-15)
    close(grads["gate_proj"]["weight"], [[30 * slope]], 1e-15)
    close(grads["up_proj"]["weight"], [[15 * 0.75 * log3]], 1e-15)
    close(grads["down_proj"]["weight"], [[3 * 1.5 * log3]], 1e-15)


def test_a_feature_at_the_origin_of_gelu_worked_by_hand():
    # up = 2 x - 6 = 0 at x = 3, where gelu is 0 and its slope 1/2: y = 7, dx = dy 5 / 2 2
    layer = MLP({"up_proj": single(2, -6), "down_proj": single(5, 7)})
    y, saved = layer.forward(np.array([[3.0]]))
    np.testing.assert_array_equal(y, [[7]])
    dx, grads = layer.backward(np.array([[4.0]]), saved)
    np.testing.assert_array_equal(dx, [[20]])
    np.testing.assert_array_equal(grads["up_proj"]["weight"], [[30]])
    np.testing.assert_array_equal(grads["up_proj"]["bias"], [10])
    np.testing.assert_array_equal(grads["down_proj"]["weight"], [[0]])
    np.testing.assert_array_equal(grads["down_proj"]["bias"], [4])


def test_features_on_both_sides_of_the_kink_of_relu_worked_by_hand():
    # up = (2 x, -3 x) = (4, -6) at x = 2: relu leaves (4, 0), y = 5 4 + 7 0, dx = dy 5 2
    up, down = {"weight": np.array([[2.0], [-3.0]])}, {"weight": np.array([[5.0, 7.0]])}
    layer = MLP({"up_proj": up, "down_proj": down}, activation=ReLU())
    y, saved = layer.forward(np.array([[2.0]]))
    np.testing.assert_array_equal(y, [[20]])
    dx, grads = layer.backward(np.array([[3.0]]), saved)
    np.testing.assert_array_equal(dx, [[30]])
    np.testing.assert_array_equal(grads["up_proj"]["weight"], [[30], [0]])
    np.testing.assert_array_equal(grads["down_proj"]["weight"], [[12, 0]])


@pytest.mark.parametrize(
    ("activation", "theirs"), [(ReLU(), torch.relu), (SiLU(), torch.nn.functional.silu)], ids=["ReLU", "SiLU"]
)
def test_another_activation_is_the_derivative_and_torch_gives_the_same(activation, theirs):
    rng = np.random.default_rng(8)
    x, dy, params = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3, 5)), draw(rng, MLP, 5, 7)
    check_backward(lambda p: MLP(p, activation=activation), params, x, rng)
    tensor = torch.tensor(x, requires_grad=True)
    up, down = (map_tree(torch.tensor, params[name]) for name in NAMES[MLP])
    expected = torch.nn.functional.linear(theirs(torch.nn.functional.linear(tensor, **up)), **down)
    expected.backward(torch.tensor(dy))
    layer = MLP(params, activation=activation)
    y, saved = layer.forward(x)
    close(y, expected.detach())
    close(layer.backward(dy, saved)[0], tensor.grad)


@BOTH
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_backward_is_the_derivative(kind, bias, shape):
    rng = np.random.default_rng(1)
    check_backward(kind, draw(rng, kind, 5, 7, bias), rng.standard_normal(shape), rng)


@BOTH
def test_backward_agrees_with_finite_differences(kind):
    rng = np.random.default_rng(2)
    check_finite_differences(kind, draw(rng, kind, 3, 4), rng.standard_normal((2, 5, 3)), rng)


@BOTH
def test_torch_gives_the_same(kind):
    rng = np.random.default_rng(3)
    x, dy, params = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3, 5)), draw(rng, kind, 5, 7)
    tensor = torch.tensor(x, requires_grad=True)
    tensors = map_tree(lambda a: torch.tensor(a, requires_grad=True), params)

    def linear(name, x):
        return torch.nn.functional.linear(x, **tensors[name])

    h = linear("up_proj", tensor)
    if kind is SwiGLU:
        h = torch.nn.functional.silu(linear("gate_proj", tensor)) * h
    else:
        h = torch.nn.functional.gelu(h, approximate="tanh")
    expected = linear("down_proj", h)
    expected.backward(torch.tensor(dy))
    layer = kind(params)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    close(y, expected.detach())
    close(dx, tensor.grad)
    for (_, came), (_, theirs) in zip(leaves(grads), leaves(tensors), strict=True):
        close(came, theirs.grad)


@BOTH
def test_float32_stays_float32(kind):
    rng = np.random.default_rng(4)
    layer = kind(map_tree(lambda a: a.astype("float32"), draw(rng, kind, 5, 7)))
    y, saved = layer.forward(rng.standard_normal((3, 5)).astype("float32"))
    dx, grads = layer.backward(y, saved)
    assert {a.dtype for a in (y, dx, *(g for _, g in leaves(grads)))} == {np.dtype("float32")}


@BOTH
def test_parameters_are_copies_with_an_axis_for_each(kind):
    params = draw(np.random.default_rng(5), kind, 5, 7)
    layer = kind(params)
    same_bits(layer.params, params)
    assert not any(np.shares_memory(a, b) for (_, a), (_, b) in zip(leaves(layer.params), leaves(params), strict=True))
    assert layer.shards["up_proj"] == {"weight": 0, "bias": 0}
    assert layer.shards["down_proj"] == {"weight": 1, "bias": None}
    assert [name for name, _ in leaves(layer.shards)] == [name for name, _ in leaves(params)]


@BOTH
def test_an_input_of_another_width_is_refused(kind):
    layer = kind(draw(np.random.default_rng(6), kind, 5, 7))
    with pytest.raises(ValueError, match=rf"{kind.__name__} takes 5 features; x has shape \(3, 7\)"):
        layer.forward(np.ones((3, 7)))


@BOTH
def test_parameters_of_a_wrong_shape_are_refused(kind):
    params = draw(np.random.default_rng(7), kind, 5, 7)
    with pytest.raises(ValueError, match=r"Linear: weight must have shape \(outputs, inputs\)"):
        kind({**params, "up_proj": {"weight": np.ones((7, 5)), "bias": np.ones(6)}})
