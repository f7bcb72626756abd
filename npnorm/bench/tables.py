"""What was measured as tables, which are pivots of the one long table: ratios, rates, memory; and the goals."""

import math
from collections.abc import Iterable, Iterator, Sequence
from textwrap import fill
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from npnorm.bench.grid import NORMS, traffic
from npnorm.bench.peers import ABOUT, COPIES, PEERS
from npnorm.bench.rows import COMPUTES, INPUTS, KINDS
from npnorm.bench.run import REGIMES, RETAINED

WIDTH = 110
ORDER: dict[str, Sequence[str]] = {
    "norm": [*NORMS, *(norm for norm in KINDS if norm not in NORMS)],
    "heap": list(REGIMES),
    "peer": ["npnorm", *PEERS, *COPIES],
    "input": ["", *INPUTS],
    "op": ["forward", "backward", "both"],
}
"""The order of rows and columns; what is not here stands in the order of numbers, or as it came."""

CALL = ["section", "norm", "shape", "heap", "threads"]
"""The columns that tell one interleaved run from another."""

Table = tuple[str, pd.DataFrame]
"""A title, and cells as text; the index is what the rows are."""


def derive(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table in its order with more columns, nan where there is nothing to compare with.

    noise     (p90 - p10) / median
    torch, naive, ordinary
              the time divided by that of torch, of the textbook, and of ordinary rows, all of the same run
    share     which part of the speed of a copy it reaches: a copy moves two arrays, see `npnorm.bench.grid.traffic`
    rate      bytes per second, counting what the operation must move at least; of a copy, what it moves
    """

    def rank(column: pd.Series) -> pd.Series:
        names = ORDER.get(str(column.name))
        return column.map({name: i for i, name in enumerate(names)}) if names else column

    by = ["norm", "mib", "shape", "threads", "op", "heap", "peer", "input"]
    frame = frame.sort_values(by, key=rank, kind="stable").reset_index(drop=True)
    frame["noise"] = (frame["p90"] - frame["p10"]) / frame["median"]

    def relative(to: pd.Series, key: Sequence[str]) -> pd.Series:
        base = frame[to].set_index([*key])["median"].rename("base")
        return frame["median"] / frame.join(base, on=list(key), validate="many_to_one")["base"]

    for peer in ("torch", "naive"):
        frame[peer] = relative((frame["peer"] == peer) & frame["median"].notna(), [*CALL, "op"])
    frame["ordinary"] = relative(frame["input"] == "ordinary", [*CALL, "op", "peer"])
    is_copy = frame["peer"].isin(list(COPIES))
    copy = frame[is_copy].groupby(CALL)["median"].min().rename("copy")
    arrays = [2 if c else traffic(norm, op) for c, norm, op in zip(is_copy, frame["norm"], frame["op"], strict=True)]
    frame["share"] = frame.join(copy, on=CALL)["copy"] * np.array(arrays) / 2 / frame["median"]
    frame["rate"] = frame["mib"] * 2**20 * np.array(arrays) / frame["median"]
    return frame


def pivot(frame: pd.DataFrame, rows: Sequence[str], column: str, values: str) -> pd.DataFrame:
    """Return a pivot in the order in which its rows and columns first come; two values for a cell are an error."""
    table = frame.pivot(index=list(rows), columns=column, values=values)
    return table.loc[pd.MultiIndex.from_frame(frame[list(rows)].drop_duplicates()), frame[column].drop_duplicates()]


def tables(frame: pd.DataFrame) -> list[Table]:
    """Return all tables but the goals of a long table."""
    return list(_tables(derive(frame)))


def _tables(frame: pd.DataFrame) -> Iterator[Table]:
    parts = {name: some for name, some in frame.groupby("section", sort=False)}
    for norm, some in parts.get("norms", frame[:0]).groupby("norm", sort=False):
        yield str(norm), ratios(some, ["shape", "threads", "op", "heap"], shares=True)
    if (some := parts.get("small")) is not None:
        yield "Small calls", ratios(some, ["norm", "shape", "threads", "op", "heap"], unit="us")
    if (some := parts.get("step")) is not None:
        yield "A step of training a transformer", ratios(some, ["norm", "threads", "heap"])
    if (some := parts.get("rows")) is not None:
        key = ["norm", "shape", "op", "peer"]
        yield "Rows that need care: time divided by that of ordinary rows", ratios(some, key, "input", "ordinary")
        large = some[some["mib"] >= 1]
        yield "Rows that need care: largest extra memory without the result, in MiB", memory(large, key, "input")
    if (some := parts.get("scaling")) is not None:
        rates = pivot(some[some["op"] == "both"], ["norm", "shape", "threads"], "peer", "rate") / 1e9
        title = f"Rows, width, threads: GB/s of forward and backward, {some['heap'].iloc[0]} heap"
        yield title, _text(rates, "{:.1f}")
    if (some := parts.get("memory")) is not None:
        yield "Largest extra memory of a call, in MiB", memory(some, ["norm", "shape", "op"])


def ratios(
    frame: pd.DataFrame,
    rows: Sequence[str],
    column: str = "peer",
    base: str | None = None,
    unit: str = "ms",
    shares: bool = False,
) -> pd.DataFrame:
    """Return the time of the base, that of the others divided by it, shares of the copy, and the widest spread."""
    frame = frame[~frame["peer"].isin(list(COPIES))]
    if base is None:
        base = next((name for name in ("torch", "naive") if name in set(frame["peer"])), frame["peer"].iloc[0])
    median = pivot(frame, rows, column, "median")
    first = median.pop(base)
    parts = [
        _text((first * {"ms": 1e3, "us": 1e6}[unit]).map(digits).to_frame(f"{base} {unit}"), "{}"),
        _text(median.div(first, axis=0), "{:.2f}"),
    ]
    if shares:
        share = pivot(frame, rows, column, "share")
        parts.append(_text(100 * share[share.columns.intersection(["f32", "out", "torch"])].add_prefix("%"), "{:.0f}"))
    noise = pivot(frame, rows, column, "noise").max(axis=1)
    return pd.concat([*parts, _text(100 * noise.to_frame("+-%"), "{:.0f}")], axis=1)


def memory(frame: pd.DataFrame, rows: Sequence[str], column: str = "peer") -> pd.DataFrame:
    """Return extra memory in MiB."""
    return _text(pivot(frame, rows, column, "extra") / 2**20, "{:.2f}")


def _text(table: pd.DataFrame, form: str) -> pd.DataFrame:
    return table.map(lambda value: "-" if isinstance(value, float) and math.isnan(value) else form.format(value))


def digits(number: float) -> str:
    """Return three digits.

    Examples
    --------
    >>> digits(0.01234), digits(1.2), digits(1234.5)
    ('0.0123', '1.20', '1234')
    """
    if number >= 100:
        return f"{number:.0f}"
    return f"{number:.2f}" if number >= 1 else f"{number:.3g}"


class Goal(NamedTuple):
    """Cells of the derived table, the column that is judged, and the largest (or least) value that is good.

    Without a limit it is only reported; with `of_mean` the geometric mean is judged instead of each cell.
    """

    what: str
    query: str
    value: str
    limit: float | None = None
    at_least: bool = False
    of_mean: bool = False


LARGE = 32
"""MiB of x from which on goals for large arrays hold."""


def _goals() -> Iterator[Goal]:
    heaps = tuple(REGIMES)
    limits = {"RMSNorm": (0.5, 0.5, 1), "LayerNorm": (0.8, 1.5, LARGE)}
    limits |= {"BatchNorm": (1, 1, 0), "GroupNorm": (1.3, 1.3, 0)}
    for peer in ("f32", "out"):
        for norm, (*both, mib) in limits.items():
            for heap, limit in zip(heaps, both, strict=True):
                cells = f"section == 'norms' and op == 'both' and peer == '{peer}' and norm == '{norm}'"
                least = f", >= {mib} MiB" if mib else ""
                what, cells = f"{norm} {peer} / torch, {heap}{least}", f"{cells} and heap == '{heap}' and mib >= {mib}"
                yield Goal(what, cells, "torch", limit if peer == "f32" else None)
    for heap, limit in zip(heaps, (0.40, 0.75), strict=True):
        cells = f"section == 'norms' and op == 'both' and peer == 'f32' and heap == '{heap}'"
        yield Goal(f"all norms, f32 / torch, {heap}", cells, "torch", limit, of_mean=True)
    for norm in NORMS:
        cells = f"section == 'norms' and op == 'both' and peer == 'f64' and norm == '{norm}'"
        yield Goal(f"{norm} f64 / naive", cells, "naive", 1.0)
    for norm, limit in {"RMSNorm": 0.5, "LayerNorm": 0.4}.items():
        for peer in ("f32", "out"):
            cells = f"section == 'norms' and op == 'both' and peer == '{peer}' and norm == '{norm}' and mib >= {LARGE}"
            what = f"{norm} {peer}, share of copy, >= {LARGE} MiB"
            yield Goal(what, cells, "share", limit if peer == "out" else None, at_least=True)
    yield Goal("training step, npnorm / torch", "section == 'step' and peer == 'npnorm'", "torch", 0.98)
    for norm in KINDS:
        for peer in COMPUTES:
            cells = f"section == 'rows' and input != 'ordinary' and norm == '{norm}' and peer == '{peer}'"
            yield Goal(f"{norm} {peer}, rows that need care / ordinary rows", cells, "ordinary", 5.0)
    for norm in KINDS:
        yield Goal(f"{norm}, MiB of extra memory", f"section == 'rows' and norm == '{norm}'", "extra_mib", 32.0)


GOALS = tuple(_goals())


def goals(frame: pd.DataFrame, goals: Iterable[Goal] = GOALS) -> pd.DataFrame:
    """Return a line for each goal that something was measured for: the worst cell, the mean, and how many meet it."""
    frame = derive(frame)
    frame["extra_mib"] = frame["extra"] / 2**20
    lines = [line for goal in goals if (line := _judge(goal, frame)) is not None]
    return pd.DataFrame(lines, columns=["what", "worst cell", "worst", "mean", "goal", "met"]).set_index(
        ["what", "worst cell"]
    )


def _judge(goal: Goal, frame: pd.DataFrame) -> list[str] | None:
    cells = frame.query(goal.query).dropna(subset=goal.value)
    if cells.empty:
        return None
    values = cells[goal.value]
    mean = math.exp(np.log(values.clip(lower=1e-9)).mean())
    limit = "" if goal.limit is None else f"{'>=' if goal.at_least else '<='} {goal.limit:.2f}"
    if goal.of_mean:
        met = "" if goal.limit is None else "yes" if mean <= goal.limit else "no"
        return [goal.what, f"mean of {len(cells)} cells", "", f"{mean:.2f}", limit, met]
    worst = cells.loc[values.idxmin() if goal.at_least else values.idxmax()]
    good = values >= goal.limit if goal.at_least else values <= goal.limit if goal.limit is not None else None
    if worst["section"] == "rows":
        peer = f", {worst['peer']}" if cells["peer"].nunique() > 1 else ""
        where = f"{worst['shape']} {worst['op']}, {worst['input']}{peer}"
    else:
        name = worst["norm"] if worst["section"] == "step" else worst["shape"]
        heap = f" {worst['heap']}" if cells["heap"].nunique() > 1 else ""
        where = f"{name} {worst['threads']}T{heap}"
    met = "" if good is None or goal.limit is None else f"{good.sum()}/{len(cells)}"
    return [goal.what, where, f"{values[worst.name]:.2f}", f"{mean:.2f}", limit, met]


def markdown(table: pd.DataFrame, form: str = "pipe") -> str:
    """Return a table for a page, or with the form "simple" for a terminal; the index is aligned to the left."""
    table = table.rename_axis(index={"threads": "T"})
    align = ["left"] * table.index.nlevels + ["right"] * table.shape[1]
    return table.reset_index().to_markdown(index=False, tablefmt=form, disable_numparse=True, colalign=align)


def conditions(machine: dict[str, str]) -> list[str]:
    """Return lines on the machine and the heaps."""
    settings = " ".join(f"{name}={value}" for name, value in RETAINED.items())
    return [*(f"{name}: {text}" for name, text in machine.items()), f"heaps: default, and retained: {settings}"]


def legend(frame: pd.DataFrame) -> list[str]:
    """Return lines that say what the columns mean."""
    return [
        *(f"{name}: {about}" for name, about in ABOUT.items() if (frame["peer"] == name).any()),
        "columns of peers: time divided by that of the first column, medians of one interleaved run",
        "%: share of the speed of a copy of the same memory by the same threads; forward moves 2 arrays of the "
        "size of x, backward 3, both 5; for BatchNorm, whose rows run through the whole array, 3, 5 and 8",
        "+-%: (p90 - p10) / median of the contender in the row where it is largest; T: threads",
    ]


def text(frame: pd.DataFrame, machine: dict[str, str]) -> str:
    """Return all of it for a terminal: the conditions, the tables, the goals last."""
    found = [*tables(frame), ("Goals", goals(frame))]
    return "\n\n".join(
        [
            bullets(conditions(machine)),
            bullets(legend(frame)),
            *(f"{title}\n\n{markdown(table, 'simple')}" for title, table in found),
        ]
    )


def bullets(lines: Iterable[Any]) -> str:
    """Return lines as a list of a page."""
    return "\n".join(fill(f"- {line}", WIDTH, subsequent_indent="  ", break_on_hyphens=False) for line in lines)
