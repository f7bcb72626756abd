import time
import timeit
import tracemalloc
from functools import partial

import numpy as np
import pytest

from npnorm import AdaptiveNorm, LayerNorm, RMSNorm
from tests.check import BFLOAT16, close, draw, same_bits

KINDS = pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])


def arrays(seed):
    """Return x, dy, scale, shift."""
    return draw(np.random.default_rng(seed), x=(4, 3, 7), dy=(4, 3, 7), scale=(4, 7), shift=(4, 7)).values()


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
def test_a_sample_is_a_norm_with_weight_and_bias_of_its_own(kind):
    x, dy, scale, shift = arrays(2)
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
    x, _, scale, _ = arrays(3)
    zeros = np.zeros_like(scale)
    same_bits(AdaptiveNorm(kind(eps=0.1)).forward(x, zeros, zeros)[0], kind(eps=0.1).forward(x)[0])


@KINDS
def test_samples_do_not_see_each_other(kind):
    x, dy, scale, shift = arrays(4)
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
    x, dy, scale, shift = arrays(5)
    layer = AdaptiveNorm(kind())
    y, saved = layer.forward(x.astype(BFLOAT16), scale.astype("float32"), shift)
    (dx, dscale, dshift), _ = layer.backward(dy.astype(BFLOAT16), saved)
    assert y.dtype == dx.dtype == BFLOAT16
    assert dscale.dtype == np.float32
    assert dshift.dtype == np.float64


@KINDS
@pytest.mark.parametrize("size", [1e-300, 1e200])
def test_rows_whose_squares_leave_the_range(kind, size):
    x, dy, scale, shift = arrays(6)
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


def test_four_times_the_samples_take_about_four_times_as_long():
    x = np.random.default_rng(11).standard_normal((8192, 512)).astype("float32")
    layer, times = AdaptiveNorm(RMSNorm()), []
    for part in (x[:2048], x):
        call = partial(layer.forward, part, part, part)
        times.append(min(timeit.repeat(call, number=1, repeat=5, timer=time.process_time)))
    assert times[1] < 10 * times[0]  # each block once converted all samples: 16 times


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 100])
def test_blocks_may_hold_parts_of_samples_or_several(rows, monkeypatch):
    x, dy, scale, shift = (a.astype("float32") for a in arrays(12))
    layer, found = AdaptiveNorm(LayerNorm()), []
    for block in (None, 8 * 7 * rows):
        if block:
            monkeypatch.setattr("npnorm.engine.rows.EXACT_BLOCK", block)
        y, saved = layer.forward(x, scale, shift)
        found.append((y, *layer.backward(dy, saved)[0]))
    for i, (whole, parts) in enumerate(zip(*found, strict=True)):
        if i < 2:  # y and dx
            same_bits(parts, whole)
        else:
            close(parts, whole, 1e-6)


def test_the_gradients_of_scale_and_shift_take_little_memory():
    x = np.random.default_rng(13).standard_normal((4, 512, 512), dtype="float32")
    layer, condition = AdaptiveNorm(LayerNorm()), x[:, 0]
    _, saved = layer.forward(x, condition, condition)
    tracemalloc.start()
    (dx, _, _), _ = layer.backward(x, saved)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - dx.nbytes < 16 * 2**20  # the terms of both sums are 16 MiB
