"""A recurrent language model with and without norms: its loss, weights that are off centre, and what the norms act on.

Biao Zhang and Rico Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, arXiv:1910.07467, section 6.1, for a
translation model; here the model of `recurrent_model` learns the characters of Python's own language reference.

Theory of weights off centre. Adding c to all of W adds c sum(x) to each feature of x W^T. LayerNorm takes the mean of
the features off again, so that neither its output nor the gradient of W changes: the training is the same. RMSNorm does
not, and what the features have in common outweighs what distinguishes them.
"""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from npnorm.blocks import Chain
from npnorm.layers import CrossEntropy
from npnorm.plotting import LOOK_OF
from npnorm.studies.recurrent_model import NORMS, hidden_to_hidden, language_model, train
from npnorm.studies.small_transformers import text
from npnorm.studies.study import Cell, Claim, Results, Settings, Study

PAPER = "Zhang and Sennrich 2019, arXiv:1910.07467"

RUNS = {
    "paper": ("none", *NORMS),
    "larger": ("none", "LayerNorm", "RMSNorm"),
    "centre 0.2": ("LayerNorm", "RMSNorm"),
    "centre 0.2, GRU": ("LayerNorm", "RMSNorm"),
}
"""By the start, what is trained from it."""

COMPARABLE = 0.05
"""Nats per character: losses that differ by less count as the same, as in `norm_comparison`."""

POSITIONS = ("1", "2", "3", "4", "ALL")
TABLE_5 = {
    "none": ((-2.60, -1.19, -1.43, -1.53, -1.60), (7.35, 2.33, 2.61, 2.73, 3.04)),
    "LayerNorm": ((-0.43, -0.48, -0.50, -0.50, -0.51), (1.19, 1.51, 1.51, 1.51, 1.51)),
    "RMSNorm": ((-0.40, -0.60, -0.69, -0.74, -0.73), (1.27, 1.51, 1.50, 1.49, 1.50)),
}
"""The paper's mean and standard deviation of the hidden-to-hidden mapping, by position."""


def cells(settings: Settings) -> list[Cell]:
    """Return a cell for each start, norm and seed; what has no norm also tries a learning rate 3 times larger."""
    lr = settings["lr"]
    return [
        {"start": start, "norm": norm, "lr": rate, "seed": seed}
        for start, some in RUNS.items()
        for norm in some
        for rate in ([lr, 3 * lr] if norm == "none" else [lr])
        for seed in range(settings["seeds"])
    ]


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Train, and return the held-out loss by step and the mean and standard deviation of what h gives, by position."""
    data = text(settings["held out"] * settings["length"])
    first, windows = (np.random.default_rng([i, cell["seed"]]) for i in (0, 1))  # weights; what it is trained on
    model = language_model(cell["start"], cell["norm"], data.vocabulary, settings["dim"], first)
    inputs, targets = (ids.reshape(-1, settings["length"]) for ids in (data.held_out[:-1], data.held_out[1:]))
    steps, every = settings["steps"], settings["every"]
    curve = np.full(steps // every + 1, math.log(data.vocabulary))  # by chance; a loss above it counts as it
    with np.errstate(all="ignore"):  # what is not finite is found
        for step, trained in enumerate(train(model, data.learn, settings, cell["lr"], windows)):
            if step % every == 0:
                loss, _ = CrossEntropy().forward(trained.forward(inputs)[0], targets)
                curve[step // every] = np.fmin(loss, curve[step // every])
        return {"curve": curve, "finite steps": step, **by_position(model, inputs)}


def by_position(model: Chain, inputs: np.ndarray) -> dict[str, Any]:
    """Return mean and standard deviation over the features of what h gives, in the mean over the windows.

    They are those after 1, 2, 3 and 4 characters, and in the mean over all positions; before the first, h is zero.
    """
    gru: Any = model.layers["gru"]
    h = gru.forward(model.layers["embedding"].forward(inputs)[0])[0][:, :-1, :]
    found = {}
    for name, part in hidden_to_hidden(gru, h).items():
        for statistic, each in (("mean", part.mean(axis=2)), ("std", part.std(axis=2))):
            at = each.astype(float).mean(axis=0)
            found[f"{statistic} of {name}"] = [*at[:4], at.mean()]
    return found


def curves(results: Results, start: str, norm: str) -> np.ndarray:
    """Return held-out losses of shape (seeds, points): of its learning rates, those with the lowest mean at the end."""
    some = results.where(start=start, norm=norm)
    return min((some.values("curve", lr=lr) for lr in some.distinct("lr")), key=lambda each: each[:, -1].mean())


def share_of_steps(curve: np.ndarray, level: float) -> float:
    """Return after which part of the steps a curve first is as low as `level`; 1 if it never is.

    Examples
    --------
    >>> share_of_steps(np.array([4.0, 3.0, 2.0]), 2.5)
    0.75
    """
    (reached,) = np.nonzero(curve <= level)
    if not reached.size:
        return 1.0
    i = reached[0]
    into = (curve[i - 1] - level) / (curve[i - 1] - curve[i]) if i else 1.0
    return float((i - 1 + into) / (len(curve) - 1))


def shares(results: Results, start: str, norm: str) -> np.ndarray:
    """Return, for each seed, after which part of the steps a norm is as low as none is at the end."""
    plain = curves(results, start, "none")[:, -1]
    return np.array([share_of_steps(*pair) for pair in zip(curves(results, start, norm), plain, strict=True)])


def claims(results: Results) -> list[Claim]:
    """Return what is said of the models, with the numbers; bounds that the sources do not name are noted."""
    last = {(start, norm): curves(results, start, norm)[:, -1] for start, some in RUNS.items() for norm in some}
    section, figure, table_1, table_5 = (
        f"{PAPER}, {place}" for place in ("section 6.1", "figure 4", "table 1", "table 5")
    )
    to_baseline = "part of the steps after which the held-out loss is as low as the baseline's at the end"
    steady = "std of what h gives to the gates, largest / smallest of positions 1 to 4"
    both = ("LayerNorm", "RMSNorm")
    off = {norm: curves(results, "centre 0.2", norm) for norm in both}
    paper = results.where(start="paper", lr=results.settings["lr"])
    mean, std = ({norm: paper.values(f"{s} of hh_gates", norm=norm) for norm in RUNS["paper"]} for s in ("mean", "std"))
    unsteady = {norm: s[:, :4].max(axis=1) / s[:, :4].min(axis=1) for norm, s in std.items()}
    return [
        *(
            Claim(
                f"{norm} reaches a quality comparable to LayerNorm.",
                section,
                f"held-out loss, {norm} - LayerNorm, nats per character",
                last["paper", norm] - last["paper", "LayerNorm"],
                -COMPARABLE,
                COMPARABLE,
            )
            for norm in ("RMSNorm", "pRMSNorm")
        ),
        *(
            Claim(
                f"{norm} improves on the baseline, which has no norm.",
                section,
                f"held-out loss, no norm - {norm}, nats per character",
                last["paper", "none"] - last["paper", norm],
                low=0,
            )
            for norm in both
        ),
        *(
            Claim(
                f"{norm} reduces the number of training steps until convergence by about half.",
                section,
                to_baseline,
                shares(results, "paper", norm),
                0.4,
                0.6,
            )
            for norm in both
        ),
        *(
            Claim(
                f"{norm} accelerates convergence from {first} first weights.",
                source,
                to_baseline,
                shares(results, start, norm),
                high=0.9,  # what less saves is hardly seen in two curves
            )
            for start, first, source in (
                ("paper", "the paper's", section),
                ("larger", "larger", "asked here"),
            )
            for norm in both
        ),
        Claim(
            "With weights centred at 0.2, LayerNorm becomes very unstable.",
            figure,
            "largest rise from one held-out loss to the next, nats per character",
            np.diff(off["LayerNorm"], axis=1).max(axis=1),
            low=0.1,  # a rise that is seen; the paper's score falls by several points
        ),
        Claim(
            "With weights centred at 0.2, RMSNorm is at least as robust as LayerNorm.",
            figure,
            "held-out loss, RMSNorm - LayerNorm, nats per character",
            last["centre 0.2", "RMSNorm"] - last["centre 0.2", "LayerNorm"],
            high=COMPARABLE,
        ),
        *(
            Claim(
                f"With weights centred at 0.2, {norm} ends higher than with the original first weights.",
                figure,
                f"held-out loss with {norm}, centre 0.2 - centre 0, nats per character",
                last["centre 0.2", norm] - last["paper", norm],
                low=0,
            )
            for norm in both
        ),
        Claim(
            "LayerNorm trains the same when the weights that it acts on are centred at 0.2.",
            f"implied by {table_1}: it is invariant to re-centring the weight matrix",
            "held-out loss with LayerNorm, centre 0.2 in the GRU - centre 0, nats per character",
            last["centre 0.2, GRU", "LayerNorm"] - last["paper", "LayerNorm"],
            -COMPARABLE,
            COMPARABLE,
        ),
        Claim(
            "RMSNorm does not train the same when the weights that it acts on are centred at 0.2, but ends higher.",
            f"implied by {table_1}: it is not invariant to re-centring the weight matrix",
            "held-out loss with RMSNorm, centre 0.2 in the GRU - centre 0, nats per character",
            last["centre 0.2, GRU", "RMSNorm"] - last["paper", "RMSNorm"],
            low=COMPARABLE,
        ),
        Claim(
            "Without a norm the standard deviation of the hidden-to-hidden mapping is unstable over the positions.",
            table_5,
            steady,
            unsteady["none"],
            low=2,  # between 3.2 without a norm and 1.3 with one, which the table has
        ),
        *(
            Claim(
                f"With {norm} the standard deviation of the hidden-to-hidden mapping is stable over the positions.",
                table_5,
                steady,
                unsteady[norm],
                high=1.3,
            )
            for norm in both
        ),
        Claim(
            "The mean of the hidden-to-hidden mapping is more stable with RMSNorm than without a norm.",
            table_5,
            "mean of what h gives to the gates, largest - smallest of positions 1 to 4: RMSNorm - no norm",
            np.ptp(mean["RMSNorm"][:, :4], axis=1) - np.ptp(mean["none"][:, :4], axis=1),
            high=0,
        ),
        Claim(
            "The mean of the hidden-to-hidden mapping with RMSNorm is near that with LayerNorm, which centres.",
            table_5,
            "mean of what h gives to the gates, over all positions, RMSNorm - LayerNorm",
            mean["RMSNorm"][:, 4] - mean["LayerNorm"][:, 4],
            -0.25,  # 0.22 in the table
            0.25,
        ),
        Claim(
            "The standard deviation of the hidden-to-hidden mapping with RMSNorm is that with LayerNorm.",
            table_5,
            "std of what h gives to the gates, over all positions, RMSNorm / LayerNorm",
            std["RMSNorm"][:, 4] / std["LayerNorm"][:, 4],
            0.9,
            1.1,
        ),
    ]


def table(results: Results) -> list[dict[str, str]]:
    """Return a line for each start, norm and learning rate: means over the seeds, and standard deviations."""
    rows = []
    for start, some in RUNS.items():
        for norm in some:
            for lr in results.where(start=start, norm=norm).distinct("lr"):
                runs = results.where(start=start, norm=norm, lr=lr)
                curve, finite = runs.values("curve"), runs.values("finite steps")
                loss = curve[:, -1]
                share = shares(results, start, norm).mean() if norm != "none" and "none" in some else math.nan
                rows.append(
                    {
                        "start": start,
                        "norm": norm,
                        "learning rate": f"{lr:g}",
                        "held-out loss, nats": f"{loss.mean():.3f} ± {loss.std(ddof=1) if loss.size > 1 else 0:.3f}",
                        "as low as no norm after": "" if math.isnan(share) else f"{100 * share:.0f} % of the steps",
                        "largest rise, nats": f"{np.diff(curve, axis=1).max(axis=1).mean():.2g}",
                        "finite steps": f"{finite.min()}",
                    }
                )
    return rows


def parts(results: Results) -> dict[str, str]:
    """Return table 5 of the paper, with ours below: mean and standard deviation by position."""
    paper = results.where(start="paper", lr=results.settings["lr"])
    rows = [_row("paper", norm, "", *statistics) for norm, statistics in TABLE_5.items()]
    for part in ("hh_gates", "hh_candidate"):
        for norm in RUNS["paper"]:
            both = (paper.values(f"{s} of {part}", norm=norm).mean(axis=0) for s in ("mean", "std"))
            rows.append(_row("here", norm, part.removeprefix("hh_"), *both))
    return {"positions": tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)}


def _row(by: str, norm: str, part: str, mean: Any, std: Any) -> dict[str, str]:
    numbers = zip(POSITIONS, mean, std, strict=True)
    return {"": by, "norm": norm, "part": part, **{at: f"{m:.2f}, {s:.2f}" for at, m, s in numbers}}


THIN: dict[str, Any] = {"markerfacecolor": "white", "linewidth": 0.8}


def draw(results: Results, figure: Figure) -> None:
    """Draw the held-out loss by step from each start, and the standard deviations by position."""
    axes = figure.subplots(2, 2)
    for ax, title, starts in (
        (axes[0][0], "first weights as in the paper", ["paper"]),
        (axes[0][1], "larger first weights", ["larger"]),
        (axes[1][0], "centred at 0.2 (thin: only the GRU's)", ["centre 0.2", "centre 0.2, GRU"]),
    ):
        _draw_losses(results, ax, starts)
        ax.sharey(axes[0][0])
        ax.set(title=title, xlabel="step", ylabel="held-out loss,\nnats per character")
    _draw_positions(results.where(start="paper", lr=results.settings["lr"]), axes[1][1])
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _draw_losses(results: Results, ax: Axes, starts: list[str]) -> None:
    for start in starts:
        for norm in RUNS[start]:
            curve = curves(results, start, norm).mean(axis=0)[1:]
            at = np.arange(1, len(curve) + 1) * results.settings["every"]
            look = LOOK_OF[norm] | (THIN if start == "centre 0.2, GRU" else {})
            ax.plot(at, curve, label="no norm" if norm == "none" else norm, markevery=2, **look)


def _draw_positions(results: Results, ax: Axes) -> None:
    for norm in RUNS["paper"]:
        ax.plot(POSITIONS, results.values("std of hh_gates", norm=norm).mean(axis=0), **LOOK_OF[norm])
        if norm in TABLE_5:
            ax.plot(POSITIONS, TABLE_5[norm][1], **(LOOK_OF[norm] | THIN))
    ax.set(title="from h to the gates (thin: the paper's)", xlabel="position", yscale="log")
    ax.set(ylabel="standard deviation", yticks=[1, 2, 5, 10], yticklabels=["1", "2", "5", "10"], ylim=(0.9, 12))


STUDY = Study(
    shows="a GRU language model with and without norms, from four kinds of first weights",
    minutes=15,
    full={"dim": 128, "rows": 40, "length": 24, "steps": 150, "every": 10, "held out": 256, "lr": 0.01, "seeds": 5},
    quick={"dim": 32, "rows": 32, "length": 6, "steps": 12, "every": 4, "held out": 100, "lr": 0.03, "seeds": 2},
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
    parts=parts,
    size=(7.2, 5.6),
)
