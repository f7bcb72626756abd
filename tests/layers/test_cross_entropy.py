import math
import re

import numpy as np
import pytest
import torch

from npnorm.blocks import Chain
from npnorm.layers import CrossEntropy
from tests.check import WithLoss, check_backward, check_finite_differences, close, same_bits


def loss_of(targets):
    return lambda _: WithLoss(Chain({}), targets)


def test_two_rows_worked_by_hand():
    # p = (1, 2, 5) / 8 with target 1, and (1, 1, 2) / 4 with target 0: loss = (log 4 + log 4) / 2
    logits = np.log(np.array([[1.0, 2.0, 5.0], [1.0, 1.0, 2.0]]))
    loss, saved = CrossEntropy().forward(logits, np.array([1, 0]))
    close(loss, math.log(4), 1e-15)
    # dx = d (p - onehot) / 2
    dx = CrossEntropy().backward(16.0, saved)
    close(dx, [[1, -6, 5], [-6, 2, 4]], 1e-15)


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 5)])
def test_backward_is_the_derivative(shape):
    rng = np.random.default_rng(1)
    targets = np.asarray(rng.integers(0, shape[-1], shape[:-1]))
    check_backward(loss_of(targets), {}, 2 * rng.standard_normal(shape), rng)


def test_backward_agrees_with_finite_differences():
    rng = np.random.default_rng(2)
    check_finite_differences(loss_of(rng.integers(0, 4, (2, 3))), {}, rng.standard_normal((2, 3, 4)), rng)


def test_torch_gives_the_same():
    rng = np.random.default_rng(3)
    logits, targets = 3 * rng.standard_normal((3, 4, 7)), rng.integers(0, 7, (3, 4))
    tensor = torch.tensor(logits, requires_grad=True)
    expected = torch.nn.functional.cross_entropy(tensor.flatten(0, 1), torch.tensor(targets).flatten())
    (1.7 * expected).backward()
    loss, saved = CrossEntropy().forward(logits, targets)
    close(loss, expected.detach())
    close(CrossEntropy().backward(1.7, saved), tensor.grad)


def test_equal_logits_cost_the_log_of_the_vocabulary():
    loss, _ = CrossEntropy().forward(np.full((3, 4, 50), 2.5), np.random.default_rng(4).integers(0, 50, (3, 4)))
    close(loss, math.log(50), 1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_huge_logits_stay_finite(dtype):
    logits = np.array([[1e4, -1e4, 0], [1e4, 1e4 - 1, -1e4]], dtype)
    loss, saved = CrossEntropy().forward(logits, np.array([1, 0]))
    close(loss, (2e4 + math.log1p(math.exp(-1))) / 2, 1e-7)
    p = 1 / (1 + math.exp(-1))
    close(CrossEntropy().backward(2.0, saved), [[1, -1, 0], [p - 1, 1 - p, 0]], 1e-6)
    assert loss.dtype == dtype


def test_a_shift_of_a_row_changes_nothing():
    rng = np.random.default_rng(5)
    logits, targets = rng.integers(-100, 100, (3, 6)) / 2.0**4, rng.integers(0, 6, 3)
    same_bits(CrossEntropy().forward(logits + 512, targets)[0], CrossEntropy().forward(logits, targets)[0])


def test_the_gradient_of_each_row_sums_to_zero():
    rng = np.random.default_rng(6)
    _, saved = CrossEntropy().forward(rng.standard_normal((5, 9)), rng.integers(0, 9, 5))
    dx = CrossEntropy().backward(5.0, saved)
    close(1 + dx.sum(axis=-1), np.ones(5), 1e-15)
    assert np.sum(dx < 0, axis=-1).tolist() == [1] * 5  # only the target's


def test_a_nan_is_not_hidden():
    rng = np.random.default_rng(7)
    logits, targets = rng.standard_normal((3, 5)), np.array([0, 4, 2])
    logits[1, 2] = np.nan
    loss, saved = CrossEntropy().forward(logits, targets)
    assert np.isnan(loss)
    dx = CrossEntropy().backward(1.5, saved)
    assert np.isnan(dx).all(axis=-1).tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_targets_of_any_integer_dtype_are_the_same(dtype):
    rng = np.random.default_rng(8)
    logits, targets = rng.standard_normal((3, 300)), rng.integers(0, 256, 3)
    same_bits(CrossEntropy().forward(logits, targets.astype(dtype))[0], CrossEntropy().forward(logits, targets)[0])


def test_the_gradient_keeps_the_dtype_of_the_logits():
    rng = np.random.default_rng(9)
    loss, saved = CrossEntropy().forward(rng.standard_normal((3, 4)).astype("float32"), rng.integers(0, 4, 3))
    assert loss.dtype == CrossEntropy().backward(1.5, saved).dtype == np.float32


@pytest.mark.parametrize("shape", [(2,), (3, 4), (3, 1), ()])
def test_targets_of_another_shape_are_refused(shape):
    message = f"CrossEntropy: logits (3, 4) need targets of shape (3,), at least one; got {shape}."
    with pytest.raises(ValueError, match=re.escape(message)):
        CrossEntropy().forward(np.ones((3, 4)), np.zeros(shape, int))


@pytest.mark.parametrize(("targets", "came"), [([0, 1, 4], "0 to 4"), ([-1, 0, 1], "-1 to 1")])
def test_targets_outside_the_vocabulary_are_refused(targets, came):
    with pytest.raises(ValueError, match=f"CrossEntropy takes integers from 0 to 3; got {came}"):
        CrossEntropy().forward(np.ones((3, 4)), np.array(targets))


def test_targets_that_are_not_integers_are_refused():
    with pytest.raises(TypeError, match="CrossEntropy takes integers from 0 to 3; got float64"):
        CrossEntropy().forward(np.ones((3, 4)), np.zeros(3))


def test_logits_that_are_not_floats_are_refused():
    with pytest.raises(TypeError, match="CrossEntropy works in float32 or float64; the dtype of logits is int64"):
        CrossEntropy().forward(np.ones((3, 4), int), np.zeros(3, int))


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"got a list.*numpy\.asarray"):
        CrossEntropy().forward([[1.0, 2.0]], np.array([0]))
    with pytest.raises(TypeError, match=r"got a list.*numpy\.asarray"):
        CrossEntropy().forward(np.array([[1.0, 2.0]]), [0])


def test_a_single_logit_is_refused():
    with pytest.raises(ValueError, match="CrossEntropy"):
        CrossEntropy().forward(np.array(1.0), np.array(0))


def test_no_targets_are_refused():
    with pytest.raises(ValueError, match=r"need targets of shape \(0,\), at least one"):
        CrossEntropy().forward(np.zeros((0, 4)), np.zeros(0, int))


@pytest.mark.parametrize("dloss", [1.0, np.float64(0.5), 1 / np.int64(4), np.float32(2)])
def test_a_gradient_of_any_type_leaves_the_logits_dtype(dloss):
    logits = np.random.default_rng(21).standard_normal((3, 4)).astype("float32")
    _, saved = CrossEntropy().forward(logits, np.array([0, 3, 1]))
    dx = CrossEntropy().backward(dloss, saved)
    assert dx.dtype == np.float32
    np.testing.assert_allclose(dx, CrossEntropy().backward(1.0, saved) * float(dloss), rtol=1e-6)
