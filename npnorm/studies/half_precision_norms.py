"""RMSNorm in 16 bits, as models wrote it: what is rounded to the dtype of x, and where.

With R(a) rounded to the dtype of x, S(a) to float32, and m and rstd one number for each row:

    in the dtype   m = mean(R(x^2)), each partial sum rounded,  rstd = R(1 / sqrt(R(m + eps))),  y = R(R(x rstd) w)
    generation 1   m = R(mean(R(x^2))), summed in float32,      rstd = R(1 / sqrt(R(m + eps))),  y = R(x rstd) w
    generation 2   m = S(mean(x^2)),                            rstd = S(1 / sqrt(m + eps)),     y = R(x rstd) w
    generation 3   m and rstd as generation 2,                                                   y = R(x rstd w)

The generations are those of jingyaogong/minimind: from February 2025, from April 2025, and from March 2026. In
generations 1 and 2 the product with w has the wider dtype of the two: in NumPy as in torch, 16 bits and 32 make 32.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npnorm import CastRMSNorm, RMSNorm
from npnorm.conformance import textbook
from npnorm.norms.options import Cast
from npnorm.tree import Layer, Tree

WIDE = np.float32

HALVES = ("float16", "bfloat16")
ORDERS = ("generation 1", "generation 2", "generation 3", "llama", "olmo2", "gemma")
"""The orders of the casts that are compared."""


def mean(a: np.ndarray, sums: Any) -> np.ndarray:
    """Return the mean of each row in the dtype of a; its partial sums, one element after the other, are in `sums`.

    Examples
    --------
    >>> mean(np.ones((1, 4096), "float16"), "float16")  # 2048 + 1 is 2048 in float16
    array([[0.5]], dtype=float16)
    """
    total = np.add.accumulate(a, axis=-1, dtype=sums)[..., -1:]
    return (total.astype(WIDE) / WIDE(a.shape[-1])).astype(a.dtype)


def rstd_of_squares_in_half(x: np.ndarray, eps: float, sums: Any) -> np.ndarray:
    """Return 1 / sqrt(mean(x^2) + eps), rounded to the dtype of x after each operation."""
    with np.errstate(over="ignore", under="ignore", divide="ignore"):  # what is lost here is what is studied
        m = mean(x * x, sums)
        shifted = (m.astype(WIDE) + WIDE(eps)).astype(x.dtype)
        return (1 / np.sqrt(shifted.astype(WIDE))).astype(x.dtype)


def in_the_dtype(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """Return y; nothing is wider than x."""
    return x * rstd_of_squares_in_half(x, eps, x.dtype) * w.astype(x.dtype)


def layer_norm_in_the_dtype(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """Return y of LayerNorm; nothing is wider than x."""
    return in_the_dtype(x - mean(x, x.dtype), w, eps)


def generation_1(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """Return y; the squares are in the dtype of x."""
    return (x.astype(WIDE) * rstd_of_squares_in_half(x, eps, WIDE)).astype(x.dtype) * w


def generation_2(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """Return y, in float32 if w is."""
    return _in_float32(x, eps).astype(x.dtype) * w


def generation_3(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """Return y."""
    return (_in_float32(x, eps) * w.astype(WIDE)).astype(x.dtype)


def npnorm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """Return y of `npnorm.RMSNorm`."""
    return RMSNorm(w, eps=eps).forward(x)[0]


def _in_float32(x: np.ndarray, eps: float) -> np.ndarray:
    wide = x.astype(WIDE)
    return wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + WIDE(eps))


FORMS: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "in the dtype": in_the_dtype,
    "generation 1": generation_1,
    "generation 2": generation_2,
    "generation 3": generation_3,
    "npnorm": npnorm,
    "LayerNorm in the dtype": layer_norm_in_the_dtype,
}
"""Functions from x, w and eps to y, by name."""


class Saved(NamedTuple):
    """What backward needs of forward, in float32."""

    z: np.ndarray
    rstd: np.ndarray


class Generation1:
    """Generation 1 as a layer whose weight has the dtype of x; backward has only its rounded rstd from it."""

    shards: Tree = {"weight": None}

    def __init__(self, weight: np.ndarray, eps: float) -> None:
        self.params, self.eps = {"weight": weight}, eps

    def forward(self, x: Any) -> tuple[np.ndarray, Saved]:
        """Return y."""
        rstd = rstd_of_squares_in_half(x, self.eps, WIDE).astype(WIDE)
        z = x.astype(WIDE) * rstd
        return z.astype(x.dtype) * self.params["weight"], Saved(z, rstd)

    def backward(self, dy: Any, saved: Saved) -> tuple[np.ndarray, Tree]:
        """Return dx, and the gradient of the weight: the formula in float32, rounded once."""
        w, wide = self.params["weight"], dy.astype(WIDE)
        dx = textbook.backward(wide, w.astype(WIDE), saved.z, saved.rstd, (-1,), centred=False)
        dw = (wide * saved.z).sum(tuple(range(dy.ndim - 1)))
        return dx.astype(dy.dtype), {"weight": dw.astype(w.dtype)}


class InHalf:
    """A norm of 16 bits between layers of float32: x, y, dy, dx, a copy of the weight and its gradient are rounded.

    Parameters
    ----------
    weight : array of float32
        With the form "gemma", less 1.
    dtype : str
    form : "generation 1", "llama", "olmo2" or "gemma"
        The last three are those of `CastRMSNorm`.
    eps, loss_scale : float
        dy is rounded after it was multiplied by loss_scale, and what comes back is divided by it.
    """

    shards: Tree = {"weight": None}

    def __init__(self, weight: np.ndarray, dtype: str, form: Any, eps: float, loss_scale: float) -> None:
        self.params = {"weight": weight}
        self.dtype, self.form, self.eps, self.loss_scale = dtype, form, eps, WIDE(loss_scale)

    def forward(self, x: Any) -> tuple[np.ndarray, Any]:
        """Return y in the dtype of x."""
        y, saved = self._norm().forward(x.astype(self.dtype))
        return y.astype(x.dtype), saved

    def backward(self, dy: Any, saved: Any) -> tuple[np.ndarray, Tree]:
        """Return dx and the gradient of the weight, in the dtype of dy."""
        dx, grads = self._norm().backward((dy * self.loss_scale).astype(self.dtype), saved)
        back = {name: grad.astype(dy.dtype) / self.loss_scale for name, grad in grads.items()}
        return dx.astype(dy.dtype) / self.loss_scale, back

    def _norm(self) -> Layer:
        w = self.params["weight"].astype(self.dtype)
        if self.form == "generation 1":
            return Generation1(w, self.eps)
        cast: Cast = self.form
        return CastRMSNorm(w, eps=self.eps, cast=cast, offset=float(cast == "gemma"))
