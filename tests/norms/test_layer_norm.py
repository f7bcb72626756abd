import numpy as np
import pytest

from npnorm import LayerNorm
from tests.check import close


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


def test_a_shift_changes_nothing():
    rng = np.random.default_rng(9)
    x = rng.integers(-4000, 4000, (4, 9)) / 2.0**10
    close(LayerNorm().forward(x + 1024)[0], LayerNorm().forward(x)[0], 1e-14)


@pytest.mark.parametrize("factor", [3.0, 1e-9, 1e200])
def test_a_factor_changes_nothing_without_eps(factor):
    rng = np.random.default_rng(10)
    x = rng.standard_normal((4, 9))
    close(LayerNorm(eps=0).forward(x * factor)[0], LayerNorm(eps=0).forward(x)[0], 1e-14)
