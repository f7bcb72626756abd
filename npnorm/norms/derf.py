"""Dynamic erf, Derf: DyT with the error function, and a shift.

Mingzhi Chen et al., "Stronger Normalization-Free Transformers", 2025, arXiv:2512.10938.

Forward, element by element, with two numbers alpha and s for all:

    z = erf(alpha x + s)
    y = z w + b

Backward, given dy:

    dz     = dy w
    du     = dz 2 / sqrt(pi) exp(-u^2)    u = alpha x + s
    dx     = alpha du
    dalpha = sum over rows and features of x du
    ds     = sum over rows and features of du
    dw     = sum over rows of dy z
    db     = sum over rows of dy

Communicated, when the features are split over the ranks of a group: nothing forward; backward a sum of two numbers,
for alpha and s. The error function is SciPy's.
"""

import math
from typing import Any

import numpy as np

from npnorm.arrays import Array, erf, exp
from npnorm.group import SOLO, Group
from npnorm.norms.elementwise import Elementwise


class Derf(Elementwise):
    """Squash each element by an error function in place of a norm: y = erf(alpha x + s) w + b.

    Parameters
    ----------
    alpha, shift : arrays of shape () or (1,)
        The slope and the shift s, for all elements; the paper starts them at 0.5 and 0. On a group, the same on every
        rank.
    weight : array of the shape of the features, or None
        The gain w; None leaves it out. On a group, this rank's shard along the last axis.
    bias : array of the shape of the features, or None
        The shift b after the squashing; None leaves it out.
    group : Group
        The ranks over which the last axis is split equally. Communicated: nothing forward; backward a sum of two
        numbers.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Examples
    --------
    >>> layer = Derf(np.array(0.5), np.array(0.0), np.ones(2), np.zeros(2))
    >>> y, saved = layer.forward(np.array([[0.0, 1000.0]]))
    >>> y
    array([[0., 1.]])
    """

    layer = "Derf"

    def __init__(
        self,
        alpha: Array,
        shift: Array,
        weight: Array | None = None,
        bias: Array | None = None,
        *,
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        super().__init__({"alpha": alpha, "shift": shift}, weight, bias, group, compute)

    @classmethod
    def init(cls, features: int | tuple[int, ...], dtype: str = "float32", **settings: Any) -> "Derf":
        """Return the layer with the paper's alpha of 0.5 and shift of 0, a weight of ones and a bias of zeros."""
        scalars = np.full(1, 0.5, dtype), np.zeros(1, dtype)
        return cls(*scalars, np.ones(features, dtype), np.zeros(features, dtype), **settings)

    @staticmethod
    def squash(u: Array) -> Array:
        """Return erf(u)."""
        return erf(u)

    @staticmethod
    def slope(u: Array, z: Array) -> Array:
        """Return the derivative of erf at u."""
        return 2 / math.sqrt(math.pi) * exp(-u * u)
