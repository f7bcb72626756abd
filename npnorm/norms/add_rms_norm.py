"""Residual addition and RMSNorm in one step, as the blocks of a Pre-Norm transformer chain them.

Forward:

    h = x + residual
    y = norm(h)                           norm: `npnorm.norms.rms_norm`

y goes into the next sub-layer; h is the residual for the step after it. Backward, given dy and the gradient dh that
comes down the residual connection:

    dh      = dh + norm'(dy)              norm'(d): the backward pass of norm
    dx      = dh
    dresidual = dh

The residual connection passes by the norm: norm' takes dy alone. On a group the features are split, and what is
communicated is what RMSNorm communicates.
"""

from functools import partial
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, dtype_name
from npnorm.checks import check_features, check_saved
from npnorm.group import errors_on_all_ranks
from npnorm.norms.rms_norm import RMSNorm, Saved, normalize_backward


class AddRMSNorm:
    """Add the residual, and normalize the sum: h = x + residual, y = RMSNorm(h).

    Parameters
    ----------
    weight, bias, eps, **settings
        Those of `RMSNorm`.

    Examples
    --------
    >>> norm = AddRMSNorm(np.ones(2), eps=0)
    >>> (y, h), saved = norm.forward(np.array([[1.0, 3.0]]), np.array([[0.0, 4.0]]))
    >>> y, h
    (array([[0.2, 1.4]]), array([[1., 7.]]))
    """

    def __init__(
        self, weight: Array | None = None, bias: Array | None = None, eps: float = 1e-6, **settings: Any
    ) -> None:
        self.norm = RMSNorm(weight, bias, eps, **settings)
        self.params, self.shards = self.norm.params, self.norm.shards

    @classmethod
    def init(cls, features: int | tuple[int, ...], dtype: str = "float32", **settings: Any) -> "AddRMSNorm":
        """Return the norm with a gain of ones and no bias."""
        return cls(RMSNorm.init(features, dtype, **settings).params["weight"], **settings)

    def forward(self, x: Array, residual: Array) -> tuple[tuple[Array, Array], Saved]:
        """Return (y, h), both of the shape and dtype of x, and what backward needs; h is rounded, then normalized."""
        self._check(residual=residual, x=x)
        with np.errstate(all="ignore"):
            h = x + residual
        y, saved = self.norm.forward(h)
        return (y, h), saved

    def backward(self, dy: Array, dh: Array, saved: Saved) -> tuple[tuple[Array, Array], dict[str, Array]]:
        """Return (dx, dresidual), which are equal, and the gradients of the parameters."""
        norm = self.norm
        check_saved("AddRMSNorm", saved, Saved, norm.axes.group)
        self._check(dh=dh, x=saved.x)
        check_features("AddRMSNorm", self.params, norm.axes.count, norm.axes.group, dy=dy, x=saved.x)
        formula = partial(normalize_backward, norm.axes, norm.gain, saved.x)
        dx, grads = norm.rows.backward(formula, dy, saved.x, self.params, (saved.rstd,), saved.scale, plus=dh)
        return (dx, array_module(dx).astype(dx, dx.dtype)), grads  # dh + norm'(dy), rounded once

    def _check(self, **arrays: Array) -> None:
        axes = self.norm.axes
        check_features("AddRMSNorm", self.params, axes.count, axes.group, **arrays)
        with errors_on_all_ranks(axes.group):
            (name, a), (other, b) = arrays.items()
            if dtype_name(a) != dtype_name(b) and "complex128" not in (dtype_name(a), dtype_name(b)):
                raise TypeError(
                    f"AddRMSNorm: {name} is {dtype_name(a)}, {other} is {dtype_name(b)}. Convert one of them: "
                    "the sum would silently have the wider type."
                )
