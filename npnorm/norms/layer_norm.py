"""Layer normalization.

Jimmy Lei Ba, Jamie Ryan Kiros and Geoffrey Hinton, "Layer Normalization", 2016, arXiv:1607.06450, equations 3 and 4;
with eps inside the root, as in torch (the paper has none).

Forward, for each row x of n features, with mean(a) = sum(a) / n:

    c    = x - mean(x)                    centre gives c, mean(x) and var = mean(c^2): see `npnorm.norms.statistics`
    rstd = 1 / sqrt(mean(c^2) + eps)
    z    = c rstd
    y    = z w + b

Backward, given dy:

    dz = dy w
    dx = rstd (dz - mean(dz) - z mean(dz z))
    dw = sum over rows of dy z
    db = sum over rows of dy

Each feature moves all others through the mean, hence - mean(dz), and through rstd, hence - z mean(dz z). A row split
over the ranks of a group costs two all-reduces forward, since the mean must be known before mean(c^2), and one
backward: the two means do not wait for each other and share a message. Other forms of the statistics need one.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, sqrt
from npnorm.axes import Axes, Features
from npnorm.blocked import Rows
from npnorm.checks import check_features, check_saved, check_settings, count_axes
from npnorm.group import SOLO, Group, Solo, errors_on_all_ranks
from npnorm.norms.folding import fold_into
from npnorm.norms.rms_norm import RMSNorm
from npnorm.norms.statistics import FORMS, affine, centre, centred, refine, times_z


def normalize(axes: Axes, statistics: str, x: Array, w: Array, b: Array, eps: Array) -> tuple[Array, tuple[Array, ...]]:
    """Evaluate the forward formula on rows; return y, (mean, rest, rstd)."""
    c, mean, rest, var, _ = centre(axes, x, statistics, eps)
    rstd = 1 / sqrt(var + eps)
    z = c * rstd
    y = affine(z, w, b)
    return y, (mean, rest, rstd)


def normalize_backward(
    axes: Axes, dy: Array, x: Array, w: Array, mean: Array, rest: Array, rstd: Array, eps: Array
) -> tuple[Array, dict[str, Array]]:
    """Evaluate the backward formula on rows; the gradients of the parameters are still to be summed."""
    c = centred(x, mean, rest)
    z = c * rstd
    dz = affine(dy, w)
    mean_dz, mean_dzz = axes.mean(dz, dz * z)
    d = dz - mean_dz - z * mean_dzz
    dx = rstd * refine(axes, d, (dy, w), x, eps * rstd * rstd, (mean, rest))
    return dx, {"weight": times_z(axes, dy, c, z, rstd), "bias": dy}


class Saved(NamedTuple):
    """What backward needs of forward; the statistics are one number for each row, of the scaled rows."""

    x: Array
    mean: Array
    rest: Array  # what rounding had left of the mean
    rstd: Array
    scale: Array | None  # the exponent of two a row was divided by, where its squares leave the range


class LayerNorm:
    """Give each row mean 0 and variance 1: y = (x - mean(x)) / sqrt(var(x) + eps) w + b.

    Parameters
    ----------
    weight : array of the shape of the features, or None
        The gain w; None leaves it out. On a group, this rank's shard along the last axis.
    bias : array of the shape of the features, or None
        The shift b; None leaves it out.
    eps : float
        Added to the variance (that of n, not n - 1); in units of x squared.
    axes : int or None
        How many trailing axes are the features; None: as many as the parameters have, 1 without parameters.
    statistics : "two-pass", "packed" or "gathered"
        How the ranks of a group find mean and variance, see `npnorm.norms.statistics`. Alone all are the same.
    group : Group
        The ranks over which the last axis is split equally. Communicated: forward "two-pass" a sum of one number for
        each row and a sum of two, "packed" a sum of two, "gathered" a gather of four; backward one sum of two.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if the parameters are not floats of one shape, or eps is not finite and >= 0.

    Examples
    --------
    >>> norm = LayerNorm(np.ones(4), np.zeros(4), eps=0)
    >>> y, saved = norm.forward(np.array([[1.0, 1.0, 3.0, 3.0]]))  # mean 2, standard deviation 1
    >>> y
    array([[-1., -1.,  1.,  1.]])
    """

    def __init__(
        self,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-5,
        *,
        axes: int | None = None,
        statistics: str = "two-pass",
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        self.params = {name: a for name, a in (("weight", weight), ("bias", bias)) if a is not None}
        check_settings("LayerNorm", self.params, eps, group, axes=axes, statistics=statistics, compute=compute)
        self.axes = Features("LayerNorm", group, count_axes("LayerNorm", self.params, axes, group))
        self.shards = dict.fromkeys(self.params, None if isinstance(group, Solo) else self.axes.count - 1)
        self.rows = Rows(self.axes, eps, compute)
        with errors_on_all_ranks(group):
            if not isinstance(statistics, str) or statistics not in FORMS:
                raise ValueError(f"LayerNorm: statistics is {statistics!r}. Choose one of {', '.join(FORMS)}.")
        self.statistics = statistics

    @classmethod
    def init(cls, features: int | tuple[int, ...], dtype: str = "float32", **settings: Any) -> "LayerNorm":
        """Return the norm with a weight of ones and a bias of zeros."""
        return cls(np.ones(features, dtype), np.zeros(features, dtype), **settings)

    def forward(self, x: Array, out: Array | None = None) -> tuple[Array, Saved]:
        """Return y, of the shape and dtype of x: (..., features), and what backward needs; y is written to `out`."""
        formula = partial(normalize, self.axes, self.statistics)
        y, (mean, rest, rstd), scale = self.rows.forward(formula, x, self.params, out=out, check=self._check)
        return y, Saved(x, mean, rest, rstd, scale)

    def backward(self, dy: Array, saved: Saved, out: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """Return dx, of the shape and dtype of x, and the gradients of the parameters; dx is written to `out`."""
        check_saved("LayerNorm", saved, Saved, self.axes.group)
        x, mean, rest, rstd, scale = saved
        formula, statistics = partial(normalize_backward, self.axes), (mean, rest, rstd)
        return self.rows.backward(formula, dy, x, self.params, statistics, scale, out=out, check=self._check)

    def _check(self, **arrays: Array) -> None:
        check_features("LayerNorm", self.params, self.axes.count, self.axes.group, **arrays)

    def fold_into(self, linear: Any) -> tuple["LayerNorm", Any]:
        """Return this norm without weight and bias, and a copy of the `Linear` that reads it which has taken them in.

        The outputs are the same: (z w + b) W^T + c = z (W diag(w))^T + (W b + c); see `npnorm.norms.folding`.
        """
        bare = LayerNorm(
            eps=self.rows.eps, statistics=self.statistics, group=self.axes.group, compute=self.rows.compute
        )
        return bare, fold_into(self.params, linear, self.axes.count)

    def to_rms_norm(self) -> RMSNorm:
        """Return the RMSNorm that equals this norm on rows with mean 0, see `npnorm.norms.folding.centre_writer`."""
        settings: Any = {"axes": self.axes.count, "group": self.axes.group, "compute": self.rows.compute}
        return RMSNorm(**self.params, eps=self.rows.eps, **settings)
