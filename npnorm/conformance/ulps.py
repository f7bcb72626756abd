"""Errors in units in the last place (ulps).

The unit of a row is the ulp of its largest exact number, in the dtype of the result. A result that is rounded once
from the exact one is off by 0.5 at most.
"""

from typing import Any

import ml_dtypes  # NumPy knows the name bfloat16 from here on
import numpy as np

DTYPES = ("float32", "float16", "bfloat16", "float64")
"""The names of the dtypes."""


def unit(scale: Any, dtype: Any) -> np.ndarray:
    """Return the exponent of the ulp of each number: the last place of `scale` stands for 2^exponent.

    Examples
    --------
    >>> unit([1.0, 1.5, 2.0, 0.0], "float32").tolist()  # of 0 it is that of the smallest number
    [-23, -23, -22, -149]
    """
    info, scale = ml_dtypes.finfo(dtype), np.asarray(scale, np.float64)
    exponent = np.where(scale > 0, np.frexp(scale)[1] - 1, info.minexp)
    return np.maximum(exponent, info.minexp) - info.nmant


def ulps(came: np.ndarray, exact: Any, axis: int | tuple[int, ...] | None = -1) -> np.ndarray:
    """Return the largest error of each row of `came` in ulps; nan or inf where the row has one.

    Parameters
    ----------
    came : array
        The result; its dtype is the one that counts.
    exact : array of float64, of the same shape
        What it should be.
    axis : int, tuple of int or None
        The axes of a row. None takes the whole array as one row, as one does for the gradient of a weight.

    Examples
    --------
    >>> ulps(np.float32([[1, 3], [1, 1 + 2**-23]]), [[1, 3], [1, 1]])
    array([0., 1.])
    """
    wide, exact = came.astype(np.float64), np.asarray(exact, np.float64)
    if wide.shape != exact.shape:
        raise ValueError(f"ulps: came has shape {wide.shape}, exact {exact.shape}; they must be equal.")
    exponent = unit(abs(exact).max(axis, keepdims=True), came.dtype)
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        return abs(np.ldexp(wide, -exponent) - np.ldexp(exact, -exponent)).max(axis)
