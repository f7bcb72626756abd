"""The check of a kernel at its first use: on some rows that came, and on hard ones, against the exact evaluation.

It is there for what nobody could try before: this GPU, this compiler, these options. It allows for rounding, and sees
a wrong address, a sum that lacks a part, subnormal numbers that are taken for zeros, and rows that lost digits unseen.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, contiguous, dtype_name, to_numpy
from npnorm.engine.exact import Exact, flatten, map_statistics
from npnorm.engine.levels import Level, of_rows
from npnorm.engine.row import Absent
from npnorm.engine.statistics import Mean

ROWS = 40
"""Rows of x in the check of a backward kernel: more than one chunk of its column kernel."""

ELEMENTS = 1 << 24
"""Elements of the arrays of a check, at most, if one row is not longer."""

FAR, ORDINARY = 1, 4
"""Which of the hard rows has a mean that is too far from zero for every working precision; how many are in range."""

UNITS = {"float64": 2.0, "float32": 64.0}
"""By how many units in the last place of its row's largest a result may be off in a check, by working precision."""

STATISTICS = {"float64": 2.0**-30, "float32": 2.0**-10}
"""By what part of itself a statistic may be off."""

SUMS = {"float64": 2.0**-36, "float32": 2.0**-16}
"""By what part of dy z a sum for a parameter may be off, for each number that is added."""

FLUSHED = {"float64": 0.0, "float32": 2.0**-100}
"""By what it may be off besides, since float32 is flushed to zero."""


class CheckFailed(RuntimeError):
    """A kernel gave a result that the exact evaluation does not give."""


def forward(
    call: Callable[..., Any],
    exact: Exact,
    level: Level,
    x: Array,
    params: list[Any],
    constants: tuple[Array, ...],
) -> None:
    """Raise unless a kernel gives what the exact evaluation gives: of some rows of x, and of hard ones."""
    xp, own = array_module(x), _some(x, 4)
    hard = xp.asarray(_hard_rows(tuple(x.shape[1:]), x.dtype))
    probe = xp.concatenate([hard, x[own]])
    index = xp.asarray([i % x.shape[0] for i in range(probe.shape[0])])
    w, given = of_rows(params, index), tuple(a[index] for a in constants)
    y = xp.empty(probe.shape, dtype=probe.dtype)
    statistics, lost = call(probe, w, given, y)
    kept = np.ones(probe.shape[0], bool) if lost is None else ~to_numpy(lost)
    if exact.eps <= 1 and statistics and not kept[0]:
        raise CheckFailed("forward, ordinary numbers are said to lose digits")
    centred = any(isinstance(s, Mean) for s in statistics)
    if centred and dtype_name(x) == "float32" and kept[FAR] and FAR < hard.shape[0]:
        raise CheckFailed("forward, nearly equal numbers are said to lose no digits")
    wide = [_in_float64(a) for a in (*w, *given)]
    values, expected, _ = exact.forward([contiguous(probe, xp.float64)], wide, True)
    largest = 1.0 if isinstance(params[0], Absent) else float(xp.max(abs(params[0])))
    more = 8 * largest if level.work == "float32" else 0.0  # an error of z counts as often as the largest weight
    _agree("y", y, contiguous(values), kept, dtype_name(x), level.work, more)
    for a, b in zip(statistics, expected, strict=True):
        size = abs(b.high) + 1 / expected[-1] if isinstance(b, Mean) else abs(b)
        a, b = (s.high + s.low if isinstance(s, Mean) else s for s in (a, b))
        near = to_numpy(abs(a - b) <= STATISTICS[level.work] * size)
        if not near[kept].all():
            raise CheckFailed("forward, a statistic")


def backward(
    call: Callable[..., Any],
    exact: Exact,
    level: Level,
    arrays: tuple[Array, ...],
    params: list[Any],
    statistics: tuple[Any, ...],
    there: list[bool],
    guarded: bool,
) -> None:
    """Raise unless a kernel gives what the exact evaluation gives: for some rows of x, and hard ones of dy.

    guarded : bool
        Whether the kernel says which rows of dy are out of its range.
    """
    xp, work = array_module(arrays[1]), level.work
    own = _some(arrays[1], ROWS)
    _, x, *plus = (a[own] for a in arrays)
    w, given = of_rows(params, own), map_statistics(lambda a: a[own], statistics)
    wide, given_wide = [_in_float64(a) for a in w], map_statistics(_in_float64, given)
    of_x = [contiguous(a, xp.float64) for a in (x, *plus)]
    hard = _hard_rows(tuple(x.shape[1:]), x.dtype)[: None if guarded else ORDINARY]
    numbers = flatten(given_wide)
    size = xp.max(abs(of_x[0]), axis=tuple(range(1, x.ndim)), keepdims=True) + abs(numbers[0])
    z = max(1.0, float(xp.max(size * abs(numbers[-1]))))  # or more
    for dy in (*(xp.asarray(np.repeat(row[None], x.shape[0], axis=0)) for row in hard), x):
        dx = xp.empty(x.shape, dtype=x.dtype)
        sums, lost = call((dy, x, *plus), w, given, dx)
        kept = np.ones(x.shape[0], bool) if lost is None else ~to_numpy(lost)
        if not kept.any():
            continue
        d_y, rows = contiguous(dy, xp.float64), xp.asarray(np.flatnonzero(kept))
        (d,), _ = exact.backward([d_y, of_x[0]], wide, given_wide, None, True)
        _agree("dx", dx, d + of_x[1] if plus else d, kept, dtype_name(x), work)
        kept_given = of_rows(wide, rows), map_statistics(lambda a: a[rows], given_wide)  # noqa: B023
        _, expected = exact.backward([d_y[rows], of_x[0][rows]], *kept_given, None, True)
        largest = float(xp.max(abs(d_y[rows])))
        for a, b in zip(sums, (b for b, has in zip(expected, there, strict=True) if has), strict=True):
            a, b = to_numpy(a), to_numpy(b)
            a = a if exact.layout.adds else a[kept]
            off = SUMS[work] * largest * z * (x.size / a.size) + FLUSHED[work]
            finite = math.isfinite(off) and np.isfinite(a).all()  # what is not is evaluated again
            if finite and not np.all(np.abs(a - b) <= off):
                raise CheckFailed("backward, a sum for a parameter")


def _in_float64(a: Any) -> Any:
    return a if isinstance(a, Absent) else contiguous(a, array_module(a).float64)


def _some(x: Array, count: int) -> slice:
    """Return the first rows: as many, if they are not too long."""
    return slice(0, max(1, min(count, ELEMENTS // max(1, math.prod(x.shape[1:])))))


def _hard_rows(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return rows of ordinary and nearly equal numbers, of zeros, subnormal and huge ones; fewer, if they are long."""
    n, name = math.prod(shape), np.dtype(dtype).name
    least, most = {"float16": (2.0**-14, 2.0**15)}.get(name, (2.0**-126, 2.0**127))
    row = np.modf(np.arange(1, n + 1) * 0.6180339887498949)[0] * 2 - 0.7
    count = max(1, min(6, ELEMENTS // n))
    rows = np.stack([row, 1 + row * 2.0**-20, 1 + row * 2.0**-7, 0 * row, row * (least / 8), row * most][:count])
    return rows.reshape(count, *shape).astype(dtype)


def _agree(what: str, came: Array, expected: Array, kept: np.ndarray, dtype: str, work: str, more: float = 0.0) -> None:
    """Raise unless rows agree up to rounding, of their largest element and of `more`."""
    unit, least = {"float32": (2.0**-23, 2.0**-149), "float16": (2.0**-10, 2.0**-24)}.get(dtype, (2.0**-7, 2.0**-133))
    least = max(least, 2.0**-125) if work == "float32" else least  # results in float32 may be flushed to zero
    a, b = (to_numpy(s).astype(np.float64).reshape(len(kept), -1)[kept] for s in (came, expected))
    beyond = np.abs(b) >= np.finfo(np.float16).max if dtype == "float16" else np.abs(b) >= 2.0**127.99
    with np.errstate(all="ignore"):
        largest = np.abs(b).max(axis=1, keepdims=True, initial=0)
        near = np.abs(a - b) <= UNITS[work] * (unit * largest + least) + more * 2.0**-23
    if not np.all(near | beyond | (np.isnan(a) & np.isnan(b))):
        raise CheckFailed(what)
