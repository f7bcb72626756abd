"""The counts: how many cells of each peer are how good. A cell is one of y, dx, dw, db of one norm on one case."""

from collections import Counter
from collections.abc import Iterable

from npnorm.studies.accuracy.formats import FORMATS
from npnorm.studies.accuracy.measure import Cell, Verdict
from npnorm.studies.accuracy.run import Record
from npnorm.studies.accuracy.table import table

NEAREST = 0.51
"""Ulps of a result that is correctly rounded: 0.5, and a margin for a few near-ties."""

FLOAT64 = 8.0
"""Ulps that npnorm allows itself in float64, where there is no wider precision to compute in."""

BINS = {"<= 0.51 ulp": NEAREST, "to 4": 4.0, "to 8": FLOAT64, "8 ulps to 1 %": float("inf")}
OTHERS = {"wrong": (Verdict.WRONG,), "nan, inf": (Verdict.NAN, Verdict.INF), "refused": (Verdict.REFUSED,)}
HEADER = ["implementation", "cells", *BINS, *OTHERS, "elements not nearest"]


def scoreboard(records: list[Record], dtype: str) -> str:
    """Return the table of a dtype: a row for each peer. The columns from the second on sum to the first."""
    peers = dict.fromkeys(record.peer for record in records)
    chosen = {peer: [r for r in records if (r.peer, r.dtype) == (peer, dtype)] for peer in peers}
    return table(HEADER, [_row(peer, some) for peer, some in chosen.items() if some])


def scoreboards(records: list[Record]) -> str:
    """Return the tables of all dtypes that were measured, each below its name."""
    dtypes = [dtype for dtype in FORMATS if any(record.dtype == dtype for record in records)]
    return "\n\n".join(f"{dtype}\n\n{scoreboard(records, dtype)}" for dtype in dtypes)


def bar(record: Record) -> float:
    """Return the ulps that npnorm allows itself."""
    return FLOAT64 if record.dtype == "float64" else NEAREST


def _row(peer: str, records: list[Record]) -> list[str]:
    cells = [cell for record in records for cell in record.cells.values()]
    counts = Counter(_column(cell) for cell in cells)
    columns = [f"{counts[name]}" for name in (*BINS, *OTHERS)]
    return [peer, f"{len(cells)}", *columns, _share(cells)]


def _column(cell: Cell) -> str:
    if cell.verdict is Verdict.NUMBER:
        return next(name for name, limit in BINS.items() if cell.ulps <= limit)
    return next(name for name, verdicts in OTHERS.items() if cell.verdict in verdicts)


def _share(cells: Iterable[Cell]) -> str:
    missed, elements = (sum(counts) for counts in zip(*((c.missed, c.elements) for c in cells), strict=True))
    share = f"{missed / elements:.2%}" if missed > elements / 1e4 else f"{missed}"
    return f"{share} of {elements / 1e6:.1f} M"
