"""Clipping by the norm of the whole gradient.

Razvan Pascanu, Tomas Mikolov and Yoshua Bengio, "On the difficulty of training recurrent neural networks", 2013,
arXiv:1211.5063, algorithm 1: where the norm of the whole gradient exceeds a limit, all of it is scaled down to it.

On a group each rank holds shards of some gradients and copies of others. The squares of the shards are summed over the
ranks, in one message of one number; those of the copies count once.
"""

import math

import numpy as np

from npnorm.arrays import array_module
from npnorm.group import SOLO, Group
from npnorm.layer import Tree, leaves, map_tree


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
        wide = array_module(g).astype(g, array_module(g).float64)
        square = float(array_module(g).sum(wide * wide))
        if axes[name] is None:
            replicated += square
        else:
            sharded += square
    return math.sqrt(replicated + float(group.sum(np.asarray(sharded), what="global_norm")))


def clip(grads: Tree, norm: float, max_norm: float) -> Tree:
    """Return the gradients, scaled so that their norm, which is `norm`, is at most `max_norm`."""
    return grads if norm <= max_norm else map_tree(lambda g: g * (max_norm / norm), grads)
