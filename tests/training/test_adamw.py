import numpy as np
import torch

from npnorm.training import AdamW


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
