"""Clipping by the norm of the whole gradient.

Razvan Pascanu, Tomas Mikolov and Yoshua Bengio, "On the difficulty of training recurrent neural networks", 2013,
arXiv:1211.5063, algorithm 1: where the norm of the whole gradient exceeds a limit, all of it is scaled down to it.

On a group each rank holds shards of some gradients and copies of others. The squares of the shards are summed over the
ranks, in one message of one number; those of the copies count once.
"""

import math

import numpy as np

from npnorm.arrays import Array, array_module
from npnorm.group import SOLO, Group
from npnorm.tree import Tree, leaves, map_tree

BLOCK = 1 << 16
"""Elements of a block in float64: they stay in a core's L2 cache."""


def global_norm(grads: Tree, shards: Tree, group: Group = SOLO) -> float:
    """Return the Euclidean norm of the whole gradient, in float64.

    Parameters
    ----------
    grads, shards : trees of the same shape
        Gradients, and for each the axis along which the ranks split it, None where it is replicated.

    Examples
    --------
    >>> global_norm({"a": np.array([3.0]), "b": np.array([4.0])}, {"a": None, "b": None})
    5.0
    """
    axes, replicated, sharded = dict(leaves(shards)), 0.0, 0.0
    for name, g in leaves(grads):
        square = _square(g)
        if axes[name] is None:
            replicated += square
        else:
            sharded += square
    return math.sqrt(replicated + float(group.sum(np.asarray(sharded), label="global_norm")))


def _square(g: Array) -> float:
    """Return the sum of the squares in float64; of NumPy's arrays in blocks, since the wider copy takes memory."""
    xp, total = array_module(g), 0.0
    flat = xp.reshape(g, (-1,))
    step = BLOCK if xp is np else max(1, flat.size)
    for start in range(0, flat.size, step):
        wide = xp.astype(flat[start : start + step], xp.float64)
        wide *= wide
        total += float(xp.sum(wide))
    return total


def clip(grads: Tree, norm: float, max_norm: float) -> Tree:
    """Return the gradients, scaled so that their norm, which is `norm`, is at most `max_norm`."""
    return grads if norm <= max_norm else map_tree(lambda g: g * (max_norm / norm), grads)
