"""A line for each goal: how far from it the worst cell is, and where that is."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from npnorm.bench.grid import NORMS
from npnorm.bench.records import Measured, Record
from npnorm.bench.report import share
from npnorm.bench.table import Table

LARGE = 32.0
"""MiB of x from which on goals for large arrays hold."""

NORM_GOALS: dict[str, dict[str, float]] = {
    "RMSNorm": {"default": 0.5, "retained": 0.5},
    "LayerNorm": {"default": 0.8, "retained": 1.5},
    "BatchNorm": {"default": 1.0, "retained": 1.0},
    "GroupNorm": {"default": 1.3, "retained": 1.3},
}
"""The largest ratio to torch, forward and backward together, by heap."""

NORM_SIZES = {"RMSNorm": 1.0, "LayerNorm": LARGE, "BatchNorm": 0.0, "GroupNorm": 0.0}
"""MiB of x from which on it holds."""

MEANS = {"default": 0.40, "retained": 0.75}
"""The largest geometric mean of these ratios over the whole grid, by heap."""

COPY_SHARES = {"RMSNorm": 0.50, "LayerNorm": 0.40}
"""The least share of the copy, forward and backward together, of large arrays."""

NAIVE, STEP = 1.0, 0.98
"""The largest ratios of compute="float64" to the textbook, and of a step of training to torch."""


class Line(NamedTuple):
    """A goal and what was reached.

    Parameters
    ----------
    what : str
    worst : float
    where : str
        The cell with the worst value; empty where the goal is for the mean.
    mean : float
        The geometric mean.
    goal : float or None
        None: it is reported without a goal.
    at_least : bool
        Whether the goal is the least value instead of the largest.
    cells : int
        Of how many cells.
    missed : int
        How many of them miss the goal.
    """

    what: str
    worst: float
    where: str
    mean: float
    goal: float | None
    at_least: bool = False
    cells: int = 0
    missed: int = 0

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, by the worst cell or, where there is none, by the mean."""
        if self.goal is None:
            return None
        value = self.worst if self.where else self.mean
        return value >= self.goal if self.at_least else value <= self.goal


def geometric_mean(values: Iterable[float]) -> float:
    """Return the geometric mean.

    Examples
    --------
    >>> round(geometric_mean([0.5, 2.0, 1.0]), 12)
    1.0
    """
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def summary(records: Sequence[Record]) -> list[Line]:
    """Return the lines of all goals that something was measured for, and was not disturbed."""
    return [line for make in (_by_norm, _means, _float64, _copies, _steps) for line in make(records)]


def summary_table(measured: Measured) -> Table:
    """Return the summary as a table."""
    rows = []
    for line in summary(measured.records):
        goal = "" if line.goal is None else f"{'>=' if line.at_least else '<='} {line.goal:.2f}"
        worst = f"{line.worst:.2f}" if line.where else ""
        where = line.where or f"mean of {line.cells} cells"
        rows.append([line.what, where, worst, f"{line.mean:.2f}", goal, _verdict(line)])
    header = ["what", "worst cell", "worst", "mean", "goal", "met"]
    return Table("Goals", header, rows, left=2)


def _verdict(line: Line) -> str:
    """Return in how many of the cells a goal is met; of a goal for the mean, whether it is."""
    if line.met is None:
        return ""
    if line.where:
        return f"{line.cells - line.missed}/{line.cells}"
    return "yes" if line.met else "no"


def _by_norm(records: Sequence[Record]) -> Iterator[Line]:
    for peer in ("f32", "out"):
        for norm in NORMS:
            for regime in MEANS:
                some = [
                    r
                    for r in _having(records, "norms", peer, "torch")
                    if (r.case.norm, r.regime) == (norm, regime) and r.case.mebibytes >= NORM_SIZES[norm]
                ]
                goal = NORM_GOALS[norm][regime] if peer == "f32" else None
                least = f", >= {NORM_SIZES[norm]:g} MiB" if NORM_SIZES[norm] else ""
                what = f"{norm} {peer} / torch, {regime}{least}"
                yield from _line(what, some, _ratio(peer, "torch"), goal)


def _means(records: Sequence[Record]) -> Iterator[Line]:
    for regime, goal in MEANS.items():
        values = [
            r.ratio("f32", "torch", "both") for r in _having(records, "norms", "f32", "torch") if r.regime == regime
        ]
        if values:
            what = f"all norms, f32 / torch, {regime}"
            yield Line(what, max(values), "", geometric_mean(values), goal, cells=len(values))


def _float64(records: Sequence[Record]) -> Iterator[Line]:
    for norm in NORMS:
        some = [r for r in _having(records, "norms", "f64", "naive") if r.case.norm == norm]
        yield from _line(f"{norm} f64 / naive", some, _ratio("f64", "naive"), NAIVE)


def _copies(records: Sequence[Record]) -> Iterator[Line]:
    for norm, goal in COPY_SHARES.items():
        for peer in ("f32", "out"):
            some = [
                r
                for r in _having(records, "norms", peer, "copyto")
                if r.case.norm == norm and r.case.mebibytes >= LARGE
            ]
            what = f"{norm} {peer}, share of copy, >= {LARGE:g} MiB"
            yield from _line(what, some, _share_of(peer), goal if peer == "out" else None, at_least=True)


def _share_of(peer: str) -> Callable[[Record], float]:
    return lambda record: share(record, peer, "both")


def _ratio(peer: str, to: str) -> Callable[[Record], float]:
    return lambda record: record.ratio(peer, to, "both")


def _steps(records: Sequence[Record]) -> Iterator[Line]:
    some = _having(records, "step", "npnorm", "torch")
    yield from _line("training step, npnorm / torch", some, _ratio("npnorm", "torch"), STEP)


def _line(
    what: str, records: Sequence[Record], value: Callable[[Record], float], goal: float | None, at_least: bool = False
) -> Iterator[Line]:
    if not records:
        return
    values = {i: value(r) for i, r in enumerate(records)}
    worst = (min if at_least else max)(values, key=lambda i: values[i])
    missed = 0 if goal is None else sum((v < goal) if at_least else (v > goal) for v in values.values())
    cell = records[worst]
    where = f"{cell.case.size if cell.section != 'step' else cell.case.norm} {cell.threads}T"
    if len({r.regime for r in records}) > 1:
        where += f" {cell.regime}"
    yield Line(what, values[worst], where, geometric_mean(values.values()), goal, at_least, len(values), missed)


def _having(records: Sequence[Record], section: str, *peers: str) -> list[Record]:
    """Return the cells of a section that these contenders were measured for, without those that were disturbed."""
    some = [r for r in records if r.section == section and all(name in r.times for name in peers)]
    return [r for r in some if r.calm(*peers)]
