import numpy as np
import pytest
import torch

from npnorm import L2Norm, RMSNorm
from tests.check import BFLOAT16, close, rounded, run, same_bits

ROW = np.array([[1.0, 1.0, 1.0, 5.0, 6.0]])  # of length 8
DY = np.array([[8.0, 0.0, 0.0, 0.0, 8.0]])


def test_a_long_row_worked_by_hand():
    # y = x / 8, sum(dy y) = 1 + 6, dx = 1/8 (dy - 7 y)
    y, dx = run(L2Norm(eps=1), ROW, DY).values()
    np.testing.assert_array_equal(y, ROW / 8)
    np.testing.assert_array_equal(dx, [[57 / 64, -7 / 64, -7 / 64, -35 / 64, 11 / 32]])


def test_a_short_row_worked_by_hand():
    y, dx = run(L2Norm(eps=16), ROW, DY).values()
    np.testing.assert_array_equal(y, ROW / 16)
    np.testing.assert_array_equal(dx, DY / 16)


def test_torch_gives_the_same_for_rows_that_are_long_short_and_zero():
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((6, 7)) * np.array([[1.0, 1e-2, 1e-4, 1e-8, 0, 3]]).T, rng.standard_normal((6, 7))
    at = torch.tensor(x, requires_grad=True)
    expected = torch.nn.functional.normalize(at, dim=-1, eps=1e-3)
    expected.backward(torch.tensor(dy))
    y, dx = run(L2Norm(eps=1e-3), x, dy).values()
    for i in range(6):  # row by row: the short ones have by far the largest gradients
        close(y[i], expected[i].detach())
        close(dx[i], at.grad[i])


def test_the_class_of_llama_4_is_an_rms_norm():
    x = np.random.default_rng(3).standard_normal((4, 9))
    close(RMSNorm(eps=0).forward(x)[0], 3 * L2Norm(eps=0).forward(x)[0], 1e-15)


def test_a_rotation_turns_the_result():
    rng = np.random.default_rng(4)
    x, dy = rng.standard_normal((4, 9)), rng.standard_normal((4, 9))
    q, _ = np.linalg.qr(rng.standard_normal((9, 9)))
    y, dx = run(L2Norm(), x, dy).values()
    turned_y, turned_dx = run(L2Norm(), x @ q, dy @ q).values()
    close(turned_y, y @ q, 1e-14)
    close(turned_dx, dx @ q, 1e-14)


def test_the_gradient_stands_upright_on_a_long_row():
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((4, 9)), rng.standard_normal((4, 9))
    _, dx = run(L2Norm(), x, dy).values()
    assert np.all(np.abs(np.sum(dx * x, axis=-1)) < 1e-15 * np.sum(np.abs(dx * x), axis=-1))


def test_one_feature_has_only_a_sign():
    x = np.array([[3.0], [-1e-9], [1e200]])
    y, dx = run(L2Norm(), x, np.ones((3, 1))).values()
    close(y, [[1], [-1], [1]], 1e-15)
    assert np.all(np.abs(dx * x) < 1e-30)  # of dy = 1: nothing is left but the rounding of rounding


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e-12, 1.0, 1e20, 1e38])
@pytest.mark.parametrize("eps", [1e-12, 0.0])
@pytest.mark.parametrize("dtype", [np.dtype("float32"), BFLOAT16], ids=str)
def test_narrow_floats_are_rounded_once_over_their_whole_range(size, eps, dtype):
    rng = np.random.default_rng(6)
    size = max(size, 1e-40) if dtype == BFLOAT16 else size
    with np.errstate(under="ignore"):
        x = (rng.uniform(-3, 3, (5, 12)) * size).astype(dtype)
    dy = (rng.standard_normal((5, 12)) * min(size, 1.0)).astype(dtype)  # so that dx is in range
    y, dx = run(L2Norm(eps=eps), x, dy).values()
    wide, wide_dy = x.astype("float64"), dy.astype("float64")
    norm = np.sqrt(np.sum(wide * wide, axis=-1, keepdims=True))
    expected = wide / np.maximum(norm, eps)
    along = np.sum(wide_dy * expected, axis=-1, keepdims=True) * (norm > eps)
    expected_dx = (wide_dy - expected * along) / np.maximum(norm, eps)
    for a, b in ((y, expected), (dx, expected_dx)):
        normal = (np.abs(b) >= 2.0**-126) | (dtype == np.float32)  # `rounded` leaves subnormal bfloat16 alone
        same_bits(a[normal], rounded(b[normal], dtype))


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_torch_in_float32_is_wrong_where_squares_leave_the_range(size):
    x = np.array([[3.0, 4.0]], "float32") * np.float32(size)
    theirs = torch.nn.functional.normalize(torch.tensor(x), eps=0).numpy()
    assert not np.allclose(theirs, [[0.6, 0.8]])
    same_bits(L2Norm(eps=0).forward(x)[0], np.array([[0.6, 0.8]], "float32"))


@pytest.mark.parametrize("power", [-997, -600, 600, 997])
def test_the_whole_range_of_float64(power):
    rng = np.random.default_rng(7)
    x, dy = rng.uniform(-3, 3, (5, 12)), rng.standard_normal((5, 12))
    y, dx = run(L2Norm(eps=0), np.ldexp(x, power), dy).values()
    z = x / np.linalg.norm(x, axis=-1, keepdims=True)
    close(y, z, 1e-15)
    expected = (dy - z * np.sum(dy * z, axis=-1, keepdims=True)) / np.linalg.norm(x, axis=-1, keepdims=True)
    close(np.ldexp(dx, power), expected, 1e-15)


def test_the_floor_holds_for_the_smallest_float64():
    y, dx = run(L2Norm(), np.array([[1e-300, -2e-300], [5e-324, 0]]), np.array([[3.0, 4.0], [5.0, 6.0]])).values()
    close(y[0], [1e-288, -2e-288], 1e-15)
    close(y[1], [5e-324 / 1e-12, 0], 1e-15)
    close(dx, np.array([[3e12, 4e12], [5e12, 6e12]]), 1e-15)


def test_a_float16_row_keeps_a_floor_that_float16_cannot_hold():
    y, dx = run(L2Norm(), np.zeros((1, 3), "float16"), np.array([[6e-8, 0, -6e-8]], "float16")).values()
    np.testing.assert_array_equal(y, np.zeros((1, 3)))
    same_bits(dx, np.array([[2.0**-24 * 1e12, 0, -(2.0**-24) * 1e12]]).astype("float16"))


def test_a_weight_is_not_taken():
    with pytest.raises(ValueError, match=r"L2Norm: eps is array\(\[1\., 1\.\]\)"):
        L2Norm(np.ones(2))


def test_init_has_nothing_to_make():
    assert L2Norm.init(8, "float16", eps=0.5).params == {}
