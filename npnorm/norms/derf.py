"""Dynamic erf, Derf: DyT with the error function, and a shift.

Mingzhi Chen et al., "Stronger Normalization-Free Transformers", 2025, arXiv:2512.10938.

Forward, element by element, with two numbers alpha and s for all:

    z = erf(alpha x + s)
    y = z w + b

Backward, given dy:

    dz = dy w
    du = dz 2 / sqrt(pi) exp(-u^2)        u = alpha x + s
    dx = alpha du
    dw = sum over rows of dy z
    db = sum over rows of dy
    dalpha = sum over rows and features of x du
    ds = sum over rows and features of du

Communicated, when the features are split over the ranks of a group: nothing forward; backward a sum of two numbers, for
alpha and s. The error function is SciPy's.
"""

import math
from typing import Self, Unpack

import numpy as np
from numpy.typing import DTypeLike

from npnorm.arrays import Array, erf, exp
from npnorm.engine import Formula, Row
from npnorm.norms import elementwise
from npnorm.norms.options import Common


def forward(row: Row, x: Array, w: Array, b: Array, alpha: Array, s: Array) -> tuple[Array, tuple[()]]:
    """Return y; there are no statistics."""
    z = erf(alpha * x + s)
    y = z * w + b
    return y, ()


def backward(row: Row, dy: Array, x: Array, w: Array, alpha: Array, s: Array) -> tuple[Array, ...]:
    """Return dx, and dw, db, dalpha and ds before their sums over the rows."""
    u = alpha * x + s
    z = erf(u)
    dz = dy * w
    du = dz * (2 / math.sqrt(math.pi) * exp(-u * u))
    dx = alpha * du
    return dx, dy * z, dy, row.local_sum(x * du), row.local_sum(du)


class Derf(elementwise.Elementwise):
    """Squash each element by an error function in place of a norm: y = erf(alpha x + s) w + b.

    Parameters
    ----------
    alpha, shift : arrays of shape () or (1,)
        The slope and the shift s, for all elements; the paper starts them at 0.5 and 0. On a group, the same on every
        rank.
    weight, bias : arrays of the shape of the features, or None
        w and b; None leaves it out. On a group, this rank's shard of the last axis.
    **settings : group, compute
        As for every `FeatureNorm`.

    Examples
    --------
    >>> layer = Derf(np.array(0.5), np.array(0.0), np.ones(2), np.zeros(2))
    >>> y, saved = layer.forward(np.array([[0.0, 1000.0]]))
    >>> y
    array([[0., 1.]])
    """

    _shapes = elementwise.shapes("alpha", "shift")
    formula = Formula(
        forward,
        backward,
        elementwise.Saved,
        params=("weight", "bias", "alpha", "shift"),
        read=("weight", "alpha", "shift"),
    )

    def __init__(
        self,
        alpha: Array,
        shift: Array,
        weight: Array | None = None,
        bias: Array | None = None,
        **settings: Unpack[Common],
    ) -> None:
        super().__init__({"alpha": alpha, "shift": shift}, weight, bias, settings)

    @classmethod
    def init(cls, features: int | tuple[int, ...], dtype: DTypeLike = "float32", **settings: Unpack[Common]) -> Self:
        """Return the layer with the paper's alpha of 0.5 and shift of 0, a weight of ones and a bias of zeros.

        On a group, features are those of this rank's shard.
        """
        cls._check_init(features, dtype, settings)
        numbers = np.full(1, 0.5, dtype), np.zeros(1, dtype)
        return cls(*numbers, np.ones(features, dtype), np.zeros(features, dtype), **settings)
