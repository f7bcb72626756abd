"""What the studies share: cells that are measured once, claims that the numbers decide, a table and a picture.

A study is one file, which defines `STUDY`, a `Study` of five functions:

    cells(settings)          what is varied: a list of cells, such as {"norm": "LayerNorm", "seed": 0}
    measure(settings, cell)  what is measured in a cell: numbers by name, and lists of numbers
    claims(results)          what is claimed, and the numbers that decide it
    table(results)           lines of text by the names of their columns
    draw(results, figure)    the picture

`run` measures the cells that a file does not have yet and writes the file after each one, so that a study that was
stopped goes on where it was. A claim says between which bounds a quantity lies; its verdict follows from the numbers
and their spread over the seeds, and is never written by hand. `record.py` is the file, `report.py` what is told of it.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from matplotlib.figure import Figure
from tqdm import tqdm

from npnorm import plotting
from npnorm.conformance.machine import machine
from npnorm.studies import record

Cell = dict[str, Any]
Settings = Mapping[str, Any]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Study:
    """An experiment: its settings and its five functions.

    Parameters
    ----------
    shows : str
        What it shows, in one line.
    minutes : float
        How long the full run takes on 2 cores.
    full, quick : mappings
        The settings of the full and of the quick run; both have "seeds", how many there are.
    cells, measure, claims, table, draw : callables
        See the top of this file.
    size : (float, float)
        Width and height of the picture, in inches.
    suffix : str
        The format of the picture.
    packages : sequence of str
        Whose versions are written down, beside npnorm's and NumPy's.
    parts : callable
        More text for the page of the documentation: from the results to texts by name.

    Raises
    ------
    ValueError
        If settings have no "seeds".
    """

    shows: str
    minutes: float
    full: Settings
    quick: Settings
    cells: Callable[[Settings], list[Cell]]
    measure: Callable[[Settings, Cell], dict[str, Any]]
    claims: Callable[["Results"], list["Claim"]]
    table: Callable[["Results"], list[dict[str, str]]]
    draw: Callable[["Results", Figure], None]
    size: tuple[float, float] = (7.2, 3.6)
    suffix: str = ".svg"
    packages: Sequence[str] = ()
    parts: Callable[["Results"], dict[str, str]] = field(default=lambda results: {})

    def __post_init__(self) -> None:
        """Check the settings."""
        for name, settings in (("full", self.full), ("quick", self.quick)):
            if "seeds" not in settings:
                raise ValueError(f'Study: {name} needs "seeds", how many there are; it has {", ".join(settings)}')


class Results(NamedTuple):
    """What was measured: a line for each cell, with what was varied and what came out."""

    settings: Settings
    machine: dict[str, str]
    lines: list[dict[str, Any]]

    def where(self, **fixed: Any) -> "Results":
        """Return the lines that have these values.

        Raises
        ------
        KeyError
            If no line has one of the names.

        Examples
        --------
        >>> Results({}, {}, [{"norm": "a", "loss": 1.0}, {"norm": "b", "loss": 2.0}]).where(norm="b").lines
        [{'norm': 'b', 'loss': 2.0}]
        """
        for name in fixed:
            self._require(name)
        plain = record.plain(fixed, record.ALL)
        some = [line for line in self.lines if all(line.get(name) == value for name, value in plain.items())]
        return self._replace(lines=some)

    def values(self, name: str, **fixed: Any) -> np.ndarray:
        """Return what the lines with these values have under a name, in the order of the cells, so by seed."""
        return np.array([line[name] for line in self.where(**fixed).lines])

    def distinct(self, name: str) -> list[Any]:
        """Return what there is under a name, each once, in the order of the cells."""
        self._require(name)
        return list(dict.fromkeys(line[name] for line in self.lines if name in line))

    def _require(self, name: str) -> None:
        known = dict.fromkeys(name for line in self.lines for name in line)
        if known and name not in known:
            raise KeyError(f"no cell has {name!r}; there are {', '.join(known)}")


class Verdict(StrEnum):
    """What the numbers say of a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "not decided by this data"


@dataclass(frozen=True)
class Claim:
    """That a quantity lies between two bounds, and what was measured of it.

    Parameters
    ----------
    says : str
        The claim, as a sentence.
    source : str
        Who claims it, and where.
    quantity : str
        What the values are, with their unit.
    values : floats
        One for each seed.
    low, high : float
        The claim holds from low to high.
    exact : bool
        Whether the quantity has no spread, so that one value decides.

    Raises
    ------
    ValueError
        If there is no bound, or low is above high.

    Examples
    --------
    >>> claim = Claim("Half of it is lost.", "nobody", "share", [0.52, 0.49, 0.5], 0.4, 0.6)
    >>> str(claim.verdict)
    'holds'
    >>> claim.measured
    '0.503 (95 %: 0.465 to 0.541; 3 seeds)'
    """

    says: str
    source: str
    quantity: str
    values: Sequence[float] | np.ndarray
    low: float = -math.inf
    high: float = math.inf
    exact: bool = False

    def __post_init__(self) -> None:
        """Check the bounds."""
        if not self.low <= self.high or (math.isinf(self.low) and math.isinf(self.high)):
            raise ValueError(
                f"Claim {self.says!r}: it needs low, high or both, and low <= high; they are {self.low} and {self.high}"
            )

    @property
    def interval(self) -> tuple[float, float]:
        """Where the mean lies with a confidence of 95 %, by Student's t; the value itself, if it is exact."""
        values = np.asarray(self.values, float)
        if (self.exact and values.size) or self._all_alike:
            return float(values.min()), float(values.max())
        if values.size < 2 or not np.isfinite(values).all():
            return -math.inf, math.inf
        half = scipy.stats.t.ppf((1 + CONFIDENCE) / 2, values.size - 1) * values.std(ddof=1) / math.sqrt(values.size)
        return float(values.mean() - half), float(values.mean() + half)

    @property
    def verdict(self) -> Verdict:
        """Holds if the interval lies within the bounds, does not if it lies outside, and is open else."""
        first, last = self.interval
        if self.low <= first and last <= self.high:
            return Verdict.HOLDS
        return Verdict.FAILS if last < self.low or first > self.high else Verdict.OPEN

    @property
    def measured(self) -> str:
        """The mean, its interval and the number of seeds, in words; no interval where all seeds have the same."""
        (first, last), values = self.interval, np.asarray(self.values, float)
        if self.exact:
            return _short(first) if first == last else f"{_short(first)} to {_short(last)}"
        seeds = f"{values.size} seed{'s' * (values.size != 1)}"
        if self._all_alike:
            return f"{_short(values[0])} in each of {seeds}"
        mean = float(values.mean()) if values.size else math.nan
        if math.isinf(last):
            return f"{_short(mean)} ({seeds})"
        short = [_short(value, (last - first) / 2) for value in (mean, first, last)]
        return f"{short[0]} (95 %: {short[1]} to {short[2]}; {seeds})"

    @property
    def _all_alike(self) -> bool:
        values = np.asarray(self.values, float)
        return values.size > 1 and bool(np.isfinite(values).all() and values.min() == values.max())

    @property
    def bounds(self) -> str:
        """Where the claim holds, in words."""
        if self.low == self.high:
            return f"{self.low:g}"
        if math.isinf(self.high):
            return f"at least {self.low:.4g}"
        return f"at most {self.high:.4g}" if math.isinf(self.low) else f"{self.low:.4g} to {self.high:.4g}"


def _short(value: float, half: float = 0) -> str:
    """Return a number with three digits, or as many as show two figures of half the width of its interval."""
    digits = 3
    if 0 < half < math.inf:
        place = 1 - math.floor(math.log10(half))
        value = round(value, place) + 0.0  # not -0
        digits = min(7, max(3, place + 1 + math.floor(math.log10(abs(value))))) if value else 3
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:.{digits}g}"


def run(name: str, study: Study, settings: Settings, folder: Path | str, quiet: bool = False) -> Results:
    """Measure the cells that folder/name.json does not have yet, and return all of them.

    Raises
    ------
    ValueError
        If the folder cannot be made, or the file is of other settings, other versions or another machine, or is none
        of a study; nothing of it is lost.
    """
    path = _place(folder) / f"{name}.json"
    head = {
        "study": name,
        "format": record.FORMAT,
        "settings": record.plain({key: value for key, value in settings.items() if key != "seeds"}),
        "machine": machine(["numpy", *study.packages]),
    }
    entries: dict[str, str] = {}  # the JSON of each cell, by its key
    if path.exists():
        file = record.read(path)
        record.require_same(path, file, head)
        head["machine"] = file["machine"]
        entries = {record.key(entry["cell"]): record.line(entry) for entry in file["cells"]}
    wanted = {record.key(cell): cell for cell in study.cells(settings)}
    todo = [cell for key, cell in wanted.items() if key not in entries]
    pause = 0.1 if sys.stderr.isatty() else 60  # seconds between two lines of progress
    done = len(wanted) - len(todo)
    with tqdm(todo, initial=done, total=len(wanted), unit="cell", mininterval=pause, disable=quiet) as bar:
        for cell in bar:
            bar.set_description(" ".join(f"{key}={value}" for key, value in cell.items()), refresh=False)
            start = time.perf_counter()
            result = study.measure(settings, cell)
            seconds = round(time.perf_counter() - start, 3)
            if both := cell.keys() & result.keys():
                raise ValueError(f"{name}: {', '.join(sorted(both))} is the name of what is varied and of a result")
            entry = {"cell": record.plain(cell, record.ALL), "result": record.plain(result), "seconds": seconds}
            entries[record.key(cell)] = record.line(entry)
            record.write(path, head, list(entries.values()))
    ordered = [entries[key] for key in dict.fromkeys([*wanted, *entries])]
    results = _results({**head, "cells": [json.loads(line) for line in ordered]})
    record.write(path, head, ordered, [record.line(_described(claim)) for claim in study.claims(results)])
    return results


def _place(folder: Path | str) -> Path:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ValueError(f"{folder} cannot be made: {problem.strerror}. Take another --out.") from None
    return Path(folder)


def load(name: str, folder: Path | str) -> Results:
    """Return the results that folder/name.json has.

    Raises
    ------
    ValueError
        If it is not there, not of a study, or of one that was stopped.
    """
    path = Path(folder) / f"{name}.json"
    file = record.read(path)
    if "claims" not in file:
        raise ValueError(
            f"{path} is of a run that was stopped: {len(file['cells'])} cells are measured. Run it to the end."
        )
    return _results(file)


def draw(name: str, study: Study, results: Results, folder: Path | str) -> Path:
    """Write the picture beside the numbers, and return where."""
    path = Path(folder) / f"{name}{study.suffix}"
    with plotting.styled():
        figure = Figure(figsize=study.size, layout="constrained")
        study.draw(results, figure)
        plotting.save(figure, path)
    return path


def _results(file: dict[str, Any]) -> Results:
    lines = [{**entry["cell"], **record.numbers(entry["result"])} for entry in file["cells"]]
    return Results(file["settings"], file["machine"], lines)


def _described(claim: Claim) -> dict[str, Any]:
    numbers = {"values": claim.values, "low": claim.low, "high": claim.high, "interval": claim.interval}
    words = {"says": claim.says, "source": claim.source, "quantity": claim.quantity, "exact": claim.exact}
    return {**words, **record.plain(numbers), "verdict": str(claim.verdict)}
