import numpy as np
import pytest
import torch

from npnorm.training import clip, global_norm
from npnorm.tree import leaves


def gradients(scale=1.0):
    rng = np.random.default_rng(0)
    return {"a": {"b": scale * rng.normal(size=(3, 4))}, "c": scale * rng.normal(size=5)}


NO_SHARDS = {"a": {"b": None}, "c": None}


@pytest.mark.parametrize("limit", [0.5, 100.0])
def test_norm_and_clipping_equal_torch(limit):
    grads = gradients()
    tensors = [torch.zeros(g.shape, dtype=torch.float64, requires_grad=True) for _, g in leaves(grads)]
    for tensor, (_, g) in zip(tensors, leaves(grads), strict=True):
        tensor.grad = torch.tensor(g)
    expected = float(torch.nn.utils.clip_grad_norm_(tensors, limit))
    norm = global_norm(grads, NO_SHARDS)
    assert norm == pytest.approx(expected, rel=1e-14)
    for tensor, (_, g) in zip(tensors, leaves(clip(grads, norm, limit)), strict=True):
        np.testing.assert_allclose(g, tensor.grad, rtol=1e-5)  # torch divides by norm + 1e-6


def test_the_clipped_norm_is_the_limit():
    grads = gradients()
    clipped = clip(grads, global_norm(grads, NO_SHARDS), 0.25)
    assert global_norm(clipped, NO_SHARDS) == pytest.approx(0.25, rel=1e-14)


def test_gradients_below_the_limit_are_left_alone():
    grads = gradients()
    assert clip(grads, global_norm(grads, NO_SHARDS), 1e3) is grads


def test_squares_of_float32_do_not_overflow():
    assert global_norm({"p": np.array([3e30, 4e30], np.float32)}, {"p": None}) == pytest.approx(5e30, rel=1e-6)


def test_leaves_meet_by_name_whatever_their_order():
    grads = {"bias": np.array([3.0]), "weight": np.array([4.0])}
    assert global_norm(grads, {"weight": 0, "bias": None}) == 5.0
    with pytest.raises(KeyError):
        global_norm(grads, {"weight": 0})


def test_a_large_array_is_squared_in_blocks():
    g = np.random.default_rng(1).normal(size=(3, 50_000)).astype("float32")
    assert global_norm({"p": g}, {"p": None}) == pytest.approx(float(np.linalg.norm(g.astype("float64"))), rel=1e-14)
    assert global_norm({"p": np.zeros((0, 3))}, {"p": None}) == 0
