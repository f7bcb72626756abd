"""Weight normalization: a norm of a matrix's rows, not of activations.

Tim Salimans and Diederik P. Kingma, "Weight Normalization", NeurIPS 2016, arXiv:1602.07868, equations 2 and 3.

Forward, for each output, with its row v of directions and its length g:

    z = v / |v|
    w = z g

Backward, given dw:

    dg = sum(dw z)
    dv = (dw - z dg) g / |v|

These are the formulas of `npnorm.norms.scale_norm`, with eps = 0 and a weight for each row. The names are torch's: v is
weight_v, which forward takes, and g is weight_g, the parameter. dv is at right angles to v, so that steps along it only
lengthen v.

Where the ranks of a group split the outputs, each has whole rows, and nothing is communicated. Where they split the
inputs, forward is one sum over the ranks, of v^2, and backward one, of dw z, which makes dg complete.
"""

from typing import Any, NamedTuple, Self, Unpack

from npnorm import checks, engine
from npnorm.arrays import Array, round_to
from npnorm.group import errors_on_all_ranks
from npnorm.norms import scale_norm
from npnorm.norms.norm import Norm
from npnorm.norms.options import Common


class Saved(NamedTuple):
    """What backward needs of forward; all but weight_v are one number for each output."""

    weight_v: Array
    longer: Array  # 1: every row is divided by its own length
    rnorm: Array  # 1 / |v|
    exponent: Array | None  # rows whose squares overflow were divided by 2^exponent; None: there were none


class WeightNorm(Norm):
    """Give each row of a weight its own learned length: w = g v / |v|.

    Parameters
    ----------
    weight_g : array of outputs elements, of shape (outputs,) or as torch's (outputs, 1, ...)
        The lengths g. On a group, the same on every rank.
    **settings : group, compute
        group : the ranks over which the inputs of the weight are split. compute : as for every `FeatureNorm`.

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

    formula = engine.Formula(scale_norm.forward, scale_norm.backward, Saved, params=("weight_g",), read=("weight_g",))

    _shapes = {"weight_g": "(outputs,) or (outputs, 1, ...)"}

    def __init__(self, weight_g: Array, **settings: Unpack[Common]) -> None:
        group = self._set_common(settings)
        self.params = {"weight_g": weight_g}
        told: dict[str, Any] = {"compute": self.compute}
        checks.check_settings("WeightNorm", self.params, 0, group, self._shapes, replicated=self.params, **told)
        rows = engine.Rows(engine.Batch("WeightNorm", group), self.formula, 0, self.compute)
        self._set(shards={"weight_g": None}, rows=rows)

    @classmethod
    def of(cls, weight: Array, **settings: Unpack[Common]) -> Self:
        """Return the norm with the lengths of the rows of `weight`, so that forward(weight) is weight again."""
        group = settings.get("group", cls.group)
        checks.check_group("WeightNorm", group)
        with errors_on_all_ranks(group):
            checks.check_module("WeightNorm", weight, {}, "weight")
            checks.check_float("WeightNorm", "weight", weight)
            if weight.ndim < 2 or 0 in weight.shape:
                raise ValueError(
                    f"WeightNorm: weight has shape {tuple(weight.shape)}. It takes (outputs, inputs, ...)."
                )
        rows = engine.Rows(engine.Batch("WeightNorm", group), cls.formula, 0)
        _, (_, rnorm), exponent = rows.forward(weight[None, ...], {})
        lengths = (1 if exponent is None else 2.0**exponent) / rnorm
        return cls(round_to(lengths[:, 0, 0], weight.dtype), **settings)

    def forward(self, weight_v: Array) -> tuple[Any, Saved]:
        """Return the weight, of the shape and dtype of weight_v: (outputs, inputs, ...), and what backward needs."""
        self._check(weight_v=weight_v)
        weight, (longer, rnorm), exponent = self.rows.forward(weight_v[None, ...], self.params)
        return weight[0, ...], Saved(weight_v, longer, rnorm, exponent)

    def backward(self, dweight: Array, saved: Saved) -> tuple[Any, dict[str, Any]]:
        """Return dweight_v, of the shape and dtype of weight_v, and the gradient of weight_g, in its dtype."""
        checks.check_saved("WeightNorm", saved, Saved, self.group)
        weight_v, *statistics, exponent = saved
        self._check(dweight=dweight, weight_v=weight_v)
        dv, grads = self.rows.backward(
            dweight[None, ...], weight_v[None, ...], self.params, tuple(statistics), exponent
        )
        return dv[0, ...], grads

    def _check(self, **arrays: Array) -> None:
        with errors_on_all_ranks(self.group):
            checks.check_params("WeightNorm", self.params, self._shapes)
            outputs = self.params["weight_g"].shape[0]
            for name, x in arrays.items():
                checks.check_module("WeightNorm", x, self.params, name)
                checks.check_float("WeightNorm", name, x)
                if x.ndim < 2 or 0 in x.shape or x.shape[0] != outputs:
                    raise ValueError(
                        f"WeightNorm holds {outputs} lengths; {name} has shape {tuple(x.shape)}. "
                        f"It takes (outputs, inputs, ...), with {outputs} outputs."
                    )
            checks.check_same_shape("WeightNorm", arrays)
