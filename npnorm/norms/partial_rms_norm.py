"""Partial root mean square normalization, pRMSNorm.

Biao Zhang and Rico Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, arXiv:1910.07467, section 5: the
root mean square of the first k = ceil(n p) features divides all n of them (their code has floor in place of ceil).

Forward, for each row x of n features, of which k are measured, with m(a) = a where it is measured and 0 elsewhere:

    rstd = 1 / sqrt(sum(m(x)^2) / k + eps)
    z    = x rstd
    y    = z w + b

Backward, given dy:

    dz = dy w
    dx = rstd (dz - m(z) sum(dz z) / k)
    dw = sum over rows of dy z
    db = sum over rows of dy

All features move with rstd, hence sum(dz z) over all n; but only what is measured moves rstd, hence m(z). Split over
the ranks of a group, each rank sums what it holds: one sum over the ranks forward and one backward, as for RMSNorm.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple, Self, Unpack

import numpy as np
from numpy.typing import DTypeLike

from npnorm import checks, engine
from npnorm.arrays import Array, from_numpy, sqrt
from npnorm.norms import norm, options, rms_norm


class Saved(NamedTuple):
    """What backward needs of forward; rstd and exponent are one number for each row."""

    x: Array
    subset: Array | None  # (features,), of this rank: True where x is measured; None if all is
    k: int  # how many features were measured
    rstd: Array
    exponent: Array | None  # rows whose squares overflow were divided by 2^exponent; None: there were none


def forward(row: engine.Row, x: Array, w: Array, b: Array) -> tuple[Array, tuple[Array]]:
    """Return y, and the statistics to save."""
    m = row.measured(x)
    rstd = 1 / sqrt(row.sum(m * m) / row.k + row.eps)
    z = x * rstd
    y = z * w + b
    return y, (rstd,)


def backward(row: engine.Row, dy: Array, x: Array, w: Array, rstd: Array) -> tuple[Array, Array, Array]:
    """Return dx, and dw and db before their sums over the rows."""
    z = x * rstd
    dz = dy * w
    dx = rstd * (dz - row.measured(z) * (row.sum(dz * z) / row.k))
    return dx, dy * z, dy


class PartialRMSNorm(norm.FeatureNorm[Saved]):
    """Divide each row by the root mean square of a part of it.

    Parameters
    ----------
    weight, bias : arrays of shape (features,), or None
        w and b; None leaves it out. On a group, this rank's shard.
    p : float
        The part: k = ceil(n p) features; 6.25 % is the paper's. p = 1 is RMSNorm, bit for bit.
    eps : float
        Added to the mean square, so in units of x squared.
    **settings : group, compute
        As for every `FeatureNorm`.

    Examples
    --------
    >>> norm = PartialRMSNorm(p=0.5, eps=0)
    >>> y, saved = norm.forward(np.array([[1.0, 7.0, 10.0, -5.0]]))  # root mean square of the first half: 5
    >>> y
    array([[ 0.2,  1.4,  2. , -1. ]])
    """

    p: options.Fixed[float]
    formula = engine.Formula(forward, backward, Saved)
    _shapes = dict.fromkeys(("weight", "bias"), "(features,), one axis")

    def __init__(
        self,
        weight: Array | None = None,
        bias: Array | None = None,
        p: float = 0.0625,
        eps: float = 1e-6,
        **settings: Unpack[options.Settings],
    ) -> None:
        super().__init__(weight, bias, eps, settings)
        checks.check_part("PartialRMSNorm", p, self.group)
        self._set(p=p, rows=engine.Rows(self.layout, rms_norm.RMSNorm.formula, eps, self.compute))

    @classmethod
    def init(cls, features: int, dtype: DTypeLike = "float32", **settings: Unpack[options.OfParts]) -> Self:
        """Return the norm with a weight of ones, for this rank's features; settings as above."""
        return cls._init(features, dtype, settings)

    def forward(
        self, x: options.AnyArray, rng: np.random.Generator | None = None, *, out: Array | None = None
    ) -> tuple[options.AnyArray, Saved]:
        """Return y, of the shape and dtype of x: (..., features), and what backward needs; y is written to `out`.

        Parameters
        ----------
        rng : numpy.random.Generator or None
            Draws what is measured anew, without replacement, the same for all rows; None: the first k features. On a
            group, the same generator in the same state on every rank.
        """
        self._check(x=x)
        n, k = x.shape[-1] * self.group.size, self.k(x.shape[-1] * self.group.size)
        mask = self._draw(n, k, rng)
        subset = None if k == n else from_numpy(mask, x)
        y, (rstd,), exponent = self._rows(subset, k).forward(x, self.params, out=out)
        return y, Saved(x, subset, k, rstd, exponent)

    def backward(
        self, dy: options.AnyArray, saved: Saved, *, out: Array | None = None
    ) -> tuple[options.AnyArray, dict[str, Any]]:
        """Return dx, of the shape and dtype of x, and the gradients of the parameters; dx is written to `out`."""
        self._check_saved(saved)
        x, subset, k, rstd, exponent = saved
        self._check(dy=dy, x=x)
        return self._rows(subset, k).backward(dy, x, self.params, (rstd,), exponent, out=out)

    def k(self, n: int) -> int:
        """Return how many of n features are measured: ceil(n p)."""
        return math.ceil(n * Fraction(str(self.p)))  # p as it was written: 100 * 0.07 is above 7

    def _rows(self, subset: Array | None, k: int) -> engine.Rows:
        layout = engine.Subset("PartialRMSNorm", self.group, subset, k)
        return self.rows if subset is None else engine.Rows(layout, self.formula, self.eps, self.compute)

    def _draw(self, n: int, k: int, rng: np.random.Generator | None) -> np.ndarray:
        """Return which of this rank's features are measured."""
        chosen = np.arange(k)
        if rng is not None:
            checks.check_generator("PartialRMSNorm", rng, self.group)
            chosen = np.sort(rng.choice(n, k, replace=False))
            self.group.require_same(f"PartialRMSNorm with the subset {chosen.tolist()}")
        return self.group.shard(np.bincount(chosen, minlength=n) > 0, 0)

    def _shown(self) -> dict[str, Any]:
        return {"p": self.p, **super()._shown()}
