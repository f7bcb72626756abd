"""Partial root mean square normalization, pRMSNorm.

Biao Zhang and Rico Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, arXiv:1910.07467, section 5: the
root mean square of the first k = ceil(n p) features divides all n of them (their code has floor in place of ceil).

Forward, for each row x of n features, with the sum over k of them, the subset:

    rstd = 1 / sqrt(sum over subset of x^2 / k + eps)
    z    = x rstd
    y    = z w + b

Backward, given dy:

    dz = dy w
    dx = rstd (dz - [in subset] z sum(dz z) / k)
    dw = sum over rows of dy z
    db = sum over rows of dy

All features move with rstd, hence sum(dz z) over all n; but only the subset moves rstd. Split over the ranks of a
group, each rank sums what it holds of the subset: one all-reduce forward and one backward, as for RMSNorm.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, from_numpy, sqrt
from npnorm.axes import Features, Subset
from npnorm.blocked import Rows
from npnorm.checks import check_features, check_saved, check_settings, is_number
from npnorm.group import SOLO, Group, Solo, errors_on_all_ranks
from npnorm.norms.statistics import affine, refine


class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array
    subset: Array | None  # (features,), of this rank: True in the subset; None if all are in
    k: int  # how many features were measured
    rstd: Array  # one number for each row, of the scaled rows
    scale: Array | None  # the exponent of two a row was divided by, where its squares leave the range


class PartialRMSNorm:
    """Divide each row by the root mean square of a part of it.

    Parameters
    ----------
    weight : array of shape (features,), or None
        The gain w; None leaves it out. On a group, this rank's shard.
    bias : array of shape (features,), or None
        The shift b; None leaves it out.
    p : float
        The part: k = ceil(n p) features; 6.25 % is the paper's. p = 1 is RMSNorm, bit for bit.
    eps : float
        Added to the mean square; in units of x squared.
    group : Group
        The ranks over which the features are split equally. Communicated: one sum of a number for each row forward,
        one backward.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if p is not above 0 and at most 1, the parameters are not floats of one shape (features,),
        or eps is not finite and >= 0.

    Examples
    --------
    >>> norm = PartialRMSNorm(p=0.5, eps=0)
    >>> y, saved = norm.forward(np.array([[1.0, 7.0, 10.0, -5.0]]))  # root mean square of the first half: 5
    >>> y
    array([[ 0.2,  1.4,  2. , -1. ]])
    """

    def __init__(
        self,
        weight: Array | None = None,
        bias: Array | None = None,
        p: float = 0.0625,
        eps: float = 1e-6,
        *,
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        self.params = {name: a for name, a in (("weight", weight), ("bias", bias)) if a is not None}
        check_settings("PartialRMSNorm", self.params, eps, group, "(features,), one axis", p=p, compute=compute)
        self.shards = dict.fromkeys(self.params, None if isinstance(group, Solo) else 0)
        with errors_on_all_ranks(group):
            if not is_number(p) or not 0 < p <= 1:
                raise ValueError(
                    f"PartialRMSNorm: p is {p!r}. It must be above 0 and at most 1: k = ceil(n p) must be 1 or more."
                )
        self.p = Fraction(str(p))  # as it was written: 100 * 0.07 is above 7
        self.group, self.eps, self.compute = group, eps, compute
        self._rows(None)  # checks compute

    @classmethod
    def init(cls, features: int, dtype: str = "float32", **settings: Any) -> "PartialRMSNorm":
        """Return the norm with a weight of ones and no bias."""
        return cls(np.ones(features, dtype), **settings)

    def forward(
        self, x: Array, rng: np.random.Generator | None = None, out: Array | None = None
    ) -> tuple[Array, Saved]:
        """Return y, of the shape and dtype of x: (..., features), and what backward needs.

        Parameters
        ----------
        x : array of shape (..., features)
        rng : numpy.random.Generator or None
            Draws the subset anew, without replacement, the same for all rows; None: the first k features. On a group,
            the same generator in the same state on every rank.
        out : array of the shape and dtype of x, or None
            Where y is written to.
        """
        check_features("PartialRMSNorm", self.params, 1, self.group, x=x)
        n = x.shape[-1] * self.group.size
        k = self.k(n)
        mask = self._subset(n, k, rng)
        subset = None if k == n else from_numpy(mask, x)
        rows = self._rows(subset)
        axes = rows.axes

        def formula(x: Array, w: Array, b: Array, eps: Array) -> tuple[Array, tuple[Array]]:
            measured = axes.measured(x)
            rstd = 1 / sqrt(axes.sum(measured * measured) / k + eps)
            z = x * rstd
            y = affine(z, w, b)
            return y, (rstd,)

        y, (rstd,), scale = rows.forward(formula, x, self.params, out=out)
        return y, Saved(x, subset, k, rstd, scale)

    def backward(self, dy: Array, saved: Saved, out: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """Return dx, of the shape and dtype of x, and the gradients of the parameters; dx is written to `out`."""
        check_saved("PartialRMSNorm", saved, Saved, self.group)
        check_features("PartialRMSNorm", self.params, 1, self.group, dy=dy, x=saved.x)
        rows = self._rows(saved.subset)
        axes, k = rows.axes, saved.k

        def formula(dy: Array, x: Array, w: Array, rstd: Array, eps: Array) -> tuple[Array, dict[str, Array]]:
            z = x * rstd
            dz = affine(dy, w)
            if isinstance(axes, Subset):
                d = dz - axes.measured(z) * (axes.sum(dz * z) / k)
            else:
                d = refine(axes, dz - z * axes.mean(dz * z), (dy, w), x, eps * rstd * rstd)
            dx = rstd * d
            return dx, {"weight": dy * z, "bias": dy}  # to be summed over the rows

        return rows.backward(formula, dy, saved.x, self.params, (saved.rstd,), saved.scale, out=out)

    def k(self, n: int) -> int:
        """Return how many of n features are measured: ceil(n p).

        Examples
        --------
        >>> PartialRMSNorm(p=0.0625).k(300), PartialRMSNorm(p=0.07).k(100)
        (19, 7)
        """
        return math.ceil(n * self.p)

    def _rows(self, subset: Array | None) -> Rows:
        layer = "PartialRMSNorm"
        axes = Features(layer, self.group) if subset is None else Subset(layer, self.group, subset)
        return Rows(axes, self.eps, self.compute)

    def _subset(self, n: int, k: int, rng: np.random.Generator | None) -> np.ndarray:
        """Return which of this rank's features are in the subset."""
        with errors_on_all_ranks(self.group):
            if rng is not None and not isinstance(rng, np.random.Generator):
                raise TypeError(
                    f"PartialRMSNorm: rng is a {type(rng).__name__}. Pass a generator: numpy.random.default_rng(seed)."
                )
        chosen = np.arange(k) if rng is None else np.sort(rng.choice(n, k, replace=False))
        if rng is not None:
            self.group.require_same(f"PartialRMSNorm with the subset {chosen.tolist()}")
        whole = np.zeros(n, bool)
        whole[chosen] = True
        return self.group.shard(whole, 0)
