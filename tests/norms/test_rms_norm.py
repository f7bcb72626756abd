import numpy as np
import pytest

from npnorm import RMSNorm
from tests.check import BFLOAT16, close, draw, same_bits


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


@pytest.mark.parametrize("value", [1e-300, 0.1, -1.1e7, 1.1e200, -1.1e306])
def test_a_constant_row_gives_plus_or_minus_the_weight_without_eps(value):
    w = np.random.default_rng(14).standard_normal(100)
    close(RMSNorm(w, eps=0).forward(np.full((2, 100), value))[0], np.sign(value) * np.stack([w, w]), 1e-15)


def test_a_row_of_zeros_gives_the_bias():
    rng = np.random.default_rng(15)
    params, dy = draw(rng, weight=6, bias=6), rng.standard_normal((2, 6))
    layer = RMSNorm(**params, eps=0.25)
    y, saved = layer.forward(np.zeros((2, 6)))
    np.testing.assert_array_equal(y, np.stack([params["bias"]] * 2))
    np.testing.assert_array_equal(layer.backward(dy, saved)[0], 2 * dy * params["weight"])


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
