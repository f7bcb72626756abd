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

The derivation is in docs/norms/rms_norm.md. Each feature moves the others through one number, mean(dz z). So a row that
is split over the ranks of a group costs one sum over the ranks forward, and one backward.
"""

from typing import NamedTuple, Self, Unpack

from numpy.typing import DTypeLike

from npnorm.arrays import Array, sqrt
from npnorm.engine import Formula, Row, accurate_where_dx_cancels
from npnorm.norms import options
from npnorm.norms.norm import FeatureNorm


class Saved(NamedTuple):
    """What backward needs of forward; rstd and exponent are one number for each row."""

    x: Array
    rstd: Array
    exponent: Array | None  # rows whose squares overflow were divided by 2^exponent; None: there were none


def forward(row: Row, x: Array, w: Array, b: Array) -> tuple[Array, tuple[Array]]:
    """Return y, and the statistics to save."""
    rstd = 1 / sqrt(row.mean(x * x) + row.eps)
    z = x * rstd
    y = z * w + b
    return y, (rstd,)


@accurate_where_dx_cancels
def backward(row: Row, dy: Array, x: Array, w: Array, rstd: Array) -> tuple[Array, Array, Array]:
    """Return dx, and dw and db before their sums over the rows. Where dx cancels, it is found in another form."""
    z = x * rstd
    dz = dy * w
    dx = rstd * (dz - z * row.mean(dz * z))
    return dx, dy * z, dy


class RMSNorm(FeatureNorm[Saved]):
    """Divide each row by its root mean square: y = x / sqrt(mean(x^2) + eps) w + b.

    Parameters
    ----------
    weight, bias : arrays of the shape of the features, or None
        w and b; None leaves it out. On a group, this rank's shard of the last axis.
    eps : float
        Added to the mean square, so in units of x squared.
    offset : float
        Added to the weight: Gemma and Qwen3-Next store w - 1, and have offset=1.
    **settings : axes, features, group, compute
        As for every `FeatureNorm`.

    Examples
    --------
    >>> import numpy as np
    >>> norm = RMSNorm(np.ones(2), eps=0)
    >>> y, saved = norm.forward(np.array([[1.0, 7.0]]))  # root mean square 5
    >>> y
    array([[0.2, 1.4]])
    """

    formula = Formula(forward, backward, Saved)

    def __init__(
        self,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-6,
        *,
        offset: float = 0,
        **settings: Unpack[options.Settings],
    ) -> None:
        super().__init__(weight, bias, eps, settings, offset=offset)

    @classmethod
    def init(cls, features: options.Sizes, dtype: DTypeLike = "float32", **settings: Unpack[options.OfWeights]) -> Self:
        """Return the norm with a weight of ones, less the offset, for this rank's features; settings as above."""
        return cls._init(features, dtype, settings)
