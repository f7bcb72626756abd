"""Weight normalization: a norm of a matrix's rows, not of activations.

Tim Salimans and Diederik P. Kingma, "Weight Normalization", NeurIPS 2016, arXiv:1602.07868, equations 2 and 3.

Forward, for each output, with its row v of directions and its length g:

    w = g v / |v|

Backward, given dw, with z = v / |v|:

    dg = sum(dw z)
    dv = g / |v| (dw - z dg)

The names are torch's: v is weight_v, which forward takes, and g is weight_g, the parameter. dv is at right angles to v,
so that steps along it only lengthen v.

Where the ranks of a group split the outputs, each has whole rows, and nothing is communicated. Where they split the
inputs, forward is one all-reduce, of sum(v^2), and backward one, of dg.
"""

from functools import partial
from typing import NamedTuple

from npnorm.arrays import Array, array_module, contiguous, round_to, sqrt
from npnorm.axes import Batch
from npnorm.blocked import Rows
from npnorm.checks import check_float, check_module, check_same_shape, check_saved, check_settings
from npnorm.group import SOLO, Group, errors_on_all_ranks
from npnorm.norms.scale_norm import normalize, normalize_backward


class Saved(NamedTuple):
    """What backward needs of forward; one number for each output, of the scaled rows."""

    weight_v: Array
    longer: Array  # 1: every row is divided by its own length
    rnorm: Array  # 1 / |v|
    scale: Array | None  # the exponent of two a row was divided by, where its squares leave the range


class WeightNorm:
    """Give each row of a weight its own learned length: w = g v / |v|.

    Parameters
    ----------
    weight_g : array of outputs elements, of shape (outputs,) or as torch's (outputs, 1, ...)
        The lengths.
    group : Group
        The ranks over which the inputs of the weight are split. Communicated: one sum forward, one backward.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Notes
    -----
    A row of zeros has no direction; its result is NaN.

    Examples
    --------
    >>> import numpy as np
    >>> norm = WeightNorm(np.array([10.0]))
    >>> weight, saved = norm.forward(np.array([[3.0, 4.0]]))
    >>> weight
    array([[6., 8.]])
    """

    def __init__(self, weight_g: Array, *, group: Group = SOLO, compute: str | None = None) -> None:
        self.params = {"weight_g": weight_g}
        self.shards: dict[str, int | None] = {"weight_g": None}
        shape = "(outputs,) or (outputs, 1, ...)"
        check_settings("WeightNorm", self.params, 0, group, shape, replicated=self.params, compute=compute)
        self.axes = Batch("WeightNorm", group)
        self.rows = Rows(self.axes, 0, compute)

    @classmethod
    def of(cls, weight: Array, *, group: Group = SOLO, compute: str | None = None) -> "WeightNorm":
        """Return the norm with the lengths of the rows of `weight`, so that forward(weight) is weight again."""
        with errors_on_all_ranks(group):
            check_module("WeightNorm", weight, {}, "weight")
            check_float("WeightNorm", "weight", weight)
            if weight.ndim < 2 or 0 in weight.shape:
                raise ValueError(
                    f"WeightNorm: weight has shape {tuple(weight.shape)}. It takes (outputs, inputs, ...)."
                )
        xp, axes = array_module(weight), Batch("WeightNorm", group)
        rows = contiguous(axes.rows(weight[None, ...]), xp.float64)
        largest = axes.largest(rows)
        largest = xp.where(largest > 0, largest, xp.ones_like(largest))
        lengths = sqrt(axes.sum((rows / largest) ** 2)) * largest
        return cls(round_to(lengths[:, 0, 0], weight.dtype), group=group, compute=compute)

    def forward(self, weight_v: Array) -> tuple[Array, Saved]:
        """Return the weight, of the shape and dtype of weight_v: (outputs, inputs, ...), and what backward needs."""
        self._check(weight_v=weight_v)
        g = {"weight": self.params["weight_g"]}
        weight, (longer, rnorm), scale = self.rows.forward(partial(normalize, self.axes), weight_v[None, ...], g)
        return weight[0, ...], Saved(weight_v, longer, rnorm, scale)

    def backward(self, dweight: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
        """Return dweight_v, of the shape and dtype of weight_v, and the gradient of weight_g, in its dtype."""
        check_saved("WeightNorm", saved, Saved, self.axes.group)
        weight_v, longer, rnorm, scale = saved
        self._check(dweight=dweight, weight_v=weight_v)
        g = {"weight": self.params["weight_g"]}
        formula = partial(normalize_backward, self.axes)
        dweight, weight_v = dweight[None, ...], weight_v[None, ...]
        dv, grads = self.rows.backward(formula, dweight, weight_v, g, (longer, rnorm), scale)
        return dv[0, ...], {"weight_g": grads["weight"]}

    def _check(self, **arrays: Array) -> None:
        outputs = self.params["weight_g"].shape[0]
        with errors_on_all_ranks(self.axes.group):
            for name, x in arrays.items():
                check_module("WeightNorm", x, self.params)
                check_float("WeightNorm", name, x)
                if x.ndim < 2 or 0 in x.shape or x.shape[0] != outputs:
                    raise ValueError(
                        f"WeightNorm holds {outputs} lengths; {name} has shape {tuple(x.shape)}. "
                        f"It takes (outputs, inputs, ...), with {outputs} outputs."
                    )
            check_same_shape("WeightNorm", arrays)
