import math

import numpy as np
import pytest
import torch

from npnorm.layers import Rotary
from tests.check import check_backward, check_finite_differences, close, same_bits


def test_positions_worked_by_hand():
    # d = 4, base = 4: position t turns features 0 and 2 by t, features 1 and 3 by t 4^(-2/4) = t/2
    x = np.array([[1.0, 2, 3, 4], [1, 0, 0, 0], [0, 0, 0, 2]])
    y, saved = Rotary(base=4).forward(x)
    expected = [[1, 2, 3, 4], [math.cos(1), 0, math.sin(1), 0], [0, -2 * math.sin(1), 0, 2 * math.cos(1)]]
    close(y, expected, 1e-15)
    dx, grads = Rotary(base=4).backward(np.array([[5.0, 6, 7, 8], [0, 0, 1, 0], [0, 3, 0, 0]]), saved)
    close(dx, [[5, 6, 7, 8], [math.sin(1), 0, math.cos(1), 0], [0, 3 * math.cos(1), 0, -3 * math.sin(1)]], 1e-15)
    assert grads == {}


@pytest.mark.parametrize("shape", [(5, 2), (3, 4, 6), (2, 3, 5, 4)])
def test_backward_is_the_derivative(shape):
    rng = np.random.default_rng(1)
    check_backward(lambda _: Rotary(), {}, rng.standard_normal(shape), rng)


def test_backward_agrees_with_finite_differences():
    rng = np.random.default_rng(2)
    check_finite_differences(lambda _: Rotary(100.0), {}, rng.standard_normal((2, 3, 4)), rng)


def test_torch_gives_the_same_by_complex_numbers():
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, 3, 7, 10)), rng.standard_normal((2, 3, 7, 10))
    tensor = torch.tensor(x, requires_grad=True)
    angle = torch.arange(7.0, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(5, dtype=torch.float64) / 5)
    turned = torch.complex(tensor[..., :5], tensor[..., 5:]) * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    expected.backward(torch.tensor(dy))
    y, saved = Rotary().forward(x)
    close(y, expected.detach())
    close(Rotary().backward(dy, saved)[0], tensor.grad)


def test_the_product_of_query_and_key_depends_on_their_distance_only():
    rng = np.random.default_rng(4)
    q, k = (Rotary().forward(np.tile(rng.standard_normal(8), (40, 1)))[0] for _ in range(2))
    products = q @ k.T
    for distance in range(-20, 20):
        diagonal = np.diagonal(products, distance)
        close(diagonal, np.full(diagonal.size, diagonal[0]), 1e-12)
    assert np.ptp(products[0]) > 1


def test_lengths_are_kept():
    x = np.random.default_rng(5).standard_normal((3, 50, 6))
    close(np.linalg.norm(Rotary().forward(x)[0], axis=-1), np.linalg.norm(x, axis=-1), 1e-15)


def test_backward_turns_back():
    x = np.random.default_rng(6).standard_normal((3, 50, 6))
    y, saved = Rotary().forward(x)
    close(Rotary().backward(y, saved)[0], x, 1e-15)


def test_the_first_position_does_not_turn():
    x = np.random.default_rng(7).standard_normal((3, 5, 6))
    same_bits(Rotary().forward(x)[0][:, 0], x[:, 0])


def test_float32_stays_float32_and_angles_are_exact_far_out():
    x = np.random.default_rng(8).standard_normal((5000, 4)).astype("float32")
    y, saved = Rotary().forward(x)
    dx, _ = Rotary().backward(x, saved)
    assert {a.dtype for a in (y, dx, *saved)} == {np.dtype("float32")}
    close(y, Rotary().forward(x.astype("float64"))[0], 1e-7)


def test_an_odd_number_of_features_is_refused():
    with pytest.raises(ValueError, match=r"Rotary turns pairs of features of each position; x has shape \(3, 5\)"):
        Rotary().forward(np.ones((3, 5)))


def test_an_input_without_positions_is_refused():
    with pytest.raises(ValueError, match="Rotary"):
        Rotary().forward(np.ones(4))
