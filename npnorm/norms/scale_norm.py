"""ScaleNorm: each row becomes a vector of one learned length.

Toan Q. Nguyen and Julian Salazar, "Transformers without Tears", IWSLT 2019, arXiv:1910.05895, equation 5; with the
length bounded from below by eps, as in their code.

Forward, for each row x, with one number g, the weight, for all features:

    norm = max(sqrt(sum(x^2)), eps)
    z    = x / norm
    y    = g z

Backward, given dy:

    dx = g / norm (dy - z sum(dy z))      where |x| >= eps; for a shorter row norm is a constant: g / eps dy
    dg = sum over rows of sum(dy z)

RMSNorm with the constant weight g / sqrt(n) is the same up to the place of eps. A row split over the ranks of a group
costs one all-reduce forward, of sum(x^2), and one backward, of sum(dy z), which makes dg complete, too.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module, sqrt
from npnorm.axes import Axes, Features
from npnorm.blocked import Rows
from npnorm.checks import check_features, check_place, check_saved, check_settings, count_axes
from npnorm.group import SOLO, Group, errors_on_all_ranks
from npnorm.norms.statistics import affine, refine


def normalize(axes: Axes, x: Array, g: Array, _: None, eps_squared: Array) -> tuple[Array, tuple[Array, Array]]:
    """Evaluate the forward formula on rows; return y, (1 where |x| >= eps and 0 elsewhere, 1 / norm)."""
    xp = array_module(x)
    square = axes.sum(x * x)
    longer = abs(square) >= eps_squared
    rnorm = 1 / sqrt(xp.where(longer, square, 0 * square + eps_squared))
    z = x * rnorm
    y = affine(z, g)
    return y, (xp.astype(longer, rnorm.dtype), rnorm)


def normalize_backward(
    axes: Axes, dy: Array, x: Array, g: Array, longer: Array, rnorm: Array, _: Array
) -> tuple[Array, dict[str, Array]]:
    """Evaluate the backward formula on rows; the gradient of g is still to be summed over them."""
    z = x * rnorm
    sum_dyz = axes.sum(dy * z)
    d = refine(axes, dy - z * (longer * sum_dyz), (dy, None), x, 0 * rnorm)
    dx = affine(rnorm * d, g)
    return dx, {"weight": sum_dyz}


class Saved(NamedTuple):
    """What backward needs of forward; one number for each row, of the scaled rows."""

    x: Array
    longer: Array  # 1 where |x| >= eps, and 0 elsewhere
    rnorm: Array  # 1 / norm
    scale: Array | None  # the exponent of two a row was divided by, where its squares leave the range


class ScaleNorm:
    """Give each row the Euclidean length g: y = g x / max(|x|, eps).

    Parameters
    ----------
    weight : array of shape () or (1,), or None
        The length g; None is 1. On a group, the same on every rank.
    eps : float
        The least length that is divided by; in units of x.
    axes : int
        How many trailing axes are the features.
    group : Group
        The ranks over which the last axis is split equally. Communicated: one sum of a number for each row forward,
        one backward.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if the weight is not one float, or eps is not finite and >= 0.

    Examples
    --------
    >>> norm = ScaleNorm(np.array(10.0))
    >>> y, saved = norm.forward(np.array([[3.0, 4.0]]))
    >>> y
    array([[6., 8.]])
    """

    layer = "ScaleNorm"

    def __init__(
        self,
        weight: Array | None = None,
        eps: float = 1e-5,
        *,
        axes: int = 1,
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        self.params = {} if weight is None else {"weight": weight}
        self.shards: dict[str, int | None] = dict.fromkeys(self.params)  # replicated
        check_settings(
            self.layer, self.params, eps, group, "() or (1,)", replicated=self.params, axes=axes, compute=compute
        )
        with errors_on_all_ranks(group):
            end = 1e18 if compute == "float32" else 1e150
            if eps and not 1 / end <= eps <= end:
                raise ValueError(
                    f"{self.layer}: eps is {eps}. Its square leaves the working precision; choose 0, or {1 / end:.0e} "
                    f"to {end:.0e}."
                )
        self.axes = Features(self.layer, group, count_axes(self.layer, {}, axes, group))
        self.rows = Rows(self.axes, eps * eps, compute)

    @classmethod
    def init(cls, features: int, dtype: str = "float32", **settings: Any) -> "ScaleNorm":
        """Return the norm with the length sqrt(features)."""
        return cls(np.array(features**0.5, dtype), **settings)

    def forward(self, x: Array, out: Array | None = None) -> tuple[Array, Saved]:
        """Return y, of the shape and dtype of x: (..., features), and what backward needs; y is written to `out`."""
        self._check(x=x)
        y, (longer, rnorm), scale = self.rows.forward(partial(normalize, self.axes), x, self.params, out=out)
        return y, Saved(x, longer, rnorm, scale)

    def backward(self, dy: Array, saved: Saved, out: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """Return dx, of the shape and dtype of x, and the complete gradient of the weight; dx is written to `out`."""
        check_saved(self.layer, saved, Saved, self.axes.group)
        x, longer, rnorm, scale = saved
        self._check(dy=dy, x=x)
        formula = partial(normalize_backward, self.axes)
        return self.rows.backward(formula, dy, x, self.params, (longer, rnorm), scale, out=out)

    def _check(self, **arrays: Array) -> None:
        check_place(self.layer, self.params, self.axes.group, **arrays)
        check_features(self.layer, {}, self.axes.count, self.axes.group, **arrays)
