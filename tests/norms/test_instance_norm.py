import operator
import re

import numpy as np
import pytest
import torch

from npnorm import InstanceNorm
from npnorm.tree import map_tree
from tests.check import BFLOAT16, close, exact_norm, rounded, same_bits

NARROW = pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)


def draw(rng, names, channels, dtype="float64"):
    return {name: rng.standard_normal(channels).astype(dtype) for name in names}


def run(layer, x, dy):
    """Return everything that comes out, as a tree."""
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    return {"y": y, "dx": dx, **grads}


def test_two_channels_worked_by_hand():
    # c = (-3, -1, 1, 3), var = 5, rstd = 1 / sqrt(5 + 11) = 1/4; c = (-9, -5, 5, 9), var = 53, rstd = 1/8
    x = np.array([[[0.0, 2.0, 4.0, 6.0], [1.0, 5.0, 15.0, 19.0]]])
    layer = InstanceNorm(np.array([2.0, -4.0]), np.array([1.0, 3.0]), eps=11)
    y, saved = layer.forward(x)
    np.testing.assert_array_equal(y, [[[-1 / 2, 1 / 2, 3 / 2, 5 / 2], [15 / 2, 11 / 2, 1 / 2, -3 / 2]]])
    # dz = (8, 0, 4, -4), mean 2; mean(dz z) = (-6 + 0 + 1 - 3) / 4 = -2
    # dz = (-4, -8, 0, -4), mean -4; mean(dz z) = (9/2 + 5 + 0 - 9/2) / 4 = 5/4
    dx, grads = layer.backward(np.array([[[4.0, 0.0, 2.0, -2.0], [1.0, 2.0, 0.0, 1.0]]]), saved)
    expected = [[[9 / 8, -5 / 8, 5 / 8, -9 / 8], [45 / 256, -103 / 256, 103 / 256, -45 / 256]]]
    np.testing.assert_array_equal(dx, expected)
    np.testing.assert_array_equal(grads["weight"], [-4, -5 / 4])
    np.testing.assert_array_equal(grads["bias"], [4, 4])


@pytest.mark.parametrize("names", [(), ("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("shape", [(3, 6, 7), (2, 6, 3, 5), (2, 4, 3, 2, 5)])
def test_torch_gives_the_same(names, shape):
    rng = np.random.default_rng(1)
    x, dy, params = rng.standard_normal(shape) + 3, rng.standard_normal(shape), draw(rng, names, shape[1])
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in {"x": x, **params}.items()}
    affine = {name: tensors[name] for name in names}
    theirs = torch.nn.functional.instance_norm(tensors["x"], **affine, eps=0.1)
    theirs.backward(torch.tensor(dy))
    came = run(InstanceNorm(**params, eps=0.1), x, dy)
    close(came["y"], theirs.detach())
    close(came["dx"], tensors["x"].grad)
    for name in names:
        close(came[name], tensors[name].grad)


def test_the_default_eps_is_that_of_torch():
    x = np.random.default_rng(2).standard_normal((2, 4, 3)) * 0.01
    close(InstanceNorm().forward(x)[0], torch.nn.InstanceNorm1d(4)(torch.tensor(x)))


def test_channels_and_samples_do_not_see_each_other():
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, 3, 2, 5, 4))
    whole = run(InstanceNorm(), x, dy)
    for sample in range(3):
        for channel in range(2):
            one = (slice(sample, sample + 1), slice(channel, channel + 1))
            mine = run(InstanceNorm(), x[one], dy[one])
            same_bits(mine, map_tree(operator.itemgetter(one), whole))


@NARROW
def test_narrow_floats_are_rounded_once(dtype):
    rng = np.random.default_rng(4)
    x, dy = (rng.standard_normal((2, 3, 4, 5)).astype(dtype) for _ in range(2))
    came = run(InstanceNorm(), x, dy)
    rows, one, zero = (6, 20), np.ones(20), np.zeros(20)
    y, dx, _, _ = exact_norm(x.reshape(rows), one, zero, 1e-5, dy.reshape(rows), centred=True)
    same_bits(came, map_tree(lambda a: rounded(a.reshape(x.shape), dtype), {"y": y, "dx": dx}))


def test_a_constant_channel_gives_the_bias():
    rng = np.random.default_rng(5)
    params, dy = draw(rng, ("weight", "bias"), 3), rng.standard_normal((2, 3, 7))
    came = run(InstanceNorm(**params), np.full((2, 3, 7), 0.1), dy)
    np.testing.assert_array_equal(came["y"], np.broadcast_to(params["bias"][:, None], (2, 3, 7)))
    dz = dy * params["weight"][:, None]
    close(came["dx"], (dz - dz.mean(axis=-1, keepdims=True)) / np.sqrt(1e-5))


def test_an_empty_batch_has_empty_results_and_no_gradient():
    layer = InstanceNorm.init(6, "float64")
    came = run(layer, np.ones((0, 6, 3)), np.ones((0, 6, 3)))
    assert came["y"].shape == came["dx"].shape == (0, 6, 3)
    same_bits({name: came[name] for name in layer.params}, map_tree(np.zeros_like, layer.params))


def test_init_makes_ones_and_zeros():
    layer = InstanceNorm.init(3, "float16", eps=0.5)
    same_bits(layer.params, {"weight": np.ones(3, "float16"), "bias": np.zeros(3, "float16")})
    assert layer.forward(np.array([[[1.0, -1.0]] * 3]))[0][0, 0, 0] == 1 / np.sqrt(1.5)
    assert InstanceNorm.init(3).params["weight"].dtype == np.float32


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 1), (1, 3, 1, 1)])
def test_one_element_of_space_is_refused(shape):
    message = f"InstanceNorm takes (N, C, ...) with more than one element of space; x has shape {shape}."
    with pytest.raises(ValueError, match=re.escape(message)):
        InstanceNorm(np.ones(3)).forward(np.ones(shape))


@pytest.mark.parametrize("shape", [(2, 4, 5), (3,), (2, 3, 0)])
def test_an_input_of_another_shape_is_refused(shape):
    message = f"InstanceNorm holds 3 channels; x has shape {shape}. It takes (N, C, ...) with nothing empty but N"
    with pytest.raises(ValueError, match=re.escape(message)):
        InstanceNorm(np.ones(3)).forward(np.ones(shape))
