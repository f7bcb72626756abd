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

from typing import NamedTuple

from npnorm.arrays import Array, array_module
from npnorm.group import SOLO, Group
from npnorm.layer import check_features, check_module


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

    Examples
    --------
    >>> import numpy as np
    >>> y, saved = Linear(np.array([[1.0, 2.0]]), np.array([3.0])).forward(np.array([[4.0, 5.0]]))
    >>> y
    array([[17.]])
    """

    def __init__(self, weight: Array, bias: Array | None = None, *, group: Group = SOLO) -> None:
        check_module("Linear", weight, {} if bias is None else {"bias": bias})
        if weight.ndim != 2 or (bias is not None and tuple(bias.shape) != (weight.shape[0],)):
            came = f"weight {tuple(weight.shape)}" + ("" if bias is None else f", bias {tuple(bias.shape)}")
            raise ValueError(f"Linear: weight must have shape (outputs, inputs), bias (outputs,); there came {came}.")
        self.params = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        self.shards = {name: 1 if name == "weight" and group is not SOLO else None for name in self.params}
        self.group = group

    def forward(self, x: Array) -> tuple[Array, Saved]:
        """Return y of shape (..., outputs) for x of shape (..., inputs)."""
        w, b = self.params["weight"], self.params.get("bias")
        check_module("Linear", x, self.params)
        check_features("Linear", x, w.shape[1], self.group)
        y = self.group.sum(x @ w.T, what="Linear")
        return (y if b is None else y + b), Saved(x)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
        """Return dx, and the gradients of weight and bias."""
        w = self.params["weight"]
        check_features("Linear.backward", dy, w.shape[0], self.group, name="dy")
        xp = array_module(dy)
        rows_dy = xp.reshape(dy, (-1, w.shape[0]))
        rows_x = xp.reshape(saved.x, (-1, w.shape[1]))
        dx = dy @ w
        grads = {"weight": rows_dy.T @ rows_x}
        if "bias" in self.params:
            grads["bias"] = xp.sum(rows_dy, axis=0)
        return dx, grads
