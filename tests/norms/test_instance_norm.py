import operator

import numpy as np

from npnorm import InstanceNorm
from npnorm.tree import map_tree
from tests.check import run, same_bits


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


def test_channels_and_samples_do_not_see_each_other():
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, 3, 2, 5, 4))
    whole = run(InstanceNorm(), x, dy)
    for sample in range(3):
        for channel in range(2):
            one = (slice(sample, sample + 1), slice(channel, channel + 1))
            mine = run(InstanceNorm(), x[one], dy[one])
            same_bits(mine, map_tree(operator.itemgetter(one), whole))
