"""What the studies share: cells that are measured once, claims that the numbers decide, a table and a picture.

A study is one file, which defines `STUDY`, a `Study` of five functions:

    cells(settings)          what is varied: a list of cells, such as {"norm": "LayerNorm", "seed": 0}
    measure(settings, cell)  what is measured in a cell: numbers by name, and lists of numbers
    claims(results)          what is claimed, and the numbers that decide it
    table(results)           lines of text by the names of their columns
    draw(results, figure)    the picture

`run` measures the cells that a file does not have yet and writes the file after each one, so that a study that was
stopped goes on where it was. A claim says between which bounds a quantity lies; its verdict follows from the numbers
and their spread over the seeds, and is never written by hand.
"""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
from matplotlib.figure import Figure
from tabulate import tabulate
from tqdm import tqdm

from npnorm import plotting
from npnorm.conformance.machine import machine

Cell = dict[str, Any]
Settings = Mapping[str, Any]

FORMAT = 1
"""Of the JSON files; another number is another meaning of their parts."""

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


class Results(NamedTuple):
    """What was measured: a line for each cell, with what was varied and what came out."""

    settings: Settings
    machine: dict[str, str]
    lines: list[dict[str, Any]]

    def where(self, **fixed: Any) -> "Results":
        """Return the lines that have these values.

        Examples
        --------
        >>> Results({}, {}, [{"norm": "a", "loss": 1.0}, {"norm": "b", "loss": 2.0}]).where(norm="b").lines
        [{'norm': 'b', 'loss': 2.0}]
        """
        some = [line for line in self.lines if all(line.get(name) == value for name, value in fixed.items())]
        return self._replace(lines=some)

    def values(self, name: str, **fixed: Any) -> np.ndarray:
        """Return what the lines with these values have under a name, in the order of the cells, so by seed."""
        return np.array([line[name] for line in self.where(**fixed).lines])

    def distinct(self, name: str) -> list[Any]:
        """Return what there is under a name, each once, in the order of the cells."""
        return list(dict.fromkeys(line[name] for line in self.lines if name in line))


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

    @property
    def interval(self) -> tuple[float, float]:
        """Where the mean lies with a confidence of 95 %, by Student's t; the value itself, if it is exact."""
        values = np.asarray(self.values, float)
        if self.exact and values.size:
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
        """The mean, its interval and the number of seeds, in words."""
        first, last = self.interval
        if self.exact:
            return f"{first:.3g}" if first == last else f"{first:.3g} to {last:.3g}"
        mean, count = np.mean(self.values) if len(self.values) else math.nan, len(self.values)
        seeds = f"{count} seed{'s' * (count != 1)}"
        return f"{mean:.3g} ({seeds})" if math.isinf(last) else f"{mean:.3g} (95 %: {first:.3g} to {last:.3g}; {seeds})"

    @property
    def bounds(self) -> str:
        """Where the claim holds, in words."""
        if math.isinf(self.high):
            return f"at least {self.low:.3g}"
        return f"at most {self.high:.3g}" if math.isinf(self.low) else f"{self.low:.3g} to {self.high:.3g}"


def run(name: str, study: Study, settings: Settings, folder: Path, quiet: bool = False) -> Results:
    """Measure the cells that folder/name.json does not have yet, and return all of them.

    Raises
    ------
    ValueError
        If the file is of other settings, other versions or another machine; nothing of it is lost.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    head = {
        "study": name,
        "format": FORMAT,
        "settings": _plain({key: value for key, value in settings.items() if key != "seeds"}),
        "machine": machine(["numpy", *study.packages]),
    }
    entries: dict[str, str] = {}  # the JSON of each cell, by its key
    if path.exists():
        file = _read(path)
        _require_same(path, file, head)
        head["machine"] = file["machine"]
        entries = {_key(entry["cell"]): _line(entry) for entry in file["cells"]}
    wanted = study.cells(settings)
    todo = [cell for cell in wanted if _key(cell) not in entries]
    with tqdm(todo, initial=len(wanted) - len(todo), total=len(wanted), unit="cell", disable=quiet or None) as bar:
        for cell in bar:
            bar.set_description(" ".join(map(str, cell.values())))
            start = time.perf_counter()
            result = study.measure(settings, cell)
            seconds = round(time.perf_counter() - start, 3)
            entries[_key(cell)] = _line({"cell": cell, "result": _plain(result), "seconds": seconds})
            _write(path, head, list(entries.values()), [])
    keys = [_key(cell) for cell in wanted]
    ordered = [entries[key] for key in dict.fromkeys([*keys, *entries])]
    results = _results({**head, "cells": [json.loads(line) for line in ordered]})
    _write(path, head, ordered, [_line(_described(claim)) for claim in study.claims(results)])
    return results


def load(name: str, folder: Path) -> Results:
    """Return the results that folder/name.json has."""
    return _results(_read(folder / f"{name}.json"))


def report(study: Study, results: Results) -> str:
    """Return the table and the verdicts, for the terminal."""
    lines = [tabulate(study.table(results), headers="keys", tablefmt="simple", disable_numparse=True), ""]
    for claim in study.claims(results):
        lines += [f"{claim.verdict}: {claim.says} ({claim.source})"]
        lines += [f"    {claim.quantity}: {claim.measured}; the claim: {claim.bounds}"]
    return "\n".join(lines)


def draw(name: str, study: Study, results: Results, folder: Path) -> Path:
    """Write the picture beside the numbers, and return where."""
    path = folder / f"{name}{study.suffix}"
    with plotting.styled():
        figure = Figure(figsize=study.size, layout="constrained")
        study.draw(results, figure)
        plotting.save(figure, path)
    return path


def refresh(page: Path, study: Study, results: Results) -> None:
    """Write what was measured into a page of the documentation: between `<!-- name -->` and `<!-- end -->`.

    Raises
    ------
    ValueError
        If a name is none of: verdicts, table, machine, and the study's own parts.
    """
    page.write_text(refreshed(page.read_text(encoding="utf-8"), study, results), encoding="utf-8")


def refreshed(text: str, study: Study, results: Results) -> str:
    """Return the text of a page with its marked parts made anew."""
    verdicts = [
        {
            "claim": f"{claim.says} ({claim.source})",
            "measured": f"{claim.quantity}: {claim.measured}",
            "it holds for": claim.bounds,
            "verdict": f"**{claim.verdict}**",
        }
        for claim in study.claims(results)
    ]
    parts = {
        "verdicts": _markdown(verdicts),
        "table": _markdown(study.table(results)),
        "machine": "\n".join(f"- {name}: {text}" for name, text in results.machine.items()),
        **study.parts(results),
    }

    def part(match: re.Match[str]) -> str:
        if match[1] not in parts:
            raise ValueError(f"the page has a part <!-- {match[1]} -->; there are {', '.join(parts)}")
        return f"<!-- {match[1]} -->\n\n{parts[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", part, text, flags=re.DOTALL)


def _markdown(rows: list[dict[str, str]]) -> str:
    """Return a table; a stroke within a cell, as in |x|, would end the cell."""
    rows = [{name: text.replace("|", "\\|") for name, text in row.items()} for row in rows]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def _results(file: dict[str, Any]) -> Results:
    return Results(file["settings"], file["machine"], [{**e["cell"], **_numbers(e["result"])} for e in file["cells"]])


def _described(claim: Claim) -> dict[str, Any]:
    numbers = {"values": claim.values, "low": claim.low, "high": claim.high, "interval": claim.interval}
    words = {"says": claim.says, "source": claim.source, "quantity": claim.quantity, "exact": claim.exact}
    return {**words, **_plain(numbers), "verdict": str(claim.verdict)}


def _key(cell: Cell) -> str:
    return json.dumps(cell, sort_keys=True)


def _plain(value: Any) -> Any:
    """Return what JSON has for numbers: of 7 digits; those that are not finite as text."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.7g}") if math.isfinite(value) else str(float(value))
    return value


def _numbers(value: Any) -> Any:
    """Return the numbers that `_plain` wrote as text."""
    if isinstance(value, dict):
        return {name: _numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def _read(path: Path) -> dict[str, Any]:
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
        if file["format"] != FORMAT:
            raise ValueError(f"it has the format {file['format']}, and this is {FORMAT}")
        return file
    except FileNotFoundError:
        raise ValueError(f"{path} is not there. Run the study first.") from None
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"{path} is not a file of a study ({problem}). Take another --out.") from None


def _require_same(path: Path, file: dict[str, Any], head: dict[str, Any]) -> None:
    """Raise unless the cells of a file can stand beside new ones."""
    for part, other in _differences(file, head):
        raise ValueError(
            f"{path} was measured with another {part}, {other}. Take another --out, or remove the file to measure anew."
        )


def _differences(file: dict[str, Any], head: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for part in ("study", "settings"):
        if file.get(part) != head[part]:
            yield part, file.get(part)
    for name in ("processor", "versions"):  # thread pools are seen only once they are loaded
        if file["machine"].get(name) != head["machine"][name]:
            yield name, file["machine"].get(name)


def _write(path: Path, head: dict[str, Any], cells: list[str], claims: list[str]) -> None:
    """Replace the file at once, so that one that was stopped while writing leaves the former."""
    parts = [f"{_line(name)}: {_line(value)}" for name, value in head.items()]
    for name, lines in (("cells", cells), ("claims", claims)):
        parts += [f"{_line(name)}: [\n" + ",\n".join(lines) + "\n]"]
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write("{" + ",\n".join(parts) + "}\n")
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
