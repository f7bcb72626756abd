"""Exact results: the textbook in binary floating point of 400 bits, by MPFR (gmpy2).

Arrays are taken as the numbers that they hold, eps as the float64 that it is. With 400 bits and no end of the range,
every sum keeps more than 100 correct bits also where all but one bit of float64 cancel. Where a sum cancels to an
exact 0, some 1e-100 of its terms may be left.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import gmpy2
import ml_dtypes
import numpy as np

from npnorm.conformance import textbook
from npnorm.conformance.problems import Problem
from npnorm.conformance.ulps import unit

BITS = 400


class Exact(NamedTuple):
    """An exact array, as much of it as is needed to measure a result; all parts have the shape of the result.

    Parameters
    ----------
    nearest : array
        The exact numbers rounded once to the dtype of the problem: what a perfect norm returns.
    ulp : int array
        The exponent of the unit: 2^ulp is the ulp of the largest of a row (of y, dx) or of all (dw, db).
    units, rest : float64 arrays
        The exact numbers in that unit, as a sum of two; rest is zero unless they have more digits than float64.
    scale : float64 array
        The largest of the row, or of all, in that unit.
    """

    nearest: np.ndarray
    ulp: np.ndarray
    units: np.ndarray
    rest: np.ndarray
    scale: np.ndarray


def exact(problem: Problem) -> dict[str, Exact]:
    """Return the exact y, dx, dw and, where there is a bias, db.

    Raises
    ------
    ValueError
        If one of them is beyond the largest number of the dtype.
    """
    with gmpy2.context(precision=BITS), np.errstate(all="ignore"):  # NumPy hears of what is rounded inside MPFR
        return {name: _settle(problem.x.dtype, *parts) for name, *parts in _results(problem)}


def exact_norm(x: Any, w: Any, b: Any, eps: float, dy: Any, centred: bool) -> tuple[np.ndarray, ...]:
    """Return y, dx, dw, db of LayerNorm (centred) or RMSNorm in float64: the exact ones, rounded once.

    w and b need only broadcast with x, whose last axis is the row; dw and db are sums over all other axes.
    """
    with gmpy2.context(precision=BITS), np.errstate(all="ignore"):
        x, w, b, dy = map(_numbers, (x, w, b, dy))
        y, z, rstd = textbook.forward(x, w, b, eps, (-1,), centred, _sqrt)
        dx = textbook.backward(dy, w, z, rstd, (-1,), centred)
        rows = tuple(range(x.ndim - 1))
        return tuple(a.astype(np.float64) for a in (y, dx, (dy * z).sum(rows), dy.sum(rows)))


def _results(problem: Problem) -> Iterator[tuple[Any, ...]]:
    """Yield name, values, natural scale (for where they are all zero), axes of a row, and shape of each result."""
    shape, weight, row, samples = textbook.layout(problem.norm, problem.x.shape, problem.groups)
    x, dy = (_numbers(a.reshape(shape)) for a in (problem.x, problem.dy))
    w = _numbers(problem.weight.reshape(weight))
    b = None if problem.bias is None else _numbers(problem.bias.reshape(weight))
    centred = problem.norm != "RMSNorm"
    y, z, rstd = textbook.forward(x, w, b, problem.eps, row, centred, _sqrt)
    yield "y", y, np.broadcast_to(abs(w), shape).max(row, keepdims=True), row, problem.x.shape
    del x, y  # a million numbers of 400 bits take 0.13 GB
    scale = abs(dy * w).max(row, keepdims=True) * rstd
    yield "dx", textbook.backward(dy, w, z, rstd, row, centred), scale, row, problem.x.shape
    size = abs(dy).sum(samples).max()
    yield "dw", (dy * z).sum(samples), size, None, problem.weight.shape
    if b is not None:
        yield "db", dy.sum(samples), size, None, problem.weight.shape


def _settle(dtype: np.dtype, values: np.ndarray, natural: Any, row: Any, shape: tuple[int, ...]) -> Exact:
    """Turn numbers of 400 bits into an Exact."""
    largest = abs(values).max(row, keepdims=True)
    scale = np.where(largest == 0, natural, largest)
    ulp = unit(scale.astype(np.float64), dtype)
    per_unit = np.frompyfunc(gmpy2.exp2, 1, 1)(-ulp)
    in_units = values * per_unit
    units = in_units.astype(np.float64)
    rest = (in_units - units).astype(np.float64) if dtype == np.float64 else np.zeros_like(units)
    parts = _nearest(values, dtype), ulp, units, rest, (scale * per_unit).astype(np.float64)
    return Exact(*(np.broadcast_to(part, values.shape).reshape(shape) for part in parts))


def _nearest(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Round to the nearest number of a dtype, subnormal ones and all."""
    info = ml_dtypes.finfo(dtype)
    lowest = info.minexp - info.nmant + 1  # MPFR's significands are below 1
    context = gmpy2.context(precision=info.nmant + 1, emax=info.maxexp, emin=lowest, subnormalize=True)
    nearest = np.frompyfunc(context.plus, 1, 1)(values).astype(np.float64)
    if not np.all(np.isfinite(nearest)):
        raise ValueError("An exact result is beyond the largest number: the case tells nothing. Choose a smaller dy.")
    return nearest.astype(dtype)


def _numbers(a: Any) -> np.ndarray:
    return gmpy2.mpfr(0) + np.asarray(a, np.float64)  # an array of objects; the fastest of the ways to make one


def _sqrt(a: np.ndarray) -> np.ndarray:
    return np.frompyfunc(gmpy2.sqrt, 1, 1)(a)
