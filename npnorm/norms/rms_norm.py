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

from typing import NamedTuple

import numpy as np

from npnorm.arrays import Array, sqrt
from npnorm.blocked import Rows
from npnorm.group import SOLO, Group, Solo
from npnorm.layer import check_saved
from npnorm.norms.features import Features, affine


class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array
    rstd: Array  # (rows, 1), of the scaled rows
    scale: Array | None  # (rows, 1): the power of two a row was divided by, where its squares leave the range


class RMSNorm:
    """Divide each row by its root mean square: y = x / sqrt(mean(x^2) + eps) w + b.

    Parameters
    ----------
    weight : array of shape (features,), or None
        The gain w; None leaves it out. On a group, this rank's shard.
    bias : array of shape (features,), or None
        The shift b; None leaves it out.
    eps : float
        Added to the mean square; in units of x squared.
    group : Group
        The ranks over which the features are split equally. Communicated: one sum of a number for each row forward,
        one backward.
    compute : "float64", "float32" or None
        The working precision; None is float64.

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if the parameters are not floats of one shape (features,), or eps is not finite and >= 0.

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
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        self.params = {name: a for name, a in (("weight", weight), ("bias", bias)) if a is not None}
        self.shards = dict.fromkeys(self.params, None if isinstance(group, Solo) else 0)
        self.features = Features("RMSNorm", self.params, eps, group)
        self.rows = Rows(eps, group, compute)

    @classmethod
    def init(cls, features: int, dtype: str = "float32", **settings: object) -> "RMSNorm":
        """Return the norm with a weight of ones and no bias."""
        return cls(np.ones(features, dtype), **settings)  # type: ignore[arg-type]

    def forward(self, x: Array) -> tuple[Array, Saved]:
        """Return y, of the shape and dtype of x: (..., features), and what backward needs."""
        self.features.check(x=x)
        mean = self.features.mean

        def formula(x: Array, w: Array, b: Array, eps: Array) -> tuple[Array, Array]:
            rstd = 1 / sqrt(mean(x * x) + eps)
            z = x * rstd
            y = affine(z, w, b)
            return y, rstd

        y, rstd, scale = self.rows.forward(formula, x, self.params)
        return y, Saved(x, rstd, scale)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
        """Return dx, of the shape and dtype of x, and the gradients of the parameters, in their dtypes."""
        check_saved("RMSNorm", saved, Saved)
        self.features.check(dy=dy, x=saved.x)
        mean = self.features.mean

        def formula(dy: Array, x: Array, w: Array, rstd: Array) -> tuple[Array, dict[str, Array]]:
            z = x * rstd
            dz = affine(dy, w)
            dx = rstd * (dz - z * mean(dz * z))
            return dx, {"weight": dy * z, "bias": dy}  # to be summed over the rows

        x, rstd, scale = saved
        return self.rows.backward(formula, dy, x, self.params, rstd, scale)
