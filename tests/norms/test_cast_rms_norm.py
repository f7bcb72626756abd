import numpy as np
import pytest
import torch

from npnorm import CastRMSNorm, QKNorm, RMSNorm
from tests.check import BFLOAT16, close, rounded, same_bits

SIXTEEN_BITS = pytest.mark.parametrize("dtype", [np.dtype("float16"), BFLOAT16], ids=str)
NARROW = pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)
ORDERS = pytest.mark.parametrize(("cast", "offset"), [("llama", 0), ("olmo2", 0), ("gemma", 0), ("gemma", 1)])
EPS = 1e-6


def arrays(dtype, offset=0, rows=200, n=256):
    """Return x and a weight whose gain is about 1."""
    rng = np.random.default_rng(1)
    x = 3 * rng.standard_normal((rows, n))
    return x.astype(dtype), (1 - offset + 0.1 * rng.standard_normal(n)).astype(dtype)


def in_the_order_of_the_class(cast, x, w, offset):
    """Return y by torch, of 16-bit tensors: statistics in float32, the weight as each class of transformers has it."""
    wide = x.float()
    z = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + EPS)
    if cast == "llama":
        return w * z.to(x.dtype)
    if cast == "olmo2":
        return (w * z).to(x.dtype)
    return (z * (offset + w.float())).to(x.dtype)


def tensor(a):
    return torch.tensor(a.astype("float32")).to(getattr(torch, a.dtype.name))


def rounded_at_the_same_points(cast, x, w, offset):
    """Return y of the float64 formula with the roundings of `cast`."""
    dtype, x, w = x.dtype, x.astype("float64"), w.astype("float64")
    z = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + EPS)
    if cast is None:
        return rounded(z * (offset + w), dtype)
    if cast == "llama":
        return rounded(rounded(z, dtype).astype("float64") * w, dtype)
    gain = (offset + w).astype("float32").astype("float64")
    product = z.astype("float32").astype("float64") * gain
    return rounded(product.astype("float32").astype("float64"), dtype)


@SIXTEEN_BITS
@ORDERS
def test_torch_in_the_order_of_the_class_gives_the_same_but_for_its_float32(cast, offset, dtype):
    x, w = arrays(dtype, offset)
    y = CastRMSNorm(w, eps=EPS, offset=offset, cast=cast).forward(x)[0]
    theirs = in_the_order_of_the_class(cast, tensor(x), tensor(w), offset)
    assert theirs.dtype == tensor(x).dtype
    differs = theirs.double().numpy() != y.astype("float64")
    right = rounded_at_the_same_points(cast, x, w, offset)
    same_bits(y[differs], right[differs])
    assert np.mean(differs) < 2e-4, f"{np.mean(differs):.1e} of the elements differ from torch"


@NARROW
@ORDERS
def test_each_order_is_the_formula_with_its_roundings(cast, offset, dtype):
    x, w = arrays(dtype, offset)
    y = CastRMSNorm(w, eps=EPS, offset=offset, cast=cast).forward(x)[0]
    same_bits(y, rounded_at_the_same_points(cast, x, w, offset))


@NARROW
@pytest.mark.parametrize("offset", [0, 1])
def test_without_a_cast_there_is_one_rounding(offset, dtype):
    x, w = arrays(dtype, offset)
    y = RMSNorm(w.astype("float64"), eps=EPS, offset=offset).forward(x)[0]
    same_bits(y, rounded_at_the_same_points(None, x, w, offset))


@SIXTEEN_BITS
def test_the_order_of_llama_rounds_twice(dtype):
    x, w = arrays(dtype)
    once, twice = (CastRMSNorm(w, eps=EPS, cast=cast).forward(x)[0].astype("float64") for cast in (None, "llama"))
    share = np.mean(once != twice)
    assert 0.1 < share < 0.5, f"{share:.1e} of the elements differ"


@NARROW
def test_without_offset_olmo2_and_gemma_are_the_same(dtype):
    x, w = arrays(dtype)
    came = []
    for cast in ("olmo2", "gemma"):
        layer = CastRMSNorm(w, eps=EPS, cast=cast)
        y, saved = layer.forward(x)
        dx, grads = layer.backward(x, saved)
        came.append({"y": y, "dx": dx, "grads": grads})
    same_bits(*came)


@pytest.mark.parametrize("cast", [None, "llama", "olmo2", "gemma"])
def test_float64_sees_no_cast(cast):
    x, w = arrays("float64", 1)
    plain, layer = RMSNorm(w, w, offset=1), CastRMSNorm(w, w, offset=1, cast=cast)
    (y, saved), (expected, expected_saved) = layer.forward(x), plain.forward(x)
    same_bits(y, expected)
    (dx, grads), (expected_dx, expected_grads) = layer.backward(x, saved), plain.backward(x, expected_saved)
    same_bits({"dx": dx, **grads}, {"dx": expected_dx, **expected_grads})


@SIXTEEN_BITS
@pytest.mark.parametrize("cast", [None, "llama", "olmo2", "gemma"])
def test_a_float32_weight_does_not_widen_the_result(cast, dtype):
    x, w = arrays(dtype)
    layer = CastRMSNorm(w.astype("float32"), cast=cast)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(x, saved)
    assert (y.dtype, dx.dtype, grads["weight"].dtype) == (dtype, dtype, np.float32)
    same_bits(y, CastRMSNorm(w, cast=cast).forward(x)[0])


@pytest.mark.parametrize("cast", [None, "llama", "olmo2", "gemma"])
@pytest.mark.parametrize(
    ("w", "gain"),
    [
        (np.full(2, 0.00390625, BFLOAT16), 1.00390625),  # 1 in bfloat16
        (np.full(2, 1e-9, "float32"), 1.0),
        (np.full(2, 3e-8, "float32"), 1.0),
        (np.full(2, 7e-8, "float32"), 1 + 2.0**-23),
        (np.full(2, 1e-4, "float16"), float(np.float32(1) + np.float32(np.float16(1e-4)))),
        (np.full(2, 1e-9), 1 + 1e-9),
    ],
    ids=["bfloat16", "float32", "below half a step", "above half a step", "float16", "float64"],
)
def test_the_offset_is_added_in_float32_but_for_float64(cast, w, gain):
    layer = CastRMSNorm(w, eps=0, offset=1, cast=cast)
    y, saved = layer.forward(np.array([[1.0, -1.0]]))  # z = x
    np.testing.assert_array_equal(y, [[gain, -gain]])
    # dz = 2^60 (gain, 0), z = (1, -1): dx = dz - z mean(dz z)
    dx, _ = layer.backward(np.array([[2.0**60, 0.0]]), saved)
    np.testing.assert_array_equal(dx, [[2.0**59 * gain, 2.0**59 * gain]])


def test_a_row_worked_by_hand_with_offset():
    # mean(x^2) = 25, rstd = 1 / sqrt(25 + 39) = 1/8, z = (1, 7) / 8, 1 + w = (2, 1/2)
    layer = RMSNorm(np.array([1.0, -0.5]), eps=39, offset=1)
    y, saved = layer.forward(np.array([[1.0, 7.0]]))
    np.testing.assert_array_equal(y, [[1 / 4, 7 / 16]])
    # dz = (4, 4), mean(dz z) = 2, dx = 1/8 ((4, 4) - 2 z)
    dx, grads = layer.backward(np.array([[2.0, 8.0]]), saved)
    np.testing.assert_array_equal(dx, [[15 / 32, 9 / 32]])
    np.testing.assert_array_equal(grads["weight"], [1 / 4, 7])


@SIXTEEN_BITS
@pytest.mark.parametrize("cast", [None, "llama", "olmo2", "gemma"])
def test_the_weight_gradient_is_taken_from_the_z_that_met_the_weight(cast, dtype):
    x, w = arrays(dtype, rows=20)
    dy = np.random.default_rng(3).standard_normal(x.shape).astype(dtype)
    layer = CastRMSNorm(w.astype("float64"), eps=EPS, cast=cast)
    dx, grads = layer.backward(dy, layer.forward(x)[1])
    wide = x.astype("float64")
    z = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + EPS)
    met = {None: z, "llama": rounded(z, dtype)}.get(cast, z.astype("float32")).astype("float64")
    close(grads["weight"], np.sum(dy.astype("float64") * met, axis=0), 1e-14)
    plain = RMSNorm(w, eps=EPS)
    same_bits(dx, plain.backward(dy, plain.forward(x)[1])[0])  # through a rounding unchanged


def qk_norm(w, **settings):
    return QKNorm(w, w, **settings)


def test_a_narrow_weight_with_an_offset_lets_the_complex_step_through():
    w = np.array([0.5, -0.25], "float32")
    y, _ = RMSNorm(w, eps=0, offset=1).forward(np.array([[3.0 + 1e-30j, 4.0]]))
    rms = np.sqrt(12.5)
    slope = (1 / rms - 9 / 2 / rms**3) * 1.5  # of the first element by itself
    assert y[0, 0].imag == pytest.approx(1e-30 * slope, rel=1e-14)
