"""Every peer on every problem."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from npnorm.studies.accuracy.cases import Case, Sizes, cases
from npnorm.studies.accuracy.exact import Exact, exact
from npnorm.studies.accuracy.measure import Cell, Verdict, measure
from npnorm.studies.accuracy.peers import Peer, Results
from npnorm.studies.accuracy.problems import Problem, pose


class Record(NamedTuple):
    """A peer on a problem: a cell for each of y, dx, dw, db; and its words, if it refused."""

    peer: str
    dtype: str
    norm: str
    case: str
    n: int
    cells: dict[str, Cell]
    refusal: str = ""


def run(
    peers: Sequence[Peer],
    norms: Sequence[str],
    dtypes: Sequence[str],
    sizes: Sizes,
    progress: Callable[[list], Iterable] = iter,
) -> list[Record]:
    """Measure every peer on every case as the input of every norm; `progress` wraps the list of problems."""
    work = [(dtype, case, norm) for dtype in dtypes for case in cases(dtype, sizes) for norm in norms]
    records = []
    for dtype, case, norm in progress(work):
        problem = pose(norm, case)
        right = exact(problem)
        for peer in peers:
            if (record := _record(peer, dtype, case, problem, right)) is not None:
                records.append(record)
    return records


def _record(peer: Peer, dtype: str, case: Case, problem: Problem, right: dict[str, Exact]) -> Record | None:
    place = peer.name, dtype, problem.norm, case.name, case.x.shape[1]
    try:
        came = _results(peer, problem)
    except NotImplementedError:
        return None
    except Exception as error:
        refusal = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return Record(*place, dict.fromkeys(right, Cell(Verdict.REFUSED)), refusal)
    return Record(*place, {name: measure(_axes(problem, name, came[name]), right[name]) for name in right})


def _results(peer: Peer, problem: Problem) -> Results:
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # what overflows is seen in the results
        warnings.simplefilter("ignore")
        return peer.results(problem)


def _axes(problem: Problem, name: str, a: np.ndarray) -> np.ndarray:
    return problem.four_axes(a) if name in ("y", "dx") else problem.three_axes(a)
