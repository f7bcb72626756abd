"""How accurate is a norm? npnorm and other libraries beside exact arithmetic, forward and backward.

A cell is a case of `npnorm.conformance.cases`, where norms go wrong, laid out for a norm. Its exact results, in numbers
of 400 bits, are computed once, and every implementation is held against them:

    accuracy_peers.py       the implementations
    accuracy_outcomes.py    how far a result is from the exact one, and which kind of result that is
"""

import functools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from npnorm.conformance.cases import FULL, SMALL, Case, Sizes, cases
from npnorm.conformance.exact import exact
from npnorm.conformance.problems import pose
from npnorm.conformance.textbook import NORMS
from npnorm.conformance.ulps import DTYPES
from npnorm.studies.accuracy_outcomes import FLOAT64, KINDS, NEAREST, Outcome, hold, outcomes
from npnorm.studies.accuracy_peers import PEERS, Solve
from npnorm.studies.study import Cell, Claim, Results, Settings, Study


def cells(settings: Settings) -> list[Cell]:
    """Return a cell for each case and norm: the exact results are computed once for all peers."""
    if settings["seeds"] != 1:
        raise ValueError("each case of accuracy has a seed of its own. Leave --seeds out.")
    return [
        {"dtype": dtype, "case": case, "norm": norm}
        for dtype in DTYPES
        for case in _cases(dtype, Sizes(**settings["sizes"]))
        for norm in NORMS
    ]


@functools.lru_cache(maxsize=1)
def _cases(dtype: str, sizes: Sizes) -> dict[str, Case]:
    return {case.name: case for case in cases(dtype, sizes)}


@functools.cache
def _solve(peer: str) -> Solve | None:
    """Return what a peer makes of a problem; None if it is not installed."""
    try:
        return PEERS[peer].load()
    except ModuleNotFoundError:
        return None


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return how many elements each result has, and for each peer its errors, or its words."""
    problem = pose(cell["norm"], _cases(cell["dtype"], Sizes(**settings["sizes"]))[cell["case"]])
    right = exact(problem)
    solves = {peer: solve for peer in settings["peers"] if (solve := _solve(peer))}
    return {
        "elements": {name: array.nearest.size for name, array in right.items()},
        "peers": {peer: hold(solve, problem, right) for peer, solve in solves.items()},
    }


ROW = "the row (y, dx) or vector (dw, db)"
"""What the unit of an error is taken from."""


def claims(results: Results) -> list[Claim]:
    """Return the claims: npnorm's bars, and what is to be seen of the others."""
    every = outcomes(results)
    own = [o for o in every if o.peer == "npnorm" and o.kind != "refused"]
    wide = [o for o in own if o.dtype == "float64"]
    others = {peer: [o for o in every if o.peer == peer] for peer in _distinct(every, "peer") if peer != "npnorm"}
    page, looser = "npnorm, Precision", "asked here; npnorm, Precision, excepts sums whose terms cancel"

    def within(high: float, says: str, source: str, what: str, *groups: list[Outcome]) -> Claim:
        worst = [max(o.ulps for o in some) for some in groups]
        return Claim(
            says, source, f"largest error, in ulps of the largest number of {what}", worst, high=high, exact=True
        )

    def plain(some: list[Outcome]) -> list[Outcome]:
        return [o for o in some if o.dtype == "float32" and o.norm in ("LayerNorm", "RMSNorm") and "normal" in o.case]

    def bad(some: list[Outcome]) -> int:
        return sum(o.kind in ("wrong", "nan, inf") for o in some)

    found = []
    for dtype in ("float32", "float16", "bfloat16"):
        says = f"{dtype} results of npnorm are within 0.51 ulp of the row's largest number, forward and backward."
        found.append(within(NEAREST, says, page, ROW, [o for o in own if o.dtype == dtype]))
    says = "float64 results of npnorm are within 8 ulps of the row's largest number: y and dx."
    found.append(within(FLOAT64, says, page, "the row", [o for o in wide if o.result in ("y", "dx")]))
    says = "float64 results of npnorm are within 8 ulps of the largest number: dw and db, even where terms cancel."
    found.append(within(FLOAT64, says, looser, "the vector", [o for o in wide if o.result in ("dw", "db")]))
    says = "What npnorm returns in these cases is never wrong, nan or inf."
    wrong = "number of results that are wrong, nan or inf"
    found.append(Claim(says, f"implied by {page}", wrong, [bad(own)], high=0, exact=True))
    says = f"Each other implementation is wrong, nan or inf in some of these cases: {', '.join(others)}."
    counts = [bad(some) for some in others.values()]
    least_and_most = f"{wrong}, of the implementations the fewest and the most"
    found.append(Claim(says, "asked here", least_and_most, counts, low=1, exact=True))
    says = "On rows of normal numbers, float32 LayerNorm and RMSNorm of the others are at most 4 ulps off."
    source = "npnorm, Check a kernel, of torch; asked here of the others"
    what = f"{ROW}, of the implementations the best and the worst"
    found.append(within(4, says, source, what, *map(plain, others.values())))
    if "flax" in others:
        at_1e4 = ("float32", "LayerNorm", "mean 1e4", "y")
        ulps = {o.peer: o.ulps for o in every if (o.dtype, o.norm, o.case, o.result) == at_1e4}
        says = "flax's default variance, mean(x²) - mean(x)², is less stable than mean((x - mean(x))²)."
        quantity = "float32 LayerNorm, case mean 1e4: largest error of y in flax / that in naive NumPy"
        ratio = [ulps["flax"] / ulps["naive"]]
        found.append(Claim(says, "google/flax, flax/nnx/nn/normalization.py", quantity, ratio, low=1, exact=True))
    return found


def _distinct(some: Sequence[Outcome], name: str) -> list[str]:
    return list(dict.fromkeys(getattr(o, name) for o in some))


def table(results: Results) -> list[dict[str, str]]:
    """Return how many results of each dtype and peer are of which kind."""
    every = outcomes(results)
    rows = []
    for dtype in _distinct(every, "dtype"):
        for peer in _distinct(every, "peer"):
            some = [o for o in every if (o.dtype, o.peer) == (dtype, peer)]
            counts = Counter(o.kind for o in some)
            missed, elements = sum(o.missed for o in some), sum(o.elements for o in some if o.kind != "refused")
            share = f"{missed / elements:.2%}" if missed > elements / 1e4 else missed
            rows.append(
                {
                    "dtype": dtype,
                    "implementation": peer,
                    "results": str(len(some)),
                    **{kind: str(counts[kind]) for kind in KINDS},
                    "elements not nearest": f"{share} of {elements / 1e6:.1f} M",
                }
            )
    return rows


def parts(results: Results) -> dict[str, str]:
    """Return who was measured, the first dtype at a glance, where npnorm is not nearest or misses, and the refusals."""
    every = outcomes(results)
    measured = [f"- **{peer}**: {PEERS[peer].about}." for peer in _distinct(every, "peer")]
    absent = [f"- {peer}: not installed." for peer in results.settings["peers"] if peer not in _distinct(every, "peer")]
    return {
        "peers": "\n".join(measured + absent),
        "glance": _markdown(glance([o for o in every if o.dtype == every[0].dtype]), 1),
        "nearest": f"{_missed(every)}\n\n{_markdown(not_nearest(every), 4)}",
        "misses": _markdown(misses(every), 4),
        "refusals": _markdown(refusals(every), 4),
    }


def glance(some: Sequence[Outcome]) -> list[dict[str, str]]:
    """Return the worst result of each case (a row) and peer (a column), as it is shown."""

    def worst(case: str, peer: str) -> Outcome:
        return max((o for o in some if (o.case, o.peer) == (case, peer)), key=lambda o: o.badness)

    peers = _distinct(some, "peer")
    return [{"case": case, **{peer: worst(case, peer).shown for peer in peers}} for case in _distinct(some, "case")]


def _missed(every: Sequence[Outcome]) -> str:
    """Return how many elements of npnorm are not the nearest number, for each dtype but float64."""
    counts = []
    for dtype in _distinct(every, "dtype"):
        own = [o for o in every if (o.dtype, o.peer) == (dtype, "npnorm") and o.kind != "refused"]
        missed, elements = sum(o.missed for o in own), sum(o.elements for o in own)
        if dtype != "float64":
            counts.append(f"{missed} of {elements / 1e6:.1f} M in {dtype}")
    return f"Elements of npnorm that are not the nearest number: {', '.join(counts)}."


def not_nearest(some: Sequence[Outcome]) -> list[dict[str, str]]:
    """Return the results of npnorm, but those of float64, of which an element is not the nearest number."""
    return [
        {
            "dtype": o.dtype,
            "norm": o.norm,
            "case": o.case,
            "result": o.result,
            "elements not nearest": f"{o.missed} of {o.elements}",
            "largest error, ulps": o.shown,
        }
        for o in some
        if o.peer == "npnorm" and o.dtype != "float64" and o.missed
    ]


def misses(some: Sequence[Outcome]) -> list[dict[str, str]]:
    """Return the results of npnorm that are above its bars."""
    return [
        {"dtype": o.dtype, "norm": o.norm, "case": o.case, "result": o.result, "ulps": o.shown}
        for o in some
        if o.peer == "npnorm" and o.kind != "refused" and o.ulps > (FLOAT64 if o.dtype == "float64" else NEAREST)
    ]


def refusals(some: Sequence[Outcome]) -> list[dict[str, str]]:
    """Return what each peer said, of which norm and in which cases."""
    refused: dict[tuple[str, str, str], list[str]] = {}
    for o in some:
        if isinstance(o.error, str):
            refused.setdefault((o.peer, o.norm, o.error), []).append(o.case)
    return [
        {"implementation": peer, "norm": norm, "cases": "; ".join(dict.fromkeys(names)), "what it says": words}
        for (peer, norm, words), names in refused.items()
    ]


def _markdown(rows: list[dict[str, str]], left: int) -> str:
    """Return a table whose first `left` columns are aligned to the left."""
    if not rows:
        return "None."
    align = ["left"] * left + ["right"] * (len(rows[0]) - left)
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True, colalign=align)


LOOKS = {
    "<= 0.51 ulp": {"color": "#e3eef8"},
    "to 4 ulps": {"color": "#b3d2ec"},
    "to 8 ulps": {"color": "#86b4dc"},
    "8 ulps to 1 %": {"color": "#d08a2a"},
    "wrong": {"color": "#a8324a"},
    "nan, inf": {"color": "#2b1a2e"},
    "refused": {"color": "white", "hatch": "////"},
}
"""Of the kinds, from light to dark, so that they can be told apart in grey."""


def draw(results: Results, figure: Figure) -> None:
    """Draw the shares of the kinds of results, a panel for each dtype and a bar for each peer."""
    every = outcomes(results)
    peers, dtypes = _distinct(every, "peer"), _distinct(every, "dtype")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    for ax, dtype in zip(axes.flat, dtypes, strict=True):
        kinds = {peer: [o.kind for o in every if (o.dtype, o.peer) == (dtype, peer)] for peer in peers}
        start = np.zeros(len(peers))
        for kind in KINDS:
            shares = np.array([100 * kinds[peer].count(kind) / len(kinds[peer]) for peer in peers])
            ax.barh(peers, shares, left=start, label=kind, edgecolor="#222222", linewidth=0.5, **LOOKS[kind])
            start += shares
        ax.set_title(dtype)
        ax.set_xlim(0, 100)
        ax.grid(axis="y", visible=False)
    axes[0][0].invert_yaxis()
    for ax in axes[-1]:
        ax.set_xlabel("share of the results, in %")
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=len(KINDS), columnspacing=1.2, handlelength=1.6)


STUDY = Study(
    shows="how many units in the last place norms are off, on plain rows and on hard ones",
    minutes=22,
    full={"sizes": FULL._asdict(), "peers": list(PEERS), "seeds": 1},
    quick={
        "sizes": SMALL._replace(n=64, wide=128, constant=50)._asdict(),
        "peers": ["npnorm", "naive", "torch"],
        "seeds": 1,
    },
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
    size=(7.2, 4.2),
    packages=tuple(dict.fromkeys(["gmpy2", *(name for peer in PEERS.values() for name in peer.packages)])),
    parts=parts,
)
