"""The exact results of a problem: the formulas in binary floating point of 400 bits, by MPFR (gmpy2).

The numbers of the problem are taken as they are, eps as the float64 that it is. With 400 bits and no end of the range,
every sum below keeps more than 100 correct bits also where all but one bit of float64 cancel. Where a sum cancels to
an exact 0, some 1e-100 of its terms may be left.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from npnorm.studies.accuracy.formats import FORMATS, Format
from npnorm.studies.accuracy.needs import need
from npnorm.studies.accuracy.problems import Problem

BITS = 400
ROW, SAMPLES = (2, 3), (0, 3)  # of the four axes: those of a row, and those over which a parameter's gradient is summed


class Exact(NamedTuple):
    """An exact array, as much of it as is needed to measure a result.

    Parameters
    ----------
    nearest : array
        The exact numbers rounded to the dtype under study, once: what a perfect norm returns.
    ulp : int array
        The exponent of the unit: 2^ulp is the ulp of the largest of a row (of y, dx) or of all (dw, db).
    units, rest : float64 arrays
        The exact numbers in that unit, as a sum of two; rest is zero unless they have more digits than float64.
    scale : float64 array
        The largest of a row, or of all, in that unit.
    """

    nearest: np.ndarray
    ulp: np.ndarray
    units: np.ndarray
    rest: np.ndarray | float
    scale: np.ndarray


def exact(problem: Problem) -> dict[str, Exact]:
    """Return the exact y, dx, dw and db; y and dx with four axes, dw and db with three."""
    gmpy2 = need("gmpy2")
    fmt = FORMATS[problem.x.dtype.name]
    with gmpy2.context(precision=BITS), np.errstate(all="ignore"):  # NumPy hears of what is rounded inside MPFR
        return {name: _settle(values, natural, fmt) for name, values, natural in _results(problem)}


def _results(problem: Problem) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the name of each result, its values, and its natural scale, for where they are all zero."""
    x, dy = (_numbers(problem.four_axes(a)) for a in (problem.x, problem.dy))
    w = _numbers(problem.three_axes(problem.weight))
    n = x.shape[2] * x.shape[3]

    def mean(a: np.ndarray) -> np.ndarray:
        return a.sum(ROW, keepdims=True) / n

    centred = problem.norm != "rms"
    c = x - mean(x) if centred else x
    rstd = 1 / _sqrt(mean(c * c) + problem.eps)
    z = c * rstd
    y = z * w
    if problem.bias is not None:
        y += _numbers(problem.three_axes(problem.bias))
    yield "y", y, abs(w).max((1, 2), keepdims=True)
    del x, c, y  # a million numbers of 400 bits take 0.13 GB

    dz = dy * w
    dx = dz - z * mean(dz * z)
    if centred:
        dx -= mean(dz)
    yield "dx", dx * rstd, abs(dz).max(ROW, keepdims=True) * rstd
    del dz, dx

    size = abs(dy).sum(SAMPLES).max()
    yield "dw", (dy * z).sum(SAMPLES)[..., None], size
    if problem.bias is not None:
        yield "db", dy.sum(SAMPLES)[..., None], size


def _settle(values: np.ndarray, natural: Any, fmt: Format) -> Exact:
    """Turn numbers of 400 bits into an Exact."""
    gmpy2 = need("gmpy2")
    axes = ROW if values.ndim == 4 else None
    largest = abs(values).max(axes, keepdims=True)
    scale = np.where(largest == 0, natural, largest)
    ulp = fmt.ulp(scale.astype(np.float64))
    per_unit = np.frompyfunc(gmpy2.exp2, 1, 1)(-ulp)
    in_units = values * per_unit
    units = in_units.astype(np.float64)
    rest = (in_units - units).astype(np.float64) if fmt.name == "float64" else 0.0
    return Exact(_nearest(values, fmt), ulp, units, rest, (scale * per_unit).astype(np.float64))


def _nearest(values: np.ndarray, fmt: Format) -> np.ndarray:
    """Round to the nearest number of a format, subnormal ones and all."""
    smallest_power = fmt.smallest - fmt.precision + 2  # MPFR's significands are below 1
    context = need("gmpy2").context(precision=fmt.precision, emax=fmt.beyond, emin=smallest_power, subnormalize=True)
    nearest = np.frompyfunc(context.plus, 1, 1)(values).astype(np.float64)
    if not np.all(np.isfinite(nearest)):
        raise ValueError("An exact result is beyond the largest number: the case tells nothing. Choose a smaller dy.")
    return nearest.astype(fmt.dtype)


def _numbers(a: np.ndarray) -> np.ndarray:
    return need("gmpy2").mpfr(0) + a.astype(np.float64)  # an array of objects; the fastest of the ways to make one


def _sqrt(a: np.ndarray) -> np.ndarray:
    return np.frompyfunc(need("gmpy2").sqrt, 1, 1)(a)
