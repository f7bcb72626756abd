"""The scoreboard, the cells, and the page of the documentation; its prose is that of page.md."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import pandas as pd

from npnorm.conformance.machine import machine
from npnorm.conformance.ulps import DTYPES
from npnorm.studies.accuracy.measure import Verdict
from npnorm.studies.accuracy.peers import Peer

WIDTH = 110
PROSE = Path(__file__).with_name("page.md")

NEAREST = 0.51
"""Ulps of a result that is correctly rounded: 0.5, and a margin for a few near-ties."""

FLOAT64 = 8.0
"""Ulps that npnorm allows itself in float64, where there is no wider precision to compute in."""

BINS = {"<= 0.51 ulp": NEAREST, "to 4": 4.0, "to 8": FLOAT64, "8 ulps to 1 %": float("inf")}
OTHERS = {Verdict.WRONG: "wrong", Verdict.NAN: "nan, inf", Verdict.INF: "nan, inf", Verdict.REFUSED: "refused"}
BAD = "%", Verdict.NAN, Verdict.INF
"""How what is worse than any number of ulps ends."""


def bar(dtype: str) -> float:
    """Return the ulps that npnorm allows itself."""
    return FLOAT64 if dtype == "float64" else NEAREST


def scoreboard(frame: pd.DataFrame) -> pd.DataFrame:
    """Return how many cells of each peer are how good; the columns from the second on sum to the first."""

    def column(line: pd.Series) -> str:
        if line["verdict"] != Verdict.NUMBER:
            return OTHERS[line["verdict"]]
        return next(name for name, limit in BINS.items() if line["ulps"] <= limit)

    peers = frame["peer"].unique()
    counts = pd.crosstab(frame["peer"], frame.apply(column, axis=1))
    counts = counts.reindex(peers).reindex(columns=list(dict.fromkeys([*BINS, *OTHERS.values()])), fill_value=0)
    counts.insert(0, "cells", frame["peer"].value_counts())
    sums = frame.groupby("peer")[["missed", "elements"]].sum().loc[peers]
    counts["elements not nearest"] = [
        f"{f'{missed / elements:.2%}' if missed > elements / 1e4 else missed} of {elements / 1e6:.1f} M"
        for missed, elements in sums.to_numpy()
    ]
    return counts.rename_axis("implementation").reset_index()


def shown(line: pd.Series) -> str:
    """Return a cell in a few characters: ulps, or what is worse than any ulps."""
    verdict, ulps, share = line["verdict"], line["ulps"], line["share"]
    if verdict == Verdict.WRONG:
        return f"{100 * share:.0f} %" if share < 10 else "> 1000 %"
    if verdict != Verdict.NUMBER:
        return str(verdict)
    return f"{ulps:.2f}" if ulps < 10 else f"{ulps:.0f}" if ulps < 1000 else f"{ulps:.0e}"


def cells(frame: pd.DataFrame, by: Sequence[str] = ("dtype", "norm", "pass", "case")) -> pd.DataFrame:
    """Return the worst cell, as `shown`, of each case (a row) and peer (a column)."""
    some = frame.assign(rank=frame["verdict"].map(list(Verdict).index))
    some["pass"] = some["result"].map(lambda name: "forward" if name == "y" else "backward")
    worst = some.sort_values(["rank", "ulps"], kind="stable").groupby([*by, "peer"], sort=False).tail(1)
    worst = worst.assign(shown=worst.apply(shown, axis=1)).set_index([*by, "peer"])["shown"].unstack("peer")
    order = pd.MultiIndex.from_frame(some[list(by)].drop_duplicates())
    order = order if len(by) > 1 else order.get_level_values(0)
    return worst.loc[order, frame["peer"].unique()].reset_index().rename_axis(columns=None)


def misses(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the cells of npnorm that are above its bars."""
    own = frame[(frame["peer"] == "npnorm") & (frame["verdict"] != Verdict.REFUSED)]
    own = own[~(own["ulps"] <= own["dtype"].map(bar))]
    return own.assign(ulps=[shown(line) for _, line in own.iterrows()])[["dtype", "norm", "case", "result", "ulps"]]


def refusals(frame: pd.DataFrame) -> pd.DataFrame:
    """Return, for each peer and norm, what it said and on which cases."""
    some = frame[frame["refusal"] != ""].groupby(["peer", "norm", "refusal"], sort=False)["case"]
    table = some.agg(lambda names: "; ".join(dict.fromkeys(names))).reset_index()
    return table[["peer", "norm", "case", "refusal"]].set_axis(
        ["implementation", "norm", "cases", "what it says"], axis=1
    )


def markdown(table: pd.DataFrame, left: int = 1) -> str:
    """Return a table whose first `left` columns are aligned to the left, with what is wrong in bold."""
    if table.empty:
        return "None."
    bold = table.map(lambda text: f"**{text}**" if str(text).endswith(BAD) else str(text))
    align = ["left"] * left + ["right"] * (table.shape[1] - left)
    return bold.to_markdown(index=False, disable_numparse=True, colalign=align)


def scoreboards(frame: pd.DataFrame, heading: str = "") -> str:
    """Return the scoreboards of all dtypes that were measured, each below its name."""
    boards = {dtype: frame[frame["dtype"] == dtype] for dtype in DTYPES if (frame["dtype"] == dtype).any()}
    return "\n\n".join(f"{heading}{dtype}\n\n{markdown(scoreboard(some))}" for dtype, some in boards.items())


def page(frame: pd.DataFrame, peers: Sequence[Peer], command: str, data: str) -> str:
    """Return the page: the prose of page.md, with what was measured in its place; `data` is a link to all cells."""
    packages = dict.fromkeys(name for peer in peers for name in peer.packages)
    first = frame[frame["dtype"] == frame["dtype"].iloc[0]]
    parts = {
        "command": command,
        "peers": "\n".join(fill(f"- **{peer.name}**: {peer.about}.", WIDTH, subsequent_indent="  ") for peer in peers),
        "machine": "\n".join(
            fill(f"- {name}: {text}", WIDTH, subsequent_indent="  ")
            for name, text in machine([*packages, "gmpy2"]).items()
        ),
        "scoreboards": scoreboards(frame, "### "),
        "misses": markdown(misses(frame), left=4),
        "refusals": markdown(refusals(frame), left=4),
        "glance": f"### {first['dtype'].iloc[0]}\n\n{markdown(cells(first, ['case']))}",
        "data": data,
    }
    text = PROSE.read_text(encoding="utf-8").rstrip()
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part)
    return text
