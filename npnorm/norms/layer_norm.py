"""Layer normalization.

Jimmy Lei Ba, Jamie Ryan Kiros and Geoffrey Hinton, "Layer Normalization", 2016, arXiv:1607.06450, equations 3 and 4;
with eps inside the root, as in torch (the paper has none).

Forward, for each row x of n features, with mean(a) = sum(a) / n:

    c    = x - mean(x)
    var  = mean(c^2)
    rstd = 1 / sqrt(var + eps)
    z    = c rstd
    y    = z w + b

Backward, given dy:

    dz = dy w
    dx = rstd (dz - mean(dz) - z mean(dz z))
    dw = sum over rows of dy z
    db = sum over rows of dy

The derivation is in docs/norms/layer_norm.md. Each feature moves the others through the mean, hence - mean(dz), and
through rstd, hence - z mean(dz z). A row that is split over the ranks of a group costs two sums over the ranks forward,
since the mean must be known before c is squared, and one backward, of both means. docs/norms/statistics.md has ways to
do with one message forward.
"""

from typing import NamedTuple, Self, Unpack

from numpy.typing import DTypeLike

from npnorm.arrays import Array, sqrt
from npnorm.engine import Formula, Mean, Row, accurate_where_dx_cancels
from npnorm.norms import options
from npnorm.norms.norm import FeatureNorm


class Saved(NamedTuple):
    """What backward needs of forward: beside x, numbers for each row. The mean is the sum of its two parts."""

    x: Array
    mean: Mean
    rstd: Array
    exponent: Array | None  # rows whose squares overflow were divided by 2^exponent; None: there were none


def forward(row: Row, x: Array, w: Array, b: Array) -> tuple[Array, tuple[Mean, Array]]:
    """Return y, and the statistics to save."""
    c, mean, var = row.centre(x)  # c and var as above, and the mean
    rstd = 1 / sqrt(var + row.eps)
    z = c * rstd
    y = z * w + b
    return y, (mean, rstd)


@accurate_where_dx_cancels
def backward(row: Row, dy: Array, x: Array, w: Array, mean: Mean, rstd: Array) -> tuple[Array, Array, Array]:
    """Return dx, and dw and db before their sums over the rows. Where dx cancels, it is found in another form."""
    c = row.subtract(x, mean)
    z = c * rstd
    dz = dy * w
    mean_dz, mean_dzz = row.mean(dz, dz * z)  # together: one message
    dx = rstd * (dz - mean_dz - z * mean_dzz)
    return dx, dy * z, dy


class LayerNorm(FeatureNorm[Saved]):
    """Give each row mean 0 and variance 1: y = (x - mean(x)) / sqrt(var(x) + eps) w + b.

    Parameters
    ----------
    weight, bias : arrays of the shape of the features, or None
        w and b; None leaves it out. On a group, this rank's shard of the last axis.
    eps : float
        Added to the variance (that of n, not n - 1), so in units of x squared.
    statistics : "two-pass", "packed" or "gathered"
        How the ranks of a group find mean and variance; on one rank all three are the same.
    **settings : axes, features, group, compute
        As for every `FeatureNorm`.

    Examples
    --------
    >>> import numpy as np
    >>> norm = LayerNorm(np.ones(4), np.zeros(4), eps=0)
    >>> y, saved = norm.forward(np.array([[1.0, 1.0, 3.0, 3.0]]))  # mean 2, standard deviation 1
    >>> y
    array([[-1., -1.,  1.,  1.]])
    """

    formula = Formula(forward, backward, Saved)

    def __init__(
        self,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-5,
        *,
        statistics: options.Statistics = "two-pass",
        **settings: Unpack[options.Settings],
    ) -> None:
        super().__init__(weight, bias, eps, settings, statistics=statistics)

    @classmethod
    def init(cls, features: options.Sizes, dtype: DTypeLike = "float32", **settings: Unpack[options.OfMeans]) -> Self:
        """Return the norm with a weight of ones and a bias of zeros, for this rank's features; settings as above."""
        return cls._init(features, dtype, settings, with_bias=True)
