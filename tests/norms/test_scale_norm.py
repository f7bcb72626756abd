import numpy as np
import pytest
import torch

from npnorm import L2Norm, RMSNorm, ScaleNorm
from tests.check import BFLOAT16, close, rounded, run, same_bits

NARROW = pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)
RANGE = {"float32": (1e-45, 1e38), "float16": (1e-7, 2e4), "bfloat16": (1e-40, 1e38)}
ROW = np.array([[1.0, 1.0, 1.0, 5.0, 6.0]])  # of length 8
DY = np.array([[8.0, 0.0, 0.0, 0.0, 8.0]])


def formula(x, g, eps, dy):
    """Return y, dx, dg in float64, of rows whose squares are in its range."""
    norm = np.sqrt(np.sum(x * x, axis=-1, keepdims=True))
    z = x / np.maximum(norm, eps)
    t = np.sum(dy * z, axis=-1, keepdims=True)
    return g * z, g / np.maximum(norm, eps) * (dy - (norm > eps) * z * t), np.sum(t)


def test_a_long_row_worked_by_hand():
    # z = x / 8, sum(dy z) = 1 + 6, dx = 16/8 (dy - 7 z)
    y, dx, dg = run(ScaleNorm(np.array(16.0), eps=1), ROW, DY).values()
    np.testing.assert_array_equal(y, [[2, 2, 2, 10, 12]])
    np.testing.assert_array_equal(dx, [[57 / 4, -7 / 4, -7 / 4, -35 / 4, 11 / 2]])
    np.testing.assert_array_equal(dg, 7)


def test_a_short_row_worked_by_hand():
    # z = x / 16, sum(dy z) = 1/2 + 3, dx = 16/16 dy
    y, dx, dg = run(ScaleNorm(np.array(16.0), eps=16), ROW, DY).values()
    np.testing.assert_array_equal(y, ROW)
    np.testing.assert_array_equal(dx, DY)
    np.testing.assert_array_equal(dg, 7 / 2)


def test_over_two_axes_a_row_is_the_flattened_array():
    rng = np.random.default_rng(2)
    x, dy, g = rng.standard_normal((4, 3, 5)), rng.standard_normal((4, 3, 5)), np.array([1.7])
    y, dx, dg = run(ScaleNorm(g, axes=2), x, dy).values()
    flat_y, flat_dx, flat_dg = run(ScaleNorm(g), x.reshape(4, 15), dy.reshape(4, 15)).values()
    same_bits({"y": y.reshape(4, 15), "dx": dx.reshape(4, 15), "dg": dg}, {"y": flat_y, "dx": flat_dx, "dg": flat_dg})


def test_it_is_an_rms_norm_with_one_weight():
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((4, 9)), rng.standard_normal((4, 9))
    y, dx, dg = run(ScaleNorm(np.array(6.0), eps=0), x, dy).values()
    expected, expected_dx, dw = run(RMSNorm(np.full(9, 2.0), eps=0), x, dy).values()
    close(y, expected, 1e-14)
    close(dx, expected_dx, 1e-14)
    close(dg, np.sum(dw) / 3, 1e-14)


def test_without_a_weight_it_is_l2_norm():
    rng = np.random.default_rng(4)
    x, dy = rng.standard_normal((4, 9)), rng.standard_normal((4, 9))
    same_bits(run(ScaleNorm(eps=0.1), x, dy), run(L2Norm(eps=0.1), x, dy))


def test_every_row_gets_the_length():
    x = np.random.default_rng(5).standard_normal((40, 9)) * np.logspace(-4, 200, 40)[:, None]
    y, _ = ScaleNorm(np.array(2.5)).forward(x)
    close(np.linalg.norm(y, axis=-1), np.full(40, 2.5), 1e-15)


@NARROW
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-20, 1e-6, 1.0, 1e20, 1e38])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_narrow_floats_are_rounded_once_over_their_whole_range(dtype, size, eps):
    smallest, largest = RANGE[dtype.name]
    size = np.clip(size, smallest, largest)
    rng = np.random.default_rng(6)
    with np.errstate(under="ignore"):
        x = (rng.uniform(1, 3, (5, 12)) * rng.choice((-1.0, 1.0), (5, 12)) * size).astype(dtype)
    dy = (rng.standard_normal((5, 12)) * min(size, 1.0)).astype(dtype)  # so that dx is in range
    g = np.array([1.7], dtype)
    assert np.all(x != 0)
    came = run(ScaleNorm(g, eps=eps), x, dy).values()
    expected = formula(x.astype("float64"), g.astype("float64"), eps, dy.astype("float64"))
    for a, b in zip(came, expected, strict=True):
        if dtype == BFLOAT16:  # `rounded` leaves subnormal numbers alone
            normal = np.abs(b) >= 2.0**-126
            a, b = a[normal.reshape(a.shape)], b[normal]
        same_bits(a.ravel(), rounded(np.asarray(b), dtype).ravel())


@pytest.mark.parametrize("power", [-997, -600, 600, 997])
@pytest.mark.parametrize("g", [1.7, 1e-3])
def test_the_whole_range_of_float64(power, g):
    rng = np.random.default_rng(7)
    x, dy = rng.uniform(-3, 3, (5, 12)), rng.standard_normal((5, 12))
    y, dx, dg = run(ScaleNorm(np.array(g), eps=0), np.ldexp(x, power), dy).values()
    expected = formula(x, g, 0, dy)
    close(y, expected[0], 1e-15)
    close(np.ldexp(dx, power), expected[1], 1e-15)
    close(dg, expected[2], 1e-14)


def test_rows_of_float64_far_shorter_than_eps():
    x, dy = np.full((1, 4), 1e-300), np.array([[1.0, -2.0, 3.0, 0.0]])
    y, dx, dg = run(ScaleNorm(np.array(2.0)), x, dy).values()
    close(y, np.full((1, 4), 2e-295), 1e-15)
    close(dx, 2e5 * dy, 1e-15)
    close(dg, 2e-295, 1e-15)


def test_a_row_of_zeros_stays_zero():
    y, dx, dg = run(ScaleNorm(np.array(3.0), eps=0.5), np.zeros((2, 4)), np.ones((2, 4))).values()
    np.testing.assert_array_equal(y, np.zeros((2, 4)))
    np.testing.assert_array_equal(dx, np.full((2, 4), 6.0))
    assert dg == 0


def test_the_default_eps():
    x = np.array([[3e-6, 4e-6]])
    close(ScaleNorm(np.array(1.0)).forward(x)[0], [[0.3, 0.4]], 1e-15)


def test_init_makes_the_root_of_the_width():
    layer = ScaleNorm.init(16, "float64")
    same_bits(layer.params, {"weight": np.array(4.0)})
    x = np.random.default_rng(8).standard_normal((4, 16))
    close(layer.forward(x)[0], RMSNorm(eps=0).forward(x)[0], 1e-15)
    assert layer.shards == {"weight": None}


@pytest.mark.parametrize("kind", [ScaleNorm, L2Norm])
@pytest.mark.parametrize(("eps", "compute"), [(1e-200, None), (1e200, None), (1e-25, "float32"), (1e20, "float32")])
def test_an_eps_whose_square_is_out_of_range_is_refused(kind, eps, compute):
    with pytest.raises(
        ValueError, match=rf"{kind.__name__}: eps is .*Its square leaves the working precision; choose 0"
    ):
        kind(eps=eps, compute=compute)


@pytest.mark.parametrize("dy", [[0.0, 1.0], [1.0, 0.0]])
def test_a_row_just_as_long_as_eps_has_the_gradient_of_torch(dy):
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    torch.nn.functional.normalize(x, dim=-1, eps=5.0).backward(torch.tensor([dy], dtype=torch.float64))
    _, saved = L2Norm(eps=5.0).forward(x.detach().numpy())
    close(L2Norm(eps=5.0).backward(np.array([dy]), saved)[0], x.grad, 1e-15)
