import re
import timeit

import numpy as np
import pytest
import torch

from npnorm import AdaptiveNorm, GroupNorm, LayerNorm, RMSNorm
from tests.check import BFLOAT16, close, same_bits

KINDS = pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
SHAPES = pytest.mark.parametrize("shape", [(4, 7), (4, 3, 7), (4, 2, 3, 7)])


def draw(rng, shape=(4, 3, 7), dtype="float64"):
    """Return x, dy, scale, shift."""
    return (rng.standard_normal(s).astype(dtype) for s in (shape, shape, (shape[0], 7), (shape[0], 7)))


def test_two_samples_worked_by_hand():
    # mean 3, c = (-2, 2) and (2, -2), rstd = 1 / sqrt(4 + 12) = 1/4, z = (-1, 1) / 2 and (1, -1) / 2
    x = np.array([[[1.0, 5.0]], [[5.0, 1.0]]])
    scale, shift = np.array([[1.0, -0.5], [0.0, 3.0]]), np.array([[1.0, 0.0], [0.0, -1.0]])
    layer = AdaptiveNorm(LayerNorm(eps=12))
    y, saved = layer.forward(x, scale, shift)
    np.testing.assert_array_equal(y, [[[0, 1 / 4]], [[1 / 2, -3]]])
    # first: dz = (2, 0), means 1 and -1/2; second: dz = (2, 16), means 9 and -7/2
    (dx, dscale, dshift), grads = layer.backward(np.array([[[1.0, 0.0]], [[2.0, 4.0]]]), saved)
    np.testing.assert_array_equal(dx, [[[3 / 16, -3 / 16]], [[-21 / 16, 21 / 16]]])
    np.testing.assert_array_equal(dscale, [[-1 / 2, 0], [1, -2]])
    np.testing.assert_array_equal(dshift, [[1, 0], [2, 4]])
    assert grads == layer.params == layer.shards == {}


def test_positions_of_a_sample_worked_by_hand():
    # rstd = 1 / sqrt(25 + 39) = 1/8, z = (1, 7) / 8 and (-7, 1) / 8: one sample of two positions
    layer = AdaptiveNorm(RMSNorm(eps=39))
    y, saved = layer.forward(np.array([[[1.0, 7.0], [-7.0, 1.0]]]), np.array([[1.0, 3.0]]), np.array([[2.0, 0.0]]))
    np.testing.assert_array_equal(y, [[[9 / 4, 7 / 2], [1 / 4, 1 / 2]]])
    # dz = (4, 4) and (0, -8), mean(dz z) = 2 and -1/2
    (dx, dscale, dshift), _ = layer.backward(np.array([[[2.0, 1.0], [0.0, -2.0]]]), saved)
    np.testing.assert_array_equal(dx, [[[15 / 32, 9 / 32], [-7 / 128, -127 / 128]]])
    np.testing.assert_array_equal(dscale, [[1 / 4, 5 / 8]])
    np.testing.assert_array_equal(dshift, [[2, -1]])


@KINDS
@SHAPES
def test_torch_gives_the_same(kind, shape):
    x, dy, scale, shift = draw(np.random.default_rng(1), shape)
    at = [torch.tensor(a, requires_grad=True) for a in (x, scale, shift)]
    norm = torch.nn.functional.layer_norm if kind is LayerNorm else torch.nn.functional.rms_norm
    each = (shape[0], *[1] * (len(shape) - 2), 7)
    expected = norm(at[0], (7,), eps=0.1) * (1 + at[1].reshape(each)) + at[2].reshape(each)
    expected.backward(torch.tensor(dy))
    layer = AdaptiveNorm(kind(eps=0.1))
    y, saved = layer.forward(x, scale, shift)
    gradients, _ = layer.backward(dy, saved)
    close(y, expected.detach())
    for came, right in zip(gradients, at, strict=True):
        close(came, right.grad)


@KINDS
def test_a_sample_is_a_norm_with_weight_and_bias_of_its_own(kind):
    x, dy, scale, shift = draw(np.random.default_rng(2))
    layer = AdaptiveNorm(kind(eps=0.1))
    y, saved = layer.forward(x, scale, shift)
    (dx, dscale, dshift), _ = layer.backward(dy, saved)
    for i in range(4):
        norm = kind(1 + scale[i], shift[i], eps=0.1)
        expected, saved_norm = norm.forward(x[i])
        expected_dx, grads = norm.backward(dy[i], saved_norm)
        close(y[i], expected, 1e-15)
        close(dx[i], expected_dx, 1e-15)
        close(dscale[i], grads["weight"], 1e-15)
        close(dshift[i], grads["bias"], 1e-15)


@KINDS
def test_without_scale_and_shift_it_is_the_norm(kind):
    x, _, scale, _ = draw(np.random.default_rng(3))
    zeros = np.zeros_like(scale)
    same_bits(AdaptiveNorm(kind(eps=0.1)).forward(x, zeros, zeros)[0], kind(eps=0.1).forward(x)[0])


@KINDS
def test_samples_do_not_see_each_other(kind):
    x, dy, scale, shift = draw(np.random.default_rng(4))
    other_x, other_dy, other_scale, other_shift = (a.copy() for a in (x, dy, scale, shift))
    for a in (other_x, other_dy, other_scale, other_shift):
        a[1] = np.nan
    layer = AdaptiveNorm(kind())
    y, saved = layer.forward(x, scale, shift)
    y_other, saved_other = layer.forward(other_x, other_scale, other_shift)
    gradients, others = layer.backward(dy, saved)[0], layer.backward(other_dy, saved_other)[0]
    for a, b in zip((y, *gradients), (y_other, *others), strict=True):
        same_bits(np.delete(a, 1, axis=0), np.delete(b, 1, axis=0))


@KINDS
def test_scale_and_shift_may_have_a_dtype_of_their_own(kind):
    x, dy, scale, shift = draw(np.random.default_rng(5))
    layer = AdaptiveNorm(kind())
    y, saved = layer.forward(x.astype(BFLOAT16), scale.astype("float32"), shift)
    (dx, dscale, dshift), _ = layer.backward(dy.astype(BFLOAT16), saved)
    assert y.dtype == dx.dtype == BFLOAT16
    assert dscale.dtype == np.float32
    assert dshift.dtype == np.float64


@KINDS
@pytest.mark.parametrize("size", [1e-300, 1e200])
def test_rows_whose_squares_leave_the_range(kind, size):
    x, dy, scale, shift = draw(np.random.default_rng(6))
    layer = AdaptiveNorm(kind(eps=0))
    y, saved = layer.forward(size * x, scale, shift)
    (dx, dscale, _), _ = layer.backward(dy, saved)
    expected, saved = layer.forward(x, scale, shift)
    (expected_dx, expected_dscale, _), _ = layer.backward(dy, saved)
    close(y, expected, 1e-14)
    close(dx * size, expected_dx, 1e-14)
    close(dscale, expected_dscale, 1e-14)


@pytest.mark.parametrize("shape", [(0, 7), (0, 3, 7), (4, 0, 7)])
def test_without_samples_or_rows_there_is_nothing(shape):
    layer, condition = AdaptiveNorm(RMSNorm()), np.ones((shape[0], 7))
    y, saved = layer.forward(np.ones(shape), condition, condition)
    (dx, dscale, dshift), _ = layer.backward(np.ones(shape), saved)
    assert y.shape == dx.shape == shape
    np.testing.assert_array_equal(dscale, np.zeros((shape[0], 7)))
    np.testing.assert_array_equal(dshift, np.zeros((shape[0], 7)))


@KINDS
@pytest.mark.parametrize("names", [("weight",), ("bias",), ("weight", "bias")], ids="+".join)
def test_a_norm_with_parameters_is_refused(kind, names):
    message = f"AdaptiveNorm takes a norm without weight and bias, over one axis; this one has {list(names)} and 1 axes"
    with pytest.raises(ValueError, match=re.escape(message)):
        AdaptiveNorm(kind(**dict.fromkeys(names, np.ones(7))))


@KINDS
def test_a_norm_over_two_axes_is_refused(kind):
    with pytest.raises(ValueError, match=r"over one axis; this one has \[\] and 2 axes\. The scale and shift"):
        AdaptiveNorm(kind(axes=2))


def test_another_norm_is_refused():
    with pytest.raises(TypeError, match=r"AdaptiveNorm takes a LayerNorm or RMSNorm; got a GroupNorm\."):
        AdaptiveNorm(GroupNorm(1))


@KINDS
@pytest.mark.parametrize("name", ["scale", "shift"])
@pytest.mark.parametrize("shape", [(7,), (4, 6), (3, 7), (1, 7), (4, 1, 7), (4, 3, 7)])
def test_a_condition_that_does_not_fit_the_samples_is_refused(kind, name, shape):
    condition = {"scale": np.ones((4, 7)), "shift": np.ones((4, 7)), name: np.ones(shape)}
    message = f"AdaptiveNorm: x has shape (4, 3, 7), {name} {shape}. They take (samples, ..., features) and (samples,"
    with pytest.raises(ValueError, match=re.escape(message)):
        AdaptiveNorm(kind()).forward(np.ones((4, 3, 7)), **condition)


def test_a_row_without_a_sample_axis_is_refused():
    with pytest.raises(ValueError, match=r"AdaptiveNorm: x has shape \(7,\), scale \(7, 7\)\. They take"):
        AdaptiveNorm(RMSNorm()).forward(np.ones(7), np.ones((7, 7)), np.ones((7, 7)))


def test_a_condition_of_integers_is_refused():
    with pytest.raises(TypeError, match=r"AdaptiveNorm works on float16.*; shift is int64"):
        AdaptiveNorm(RMSNorm()).forward(np.ones((4, 7)), np.ones((4, 7)), np.ones((4, 7), "int64"))


def test_a_gradient_of_another_shape_is_refused():
    layer = AdaptiveNorm(RMSNorm())
    _, saved = layer.forward(np.ones((4, 7)), np.ones((4, 7)), np.ones((4, 7)))
    with pytest.raises(ValueError, match=r"AdaptiveNorm: dy has shape \(3, 7\), and the x that was saved \(4, 7\)"):
        layer.backward(np.ones((3, 7)), saved)


def test_many_samples_take_no_longer_than_their_rows():
    rng = np.random.default_rng(11)
    x = rng.standard_normal((8192, 512)).astype("float32")
    adaptive, plain = AdaptiveNorm(RMSNorm()), RMSNorm()
    times = {}
    for name, run in (("plain", lambda: plain.forward(x)), ("adaptive", lambda: adaptive.forward(x, x, x))):
        times[name] = min(timeit.repeat(run, number=1, repeat=3))
    assert times["adaptive"] < 8 * times["plain"]  # each block once converted all samples: 40 times
