"""Layer normalization.

Jimmy Lei Ba, Jamie Ryan Kiros and Geoffrey Hinton, "Layer Normalization", 2016, arXiv:1607.06450, equations 3 and 4;
with eps inside the root, as in torch (the paper has none).

Forward, for each row x of n features, with mean(a) = sum(a) / n:

    c    = x - mean(x)                    centre(x) gives c, mean(x) and var = mean(c^2): see `Features.centre`
    rstd = 1 / sqrt(mean(c^2) + eps)
    z    = c rstd
    y    = z w + b

Backward, given dy:

    dz = dy w
    dx = rstd (dz - mean(dz) - z mean(dz z))
    dw = sum over rows of dy z
    db = sum over rows of dy

Each feature moves all others through the mean, hence - mean(dz), and through rstd, hence - z mean(dz z). A row split
over the ranks of a group costs two all-reduces forward, since the mean must be known before mean(c^2), and one
backward: the two means do not wait for each other and share a message.
"""

from typing import NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module, sqrt
from npnorm.blocked import Rows
from npnorm.group import SOLO, Group, Solo
from npnorm.layer import check_saved
from npnorm.norms.features import Features, affine, centred


class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array
    statistics: Array  # (rows, 3): the mean in two parts, and rstd; of the scaled rows
    scale: Array | None  # (rows, 1): the power of two a row was divided by, where its squares leave the range


class LayerNorm:
    """Give each row mean 0 and variance 1: y = (x - mean(x)) / sqrt(var(x) + eps) w + b.

    Parameters
    ----------
    weight : array of shape (features,), or None
        The gain w; None leaves it out. On a group, this rank's shard.
    bias : array of shape (features,), or None
        The shift b; None leaves it out.
    eps : float
        Added to the variance (that of n, not n - 1); in units of x squared.
    group : Group
        The ranks over which the features are split equally. Communicated: forward a sum of one number for each row,
        the mean, and a sum of two, the centred square and what rounding had left of the mean; backward one sum of two.
    compute : "float64", "float32" or None
        The working precision; None is float64.

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if the parameters are not floats of one shape (features,), or eps is not finite and >= 0.

    Examples
    --------
    >>> norm = LayerNorm(np.ones(4), np.zeros(4), eps=0)
    >>> y, saved = norm.forward(np.array([[1.0, 1.0, 3.0, 3.0]]))  # mean 2, standard deviation 1
    >>> y
    array([[-1., -1.,  1.,  1.]])
    """

    def __init__(
        self,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-5,
        *,
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        self.params = {name: a for name, a in (("weight", weight), ("bias", bias)) if a is not None}
        self.shards = dict.fromkeys(self.params, None if isinstance(group, Solo) else 0)
        self.features = Features("LayerNorm", self.params, eps, group)
        self.rows = Rows(eps, group, compute)

    @classmethod
    def init(cls, features: int, dtype: str = "float32", **settings: object) -> "LayerNorm":
        """Return the norm with a weight of ones and a bias of zeros."""
        return cls(np.ones(features, dtype), np.zeros(features, dtype), **settings)  # type: ignore[arg-type]

    def forward(self, x: Array) -> tuple[Array, Saved]:
        """Return y, of the shape and dtype of x: (..., features), and what backward needs."""
        self.features.check(x=x)
        centre = self.features.centre

        def formula(x: Array, w: Array, b: Array, eps: Array) -> tuple[Array, Array]:
            c, mean, var = centre(x)
            rstd = 1 / sqrt(var + eps)
            z = c * rstd
            y = affine(z, w, b)
            return y, array_module(x).concat([mean, rstd], axis=-1)

        y, statistics, scale = self.rows.forward(formula, x, self.params)
        return y, Saved(x, statistics, scale)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
        """Return dx, of the shape and dtype of x, and the gradients of the parameters, in their dtypes."""
        check_saved("LayerNorm", saved, Saved)
        self.features.check(dy=dy, x=saved.x)
        mean = self.features.mean

        def formula(dy: Array, x: Array, w: Array, statistics: Array) -> tuple[Array, dict[str, Array]]:
            mean_x, rstd = statistics[:, :2], statistics[:, 2:]
            z = centred(x, mean_x) * rstd
            dz = affine(dy, w)
            mean_dz, mean_dzz = mean(dz, dz * z)
            dx = rstd * (dz - mean_dz - z * mean_dzz)
            return dx, {"weight": dy * z, "bias": dy}  # to be summed over the rows

        x, statistics, scale = saved
        return self.rows.backward(formula, dy, x, self.params, statistics, scale)
