"""Residual addition and RMSNorm in one step, as the blocks of a Pre-Norm transformer chain them.

Forward:

    h = x + residual
    y = norm(h)                           norm: `npnorm.norms.rms_norm`

y goes into the next sub-layer; h is the residual for the step after it. Backward, given dy and the gradient dh that
comes down the residual connection, with norm' the backward pass of norm:

    dx        = dh + norm'(dy)
    dresidual = dx

The residual connection passes by the norm: norm' takes dy alone. On a group the features are split, and what is
communicated is what RMSNorm communicates.
"""

from typing import Any, Self, Unpack

import numpy as np
from numpy.typing import DTypeLike

from npnorm import arrays, checks
from npnorm.arrays import Array
from npnorm.group import errors_on_all_ranks
from npnorm.norms import cast_rms_norm, rms_norm
from npnorm.norms.norm import Norm
from npnorm.norms.options import OfSums

Saved = rms_norm.Saved
"""What backward needs of forward."""


class AddRMSNorm(Norm):
    """Add the residual, and normalize the sum: h = x + residual, y = RMSNorm(h).

    Parameters
    ----------
    weight, bias, eps, **settings
        Those of `RMSNorm`; and `cast`, that of `CastRMSNorm`.

    Examples
    --------
    >>> norm = AddRMSNorm(np.ones(2), eps=0)
    >>> (y, h), saved = norm.forward(np.array([[1.0, 3.0]]), np.array([[0.0, 4.0]]))
    >>> y, h
    (array([[0.2, 1.4]]), array([[1., 7.]]))
    """

    norm: rms_norm.RMSNorm | cast_rms_norm.CastRMSNorm
    _shapes = rms_norm.RMSNorm._shapes

    def __init__(
        self, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-6, **settings: Any
    ) -> None:
        kind = cast_rms_norm.CastRMSNorm if "cast" in settings else rms_norm.RMSNorm
        norm = kind(weight, bias, eps, **settings)
        self.params = norm.params
        self._set(norm=norm, eps=norm.eps, group=norm.group, compute=norm.compute, shards=norm.shards)

    @classmethod
    def init(cls, features: int | tuple[int, ...], dtype: DTypeLike = "float32", **settings: Unpack[OfSums]) -> Self:
        """Return the norm with a weight of ones, less the offset, and no bias; settings: cast, and those of `RMSNorm`.

        On a group, features are those of this rank's shard.
        """
        return cls(cls._ones(features, dtype, settings), **settings)

    def forward(self, x: Array, residual: Array) -> tuple[tuple[Any, Any], Saved]:
        """Return (y, h), both of the shape and dtype of x, and what backward needs; h is rounded, then normalized."""
        self._check(residual=residual, x=x)
        with np.errstate(all="ignore"):
            h = x + residual
        y, (rstd,), exponent = self.norm.rows.forward(h, self.params)
        return (y, h), Saved(h, rstd, exponent)

    def backward(self, dy: Array, dh: Array, saved: Saved) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """Return (dx, dresidual), which are equal, and the gradients of the parameters."""
        checks.check_saved("AddRMSNorm", saved, Saved, self.group)
        h, rstd, exponent = saved
        self._check(dh=dh, x=h)
        checks.check_features("AddRMSNorm", self.params, self._shapes, self.norm.axes, self.group, dy=dy, x=h)
        dx, grads = self.norm.rows.backward(dy, h, self.params, (rstd,), exponent, plus=dh)
        return (dx, arrays.array_module(dx).astype(dx, dx.dtype)), grads  # dh + norm'(dy), rounded once

    def _check(self, **pair: Array) -> None:
        axes, features = self.norm.axes, self.norm.features
        checks.check_features("AddRMSNorm", self.params, self._shapes, axes, self.group, features, **pair)
        checks.check_offset("AddRMSNorm", self.params, self.norm.offset, self.group)
        with errors_on_all_ranks(self.group):
            (name, a), (other, b) = ((name, arrays.dtype_name(array)) for name, array in pair.items())
            if a != b and "complex128" not in (a, b):
                raise TypeError(
                    f"AddRMSNorm: {name} is {a}, {other} is {b}. Convert one of them: "
                    "the sum would silently have the wider type."
                )

    def _shown(self) -> dict[str, Any]:
        return self.norm._shown()
