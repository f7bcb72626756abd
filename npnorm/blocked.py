"""How a row formula is driven: in which precision, in which blocks of rows, at which scale. No mathematics of norms.

A norm's page gives a formula over rows of features. `Rows` evaluates it in float64, block by block, and rounds once:

* float64 holds the square of any float32, so that float32, float16 and bfloat16 come out correctly rounded over their
  whole range; and in blocks that stay in cache it is no slower than float32 arrays in memory.
* Alone, the formula runs on one block of rows after the other. On a group it runs on all its rows at once, so that a
  statistic is one message; on a GPU too, where every block would be a launch.
* A norm does not see the scale of a row: z(x, eps) = z(x / 2^k, eps / 4^k). Rows whose squares leave the range are
  handed to the formula divided by a power of two, which is exact.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, contiguous, dtype_name, round_to
from npnorm.group import Group, Solo, everywhere

BLOCK = 1 << 20
"""Bytes of one operand in a block, in working precision: about a core's L2 cache."""

SAFE = {"float64": 450, "float32": 50}
"""Numbers between 2^-SAFE and 2^SAFE, and sums of their squares, are in range."""


class Rows:
    """The rows of arrays with the features last, and how formulas over them are evaluated.

    Parameters
    ----------
    eps : float
        What the norm adds to its mean square; it is scaled as the rows are.
    group : Group
        The ranks over which the features are split.
    compute : "float64", "float32" or None
        The working precision; None is float64.
    """

    def __init__(self, eps: float, group: Group, compute: str | None) -> None:
        self.eps = float(eps)  # a Python number takes the precision of the array that it meets
        self.group = group
        with everywhere(group):
            if compute not in (None, *SAFE):
                raise ValueError(f"compute is {compute!r}. Choose None, 'float64' or 'float32'.")
        self.compute = compute or "float64"

    def forward(
        self, formula: Callable[..., Any], x: Array, params: dict[str, Array]
    ) -> tuple[Array, Array, Array | None]:
        """Evaluate `formula(x, w, b, eps) -> y, statistics` on all rows.

        Parameters
        ----------
        formula : callable
            w and b are None where the norm has none; statistics are of shape (rows, k), with rstd last.
        x : array of shape (..., features)
        params : dict
            May hold "weight" and "bias", of shape (features,).

        Returns
        -------
        y : array of the shape and dtype of x
        statistics : array of shape (rows, k), of the scaled rows, in working precision
        scale : array of shape (rows, 1), or None
            The power of two that each row was divided by; None if no row needed one.
        """
        with _evaluation(x.shape[-1]):  # what leaves the range is found by its rstd, and redone
            y, statistics = self._forward(formula, x, params, None)
            scale = self._scale(x, statistics[:, -1:])
            if scale is not None:
                y, statistics = self._forward(formula, x, params, scale)
        return y, statistics, scale

    def _forward(
        self, formula: Callable[..., Any], x: Array, params: dict[str, Array], scale: Array | None
    ) -> tuple[Array, Array]:
        xp, work, flat = array_module(x), self._work(x, *params.values()), _flat(x)
        w, b = (_cast(params.get(name), work) for name in ("weight", "bias"))
        out, statistics = xp.empty_like(flat), []
        for s in self._blocks(flat):
            k = None if scale is None else scale[s, :]
            eps = self.eps if k is None else _divide(_divide(xp.full_like(k, self.eps), k), k)
            y, statistic = formula(_divide(_cast(flat[s, :], work), k), w, b, eps)
            out[s, :] = round_to(y, x.dtype)
            statistics.append(statistic)
        return xp.reshape(out, x.shape), xp.concat(statistics)

    def backward(
        self,
        formula: Callable[..., Any],
        dy: Array,
        x: Array,
        params: dict[str, Array],
        statistics: Array,
        scale: Array | None,
    ) -> tuple[Array, dict[str, Array]]:
        """Evaluate `formula(dy, x, w, statistics) -> dx, {name: gradient by row}` on all rows.

        Returns
        -------
        dx : array of the shape and dtype of x
        grads : dict
            For each name in `params` the sum of its gradient over the rows, in the dtype of the parameter.
        """
        xp, work = array_module(x), self._work(dy, *params.values())
        flat, flat_dy = _flat(x), _flat(dy)
        w = _cast(params.get("weight"), work)
        out, sums = xp.empty_like(flat), dict.fromkeys(params, 0.0)
        with _evaluation(x.shape[-1]):
            for s in self._blocks(flat):
                k = None if scale is None else scale[s, :]
                dx, rows = formula(_cast(flat_dy[s, :], work), _divide(_cast(flat[s, :], work), k), w, statistics[s, :])
                out[s, :] = round_to(_divide(dx, k), x.dtype)
                for name in params:
                    sums[name] = xp.sum(rows[name], axis=0) + sums[name]
            grads = {name: round_to(sums[name], param.dtype) for name, param in params.items()}
        return xp.reshape(out, x.shape), grads

    def _work(self, *arrays: Array) -> Any:
        """Return the working dtype: complex128 for the complex step, which differentiates the very code that runs."""
        names = {dtype_name(a) for a in arrays}
        with everywhere(self.group):
            if "float64" in names and self.compute == "float32":
                raise TypeError("compute='float32' would cut float64 arrays short. Leave compute out for them.")
        return getattr(array_module(arrays[0]), "complex128" if "complex128" in names else self.compute)

    def _blocks(self, flat: Array) -> Iterator[slice]:
        rows, width = flat.shape
        one_by_one = isinstance(self.group, Solo) and array_module(flat) is np
        step = max(1, BLOCK // (8 * width)) if one_by_one else max(1, rows)
        for start in range(0, max(1, rows), step):  # without rows, one empty block
            yield slice(start, min(start + step, rows))

    def _scale(self, x: Array, rstd: Array) -> Array | None:
        """Return each row's power of two, or None if all are in range: the same on every rank, as rstd is."""
        xp = array_module(x)
        safe = SAFE[self.compute]
        size = abs(rstd)
        out = ~((size > 2.0**-safe) & (size < 2.0**safe))  # a NaN is out
        if not bool(xp.any(out)):
            return None
        largest = self.group.max(xp.max(abs(_cast(_flat(x), self._work(x))), axis=-1, keepdims=True))
        usable = out & (largest > 0) & (largest < float("inf"))
        k = xp.floor(xp.log2(xp.where(usable, largest, xp.ones_like(largest))))
        if self.eps > 0:  # eps / 4^k should neither overflow nor vanish
            root = float(math.floor(math.log2(self.eps) / 2))
            k = xp.where(k < root, xp.full_like(k, root), k)
            k = xp.where(k > root + 2 * safe, k - safe, xp.where(k > root + safe, xp.full_like(k, root + safe), k))
        return xp.where(usable, k, xp.zeros_like(k)) if bool(xp.any(usable)) else None


@contextmanager
def _evaluation(width: int) -> Iterator[None]:
    """Silence floating-point warnings, and set NumPy's ufunc buffer to a row, for this context only.

    NumPy (up to 2.4 at least) copies a broadcast operand into its buffer of 8192 elements again and again; a buffer of
    one row spares that. LayerNorm of (4096, 1024) float32 takes 0.8 of the time, with the same bits.
    """
    with np.errstate(all="ignore"):
        if 512 <= width < 8192:
            np.setbufsize(width // 16 * 16)
        yield


def _flat(x: Array) -> Array:
    return array_module(x).reshape(contiguous(x), (-1, x.shape[-1]))


def _cast(x: Array | None, dtype: Any) -> Any:
    return None if x is None else array_module(x).astype(x, dtype, copy=False)


def _divide(x: Array, k: Array | None) -> Array:
    """Return x / 2^k, in two steps, since 2^k itself may be out of range."""
    if k is None:
        return x
    half = array_module(k).floor(k / 2)
    return x * 2.0**-half * 2.0 ** (half - k)
