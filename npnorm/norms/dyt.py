"""Dynamic tanh, DyT: what is left of a norm without statistics.

Jiachen Zhu et al., "Transformers without Normalization", CVPR 2025, arXiv:2503.10622.

Forward, element by element, with one number alpha for all:

    z = tanh(alpha x)
    y = z w + b

Backward, given dy:

    dz = dy w
    du = dz (1 - z^2)                     u = alpha x, and 1 - tanh(u)^2 = 1 / cosh(u)^2
    dx = alpha du
    dw = sum over rows of dy z
    db = sum over rows of dy
    dalpha = sum over rows and features of x du

It is not a norm: no element sees another. So nothing is communicated when the features are split over the ranks of a
group, but one number backward, since alpha is the same on every rank and its gradient complete.
"""

from typing import Self, Unpack

import numpy as np
from numpy.typing import DTypeLike

from npnorm.arrays import Array, array_module, exp, tanh
from npnorm.engine import Formula, Row
from npnorm.norms import elementwise
from npnorm.norms.options import Common


def slope(u: Array) -> Array:
    """Return 1 / cosh(u)^2, which is 1 - tanh(u)^2 without its cancellation, and without overflow."""
    e = exp(2 * array_module(u).where(u > 0, -u, u))
    return 4 * e / ((1 + e) * (1 + e))


def forward(row: Row, x: Array, w: Array, b: Array, alpha: Array) -> tuple[Array, tuple[()]]:
    """Return y; there are no statistics."""
    z = tanh(alpha * x)
    y = z * w + b
    return y, ()


def backward(row: Row, dy: Array, x: Array, w: Array, alpha: Array) -> tuple[Array, Array, Array, Array]:
    """Return dx, and dw, db and dalpha before their sums over the rows."""
    u = alpha * x
    z = tanh(u)
    dz = dy * w
    du = dz * slope(u)
    dx = alpha * du
    return dx, dy * z, dy, row.local_sum(x * du)


class DyT(elementwise.Elementwise):
    """Squash each element by a tanh in place of a norm: y = tanh(alpha x) w + b.

    Parameters
    ----------
    alpha : array of shape () or (1,)
        The slope, for all elements; the paper starts it at 0.5. On a group, the same on every rank.
    weight, bias : arrays of the shape of the features, or None
        w and b; None leaves it out. On a group, this rank's shard of the last axis.
    **settings : group, compute
        As for every `FeatureNorm`.

    Examples
    --------
    >>> layer = DyT(np.array(0.5), np.ones(2), np.zeros(2))
    >>> y, saved = layer.forward(np.array([[0.0, 1000.0]]))
    >>> y
    array([[0., 1.]])
    """

    _shapes = elementwise.shapes("alpha")
    formula = Formula(forward, backward, elementwise.Saved, ("weight", "bias", "alpha"), read=("weight", "alpha"))

    def __init__(
        self, alpha: Array, weight: Array | None = None, bias: Array | None = None, **settings: Unpack[Common]
    ) -> None:
        super().__init__({"alpha": alpha}, weight, bias, settings)

    @classmethod
    def init(cls, features: int | tuple[int, ...], dtype: DTypeLike = "float32", **settings: Unpack[Common]) -> Self:
        """Return the layer with the paper's alpha of 0.5, a weight of ones and a bias of zeros.

        On a group, features are those of this rank's shard.
        """
        cls._check_init(features, dtype, settings)
        return cls(np.full(1, 0.5, dtype), np.ones(features, dtype), np.zeros(features, dtype), **settings)
