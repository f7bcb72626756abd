"""The linear layer.

Forward, for each row x of n features:

    y = x W^T + b

Backward, given dy:

    dx = dy W
    dW = sum over rows of dy^T x
    db = sum over rows of dy

Tensor parallelism needs no other class. A *column split* is a Linear that holds some rows of W (columns of W^T): it
turns a replicated x into a shard of y, and its dx is partial. A *row split* holds some columns of W and takes a shard
of x: its products are partial, their sum over the group is y, and b is added once, after the sum.
Mohammad Shoeybi et al., "Megatron-LM", 2019, arXiv:1909.08053, section 3.
"""

from typing import Any, NamedTuple

from npnorm.arrays import Array, array_module, describe
from npnorm.checks import check_input, check_module, check_saved, check_width, require_same_settings
from npnorm.group import SOLO, Group, Solo, errors_on_all_ranks
from npnorm.layers.inplace import add_into
from npnorm.tree import show_shapes, summary

COLUMN: dict[str, int | None] = {"weight": 0, "bias": 0}
ROW: dict[str, int | None] = {"weight": 1, "bias": None}
"""The axes along which a column split and a row split are cut from the whole arrays."""


@show_shapes
class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array


class Linear:
    """Multiply by a matrix and add a bias: y = x W^T + b.

    Parameters
    ----------
    weight : array of shape (outputs, inputs)
    bias : array of shape (outputs,), or None
    group : Group
        The ranks over which the *inputs* are split: weight is then this rank's shard along axis 1, and x a shard.
        Communicated: one sum of y forward; nothing backward.

    Notes
    -----
    A Linear cannot know that it is a column split. Its `shards` say None, its dx is partial; the layer that splits it
    gives the axis, and sums dx.

    Examples
    --------
    >>> import numpy as np
    >>> y, saved = Linear(np.array([[1.0, 2.0]]), np.array([3.0])).forward(np.array([[4.0, 5.0]]))
    >>> y
    array([[17.]])
    """

    def __init__(self, weight: Array, bias: Array | None = None, *, group: Group = SOLO) -> None:
        self.params: dict[str, Any] = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        self.shards = {name: None if name == "bias" or isinstance(group, Solo) else 1 for name in self.params}
        self.group = group
        with errors_on_all_ranks(group):
            check_module("Linear", weight, self.params)
            require_same_settings("Linear", group, self.params, replicated=["bias"])
            if weight.ndim != 2 or (bias is not None and tuple(bias.shape) != (weight.shape[0],)):
                described = ", ".join(f"{name} {describe(array)}" for name, array in self.params.items())
                raise ValueError(f"Linear: weight must have shape (outputs, inputs), bias (outputs,); got {described}.")

    def __repr__(self) -> str:
        return summary("Linear", self.params, group=self.group)

    def forward(self, x: Array) -> tuple[Any, Saved]:
        """Return y of shape (..., outputs) for x of shape (..., inputs)."""
        w, b = self.params["weight"], self.params.get("bias")
        with errors_on_all_ranks(self.group):
            check_input("Linear", x, self.params, w.shape[1])
        y = self.group.sum(_times(x, w.T), label="Linear")
        return (y if b is None else add_into(y, b)), Saved(x)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, dict[str, Array]]:
        """Return dx, and the gradients of weight and bias."""
        w = self.params["weight"]
        with errors_on_all_ranks(self.group):
            check_saved("Linear", saved, Saved)
            check_width("Linear.backward", dy, w.shape[0], name="dy")
        xp = array_module(dy)
        rows_dy = xp.reshape(dy, (-1, w.shape[0]))
        rows_x = xp.reshape(saved.x, (-1, w.shape[1]))
        dx = _times(dy, w)
        grads = {"weight": rows_dy.T @ rows_x}
        if "bias" in self.params:
            grads["bias"] = xp.sum(rows_dy, axis=0)
        return dx, grads


def _times(x: Array, w: Array) -> Array:
    """Return x w for x of any shape, as one product of two matrices: NumPy would take one for each leading index."""
    xp = array_module(x)
    return xp.reshape(xp.reshape(x, (-1, w.shape[0])) @ w, (*x.shape[:-1], w.shape[1]))
