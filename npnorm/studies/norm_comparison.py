"""Four transformers with and without norms: as a teaching experiment has them, but smaller, and then repaired.

The experiment is joyehuang/minimind-notes, 01-normalization, exp2_norm_comparison.py (2025): no norm, LayerNorm after
and before the sub-layers, RMSNorm before them; 2 blocks, 4 heads, an MLP with ReLU; Adam without clipping.

    as written   each with its own learning rate, on random tokens: the target of a position is the token of the next.
                 There is no mask, no layer knows where a token stands, and no norm stands before the head. The full
                 run is smaller: 128 wide in place of 256, 4 sequences in place of 16, 600 steps in place of 1000.
    repaired     a causal mask, learned positions, a norm before the head where none stands between the blocks, and
                 text; the four have the same first weights, the same data, and each of the learning rates.

What can be learned as written. To the network the tokens of a sequence are a bag: of N = length - 1 others one is the
target, each as likely. So the best loss, in the mean, is that of guessing among them,

    ln N - E[ln(1 + B)],  B ~ Binomial(N - 1, 1 / vocabulary)

where B counts how often the target occurs again among them. No network has a lower one.
"""

import math
from itertools import product
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from npnorm.config import Config
from npnorm.plotting import LOOK_OF, LOOKS, reference
from npnorm.studies import small_transformers as small
from npnorm.studies.study import Cell, Claim, Results, Settings, Study
from npnorm.training import Recipe
from npnorm.transformer import Transformer

SCRIPT = "minimind-notes, 01-normalization/exp2_norm_comparison.py, 2025"
TEXT = "minimind-notes, 01-normalization/teaching.md, 2025, section 3"
ASKED = "asked here"

SMALLER = "as written, but smaller"
"""What the part "as written" is called, which is smaller than the source."""

CONFIGURATIONS: dict[str, tuple[dict[str, Any], float]] = {
    "no norm": ({"placement": "none", "norm": "layer"}, 1e-4),
    "Post-LN": ({"placement": "post", "norm": "layer"}, 1e-4),
    "Pre-LN": ({"placement": "pre", "norm": "layer"}, 5e-4),
    "Pre-RMSNorm": ({"placement": "pre", "norm": "rms"}, 5e-4),
}
"""Of each its settings, and its learning rate as written."""

LOOK = {"no norm": LOOK_OF["none"], "Post-LN": LOOKS[2], "Pre-LN": LOOK_OF["LayerNorm"], "Pre-RMSNorm": LOOKS[1]}

RING: dict[str, Any] = {"color": "black", "linestyle": "", "marker": "o", "markersize": 10, "markerfacecolor": "none"}
"""Around the losses of runs that are capped."""

DOCUMENTED = {"Post-LN": 3.5, "Pre-LN": 2.8, "Pre-RMSNorm": 2.7}
"""The last loss, as the teaching text has it; "no norm" is said to be not a number from about step 500 on."""

POINTS = 50
"""Of the curve of losses: each is the mean of as many steps as it takes."""

SAME = 0.05
"""Nats: losses that differ by less count as the same; chosen before the first run."""


def floor(vocabulary: int, length: int) -> float:
    """Return the best possible loss on the random tokens, in nats.

    Examples
    --------
    >>> round(floor(1000, 64), 3), round(math.log(63), 3)
    (4.101, 4.143)
    """
    others = length - 1
    b = np.arange(others)
    return math.log(others) - float(scipy.stats.binom.pmf(b, others - 1, 1 / vocabulary) @ np.log(1 + b))


def cells(settings: Settings) -> list[Cell]:
    """Return a cell for each configuration as written, and for each learning rate repaired; and each seed."""
    written = [("as written", name, lr) for name, (_, lr) in CONFIGURATIONS.items()]
    repaired = [("repaired", name, lr) for name, lr in product(CONFIGURATIONS, settings["lrs"])]
    seeds = range(settings["seeds"])
    return [
        {"part": part, "configuration": name, "lr": lr, "seed": s}
        for part, name, lr in written + repaired
        for s in seeds
    ]


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return the losses of a run: of its training as written, on what is held out repaired."""
    part, seed, choice = cell["part"], cell["seed"], CONFIGURATIONS[cell["configuration"]][0]
    steps, rows, length = settings["steps"][part], settings["rows"][part], settings["length"]
    weights, batches = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    sizes: Any = {"width": settings["width"][part], "depth": 2, "heads": 4, "context": length}
    sizes |= {"mlp": "relu", "bias": True, **choice}
    if part == "as written":
        model = small.as_written(Config(small.VOCABULARY, positions="none", causal=False, **sizes), weights)
        losses = small.train_on_random_tokens(model, steps, rows, length, cell["lr"], math.inf, batches)
        points = [float(some.mean()) for some in np.array_split(losses, min(POINTS, steps))]
        last, finite = float(losses[-steps // 10 :].mean()), int(np.isfinite(losses).sum())
        return {"curve": points, "last loss": last, "finite steps": finite}
    data = small.text(settings["held out"])
    config = Config(data.vocabulary, positions="learned", **sizes)
    recipe = Recipe(steps, rows, length, cell["lr"], warmup=0, weight_decay=0.0, max_norm=math.inf)
    return small.train_on_text(Transformer(config, small.torch_init(config, weights)), data, recipe, batches)


def diverged(results: Results) -> np.ndarray:
    """Return for each run whether its loss was not finite at some step."""
    return np.array([line["finite steps"] < results.settings["steps"][line["part"]] for line in results.lines])


def largest_lr(results: Results, name: str) -> np.ndarray:
    """Return the largest learning rate that trains a configuration, for each seed; not a number if none does."""
    lrs = np.array(results.settings["lrs"])[:, None]
    trains = np.array([results.values("trains", part="repaired", configuration=name, lr=lr) for lr in lrs[:, 0]], bool)
    return np.where(trains.any(axis=0), np.where(trains, lrs, 0.0).max(axis=0), math.nan)


def held_out(results: Results, name: str) -> np.ndarray:
    """Return the loss on what is held out, by learning rate and seed."""
    some = results.where(part="repaired", configuration=name)
    return np.array([some.values("held-out loss", lr=lr) for lr in results.settings["lrs"]])


def best(results: Results, name: str) -> tuple[float, np.ndarray]:
    """Return the learning rate with the lowest loss on what is held out, in the mean, and that loss for each seed."""
    losses = held_out(results, name)
    i = losses.mean(axis=1).argmin()
    return results.settings["lrs"][i], losses[i]


def capped(losses: np.ndarray, no_context: float) -> np.ndarray:
    """Return which held-out losses are chance, the most that is counted: ln of how many characters there are.

    Examples
    --------
    >>> capped(np.array([2.8, math.log(103), 4.5]), no_context=3.3)
    array([False,  True, False])
    """
    characters = np.exp(losses)
    return (losses > no_context) & (abs(characters - characters.round()) < 1e-4)  # a file has 7 digits


def claims(results: Results) -> list[Claim]:
    """Return what is said of the four, with the numbers."""
    return written_claims(results) + repaired_claims(results)


def written_claims(results: Results) -> list[Claim]:
    """Return what is said of the experiment as written, but smaller."""
    some, lowest = results.where(part="as written"), floor(small.VOCABULARY, results.settings["length"])
    nan = diverged(some.where(configuration="no norm")).astype(float)
    last = {name: some.values("last loss", configuration=name) for name in CONFIGURATIONS}
    learned = math.log(small.VOCABULARY) - np.min(list(last.values()), axis=0)
    start = SMALLER.capitalize()
    return [
        Claim(
            f"{start}, the network without norms has a loss of NaN from about step 500 on.",
            TEXT,
            "part of the seeds whose loss is not finite at some step",
            nan,
            low=0.5,
        ),
        *(
            Claim(
                f"{start}, {name} ends at a loss of about {loss}.",
                TEXT,
                "training loss, mean of the last tenth of the steps, nats per token",
                last[name],
                loss - 0.1,
                loss + 0.1,
            )
            for name, loss in DOCUMENTED.items()
        ),
        Claim(
            "As written, in any size, a loss of 3.5 can be reached.",
            f"implied by {TEXT}, and by the data of the script",
            "best possible loss on random tokens, nats per token",
            [lowest],
            high=3.5,
            exact=True,
        ),
        Claim(
            f"{start}, the loss of one of the four falls below chance.",
            ASKED,
            "chance, ln 1000, - lowest last loss of the four, nats per token",
            learned,
            low=0.1,
        ),
    ]


def repaired_claims(results: Results) -> list[Claim]:
    """Return what is said of the four, of the experiment repaired."""
    top = {name: largest_lr(results, name) for name in CONFIGURATIONS}
    all_four = np.mean([np.isfinite(lrs) for lrs in top.values()], axis=0)
    bare = np.isfinite(top["no norm"]).astype(float)
    loss = {name: best(results, name)[1] for name in CONFIGURATIONS}
    difference = "held-out loss, {} - {}, each at its best learning rate, nats per character"
    rms = loss["Pre-RMSNorm"] - loss["Pre-LN"]

    def tolerates(one: str, other: str, source: str) -> Claim:
        than = "the network without norms" if other == "no norm" else other
        return Claim(
            f"Repaired, {one} tolerates a larger learning rate than {than}.",
            source,
            f"largest learning rate that trains, {one} / {other}",
            top[one] / top[other],
            low=2,  # the next learning rate is 3 times larger
        )

    return [
        Claim(
            "Repaired, all four learn.", ASKED, "part of the four that trains with some learning rate", all_four, low=1
        ),
        Claim(
            "Repaired, the network without norms cannot be trained.",
            f"{SCRIPT}, of the network as written",
            "part of the seeds with a learning rate that trains",
            bare,
            high=0,
        ),
        Claim(
            "Repaired, Post-LN needs a learning rate below 1e-4.",
            f"{TEXT}, of the network as written",
            "largest learning rate that trains",
            top["Post-LN"],
            high=1e-4,
        ),
        tolerates("Pre-LN", "Post-LN", f"{SCRIPT}, of the network as written"),
        tolerates("Pre-LN", "no norm", f"{TEXT}, of the network as written"),
        tolerates("Pre-RMSNorm", "Pre-LN", f"{TEXT}, of the network as written"),
        Claim(
            "Repaired, Pre-RMSNorm ends as low as Pre-LN.",
            f"{SCRIPT}, of the network as written",
            difference.format("Pre-RMSNorm", "Pre-LN"),
            rms,
            -SAME,
            SAME,
        ),
        Claim(
            "Repaired, Pre-RMSNorm ends 0.1 lower than Pre-LN.",
            f"{TEXT}, of the network as written",
            difference.format("Pre-RMSNorm", "Pre-LN"),
            rms,
            -0.15,
            -SAME,
        ),
        Claim(
            "Repaired, Pre-LN ends lower than the network without norms.",
            ASKED,
            difference.format("no norm", "Pre-LN"),
            loss["no norm"] - loss["Pre-LN"],
            low=SAME,
        ),
    ]


def table(results: Results) -> list[dict[str, str]]:
    """Return a line for each part and configuration: mean over the seeds, and standard deviation."""
    rows = []
    for part, name in product(("as written", "repaired"), CONFIGURATIONS):
        some = results.where(part=part, configuration=name)
        if part == "as written":
            lr, loss, span, at_chance = CONFIGURATIONS[name][1], some.values("last loss"), "", ""
        else:
            lr, loss = best(results, name)
            lrs = [lr for lr in results.settings["lrs"] if some.values("trains", lr=lr).all()]
            span = f"{lrs[0]:g} to {lrs[-1]:g}" if lrs else "none"
            (no_context,) = some.distinct("no context")
            at = some.values("lr")[capped(some.values("held-out loss"), no_context)]
            at_chance = f"{at.size} of {len(some.lines)} runs"
            if at.size:
                at_chance += f", at {', '.join(f'{lr:g}' for lr in sorted(set(at)))}"
        bad = diverged(some)
        first = f", first at step {some.values('finite steps')[bad].min()}" if bad.any() else ""
        rows.append(
            {
                "part": SMALLER if part == "as written" else part,
                "configuration": name,
                "learning rate": f"{lr:g}" + " (the best)" * (part == "repaired"),
                "loss, nats": f"{loss.mean():.3f} ± {loss.std(ddof=min(1, loss.size - 1)):.3f}",
                "rates that train": span,
                "capped at chance": at_chance,
                "loss not finite": f"{bad.sum()} of {bad.size} runs{first}",
            }
        )
    return rows


def draw(results: Results, figure: Figure) -> None:
    """Draw the loss by step as written but smaller, and the loss by learning rate repaired, with a ring if capped."""
    left, right = figure.subplots(1, 2)
    _draw_written(results.where(part="as written"), left)
    (no_context,) = results.distinct("no context")
    rings = []
    for name in CONFIGURATIONS:
        lrs, losses = np.array(results.settings["lrs"]), held_out(results, name)
        right.plot(lrs, losses.mean(axis=1), **LOOK[name])
        some = capped(losses, no_context).any(axis=1)
        if some.any():
            rings = right.plot(lrs[some], losses[some].mean(axis=1), **RING)
    reference(right, no_context, "no context", left=True)
    reference(right, no_context - small.MARGIN, "trains below", left=True)
    right.set(title="repaired: text", xlabel="learning rate", xscale="log", xlim=(2e-5, 0.15))
    right.set_ylabel("held-out loss, nats per character")
    handles, labels = left.get_legend_handles_labels()
    labels += ["capped at chance"] * len(rings)
    figure.legend([*handles, *rings], labels, loc="outside lower center", ncols=5)


def _draw_written(results: Results, ax: Axes) -> None:
    steps = results.settings["steps"]["as written"]
    for name in CONFIGURATIONS:
        curve = results.values("curve", configuration=name).mean(axis=0)
        at = (np.arange(len(curve)) + 0.5) * steps / len(curve)
        ax.plot(at, curve, label=name, markevery=max(1, len(curve) // 5), **LOOK[name])
        if name in DOCUMENTED:
            ax.plot(steps, DOCUMENTED[name], **(LOOK[name] | {"linestyle": "", "markersize": 6}), clip_on=False)
    words = "documented, at the end: " + ", ".join(map(str, DOCUMENTED.values()))
    ax.annotate(words, (steps, 3.1), (-10, 0), textcoords="offset points", ha="right", va="center", fontsize=7.5)
    reference(ax, math.log(small.VOCABULARY), "chance, ln 1000 = 6.91", left=True, gap=-10)
    lowest = floor(small.VOCABULARY, results.settings["length"])
    reference(ax, lowest, f"best possible, {lowest:.2f}", left=True)
    ax.set(title=f"{SMALLER}: random tokens", xlabel="step", ylabel="training loss, nats per token", ylim=(2.3, 7.7))


STUDY = Study(
    shows="four transformers with and without norms: a teaching experiment as written, and repaired",
    minutes=13,
    full={
        "width": {"as written": 128, "repaired": 64},
        "steps": {"as written": 600, "repaired": 150},
        "rows": {"as written": 4, "repaired": 4},
        "length": 64,
        "lrs": [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
        "held out": 8192,
        "seeds": 3,
    },
    quick={
        "width": {"as written": 32, "repaired": 32},
        "steps": {"as written": 10, "repaired": 25},
        "rows": {"as written": 1, "repaired": 2},
        "length": 64,
        "lrs": [1e-2, 1e-1],
        "held out": 256,
        "seeds": 1,
    },
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
)
