"""Cross entropy of the softmax, the loss of a language model.

Forward, for N rows of logits x over a vocabulary, each with a target t:

    p    = exp(x) / sum(exp(x))
    loss = mean over rows of -log p[t] = mean of log sum(exp(x - m)) - (x[t] - m),   m = max(x)

Backward, given the gradient d of the loss:

    dx = d (p - onehot(t)) / N

On a group the vocabulary is split. Communicated: forward one max, and one sum of two numbers for each row (its sum of
exponentials, and the logit of its target from the rank that holds it); nothing backward. The loss is replicated.
"""

from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module, from_numpy, log
from npnorm.checks import check_ids, check_module, check_saved, check_width, require_same_settings
from npnorm.group import SOLO, Group, errors_on_all_ranks
from npnorm.layers.inplace import exp
from npnorm.tree import show_shapes, summary


@show_shapes
class Saved(NamedTuple):
    """What backward needs of forward."""

    p: Array  # of the shape of the logits
    target: Array  # for each row the place of the target in p; outside 0 ... vocabulary - 1 if another rank holds it


class CrossEntropy:
    """The mean over rows of the negative log of the probability that softmax gives the target, in nats.

    Parameters
    ----------
    group : Group
        The ranks over which the vocabulary is split equally.

    Examples
    --------
    >>> loss, saved = CrossEntropy().forward(np.zeros((3, 4)), np.array([0, 3, 1]))
    >>> round(float(loss), 4)  # log 4
    1.3863
    """

    params: dict[str, Array] = {}
    shards: dict[str, None] = {}

    def __init__(self, *, group: Group = SOLO) -> None:
        self.group = group
        with errors_on_all_ranks(group):
            require_same_settings("CrossEntropy", group)

    def __repr__(self) -> str:
        return summary("CrossEntropy", group=self.group)

    def forward(self, logits: Array, targets: Array) -> tuple[Any, Saved]:
        """Return the loss, without axes, for logits of shape (..., vocabulary) and targets of shape (...)."""
        with errors_on_all_ranks(self.group):
            xp = array_module(logits)
            held = logits.shape[-1] if logits.ndim else 0
            check_width("CrossEntropy", logits, held or 1, name="logits")
            check_module("CrossEntropy", logits, {"targets": targets})
            if tuple(targets.shape) != tuple(logits.shape[:-1]) or targets.size == 0:
                raise ValueError(
                    f"CrossEntropy: logits {tuple(logits.shape)} need targets of shape {tuple(logits.shape[:-1])}, at "
                    f"least one; got {tuple(targets.shape)}."
                )
            check_ids("CrossEntropy", targets, held * self.group.size, self.group)
        target = xp.astype(targets, xp.int64)[..., None] - self.group.rank * held
        inside = (target >= 0) & (target < held)
        m = self.group.max(xp.max(logits, axis=-1, keepdims=True), label="CrossEntropy")
        x = logits - m
        x_t = xp.take_along_axis(x, xp.where(inside, target, xp.zeros_like(target)), axis=-1)
        x_t = xp.where(inside, x_t, xp.zeros_like(x_t))
        p = exp(x)
        total, x_t = self.group.sum(xp.sum(p, axis=-1, keepdims=True), x_t, label="CrossEntropy")
        p /= total
        loss = xp.mean(log(total) - x_t)
        return loss, Saved(p, target)

    def backward(self, dloss: Array | float, saved: Saved) -> Array:
        """Return the gradient of the logits, this rank's shard."""
        check_saved("CrossEntropy", saved, Saved)
        p, target = saved
        xp = array_module(p)
        rows = p.size // p.shape[-1]
        dx = p - xp.astype(target == from_numpy(np.arange(p.shape[-1]), target), p.dtype)
        return xp.astype(dx * (dloss / rows), p.dtype, copy=False)
