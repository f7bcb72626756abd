import operator

import numpy as np
import pytest

from npnorm import GroupNorm, InstanceNorm, LayerNorm
from npnorm.tree import map_tree
from tests.check import close, draw, run, same_bits


def data(tree):
    """Return what the samples have of a tree of `run`."""
    return {"y": tree["y"], "dx": tree["dx"]}


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


@pytest.mark.parametrize("space", [(), (4,), (3, 5)])
def test_one_group_is_layer_norm_over_channels_and_space_with_a_weight_for_each_channel(space):
    rng = np.random.default_rng(3)
    x, dy, params = rng.standard_normal((3, 6, *space)), rng.standard_normal((3, 6, *space)), draw(rng, weight=6)
    each = np.broadcast_to(params["weight"].reshape(6, *[1] * len(space)), (6, *space))
    came, expected = run(GroupNorm(1, **params), x, dy), run(LayerNorm(each, eps=1e-5), x, dy)
    close(came["y"], expected["y"])
    close(came["dx"], expected["dx"])
    close(came["weight"], expected["weight"].reshape(6, -1).sum(axis=-1))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_as_many_groups_as_channels_are_instance_norm_to_the_bit(dtype):
    rng = np.random.default_rng(4)
    x, dy = (rng.standard_normal((3, 6, 4, 5)).astype(dtype) for _ in range(2))
    params = draw(rng, dtype, weight=6, bias=6)
    same_bits(run(GroupNorm(6, **params, eps=0.1), x, dy), run(InstanceNorm(**params, eps=0.1), x, dy))


def test_a_group_is_neighbouring_channels():
    x = np.array([[1.0, 3.0, 10.0, 30.0, 500.0, 100.0]])
    np.testing.assert_array_equal(GroupNorm(3, eps=0).forward(x)[0], [[-1, 1, -1, 1, 1, -1]])


def test_groups_do_not_see_each_other():
    rng = np.random.default_rng(6)
    x, dy, params = rng.standard_normal((3, 6, 5)), rng.standard_normal((3, 6, 5)), draw(rng, weight=6, bias=6)
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


def test_a_group_of_one_element_gives_the_bias_and_no_gradient():
    rng = np.random.default_rng(11)
    params = draw(rng, weight=4, bias=4)
    came = run(GroupNorm(4, **params), rng.standard_normal((3, 4)), rng.standard_normal((3, 4)))
    np.testing.assert_array_equal(came["y"], np.stack([params["bias"]] * 3))
    np.testing.assert_array_equal(came["dx"], np.zeros((3, 4)))
    np.testing.assert_array_equal(came["weight"], np.zeros(4))
