import operator
import re

import numpy as np
import pytest
import torch

from npnorm import GroupNorm, InstanceNorm, LayerNorm
from npnorm.tree import map_tree
from tests.check import BFLOAT16, close, exact_norm, rounded, same_bits

AFFINE = pytest.mark.parametrize("names", [(), ("weight",), ("bias",), ("weight", "bias")], ids="+".join)
NARROW = pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)


def draw(rng, names, channels, dtype="float64"):
    return {name: rng.standard_normal(channels).astype(dtype) for name in names}


def run(layer, x, dy):
    """Return everything that comes out, as a tree."""
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    return {"y": y, "dx": dx, **grads}


def data(tree):
    """Return what the samples have of a tree of `run`."""
    return {"y": tree["y"], "dx": tree["dx"]}


def exact_group_norm(groups, x, w, b, eps, dy):
    """Return the tree of `run` in float64: each group of each sample is a row of the norm in sixty digits."""
    rows = (x.shape[0] * groups, -1)
    channels = (1, -1, *[1] * (x.ndim - 2))
    wide = [np.broadcast_to(a, x.shape).astype("float64") for a in (x, w.reshape(channels), b.reshape(channels), dy)]
    x, w, b, dy = (a.reshape(rows) for a in wide)
    y, dx, _, _ = exact_norm(x, w, b, eps, dy, centred=True)
    z = exact_norm(x, np.ones_like(x), np.zeros_like(x), eps, dy, centred=True)[0]
    shape, over = wide[0].shape, (0, *range(2, wide[0].ndim))
    dw, db = (a.reshape(shape).sum(axis=over) for a in (dy * z, dy))
    return {"y": y.reshape(shape), "dx": dx.reshape(shape), "weight": dw, "bias": db}


def test_two_groups_worked_by_hand():
    # channels 0 and 1: mean 3, c = (-3, -1, 1, 3), var = 5, rstd = 1 / sqrt(5 + 11) = 1/4
    # channels 2 and 3: mean 10, c = (-9, -5, 5, 9), var = 53, rstd = 1 / sqrt(53 + 11) = 1/8
    x = np.array([[0.0, 2.0], [4.0, 6.0], [1.0, 5.0], [15.0, 19.0]])
    w, b = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.0, 1.0, -1.0, 2.0])
    layer = GroupNorm(2, w, b, eps=11)
    y, saved = layer.forward(np.stack([x, x - 8]))  # the shift of the second sample changes nothing
    expected = [[-3 / 4, -1 / 4], [3 / 2, 5 / 2], [-11 / 2, -7 / 2], [7, 11]]
    np.testing.assert_array_equal(y, [expected, expected])
    # dz = (4, 0, 4, -2), mean(dz) = 3/2, mean(dz z) = (-3 + 0 + 1 - 3/2) / 4 = -7/8
    # dz = (4, 8, 0, 8), mean(dz) = 5, mean(dz z) = (-9/2 - 5 + 0 + 9) / 4 = -1/8
    dy = np.array([[4.0, 0.0], [2.0, -1.0], [1.0, 2.0], [0.0, 1.0]])
    dx, grads = layer.backward(np.stack([dy, 2 * dy]), saved)
    expected = np.array([[59 / 128, -55 / 128], [87 / 128, -91 / 128], [-73 / 512, 187 / 512], [-315 / 512, 201 / 512]])
    np.testing.assert_array_equal(dx, [expected, 2 * expected])
    np.testing.assert_array_equal(grads["weight"], [3 * -3, 3 * -1 / 4, 3 * -19 / 8, 3 * 9 / 8])
    np.testing.assert_array_equal(grads["bias"], [3 * 4, 3 * 1, 3 * 3, 3 * 1])


@AFFINE
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("shape", [(5, 12), (3, 6, 7), (2, 6, 3, 5), (2, 6, 3, 4, 5)])
def test_torch_gives_the_same(names, groups, shape):
    rng = np.random.default_rng(1)
    x, dy, params = rng.standard_normal(shape) + 3, rng.standard_normal(shape), draw(rng, names, shape[1])
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in {"x": x, **params}.items()}
    w = tensors.get("weight", torch.ones(shape[1], dtype=torch.float64))  # torch takes no bias without a weight
    theirs = torch.nn.functional.group_norm(tensors["x"], groups, w, tensors.get("bias"), eps=0.1)
    theirs.backward(torch.tensor(dy))
    came = run(GroupNorm(groups, **params, eps=0.1), x, dy)
    close(came["y"], theirs.detach())
    close(came["dx"], tensors["x"].grad)
    for name in names:
        close(came[name], tensors[name].grad)


def test_the_default_eps_is_that_of_torch():
    x = np.random.default_rng(2).standard_normal((2, 4, 3)) * 0.01
    close(GroupNorm(2).forward(x)[0], torch.nn.GroupNorm(2, 4, affine=False)(torch.tensor(x)))


@pytest.mark.parametrize("space", [(), (4,), (3, 5)])
def test_one_group_is_layer_norm_over_channels_and_space_with_a_weight_for_each_channel(space):
    rng = np.random.default_rng(3)
    x, dy, params = rng.standard_normal((3, 6, *space)), rng.standard_normal((3, 6, *space)), draw(rng, ("weight",), 6)
    each = np.broadcast_to(params["weight"].reshape(6, *[1] * len(space)), (6, *space))
    came, expected = run(GroupNorm(1, **params), x, dy), run(LayerNorm(each, eps=1e-5), x, dy)
    close(came["y"], expected["y"])
    close(came["dx"], expected["dx"])
    close(came["weight"], expected["weight"].reshape(6, -1).sum(axis=-1))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_as_many_groups_as_channels_are_instance_norm_to_the_bit(dtype):
    rng = np.random.default_rng(4)
    x, dy = (rng.standard_normal((3, 6, 4, 5)).astype(dtype) for _ in range(2))
    params = draw(rng, ("weight", "bias"), 6, dtype)
    same_bits(run(GroupNorm(6, **params, eps=0.1), x, dy), run(InstanceNorm(**params, eps=0.1), x, dy))


def test_a_group_is_neighbouring_channels():
    x = np.array([[1.0, 3.0, 10.0, 30.0, 500.0, 100.0]])
    np.testing.assert_array_equal(GroupNorm(3, eps=0).forward(x)[0], [[-1, 1, -1, 1, 1, -1]])


def test_samples_do_not_see_each_other():
    rng = np.random.default_rng(5)
    x, dy, order = rng.standard_normal((6, 4, 5)), rng.standard_normal((6, 4, 5)), rng.permutation(6)
    layer = GroupNorm(2, **draw(rng, ("weight", "bias"), 4))
    came, expected = run(layer, x[order], dy[order]), run(layer, x, dy)
    same_bits(data(came), map_tree(lambda a: a[order], data(expected)))
    alone = run(layer, x[2:3], dy[2:3])
    same_bits(data(alone), map_tree(lambda a: a[2:3], data(expected)))


def test_groups_do_not_see_each_other():
    rng = np.random.default_rng(6)
    x, dy, params = rng.standard_normal((3, 6, 5)), rng.standard_normal((3, 6, 5)), draw(rng, ("weight", "bias"), 6)
    whole = run(GroupNorm(3, **params), x, dy)
    for first in (0, 2, 4):
        s = slice(first, first + 2)
        mine = run(GroupNorm(1, **{name: a[s] for name, a in params.items()}), x[:, s], dy[:, s])
        same_bits(data(mine), map_tree(operator.itemgetter((slice(None), s)), data(whole)))
        close(mine["weight"], whole["weight"][s], 1e-14)


def test_each_group_of_each_sample_may_be_shifted_and_scaled_on_its_own():
    rng = np.random.default_rng(7)
    x = rng.integers(-4000, 4000, (3, 6, 5)) / 2.0**10
    shift, scale = rng.integers(-1000, 1000, (3, 2, 1, 1)), 2.0 ** rng.integers(-9, 9, (3, 2, 1, 1))
    changed = ((x.reshape(3, 2, 3, 5) + shift) * scale).reshape(x.shape)
    close(GroupNorm(2, eps=0).forward(changed)[0], GroupNorm(2, eps=0).forward(x)[0], 1e-14)


@NARROW
@pytest.mark.parametrize("size", [0.01, 1.0, 300.0])
def test_narrow_floats_are_rounded_once(dtype, size):
    rng = np.random.default_rng(8)
    x = (rng.standard_normal((3, 4, 5)) * size + size).astype(dtype)
    dy = rng.standard_normal((3, 4, 5)).astype(dtype)
    params = draw(rng, ("weight", "bias"), 4, dtype)
    came = run(GroupNorm(2, **params), x, dy)
    expected = exact_group_norm(2, x, params["weight"], params["bias"], 1e-5, dy)
    same_bits(came, map_tree(lambda a: rounded(a, dtype), expected))


@pytest.mark.parametrize(
    ("dtype", "size", "eps"),
    [("float32", 1e-40, 1e-5), ("float32", 1e37, 1e-5), ("float64", 1e-200, 0), ("float64", 1e300, 0)],
)
def test_the_whole_range_is_right(dtype, size, eps):
    rng = np.random.default_rng(9)
    x, dy = ((rng.uniform(-3, 3, (2, 4, 3)) * s).astype(dtype) for s in (size, 1))
    params = draw(rng, ("weight", "bias"), 4, dtype)
    came = run(GroupNorm(2, **params, eps=eps), x, dy)
    expected = exact_group_norm(2, x, params["weight"], params["bias"], eps, dy)
    for name in came:
        right = expected[name]
        if dtype == "float32":
            same_bits(came[name], right.astype(dtype))
        else:
            close(came[name], right, 1e-14)


@pytest.mark.parametrize("value", [0.0, 0.1, -1.1e7, 1.1e200, 1.1e-300])
@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 1), (2, 6, 7, 3)])
def test_constant_groups_give_the_bias(value, shape):
    rng = np.random.default_rng(10)
    params, dy = draw(rng, ("weight", "bias"), 6), rng.standard_normal(shape)
    layer, channels = GroupNorm(3, **params), (6, *[1] * (len(shape) - 2))
    y, saved = layer.forward(np.full(shape, value))
    np.testing.assert_array_equal(y, np.broadcast_to(params["bias"].reshape(channels), shape))
    dz = (dy * params["weight"].reshape(channels)).reshape(2, 3, -1)
    dx, _ = layer.backward(dy, saved)
    close(dx, ((dz - dz.mean(axis=-1, keepdims=True)) / np.sqrt(1e-5)).reshape(shape))


def test_a_group_of_one_element_gives_the_bias_and_no_gradient():
    rng = np.random.default_rng(11)
    params = draw(rng, ("weight", "bias"), 4)
    came = run(GroupNorm(4, **params), rng.standard_normal((3, 4)), rng.standard_normal((3, 4)))
    np.testing.assert_array_equal(came["y"], np.stack([params["bias"]] * 3))
    np.testing.assert_array_equal(came["dx"], np.zeros((3, 4)))
    np.testing.assert_array_equal(came["weight"], np.zeros(4))


def test_an_empty_batch_has_empty_results_and_no_gradient():
    layer = GroupNorm.init(2, 6, "float64")
    came = run(layer, np.ones((0, 6, 3)), np.ones((0, 6, 3)))
    assert came["y"].shape == came["dx"].shape == (0, 6, 3)
    same_bits({name: came[name] for name in layer.params}, map_tree(np.zeros_like, layer.params))


def test_init_makes_ones_and_zeros():
    layer = GroupNorm.init(2, 4, "float16", eps=0.5)
    same_bits(layer.params, {"weight": np.ones(4, "float16"), "bias": np.zeros(4, "float16")})
    assert layer.forward(np.array([[1.0, -1.0, 2.0, 2.0]]))[0][0, 0] == 1 / np.sqrt(1.5)
    assert GroupNorm.init(2, 4).params["weight"].dtype == np.float32


def test_parameters_are_held_as_they_came():
    w = np.random.default_rng(12).standard_normal(4)
    assert GroupNorm(2, w).params["weight"] is w
    assert GroupNorm(2, w).shards == {"weight": None}
    assert GroupNorm(2).params == {}


@pytest.mark.parametrize("groups", [0, -2, 1.5, "2", None, True])
def test_a_number_of_groups_that_is_no_count_is_refused(groups):
    with pytest.raises(ValueError, match=re.escape(f"GroupNorm: groups is {groups!r}. It must be an integer, 1 or")):
        GroupNorm(groups, np.ones(4))


def test_groups_that_do_not_divide_the_channels_are_refused():
    message = "GroupNorm: 4 groups cannot share 6 channels equally"
    with pytest.raises(ValueError, match=message):
        GroupNorm(4, np.ones(6))
    with pytest.raises(ValueError, match=message):
        GroupNorm(4).forward(np.ones((2, 6, 3)))


@pytest.mark.parametrize("shape", [(3, 5, 2), (4,), (), (3, 4, 0)])
def test_an_input_of_another_shape_is_refused(shape):
    message = f"GroupNorm holds 4 channels; x has shape {shape}. It takes (N, C, ...) with nothing empty but N; axis 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        GroupNorm(2, np.ones(4)).forward(np.ones(shape))


def test_parameters_of_two_axes_are_refused():
    with pytest.raises(ValueError, match=r"GroupNorm: each parameter must have shape \(channels,\).*weight \(4, 1\)"):
        GroupNorm(2, np.ones((4, 1)))


def test_a_gradient_of_another_shape_is_refused():
    layer = GroupNorm(2, np.ones(4))
    _, saved = layer.forward(np.ones((2, 4, 3)))
    message = "GroupNorm: dy has shape (2, 4, 1), and the x that was saved (2, 4, 3). Hand backward the gradient of"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.backward(np.ones((2, 4, 1)), saved)


def test_what_another_layer_saved_is_refused():
    _, saved = LayerNorm().forward(np.ones((2, 4)))
    with pytest.raises(TypeError, match=r"takes what GroupNorm\.forward saved; got npnorm\.norms\.layer_norm\.Saved"):
        GroupNorm(2).backward(np.ones((2, 4)), saved)
