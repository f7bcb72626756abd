"""The fast way once more: what came before, in a single block, is evaluated without looking at it again.

A small norm takes a few microseconds, and to check its arrays, cut blocks, start threads and add sums ten times as
much. So a shape and dtype that passed all of it is remembered, with the very arrays of the parameters; the next array
like it goes straight to the kernel. Nothing of its values is remembered: they, and the rows that need care, are looked
at each time.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, round_to
from npnorm.careful import buffer_size
from npnorm.kernels import Kernel
from npnorm.written import Limits

SMALL = 1 << 14
"""The elements of x up to which new memory costs less than to look for what a thread keeps."""


class Known(NamedTuple):
    """What is known of arrays of one shape and dtype that make a single block, once they have passed all checks."""

    run: Callable[..., tuple[Any, ...]]
    buffer: int  # the length of NumPy's ufunc buffer; 0: as it is
    means: tuple[int, ...]
    params: dict[str, np.ndarray]  # these very arrays
    same: tuple[np.ndarray, ...]  # w and b, where they have the working precision
    rows: tuple[int, ...]


class Repeated:
    """Evaluates kernels over arrays like those that came before.

    Parameters
    ----------
    eps : float
    compute : "float64" or "float32"
        The working precision.
    limits : Limits
    """

    def __init__(self, eps: float, compute: str, limits: Limits) -> None:
        self.compute, self.limits = compute, limits
        self._known: dict[tuple[Any, ...], Known] = {}
        beside_eps = math.sqrt((1 - 2.0**-20) / eps) if eps and limits.tiny else math.inf
        self._rstd = 2.0**-limits.size, min(2.0**limits.size, beside_eps)

    def remember(
        self,
        which: str,
        kernel: Kernel,
        means: tuple[int, ...],
        x: np.ndarray,
        rows: tuple[int, ...],
        params: dict[str, Array],
    ) -> None:
        """Note that arrays like these have passed all checks; which: "x" forward, "dy" backward."""
        if type(x) is np.ndarray and all(type(a) is np.ndarray and a.ndim == 1 and _plain(a) for a in params.values()):
            same = tuple(params.values()) if all(a.dtype == self.compute for a in params.values()) else ()
            run, buffer = (kernel.once, 0) if x.size <= SMALL else (kernel.run, buffer_size(rows[-1]))
            self._known[which, x.shape, x.dtype] = Known(run, buffer, means, dict(params), same, rows)

    def forward(
        self, x: Array, params: dict[str, Array], out: Array | None = None
    ) -> tuple[Array, tuple[Array, ...], None] | None:
        """Return what `Rows.forward` does, for arrays like those that came before; None for others, or for care."""
        known = self._find("x", x, params)
        if known is None or not (out is None or _suits(out, x, params)):
            return None
        rows = x if x.ndim == 2 else x.reshape(known.rows)
        y = np.empty(known.rows, x.dtype) if out is None else out.reshape(known.rows)
        with np.errstate(all="ignore"):
            if known.buffer:
                np.setbufsize(known.buffer)
            flat, means = known.run(rows, *(known.same or self._cast(known.params)), y)
        if not _within(flat[-1], *self._rstd):
            return None
        for mean in means:
            if not _within(mean, -self.limits.mean, self.limits.mean):
                return None
        return (y.reshape(x.shape) if out is None else out), tuple([a[:, None] for a in flat]), None

    def backward(
        self, dy: Array, x: Array, params: dict[str, Array], statistics: tuple[Array, ...], out: Array | None = None
    ) -> tuple[Array, dict[str, Array]] | None:
        """Return what `Rows.backward` does, for arrays like those that came before; None for others, or for care."""
        known = self._find("dy", x, params)
        if known is None or type(dy) is not np.ndarray or dy.shape != x.shape or dy.dtype != x.dtype or not _plain(dy):
            return None
        if out is not None and not (_suits(out, x, params) and _suits(out, dy, params)):
            return None
        numbers = [a.reshape(-1) for a in statistics if a.dtype == self.compute]
        if len(numbers) < len(statistics) or len(numbers[-1]) != known.rows[0]:
            return None
        dx, limits = np.empty(known.rows, x.dtype) if out is None else out.reshape(known.rows), self.limits
        with np.errstate(all="ignore"):
            if known.buffer:
                np.setbufsize(known.buffer)
            weight = (known.same or self._cast(known.params))[: "weight" in known.params]
            sums, (square,), (left,) = known.run(dy.reshape(known.rows), x.reshape(known.rows), *weight, *numbers, dx)
            good = (
                all(w.dot(w) < limits.weight**2 for w in weight)
                and _within(numbers[-1], *self._rstd)
                and all(_within(numbers[i] * numbers[-1], -limits.mean, limits.mean) for i in known.means)
                and _within(square, 2.0**-limits.square, 2.0**limits.square)
                and _within(left / square, limits.left - 1, math.inf)
                and all(a.dot(a) < math.inf for a in sums)
            )
            if not good:
                return None
            grads = {n: round_to(a, p.dtype) for (n, p), a in zip(known.params.items(), sums, strict=True)}
        return (dx.reshape(x.shape) if out is None else out), grads

    def _find(self, which: str, x: Array, params: dict[str, Array]) -> Known | None:
        if type(x) is not np.ndarray:
            return None
        known = self._known.get((which, x.shape, x.dtype))
        if known is None or not _plain(x):
            return None
        if len(params) != len(known.params):
            return None
        for name, a in known.params.items():
            if params.get(name) is not a:
                return None
        return known

    def _cast(self, params: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        return tuple([a.astype(self.compute, copy=False) for a in params.values()])


def _plain(x: np.ndarray) -> bool:
    """Return whether x is in C order and aligned."""
    return x.flags.num & 0x101 == 0x101  # as flags.c_contiguous and flags.aligned, in a third of the time


def _suits(out: Array, x: np.ndarray, params: dict[str, Array]) -> bool:
    """Return whether a result like x can be written to `out` while x and the parameters are read."""
    if type(out) is not np.ndarray or out.shape != x.shape or out.dtype != x.dtype:
        return False
    shared = any(np.may_share_memory(out, a) for a in (x, *params.values()))
    return _plain(out) and out.flags.writeable and not shared


def _within(a: np.ndarray, low: float, high: float) -> bool:
    """Return whether all numbers lie between two; a NaN does not."""
    if a.size > 16:
        return bool(((a > low) & (a < high)).all())
    for value in a.tolist():  # for a few numbers this takes a third of the time
        if not low < value < high:
            return False
    return True
