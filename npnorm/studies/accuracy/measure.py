"""How far a result is from the exact one.

The error of an array is its largest |came - exact|, in ulps of the dtype at the largest exact number of the row (of y
and dx) or of the vector (of dw and db). Rounding the exact numbers correctly gives 0.5 at most.
"""

from enum import StrEnum
from typing import NamedTuple

import numpy as np

from npnorm.studies.accuracy.exact import Exact


class Verdict(StrEnum):
    """What kind of result it is."""

    NUMBER = "number"
    WRONG = "wrong"  # off by 1 % of scale or more, and by more than 8 ulps: those of bfloat16 are nearly 1 %
    NAN = "nan"  # where the exact result is a number
    INF = "inf"
    REFUSED = "refused"  # an exception


class Cell(NamedTuple):
    """One result of one peer, held against the exact one.

    Parameters
    ----------
    verdict : Verdict
    ulps : float
        The largest error; inf where it is not a number.
    share : float
        The same as a share of the scale.
    missed, elements : int
        How many elements are not the nearest number to the exact one, and of how many.
    """

    verdict: Verdict
    ulps: float = np.inf
    share: float = np.inf
    missed: int = 0
    elements: int = 0


def measure(came: np.ndarray, exact: Exact) -> Cell:
    """Hold an array against the exact one.

    Raises
    ------
    ValueError
        If its shape or dtype is another one.
    """
    nearest = exact.nearest
    if came.shape != nearest.shape or came.dtype != nearest.dtype:
        raise ValueError(f"came {came.dtype} {came.shape}, expected {nearest.dtype} {nearest.shape}")
    counts = int(np.count_nonzero(came != nearest)), came.size
    came = came.astype(np.float64)
    if np.isnan(came).any():
        return Cell(Verdict.NAN, missed=counts[0], elements=counts[1])
    if np.isinf(came).any():
        return Cell(Verdict.INF, missed=counts[0], elements=counts[1])
    with np.errstate(over="ignore", under="ignore"):  # a result may be far too large; a part may be far below the unit
        error = np.abs(np.ldexp(came, -exact.ulp) - exact.units - exact.rest)
    ulps, share = float(error.max()), float((error / exact.scale).max())
    return Cell(Verdict.WRONG if ulps > 8 and share >= 0.01 else Verdict.NUMBER, ulps, share, *counts)
