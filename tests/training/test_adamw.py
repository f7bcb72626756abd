import numpy as np
import pytest
import torch

from npnorm.threads import set_threads
from npnorm.training import AdamW
from npnorm.training.adamw import BLOCK
from tests.check import same_bits


def test_ten_steps_equal_torch():
    rng = np.random.default_rng(0)
    matrix, vector = rng.normal(size=(3, 5)), rng.normal(size=4)
    params = {"a": {"matrix": matrix.copy()}, "vector": vector.copy()}
    ours = AdamW(params, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    theirs = [torch.tensor(matrix, requires_grad=True), torch.tensor(vector, requires_grad=True)]
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.95), eps=1e-6)
    for step in range(10):
        grads = rng.normal(size=(3, 5)), rng.normal(size=4)
        for tensor, grad in zip(theirs, grads, strict=True):
            tensor.grad = torch.tensor(grad)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()
        ours.step({"a": {"matrix": grads[0]}, "vector": grads[1]}, lr=0.1 / (step + 1))
    np.testing.assert_allclose(params["a"]["matrix"], theirs[0].detach(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(params["vector"], theirs[1].detach(), rtol=1e-12, atol=1e-14)


def test_the_first_step_by_hand():
    # g = 2: m / c1 = 2, v / c2 = 4, so that the step is lr 2 / (2 + 0) = lr; no decay for a vector.
    params = {"p": np.array([1.0])}
    AdamW(params, eps=0.0, weight_decay=0.5).step({"p": np.array([2.0])}, lr=0.25)
    np.testing.assert_allclose(params["p"], [0.75], rtol=1e-15)


def test_float32_parameters_stay_float32_and_grads_unchanged():
    params, grads = {"p": np.ones((2, 3), np.float32)}, {"p": np.full((2, 3), 0.5, np.float32)}
    AdamW(params).step(grads, lr=0.1)
    assert params["p"].dtype == np.float32
    np.testing.assert_array_equal(grads["p"], np.full((2, 3), 0.5, np.float32))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_arrays_are_updated_in_blocks_to_the_same_bits(threads):
    rng = np.random.default_rng(1)
    start, grad = (rng.normal(size=(3, BLOCK // 2 + 5)).astype("float32") for _ in range(2))
    whole, rows = {"p": start.copy()}, {str(i): start[i : i + 1].copy() for i in range(3)}
    optimizers = AdamW(whole), AdamW(rows)
    set_threads(threads)
    try:
        for _ in range(2):
            optimizers[0].step({"p": grad}, lr=0.1)
            optimizers[1].step({str(i): grad[i : i + 1] for i in range(3)}, lr=0.1)
    finally:
        set_threads(None)
    same_bits(whole["p"], np.concatenate(list(rows.values())))


def test_arrays_that_are_views_are_updated_in_place():
    table = np.ones((4, 6))
    AdamW({"columns": table[:, ::2], "rows": table[1:2, 1:2]}).step(
        {"columns": np.ones((4, 3)), "rows": np.ones((1, 1))}, lr=0.1
    )
    assert np.all(table[:, ::2] < 1)
    assert table[1, 1] < 1
    assert np.sum(table == 1) == 11


def test_gradients_meet_their_parameters_by_name():
    params = {"a": np.zeros(2), "b": np.zeros(2)}
    AdamW(params, weight_decay=0).step({"b": np.ones(2), "a": -np.ones(2)}, lr=0.1)
    np.testing.assert_allclose(params["a"], [0.1, 0.1], rtol=1e-7)
    np.testing.assert_allclose(params["b"], [-0.1, -0.1], rtol=1e-7)
