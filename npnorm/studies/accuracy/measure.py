"""Every peer on every problem, and how far from the exact one each result is.

The error of an array is its largest |came - exact|, in ulps of the dtype at the largest exact number of the row (of y
and dx) or of the vector (of dw and db). Rounding the exact numbers correctly gives 0.5 at most.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from npnorm.conformance.cases import Sizes, cases
from npnorm.conformance.exact import Exact, exact
from npnorm.conformance.problems import Problem, pose
from npnorm.studies.accuracy.peers import Peer


class Verdict(StrEnum):
    """What kind of result it is, from good to bad."""

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


def run(
    peers: Sequence[Peer],
    norms: Sequence[str],
    dtypes: Sequence[str],
    sizes: Sizes,
    progress: Callable[[list], Iterable] = iter,
) -> pd.DataFrame:
    """Return a line for each peer, dtype, norm, case and result (y, dx, dw, db): its cell, and the peer's words.

    `progress` wraps the list of problems.
    """
    work = [(dtype, case, norm) for dtype in dtypes for case in cases(dtype, sizes) for norm in norms]
    lines: list[dict[str, Any]] = []
    for dtype, case, norm in progress(work):
        problem = pose(norm, case)
        right = exact(problem)
        place = {"dtype": dtype, "norm": norm, "case": case.name, "n": case.x.shape[1]}
        for peer in peers:
            lines += ({"peer": peer.name, **place, **line} for line in _lines(peer, problem, right))
    return pd.DataFrame(lines)


def _lines(peer: Peer, problem: Problem, right: dict[str, Exact]) -> Iterator[dict[str, Any]]:
    came, refusal = {}, ""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):  # what overflows is seen in the results
            warnings.simplefilter("ignore")
            came = peer.results(problem)
    except Exception as error:
        refusal = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    for name, array in right.items():
        cell = Cell(Verdict.REFUSED) if refusal else measure(came[name], array)
        yield {"result": name, **cell._asdict(), "refusal": refusal}


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
