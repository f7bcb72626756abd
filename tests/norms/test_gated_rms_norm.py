import decimal

import numpy as np
import pytest
import torch

from npnorm import GatedRMSNorm, RMSNorm
from tests.check import BFLOAT16, close, draw, rounded, same_bits

ORDERS = pytest.mark.parametrize("norm_before_gate", [True, False], ids=["norm first", "gate first"])
GROUPS = pytest.mark.parametrize("groups", [1, 2, 4, 12])


def arrays(rng, shape=(2, 5, 12), dtype="float64"):
    """Return x, gate, dy, weight."""
    return draw(rng, dtype, x=shape, gate=shape, dy=shape, weight=shape[-1]).values()


def test_norm_before_gate_worked_by_hand():
    # silu(64) = 64 and silu'(64) = 1 in float64; silu(0) = 0, silu'(0) = 1/2
    # rstd = 1 / sqrt(25 + 39) = 1/8, z = (1, 7) / 8, y = z w silu
    layer = GatedRMSNorm(np.array([2.0, 4.0]), eps=39)
    y, saved = layer.forward(np.array([[1.0, 7.0]]), np.array([[64.0, 0.0]]))
    np.testing.assert_array_equal(y, [[16, 0]])
    # dz = dy silu w = (128, 0), mean(dz z) = 8, dx = 1/8 ((128, 0) - 8 z), dg = dy z w silu'
    (dx, dgate), grads = layer.backward(np.array([[1.0, 2.0]]), saved)
    np.testing.assert_array_equal(dx, [[127 / 8, -7 / 8]])
    np.testing.assert_array_equal(dgate, [[1 / 4, 7 / 2]])
    np.testing.assert_array_equal(grads["weight"], [8, 0])


def test_gate_before_norm_worked_by_hand():
    # u = x silu = (64, 0), rstd = 1 / sqrt(2048 + 2048) = 1/64, z = (1, 0)
    layer = GatedRMSNorm(np.array([2.0, 4.0]), eps=2048, norm_before_gate=False)
    y, saved = layer.forward(np.array([[1.0, 7.0]]), np.array([[64.0, 0.0]]))
    np.testing.assert_array_equal(y, [[2, 0]])
    # dz = (2, 8), mean(dz z) = 1, du = 1/64 (1, 8), dx = du silu, dg = du x silu'
    (dx, dgate), grads = layer.backward(np.array([[1.0, 2.0]]), saved)
    np.testing.assert_array_equal(dx, [[1, 0]])
    np.testing.assert_array_equal(dgate, [[1 / 64, 7 / 16]])
    np.testing.assert_array_equal(grads["weight"], [1, 0])


def test_groups_worked_by_hand():
    # the rows (1, 7) and (5, -5), each with rstd = 1/8; gates of 64 are a factor
    layer = GatedRMSNorm(eps=39, groups=2)
    y, saved = layer.forward(np.array([[1.0, 7.0, 5.0, -5.0]]), np.full((1, 4), 64.0))
    np.testing.assert_array_equal(y, [[8, 56, 40, -40]])
    # dz = (256, 256, 128, 256): mean(dz z) = 128 in the first group, -40 in the second
    (dx, _), _ = layer.backward(np.array([[4.0, 4.0, 2.0, 4.0]]), saved)
    np.testing.assert_array_equal(dx, [[30, 18, 16 + 25 / 8, 32 - 25 / 8]])


def as_in_mamba(x, gate, weight, eps, groups, norm_before_gate):
    """Return y by torch in the order of Mamba-2's reference: gate or norm first, one mean for each group."""
    if not norm_before_gate:
        x = x * torch.nn.functional.silu(gate)
    grouped = x.unflatten(-1, (groups, -1))
    rstd = 1 / torch.sqrt(grouped.square().mean(dim=-1, keepdim=True) + eps)
    y = (grouped * rstd).flatten(-2) * weight
    return y * torch.nn.functional.silu(gate) if norm_before_gate else y


@ORDERS
@GROUPS
@pytest.mark.parametrize("shape", [(12,), (7, 12), (2, 3, 5, 12)])
def test_torch_in_the_order_of_mamba_gives_the_same(norm_before_gate, groups, shape):
    x, gate, dy, weight = arrays(np.random.default_rng(1), shape)
    at = [torch.tensor(a, requires_grad=True) for a in (x, gate, weight)]
    expected = as_in_mamba(*at, 0.1, groups, norm_before_gate)
    expected.backward(torch.tensor(dy))
    layer = GatedRMSNorm(weight, eps=0.1, groups=groups, norm_before_gate=norm_before_gate)
    y, saved = layer.forward(x, gate)
    (dx, dgate), grads = layer.backward(dy, saved)
    close(y, expected.detach())
    for came, right in zip((dx, dgate, grads["weight"]), at, strict=True):
        close(came, right.grad)


@ORDERS
def test_a_group_is_a_norm_by_itself(norm_before_gate):
    x, gate, dy, weight = arrays(np.random.default_rng(2))
    settings = {"eps": 0.1, "norm_before_gate": norm_before_gate}
    layer = GatedRMSNorm(weight, groups=3, **settings)
    y, saved = layer.forward(x, gate)
    (dx, dgate), grads = layer.backward(dy, saved)
    for part in (slice(0, 4), slice(4, 8), slice(8, 12)):
        alone = GatedRMSNorm(weight[part], **settings)
        y_alone, saved_alone = alone.forward(x[..., part], gate[..., part])
        (dx_alone, dgate_alone), grads_alone = alone.backward(dy[..., part], saved_alone)
        close(y[..., part], y_alone, 1e-15)
        close(dx[..., part], dx_alone, 1e-15)
        close(dgate[..., part], dgate_alone, 1e-15)
        close(grads["weight"][part], grads_alone["weight"], 1e-15)


def test_the_orders_differ():
    x, gate, _, weight = arrays(np.random.default_rng(3))
    y, other = (GatedRMSNorm(weight, norm_before_gate=first).forward(x, gate)[0] for first in (True, False))
    assert np.abs(y - other).max() > 0.1


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)
@ORDERS
def test_narrow_floats_are_rounded_once(norm_before_gate, dtype):
    x, gate, dy, weight = arrays(np.random.default_rng(4), dtype=dtype)
    settings = {"groups": 2, "norm_before_gate": norm_before_gate}
    layer = GatedRMSNorm(weight, **settings)
    y, saved = layer.forward(x, gate)
    (dx, dgate), grads = layer.backward(dy, saved)
    wide_x, wide_gate, wide_dy, wide_weight = (a.astype("float64") for a in (x, gate, dy, weight))
    wide = GatedRMSNorm(wide_weight, **settings)
    expected, wide_saved = wide.forward(wide_x, wide_gate)
    (expected_dx, expected_dgate), expected_grads = wide.backward(wide_dy, wide_saved)
    same_bits(y, rounded(expected, dtype))
    same_bits(dx, rounded(expected_dx, dtype))
    same_bits(dgate, rounded(expected_dgate, dtype))
    same_bits(grads["weight"], rounded(expected_grads["weight"], dtype))


def test_the_gate_may_have_a_dtype_of_its_own():
    x, gate, dy, weight = arrays(np.random.default_rng(5))
    layer = GatedRMSNorm(weight)
    y, saved = layer.forward(x.astype("float16"), gate.astype("float32"))
    (dx, dgate), grads = layer.backward(dy.astype("float16"), saved)
    assert y.dtype == dx.dtype == np.float16
    assert dgate.dtype == np.float32
    assert grads["weight"].dtype == np.float64


@ORDERS
def test_a_closed_gate_lets_nothing_through_but_can_open(norm_before_gate):
    x, _, dy, weight = arrays(np.random.default_rng(6))
    layer = GatedRMSNorm(weight, norm_before_gate=norm_before_gate)
    y, saved = layer.forward(x, np.zeros_like(x))
    (dx, dgate), grads = layer.backward(dy, saved)
    for nothing in (y, dx, grads["weight"]):
        np.testing.assert_array_equal(nothing, np.zeros_like(nothing))
    assert np.all(dgate != 0)


@ORDERS
@pytest.mark.parametrize("size", [30.0, 1000.0, 1e30])
def test_far_gates_are_open_or_closed(norm_before_gate, size):
    rng = np.random.default_rng(7)
    x, gate, dy, weight = arrays(rng)
    gate = np.where(gate > 0, size, -size)
    layer = GatedRMSNorm(weight, norm_before_gate=norm_before_gate)
    y, saved = layer.forward(x, gate)
    (dx, dgate), _ = layer.backward(dy, saved)
    open_ = np.where(gate > 0, size, 0.0)
    plain = RMSNorm(weight)
    expected, plain_saved = plain.forward(x if norm_before_gate else x * open_)
    d, _ = plain.backward(dy * open_ if norm_before_gate else dy, plain_saved)
    close(y, expected * open_ if norm_before_gate else expected)
    close(dx, d if norm_before_gate else d * open_)
    close(dgate, (dy * expected if norm_before_gate else d * x) * (gate > 0), 1e-11)  # silu'(-30) is -3e-12


def test_the_scale_of_the_input_or_of_an_open_gate_is_not_seen_where_the_gate_comes_first():
    x, gate, _, weight = arrays(np.random.default_rng(8))
    layer = GatedRMSNorm(weight, eps=0, norm_before_gate=False)
    y, _ = layer.forward(x, gate)
    for factor in (1e-200, 1e200):
        close(layer.forward(factor * x, gate)[0], y, 1e-14)
    close(layer.forward(x, np.full_like(x, 100.0))[0], layer.forward(x, np.full_like(x, 1000.0))[0], 1e-14)


@pytest.mark.parametrize("gate", [1e200, -600.0, 1e-200])
def test_a_gate_that_leads_out_of_range_changes_no_more_than_the_sign(gate):
    x = np.array([[1.0, -1.0], [3.0, 4.0]])
    y, _ = GatedRMSNorm(eps=0, norm_before_gate=False).forward(x, np.full((2, 2), gate))
    close(y, np.sign(gate) * RMSNorm(eps=0).forward(x)[0], 1e-15)


@pytest.mark.parametrize(("dtype", "gate"), [("float32", -400.0), ("float32", 1e200), ("float64", -700.0)])
def test_a_gate_of_any_size_leads_no_dtype_out_of_range(dtype, gate):
    x = np.array([[1.0, -2.0]], dtype)
    y, saved = GatedRMSNorm(eps=0, norm_before_gate=False).forward(x, np.full((1, 2), gate))
    close(y, np.sign(gate) * RMSNorm(eps=0).forward(x)[0], 1e-6)
    (dx, _), _ = GatedRMSNorm(eps=0, norm_before_gate=False).backward(np.ones((1, 2)), saved)
    assert np.isfinite(dx).all()


def exact_gate_first(x, gate, dy, weight, eps):
    """Return dx and dgate where the gate comes first: the textbook in eighty decimal digits, then float64."""
    with decimal.localcontext(prec=80):
        x, g, dy, w = (
            np.vectorize(decimal.Decimal, otypes=[object])(a.astype("float64")) for a in (x, gate, dy, weight)
        )
        s = np.vectorize(lambda a: 1 / (1 + (-a).exp()), otypes=[object])(g)
        u = x * g * s
        rstd = 1 / np.sqrt((u * u).sum(axis=-1, keepdims=True) / x.shape[-1] + decimal.Decimal(eps))
        z, dz = u * rstd, dy * w
        du = rstd * (dz - z * (dz * z).sum(axis=-1, keepdims=True) / x.shape[-1])
        return tuple(a.astype("float64") for a in (du * g * s, du * x * (s + g * s * (1 - s))))


@pytest.mark.parametrize(("dtype", "units"), [("float32", 0.51), ("float64", 20)])
@pytest.mark.parametrize("outlier", ["x", "gate", "two of x"])
@pytest.mark.parametrize("size", [1.0, 1e5, 1e10, 1e15, 1e20, 1e30])
def test_beside_an_outlier_the_gradients_keep_their_digits(dtype, units, outlier, size):
    """There du is a small difference of large terms, while x, or silu, is as large: their product counts."""
    x, gate, dy, weight = arrays(np.random.default_rng(9), (20, 16), dtype)
    if dtype == "float64" and outlier == "two of x":
        units = 100  # in one of the rows dz is along the two but for a part in 94, and silu is rounded
    if outlier == "gate":
        gate[:, 3] = size
    else:
        x[:, 3] *= size
        x[:, 5] *= size if outlier == "two of x" else 1
    layer = GatedRMSNorm(weight, eps=1e-6, norm_before_gate=False)
    came, _ = layer.backward(dy, layer.forward(x, gate)[1])
    for a, b in zip(came, exact_gate_first(x, gate, dy, weight, 1e-6), strict=True):
        largest = np.abs(b).max(axis=-1, keepdims=True)
        assert np.all(np.abs(a - b) <= units * np.finfo(dtype).eps * largest)
