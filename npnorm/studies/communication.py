"""What is the message worth that RMSNorm saves? Messages, bytes and times of norms whose features are split over ranks.

LayerNorm as one writes it sums over the ranks twice, since the mean must be known before the squares are taken; RMSNorm
sums once. Counted and timed are both, LayerNorm's two forms of one message, and the block of a transformer around them.

Each cell is a job of its own, `mpirun -n N`; `communication_ranks.py` is what its ranks do.
"""

import math
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from npnorm.plotting import LOOKS, NONE, REFERENCE
from npnorm.studies.communication_ranks import MESSAGES, SPLIT, rank_main
from npnorm.studies.jobs import on_ranks
from npnorm.studies.study import Cell, Claim, Results, Settings, Study

LAYER_NORMS = tuple(form for form in MESSAGES if form != "RMSNorm")

BYHAND = "AI by Hand, RMS, Group, Layer, Batch Norm, Tensor Parallelism, 2025"
STRICT = f"{BYHAND}, without its word typically"
COLOSSAL = "hpcaitech/ColossalAI, issue 782, 2022"
MEGATRON = "Shoeybi et al., Megatron-LM, 2019, arXiv:1909.08053, section 3"
PAGE = "theory, npnorm, Mean and variance on a group of ranks"

NORM_GAIN, BLOCK_GAIN = 1.1, 0.05
"""What is called a clear gain here, since the source has no number: 10 % of a norm's time, 5 % of a block's."""


def cells(settings: Settings) -> list[Cell]:
    """Return a cell for each number of ranks, of rows, and seed."""
    ranks, rows, seeds = settings["ranks"], settings["rows"], range(settings["seeds"])
    return [{"ranks": n, "rows": m, "seed": s} for n in ranks for m in rows for s in seeds]


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return what the ranks found, for each form; see `npnorm.studies.communication_ranks.rank_main`."""
    return on_ranks(cell["ranks"], rank_main, dict(settings), cell)


def of(results: Results, form: str, name: str, **fixed: Any) -> np.ndarray:
    """Return what was found under a name of a form, one for each line with these values that has it."""
    return np.array([line[form][name] for line in results.where(**fixed).lines if name in line[form]])


def messages(results: Results, form: str, direction: str, what: str = "norm") -> np.ndarray:
    """Return how many messages a form sends, by cell."""
    return of(results, form, f"{what} {direction}")[:, 0]


def row_bytes(results: Results, form: str, direction: str) -> np.ndarray:
    """Return the bytes that a rank sends for each row, by cell."""
    return of(results, form, f"norm {direction}")[:, 1] / results.values("rows")


def saved_share(results: Results, **fixed: Any) -> np.ndarray:
    """Return the share that one message less in each of two norms has of a block's time, by the messages alone."""
    more = of(results, "two-pass", "messages seconds", **fixed) - of(results, "RMSNorm", "messages seconds", **fixed)
    return 2 * more / of(results, "two-pass", "block seconds", **fixed)


def sizes(results: Results) -> tuple[list[int], list[int]]:
    """Return the numbers of rows, and those for which there is a block."""
    rows = results.distinct("rows")
    return rows, [n for n in rows if n <= results.settings["block_rows"]]


def claims(results: Results) -> list[Claim]:
    """Return what is said of the messages, with the numbers; times are those of the fewest ranks."""
    forward = {form: messages(results, form, "forward") for form in MESSAGES}
    fewest = np.min([forward[form] for form in SPLIT if form in LAYER_NORMS], axis=0)
    backward = np.concatenate([messages(results, form, "backward") for form in SPLIT])
    whole = forward["replicated"] + messages(results, "replicated", "backward")
    thrice = row_bytes(results, "two-pass", "forward") / row_bytes(results, "RMSNorm", "forward")
    packed, gathered = (
        of(results, form, "errors")[:, results.settings["means"].index(mean)]
        for form, mean in (("packed", 1e3), ("gathered", 1e5))
    )
    count, off = "messages of a forward pass", "largest error of y / largest y"
    once = "LayerNorm has to communicate only once"
    exact: list[tuple[str, str, str, np.ndarray, float, float]] = [
        ("LayerNorm needs two all-reduces.", BYHAND, f"{count}, two-pass", forward["two-pass"], 2, 2),
        ("RMSNorm needs one all-reduce.", BYHAND, f"{count}, RMSNorm", forward["RMSNorm"], 1, 1),
        (
            "LayerNorm cannot do with fewer than two messages.",
            STRICT,
            f"{count}, the fewest of three forms",
            fewest,
            2,
            2,
        ),
        (f"{once}: sums of x and of x² travel together.", COLOSSAL, f"{count}, packed", forward["packed"], 1, 1),
        (f"{once}: means and squares are gathered and merged.", PAGE, f"{count}, gathered", forward["gathered"], 1, 1),
        ("Backward, each split norm needs one message.", PAGE, "messages of a backward pass", backward, 1, 1),
        ("A norm of whole rows sends nothing.", MEGATRON, "messages, forward and backward", whole, 0, 0),
        (
            "RMSNorm sends a third of the bytes of two-pass LayerNorm.",
            PAGE,
            "bytes forward, two-pass / RMSNorm",
            thrice,
            3,
            3,
        ),
        (
            "Packed, a mean of 1e3 standard deviations costs 6 digits of 16.",
            PAGE,
            off,
            packed,
            3e-12,
            3e-9,
        ),  # within a factor 30
        ("Gathered, a mean of 1e5 standard deviations costs none.", PAGE, off, gathered, 0, 1e-14),
    ]
    found = [Claim(*claim, exact=True) for claim in exact]
    ranks, (rows, block_rows) = results.distinct("ranks")[0], sizes(results)
    for n in (rows[0], rows[-1]):
        here, where = {"ranks": ranks, "rows": n}, f"{n} rows on {ranks} ranks"
        both, one = (of(results, form, "forward ratio", **here) for form in ("two-pass", "packed"))
        says, time = f"RMSNorm is clearly faster than LayerNorm, {where}.", "time of a forward pass, two-pass / "
        found += [
            Claim(says, BYHAND, f"{time}RMSNorm", both, NORM_GAIN),
            Claim(
                f"One message fewer makes LayerNorm clearly faster, {where}.",
                BYHAND,
                f"{time}packed",
                both / one,
                NORM_GAIN,
            ),
        ]
    for n in (block_rows[0], block_rows[-1]):
        here, where = {"ranks": ranks, "rows": n}, f"{n} rows on {ranks} ranks"
        saved, alone = 1 - 1 / of(results, "two-pass", "block ratio", **here), saved_share(results, **here)
        share = "share of the block's time that"
        found += [
            Claim(f"RMSNorm makes a block clearly faster, {where}.", BYHAND, f"{share} it saves", saved, BLOCK_GAIN),
            Claim(
                f"The saved messages alone make a block clearly faster, {where}.",
                BYHAND,
                f"{share} they take alone",
                alone,
                BLOCK_GAIN,
            ),
        ]
    return found


def table(results: Results) -> list[dict[str, str]]:
    """Return a line for each number of ranks and rows: means over the seeds, and their standard deviations."""
    lines = []
    for ranks in results.distinct("ranks"):
        for rows in results.distinct("rows"):
            here = {"ranks": ranks, "rows": rows}
            line = {"ranks": str(ranks), "rows": str(rows)}
            for form in ("RMSNorm", "two-pass"):
                line[f"messages {form}, µs"] = _spread(of(results, form, "messages seconds", **here) * 1e6)
            line["RMSNorm, µs"] = _spread(of(results, "RMSNorm", "forward seconds", **here) * 1e6)
            for form in LAYER_NORMS:
                line[f"{form} / RMSNorm"] = _spread(of(results, form, "forward ratio", **here))
            line["block RMSNorm, ms"] = _spread(of(results, "RMSNorm", "block seconds", **here) * 1e3)
            line["block two-pass / RMSNorm"] = _spread(of(results, "two-pass", "block ratio", **here))
            if rows <= results.settings["block_rows"]:
                line["saved messages, % of the block"] = _spread(saved_share(results, **here) * 100)
            lines.append(line)
    return lines


def _spread(values: np.ndarray) -> str:
    def short(value: float, digits: int) -> str:
        return f"{value:.{digits}g}" if abs(value) < 100 else f"{value:.0f}"

    spread = f" ± {short(values.std(ddof=1), 2)}" if values.size > 1 else ""
    return short(values.mean(), 3) + spread if values.size else ""


def parts(results: Results) -> dict[str, str]:
    """Return two more tables: what is sent, and the errors where rows are far from zero."""
    sent = [
        "| form | messages forward | bytes per row | backward | bytes per row | checks | block forward | backward |"
    ]
    sent += ["|---" * 8 + "|"]
    means = results.settings["means"]
    errors = [f"| form | {' | '.join(f'mean {mean:g}' for mean in means)} |", "|---" * (len(means) + 1) + "|"]
    for form in MESSAGES:
        alone = [f(results, form, way).max() for way in ("forward", "backward") for f in (messages, row_bytes)]
        checks = sum(of(results, form, f"norm {way}")[:, 2].max() for way in ("forward", "backward"))
        block = [messages(results, form, way, "block").max() for way in ("forward", "backward")]
        sent.append(f"| {' | '.join([form, *(f'{number:g}' for number in [*alone, checks, *block])])} |")
    for form in SPLIT:
        largest = of(results, form, "errors").max(axis=0)
        errors.append(f"| {' | '.join([form, *('refused' if math.isnan(e) else f'{e:.0e}' for e in largest)])} |")
    return {"counts": "\n".join(sent), "errors": "\n".join(errors)}


LABELS = {form: form if form == "RMSNorm" else f"LayerNorm, {form}" for form in MESSAGES}
SHOWN = dict(zip(MESSAGES, (REFERENCE, *LOOKS[:3], NONE), strict=True))
PANELS = {"messages": "its messages alone", "forward": "norm, forward", "block": "block, forward and backward"}


def draw(results: Results, figure: Figure) -> None:
    """Draw times / RMSNorm's by rows: of the messages, of the norm, of the block; a line of panels for each ranks."""
    ranks = results.distinct("ranks")
    axes = figure.subplots(len(ranks), len(PANELS), sharex=True, sharey=True, squeeze=False)
    for line, n in zip(axes, ranks, strict=True):
        for ax, (name, title) in zip(line, PANELS.items(), strict=True):
            for form in MESSAGES:
                points = {rows: of(results, form, f"{name} ratio", ranks=n, rows=rows) for rows in sizes(results)[0]}
                points = {rows: ratios for rows, ratios in points.items() if ratios.size}
                mean, spread = ([f(ratios) for ratios in points.values()] for f in (np.mean, np.std))
                if points:
                    look = {"capsize": 2, "label": LABELS[form], **SHOWN[form]}
                    ax.errorbar(list(points), mean, spread, **look)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log", base=2)
            ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
            ax.set_xticks(results.distinct("rows"))
            if n == ranks[0]:
                ax.set_title(title)
            if n == ranks[-1]:
                ax.set_xlabel("rows")
        line[0].set_ylabel(f"{n} ranks\ntime / RMSNorm's")
    handles, labels = axes[0][1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3)


STUDY = Study(
    shows="what norms of split features send, and what the message is worth that RMSNorm saves",
    minutes=8,
    full={
        "ranks": [2, 4],
        "rows": [16, 128, 1024, 8192],
        "features": 512,
        "heads": 8,
        "length": 128,
        "block_rows": 1024,
        "means": [0, 1e3, 1e5],
        "seconds": 1.5,
        "rounds": 7,
        "seeds": 5,
    },
    quick={
        "ranks": [2],
        "rows": [8, 64],
        "features": 128,
        "heads": 4,
        "length": 32,
        "block_rows": 64,
        "means": [0, 1e3, 1e5],
        "seconds": 0.05,
        "rounds": 3,
        "seeds": 2,
    },
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
    size=(7.2, 4.8),
    packages=("mpich", "openmpi"),
    parts=parts,
)
