import math

import numpy as np
import pytest
import torch

from npnorm.layers import GELU, ReLU, SiLU
from tests.check import check_backward, check_finite_differences, close, same_bits

ALL = pytest.mark.parametrize("activation", [ReLU, GELU, SiLU])


def test_relu_worked_by_hand():
    y, saved = ReLU().forward(np.array([-2.0, 0.0, 3.0, math.nan]))
    np.testing.assert_array_equal(y, [0, 0, 3, math.nan])  # what is no number is not hidden
    np.testing.assert_array_equal(ReLU().backward(np.array([5.0, 6.0, 7.0, 8.0]), saved)[0], [0, 0, 7, 8])


def test_silu_worked_by_hand():
    # at x = log 3 the sigmoid is 3/4: y = 3/4 log 3, dx = dy 3/4 (1 + log(3)/4)
    y, saved = SiLU().forward(np.array([math.log(3), 0.0]))
    close(y, [0.75 * math.log(3), 0], 1e-15)
    close(SiLU().backward(np.array([8.0, 6.0]), saved)[0], [6 + 1.5 * math.log(3), 3], 1e-15)


def test_gelu_worked_by_hand():
    # at 0: y = 0, dx = dy / 2; at 1: t = tanh(c 1.044715), dx = (1 + t)/2 + (1 - t^2) c (1 + 3 0.044715) / 2
    c = math.sqrt(2 / math.pi)
    t = math.tanh(c * 1.044715)
    y, saved = GELU().forward(np.array([0.0, 1.0]))
    close(y, [0, (1 + t) / 2], 1e-15)
    dx, _ = GELU().backward(np.array([3.0, 2.0]), saved)
    close(dx, [1.5, 1 + t + (1 - t * t) * c * 1.134145], 1e-15)


@ALL
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_backward_is_the_derivative(activation, shape):
    rng = np.random.default_rng(1)
    check_backward(lambda _: activation(), {}, np.asarray(2 * rng.standard_normal(shape)), rng)


@ALL
def test_backward_agrees_with_finite_differences(activation):
    rng = np.random.default_rng(2)
    check_finite_differences(lambda _: activation(), {}, 2 * rng.standard_normal((2, 3, 4)), rng)


@pytest.mark.parametrize(
    ("activation", "theirs"),
    [
        (ReLU, torch.nn.functional.relu),
        (GELU, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
        (SiLU, torch.nn.functional.silu),
    ],
    ids=["ReLU", "GELU", "SiLU"],
)
def test_torch_gives_the_same(activation, theirs):
    rng = np.random.default_rng(3)
    x, dy = 3 * rng.standard_normal((4, 9)), rng.standard_normal((4, 9))
    tensor = torch.tensor(x, requires_grad=True)
    expected = theirs(tensor)
    expected.backward(torch.tensor(dy))
    y, saved = activation().forward(x)
    close(y, expected.detach(), 1e-15)
    close(activation().backward(dy, saved)[0], tensor.grad, 1e-15)


@ALL
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_far_from_zero_it_is_the_identity_or_zero(activation, dtype):
    x, dy = np.array([1e4, -1e4, 200, -200], dtype), np.array([2, 3, 5, 7], dtype)
    y, saved = activation().forward(x)
    np.testing.assert_allclose(y, [1e4, 0, 200, 0], rtol=0, atol=1e-80)
    dx, _ = activation().backward(dy, saved)
    np.testing.assert_allclose(dx, [2, 0, 5, 0], rtol=0, atol=1e-80)
    assert y.dtype == dx.dtype == dtype


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_silu_keeps_its_digits_below_zero(dtype):
    # exp(-10) is small beside 1, so that y is x exp(x) (1 - exp(x)) to more digits than float32 has.
    x = np.array([-10, -20, -40, -80], dtype)
    y, _ = SiLU().forward(x)
    wide = x.astype("float64")
    np.testing.assert_allclose(y, wide * np.exp(wide) / (1 + np.exp(wide)), rtol=4 * np.finfo(dtype).eps)


@ALL
def test_the_two_sides_differ_by_x(activation):
    x = 2 * np.random.default_rng(4).standard_normal(50)
    close(activation().forward(x)[0] - activation().forward(-x)[0], x, 1e-15)


@ALL
def test_nan_stays_and_touches_no_other_element(activation):
    y, _ = activation().forward(np.array([1.0, np.nan, -2.0]))
    assert np.isnan(y).tolist() == [False, True, False]
    same_bits(y[[0, 2]], activation().forward(np.array([1.0, -2.0]))[0])
