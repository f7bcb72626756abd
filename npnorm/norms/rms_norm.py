"""Root mean square normalization.

Biao Zhang and Rico Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, arXiv:1910.07467, equation 4; with
eps inside the root, as in torch and in Llama (the paper has none).

Forward, for each row x of n features, with mean(a) = sum(a) / n:

    rstd = 1 / sqrt(mean(x^2) + eps)
    z    = x rstd
    y    = z w + b

Backward, given dy:

    dz = dy w
    dx = rstd (dz - z mean(dz z))
    dw = sum over rows of dy z
    db = sum over rows of dy

Since d rstd / dx = -rstd^3 x / n, each feature moves all others through one number, mean(dz z). That is why a row split
over the ranks of a group costs one all-reduce forward, of mean(x^2), and one backward, of mean(dz z).
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module, sqrt, widest
from npnorm.axes import Axes, Features
from npnorm.blocked import Rows
from npnorm.checks import check_features, check_saved, check_settings, count_axes
from npnorm.group import SOLO, Group, Solo
from npnorm.norms.folding import fold_into
from npnorm.norms.statistics import affine, refine
from npnorm.norms.weight import Gain


def normalize(
    axes: Axes, gain: Gain, given: Array, x: Array, w: Array, b: Array, eps: Array
) -> tuple[Array, tuple[Array]]:
    """Evaluate the forward formula on rows; return y, (rstd,). `given`, x as it came, says what z is rounded to."""
    rstd = 1 / sqrt(axes.mean(x * x) + eps)
    z = x * rstd
    y = affine(gain.times(z, w, given), None, b)  # z w + b
    return y, (rstd,)


def normalize_backward(
    axes: Axes, gain: Gain, given: Array, dy: Array, x: Array, w: Array, rstd: Array, eps: Array
) -> tuple[Array, dict[str, Array]]:
    """Evaluate the backward formula on rows; the gradients of the parameters are still to be summed."""
    z = x * rstd
    dz = affine(dy, gain.of(w))
    d = dz - z * axes.mean(dz * z)
    dx = rstd * refine(axes, d, (dy, gain.of(w)), x, eps * rstd * rstd)
    return dx, {"weight": dy * gain.rounded(z, given), "bias": dy}


class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array
    rstd: Array  # one number for each row, of the scaled rows
    scale: Array | None  # the exponent of two a row was divided by, where its squares leave the range


class RMSNorm:
    """Divide each row by its root mean square: y = x / sqrt(mean(x^2) + eps) w + b.

    Parameters
    ----------
    weight : array of the shape of the features, or None
        The gain w; None leaves it out. On a group, this rank's shard along the last axis.
    bias : array of the shape of the features, or None
        The shift b; None leaves it out.
    eps : float
        Added to the mean square; in units of x squared.
    axes : int or None
        How many trailing axes are the features; None: as many as the parameters have, 1 without parameters.
    offset : float
        Added to the weight: y = z (offset + w) + b; in float32 for weights of 32 bits or fewer.
    cast : None, "llama", "olmo2" or "gemma"
        Where the product with the weight is rounded, for x of 32 bits or fewer; see `npnorm.norms.weight`. y has the
        dtype of x in all of them. Backward takes dw from the rounded z, and lets gradients through roundings unchanged.
    group : Group
        The ranks over which the last axis is split equally. Communicated: one sum of a number for each row forward,
        one backward.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if the parameters are not floats of one shape, or eps is not finite and >= 0.

    Examples
    --------
    >>> norm = RMSNorm(np.ones(2), eps=0)
    >>> y, saved = norm.forward(np.array([[1.0, 7.0]]))  # root mean square 5
    >>> y
    array([[0.2, 1.4]])
    """

    def __init__(
        self,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-6,
        *,
        axes: int | None = None,
        offset: float = 0,
        cast: str | None = None,
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        self.params = {name: a for name, a in (("weight", weight), ("bias", bias)) if a is not None}
        check_settings("RMSNorm", self.params, eps, group, axes=axes, compute=compute)
        self.axes = Features("RMSNorm", group, count_axes("RMSNorm", self.params, axes, group))
        self.shards = dict.fromkeys(self.params, None if isinstance(group, Solo) else self.axes.count - 1)
        self.rows = Rows(self.axes, eps, compute)
        self.gain = Gain("RMSNorm", weight, offset, cast, group)

    @classmethod
    def init(cls, features: int | tuple[int, ...], dtype: str = "float32", **settings: Any) -> "RMSNorm":
        """Return the norm with a gain of ones (offset + weight) and no bias."""
        return cls(np.full(features, 1 - settings.get("offset", 0), dtype), **settings)

    def forward(self, x: Array, out: Array | None = None) -> tuple[Array, Saved]:
        """Return y, of the shape and dtype of x: (..., features), and what backward needs; y is written to `out`."""
        formula = partial(normalize, self.axes, self.gain, x)
        y, (rstd,), scale = self.rows.forward(formula, x, self.params, out=out, check=self._check)
        return y, Saved(x, rstd, scale)

    def backward(self, dy: Array, saved: Saved, out: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """Return dx, of the shape and dtype of x, and the gradients of the parameters; dx is written to `out`."""
        check_saved("RMSNorm", saved, Saved, self.axes.group)
        x, rstd, scale = saved
        formula = partial(normalize_backward, self.axes, self.gain, x)
        return self.rows.backward(formula, dy, x, self.params, (rstd,), scale, out=out, check=self._check)

    def _check(self, **arrays: Array) -> None:
        check_features("RMSNorm", self.params, self.axes.count, self.axes.group, **arrays)

    def fold_into(self, linear: Any) -> tuple["RMSNorm", Any]:
        """Return this norm without weight and bias, and a copy of the `Linear` that reads it which has taken them in.

        The outputs are the same: (z w + b) W^T + c = z (W diag(w))^T + (W b + c); see `npnorm.norms.folding`.
        """
        params = dict(self.params)
        if "weight" in params:
            xp, w = array_module(params["weight"]), params["weight"]
            params["weight"] = self.gain.of(xp.astype(w, getattr(xp, widest(w))))
        bare = RMSNorm(eps=self.rows.eps, group=self.axes.group, compute=self.rows.compute)
        return bare, fold_into(params, linear, self.axes.count)
