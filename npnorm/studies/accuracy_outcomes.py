"""How far results of norms are from the exact ones, and which kind of result that is.

The error of an array (y, dx, dw or db) is

    ulps  = max |came - exact| / the ulp of the scale
    share = max |came - exact| / the scale

where the scale is the largest exact number of the row (for y and dx) or of all (for dw and db), and its ulp that of
the dtype. An exact result that is rounded once is off by 0.5 ulp at most.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from npnorm.conformance.exact import Exact
from npnorm.conformance.problems import Problem
from npnorm.studies.study import Results

NEAREST = 0.51
"""Ulps of the exact result, rounded once: 0.5, and a margin for near-ties and for elements far below the largest."""

FLOAT64 = 8.0
"""Ulps that npnorm allows itself in float64, where there is no wider precision to compute in."""

LIMITS = {"<= 0.51 ulp": NEAREST, "to 4 ulps": 4.0, "to 8 ulps": FLOAT64, "8 ulps to 1 %": math.inf}
KINDS = (*LIMITS, "wrong", "nan, inf", "refused")
"""The kinds of results, from good to bad."""


class Error(NamedTuple):
    """How far an array is from the exact one.

    Parameters
    ----------
    ulps, share : float
        The largest error, in ulps and as a share of the scale; nan or inf where an element is.
    missed : int
        How many elements are not the nearest number to the exact one.
    """

    ulps: float
    share: float
    missed: int


class Outcome(NamedTuple):
    """One result of one peer: its error, or the words with which the peer refused the problem."""

    dtype: str
    norm: str
    case: str
    peer: str
    result: str  # y, dx, dw or db
    elements: int
    error: Error | str

    @property
    def kind(self) -> str:
        """One of KINDS. Wrong is beyond 1 % and beyond 8 ulps: those of bfloat16 are nearly 1 % each."""
        if isinstance(self.error, str):
            return "refused"
        if not math.isfinite(self.error.ulps):
            return "nan, inf"
        if self.error.ulps > 8 and self.error.share >= 0.01:
            return "wrong"
        return next(kind for kind, limit in LIMITS.items() if self.error.ulps <= limit)

    @property
    def ulps(self) -> float:
        """The largest error; inf where it is not a number."""
        return math.inf if isinstance(self.error, str) or math.isnan(self.error.ulps) else self.error.ulps

    @property
    def shown(self) -> str:
        """The error in a few characters: ulps, or, in bold, what is worse than any ulps."""
        if isinstance(self.error, str):
            return "refused"
        ulps, share, _ = self.error
        if self.kind == "nan, inf":
            return f"**{ulps}**"
        if self.kind == "wrong":
            return f"**{100 * share:.0f} %**" if share < 10 else "**> 1000 %**"
        return f"{ulps:.2f}" if ulps < 10 else f"{ulps:.0f}" if ulps < 1000 else f"{ulps:.0e}"

    @property
    def missed(self) -> int:
        """How many elements are not the nearest number to the exact one."""
        return 0 if isinstance(self.error, str) else self.error.missed

    @property
    def badness(self) -> tuple[int, float]:
        """What is larger for a worse result."""
        return KINDS.index(self.kind), self.ulps


def compare(came: np.ndarray, exact: Exact) -> Error:
    """Return how far an array is from the exact one.

    Raises
    ------
    ValueError
        If its shape or dtype is another one.
    """
    nearest = exact.nearest
    if came.shape != nearest.shape or came.dtype != nearest.dtype:
        raise ValueError(f"came {came.dtype} {came.shape}, expected {nearest.dtype} {nearest.shape}")
    missed = int(np.count_nonzero(came != nearest))
    came = came.astype(np.float64)
    with np.errstate(all="ignore"):  # a result may be far too large; a part may be far below the unit
        error = np.abs(np.ldexp(came, -exact.ulp) - exact.units - exact.rest)
        error = np.where(np.isinf(came), error, np.minimum(error, 1e300))  # a number is off by a number
        share = error / exact.scale
    return Error(float(f"{error.max():.4g}"), float(f"{share.max():.2g}"), missed)


def hold(solve: Callable[[Problem], dict], problem: Problem, right: dict[str, Exact]) -> dict[str, Error] | str:
    """Return the errors of what `solve` makes of a problem, or what it says where it refuses."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):  # what overflows is seen in the results
            warnings.simplefilter("ignore")
            came = solve(problem)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return {name: compare(came[name], array) for name, array in right.items()}


def outcomes(results: Results) -> list[Outcome]:
    """Return each result of each peer, in the order of the cells."""
    return [
        Outcome(line["dtype"], line["norm"], line["case"], peer, result, elements, found)
        for line in results.lines
        for peer, errors in line["peers"].items()
        for result, elements in line["elements"].items()
        for found in [errors if isinstance(errors, str) else Error(*errors[result])]
    ]
