"""Dynamic tanh, DyT: what is left of a norm without statistics.

Jiachen Zhu et al., "Transformers without Normalization", CVPR 2025, arXiv:2503.10622.

Forward, element by element, with one number alpha for all:

    z = tanh(alpha x)
    y = z w + b

Backward, given dy:

    dz     = dy w
    du     = dz (1 - z^2)                 u = alpha x
    dx     = alpha du
    dalpha = sum over rows and features of x du
    dw     = sum over rows of dy z
    db     = sum over rows of dy

It is not a norm: no element sees another. So nothing is communicated when the features are split over the ranks of a
group, but one number backward, since alpha is the same on every rank and its gradient complete. The code is shared with
`npnorm.norms.derf`, see `npnorm.norms.elementwise`.
"""

from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, exp, tanh
from npnorm.group import SOLO, Group
from npnorm.norms.elementwise import Elementwise


class DyT(Elementwise):
    """Squash each element by a tanh in place of a norm: y = tanh(alpha x) w + b.

    Parameters
    ----------
    alpha : array of shape () or (1,)
        The slope, for all elements; the paper starts it at 0.5. On a group, the same on every rank.
    weight : array of the shape of the features, or None
        The gain w; None leaves it out. On a group, this rank's shard along the last axis.
    bias : array of the shape of the features, or None
        The shift b; None leaves it out.
    group : Group
        The ranks over which the last axis is split equally. Communicated: nothing forward; backward a sum of one
        number.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Examples
    --------
    >>> layer = DyT(np.array(0.5), np.ones(2), np.zeros(2))
    >>> y, saved = layer.forward(np.array([[0.0, 1000.0]]))
    >>> y
    array([[0., 1.]])
    """

    layer = "DyT"

    def __init__(
        self,
        alpha: Array,
        weight: Array | None = None,
        bias: Array | None = None,
        *,
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        super().__init__({"alpha": alpha}, weight, bias, group, compute)

    @classmethod
    def init(cls, features: int | tuple[int, ...], dtype: str = "float32", **settings: Any) -> "DyT":
        """Return the layer with the paper's alpha of 0.5, a weight of ones and a bias of zeros."""
        return cls(np.full(1, 0.5, dtype), np.ones(features, dtype), np.zeros(features, dtype), **settings)

    @staticmethod
    def squash(u: Array) -> Array:
        """Return tanh(u)."""
        return tanh(u)

    @staticmethod
    def slope(u: Array, z: Array) -> Array:
        """Return the derivative of tanh at u: 1 - z^2, without its cancellation."""
        e = exp(2 * array_module(u).where(u > 0, -u, u))
        return 4 * e / ((1 + e) * (1 + e))
