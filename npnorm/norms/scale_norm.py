"""ScaleNorm: each row becomes a vector of one learned length.

Toan Q. Nguyen and Julian Salazar, "Transformers without Tears", IWSLT 2019, arXiv:1910.05895, equation 5; with the
length bounded from below by eps, as in their code.

Forward, for each row x, with one number g, the weight, for all features:

    norm  = max(sqrt(sum(x^2)), eps)      longer: 1 where that is the length of x, 0 where it is eps
    rnorm = 1 / norm
    z     = x rnorm
    y     = z g

Backward, given dy:

    sum_dyz = sum(dy z)
    dx = rnorm (dy - z longer sum_dyz) g  of a shorter row norm is a constant
    dg = sum over rows of sum_dyz

RMSNorm with the constant weight g / sqrt(n) is the same up to the place of eps. A row that is split over the ranks of a
group costs one sum over the ranks forward, of x^2, and one backward, of dy z, which makes dg complete, too.
"""

from typing import NamedTuple, Self, Unpack

import numpy as np
from numpy.typing import DTypeLike

from npnorm.arrays import Array, array_module, sqrt
from npnorm.engine import Formula, Row, accurate_where_dx_cancels_without_eps
from npnorm.norms.norm import LengthNorm
from npnorm.norms.options import OfRows


class Saved(NamedTuple):
    """What backward needs of forward; all but x are one number for each row."""

    x: Array
    longer: Array  # 1 where |x| >= eps, and 0 elsewhere
    rnorm: Array  # 1 / norm
    exponent: Array | None  # rows whose squares overflow were divided by 2^exponent; None: there were none


def root(square: Array, least: Array) -> tuple[Array, Array]:
    """Return sqrt(square), or sqrt(least) where that is larger; and 1 where it is not, 0 where it is."""
    xp = array_module(square)
    longer = abs(square) >= least
    norm = sqrt(xp.where(longer, square, 0 * square + least))
    return norm, xp.astype(longer, norm.dtype)


def forward(row: Row, x: Array, g: Array) -> tuple[Array, tuple[Array, Array]]:
    """Return y, and the statistics to save; `row.eps` is eps^2."""
    norm, longer = root(row.sum(x * x), row.eps)
    rnorm = 1 / norm
    z = x * rnorm
    y = z * g
    return y, (longer, rnorm)


@accurate_where_dx_cancels_without_eps
def backward(row: Row, dy: Array, x: Array, g: Array, longer: Array, rnorm: Array) -> tuple[Array, Array]:
    """Return dx, and dg before its sum over the rows."""
    z = x * rnorm
    sum_dyz = row.sum(dy * z)
    dx = rnorm * (dy - z * (longer * sum_dyz)) * g
    return dx, sum_dyz


class ScaleNorm(LengthNorm[Saved]):
    """Give each row the Euclidean length g: y = g x / max(|x|, eps).

    Parameters
    ----------
    weight : array of shape () or (1,), or None
        The length g; None is 1. On a group, the same on every rank.
    eps : float
        The least length that is divided by, so in units of x.
    **settings : axes, features, group, compute
        As for every `FeatureNorm`; here axes is 1 unless it is given.

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

    formula = Formula(forward, backward, Saved, params=("weight",))

    @classmethod
    def init(cls, features: int, dtype: DTypeLike = "float32", **settings: Unpack[OfRows]) -> Self:
        """Return the norm with the length sqrt(features), of all ranks; settings: eps, axes, group, compute."""
        cls._check_init(features, dtype, settings)
        return cls(np.array(features**0.5, dtype), **settings)
