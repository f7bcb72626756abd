"""Where the norm stands: gradients at the start, and training from 2 to 16 layers, with and without warm-up.

Three parts, of which `part` of a cell says which it is:

    theorem, gradient    the gradient of each layer before any training: pre_vs_post_gradients.py
    train                a language model of characters: all placements with the same learning rate
    as written           joyehuang/minimind-notes, 01-normalization, exp3_prenorm_vs_postnorm.py (2025): random tokens;
                         Pre-LN has ten times the learning rate of Post-LN

The matrices are drawn by Xavier's normal distribution but for the last part, which has torch's own initialization.
"""

import math
from functools import partial
from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from npnorm.config import Config
from npnorm.plotting import LOOK_OF_PLACEMENT, reference
from npnorm.studies import pre_vs_post_gradients as before
from npnorm.studies import small_transformers as small
from npnorm.studies.pre_vs_post_gradients import PLACEMENTS, XIONG
from npnorm.studies.study import Cell, Claim, Results, Settings, Study
from npnorm.training import Recipe
from npnorm.transformer import Transformer

SCRIPT = "minimind-notes, exp3_prenorm_vs_postnorm.py, 2025"
DEEPNET = "Wang et al., arXiv:2203.00555"
OLMO = "2 OLMo 2 Furious, arXiv:2501.00656"
COGVIEW = "Ding et al., arXiv:2105.13290"

WRITTEN = {"pre": 1e-3, "post": 1e-4}
"""The learning rates as written."""

SAME, MORE = 0.05, 0.1
"""Nats: losses that differ by less than SAME count as the same, by more than MORE as apart; chosen beforehand."""


def cells(settings: Settings) -> list[Cell]:
    """Return the cells of the three parts."""
    found, seeds, (lower, lr) = before.cells(settings), range(settings["seeds"]), settings["lrs"]
    runs = [(placement, lr, warmup) for placement, warmup in product(PLACEMENTS, (False, True))]
    runs += [(placement, lower, False) for placement in WRITTEN]
    for (placement, lr, warmup), depth, seed in product(runs, settings["depths"], seeds):
        run = {"placement": placement, "lr": lr, "warmup": warmup}
        found += [{"part": "train", **run, "depth": depth, "seed": seed}]
    for depth, (placement, lr), seed in product((4, 8), WRITTEN.items(), seeds):
        found += [{"part": "as written", "placement": placement, "depth": depth, "lr": lr, "seed": seed}]
    return found


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return what came out of a cell."""
    part, seed = cell["part"], cell["seed"]
    if part in before.PARTS:
        return before.measure(settings, cell)
    weights, batches = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])
    steps, rows, length = settings["steps"][part], settings["rows"][part], settings["length"][part]
    sizes: Any = {"width": settings["width"][part], "depth": cell["depth"], "heads": 4, "context": length}
    choice: Any = {"norm": "layer", "placement": cell["placement"], "mlp": "relu"}
    if part == "as written":
        config = Config(small.VOCABULARY, **sizes, **choice, positions="none", causal=False, bias=True)
        network = small.as_written(config, weights)
        losses = small.train_on_random_tokens(network, steps, rows, length, cell["lr"], 1.0, batches)
        return {"last loss": float(losses[-20:].mean()), "stability": float(losses[-100:].std())}
    data = small.text(settings["held out"])
    config = Config(data.vocabulary, **sizes, **choice, positions="learned")
    model = Transformer(config, small.xavier_init(config, weights))
    recipe = Recipe(steps, rows, length, cell["lr"], warmup=steps // 2 * cell["warmup"], weight_decay=0.0, max_norm=1.0)
    return small.train_on_text(model, data, recipe, batches)


def trained(results: Results, placement: str, lr: float, warmup: bool, name: str = "held-out loss") -> np.ndarray:
    """Return the loss on what is held out, or another result of the training, by depth and seed."""
    some = results.where(part="train", placement=placement, lr=lr, warmup=warmup)
    return np.array([some.values(name, depth=depth) for depth in results.settings["depths"]], float)


def claims(results: Results) -> list[Claim]:
    """Return what is said of the placements, with the numbers."""
    return before.claims(results) + train_claims(results) + written_claims(results)


def train_claims(results: Results) -> list[Claim]:
    """Return what is said of training, with the same learning rate for all placements."""
    depths, (low, high) = results.settings["depths"], results.settings["lrs"]
    cold, warm = ({p: trained(results, p, high, warmup) for p in PLACEMENTS} for warmup in (False, True))
    gain = {p: cold[p] - warm[p] for p in PLACEMENTS}
    trains = {p: trained(results, p, high, False, "trains") for p in PLACEMENTS}
    apart = trained(results, "post", low, False) - trained(results, "pre", low, False)
    helps, deep = f"loss without - with warm-up, lr {high:g}, nats", f"{depths[-1]} layers, lr {high:g}"
    share = f"share of the depths that train without warm-up, lr {high:g}"
    ends = f"loss, Post-LN - Pre-LN, no warm-up, lr {low:g}, nats"
    ratio, both = gain["deep"].mean(axis=0) / gain["post"].mean(axis=0), "mean over the depths, DeepNorm / Post-LN"
    stuck = f"share of the seeds that train without warm-up, {deep}"
    warmed = f"loss, Post-LN - Pre-LN, with warm-up, {deep}, nats"
    return [
        *(
            Claim(f"With {depth} layers Post-LN needs warm-up.", XIONG, helps, some, low=MORE)
            for depth, some in zip(depths, gain["post"], strict=True)
        ),
        *(
            Claim(f"With {depth} layers Pre-LN does not need warm-up.", XIONG, helps, some, high=SAME)
            for depth, some in zip(depths, gain["pre"], strict=True)
        ),
        Claim("DeepNorm needs warm-up less than Post-LN.", DEEPNET, f"{helps}, {both}", ratio, high=0.5),
        Claim("Pre-LN trains without warm-up at each depth.", XIONG, share, trains["pre"].mean(axis=0), low=1),
        Claim(
            "The placement of OLMo-2 trains without warm-up at each depth.",
            OLMO,
            share,
            trains["res-post"].mean(axis=0),
            low=1,
        ),
        Claim(
            "The sandwich trains without warm-up at each depth.", COGVIEW, share, trains["sandwich"].mean(axis=0), low=1
        ),
        Claim("DeepNorm trains without warm-up at each depth.", DEEPNET, share, trains["deep"].mean(axis=0), low=1),
        Claim("With more than 12 layers Post-LN is unstable.", SCRIPT, stuck, trains["post"][-1], high=0.5),
        Claim(
            f"With warm-up and {depths[-1]} layers Post-LN ends as low as Pre-LN.",
            XIONG,
            warmed,
            (warm["post"] - warm["pre"])[-1],
            high=SAME,
        ),
        Claim("With 4 layers Post-LN and Pre-LN end alike.", SCRIPT, ends, apart[depths.index(4)], -MORE, MORE),
        Claim("With 8 layers Pre-LN ends lower than Post-LN.", SCRIPT, ends, apart[depths.index(8)], low=MORE),
    ]


def written_claims(results: Results) -> list[Claim]:
    """Return what the teaching experiment says of its own run."""
    some = results.where(part="as written")
    (post, pre), deep = (
        [some.values("last loss", placement=placement, depth=depth) for placement in ("post", "pre")]
        for depth in (4, 8)
    )
    ratios = [
        some.values("stability", placement="post", depth=depth) / some.values("stability", placement="pre", depth=depth)
        for depth in (4, 8)
    ]
    learned = math.log(small.VOCABULARY) - np.min([post, pre, *deep], axis=0)
    ratio, ends = "std of the last 100 losses, Post-LN / Pre-LN", "loss, Post-LN - Pre-LN, nats"
    return [
        Claim(
            "As written, the loss falls below chance here.",
            "asked here",
            "chance - the lowest loss, nats",
            learned,
            low=MORE,
        ),
        Claim("As written, with 4 layers Post-LN and Pre-LN end alike.", SCRIPT, ends, post - pre, -MORE, MORE),
        Claim("As written, with 4 layers Pre-LN is smoother.", SCRIPT, ratio, ratios[0], low=1),
        Claim("As written, with 8 layers Pre-LN is clearly smoother.", SCRIPT, ratio, ratios[1], low=1.5),
    ]


def table(results: Results) -> list[dict[str, str]]:
    """Return the loss on what is held out by placement, learning rate and warm-up: means over the seeds."""
    rows = []
    for placement, lr, warmup in product(PLACEMENTS, results.settings["lrs"], (False, True)):
        losses = trained(results, placement, lr, warmup)
        if losses.size:
            run = {"placement": PLACEMENTS[placement], "learning rate": f"{lr:g}", "warm-up": "yes" if warmup else "no"}
            rows.append(
                run | {f"{d} layers": _mean(loss) for d, loss in zip(results.settings["depths"], losses, strict=True)}
            )
    return rows


def parts(results: Results) -> dict[str, str]:
    """Return the tables of the other two parts."""
    written = []
    for depth, (placement, lr) in product((4, 8), WRITTEN.items()):
        some = results.where(part="as written", placement=placement, depth=depth)
        run = {"layers": str(depth), "placement": PLACEMENTS[placement], "learning rate": f"{lr:g}"}
        ends = {"last loss, nats": _mean(some.values("last loss"))}
        written.append(run | ends | {"standard deviation of the last 100": _mean(some.values("stability"))})
    markdown = partial(tabulate, headers="keys", tablefmt="github", disable_numparse=True)
    return {"gradient": markdown(before.table(results)), "written": markdown(written)}


def _mean(values: np.ndarray) -> str:
    return f"{values.mean():.2f} ± {values.std(ddof=min(1, values.size - 1)):.2f}"


def draw(results: Results, figure: Figure) -> None:
    """Draw the gradient by layer at the start, and the loss by depth without and with warm-up."""
    left, *both = figure.subplots(1, 3)
    both[1].sharey(both[0])
    before.draw(results, left)
    depths, lr, (no_context,) = results.settings["depths"], results.settings["lrs"][-1], results.distinct("no context")
    for ax, warmup in zip(both, (False, True), strict=True):
        for placement in PLACEMENTS:
            ax.plot(depths, trained(results, placement, lr, warmup).mean(axis=1), **LOOK_OF_PLACEMENT[placement])
        reference(ax, no_context, "needs no context", gap=-10)
        ax.set(title=f"trained, {'with' if warmup else 'no'} warm-up", xlabel="layers", xscale="log")
        ax.set_xticks(depths, map(str, depths))
        ax.minorticks_off()
    both[0].set_ylabel("held-out loss (nats for each character)")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5)


STUDY = Study(
    shows="where the norm stands: gradients by layer at the start, and training by depth and warm-up",
    minutes=15,
    full={
        "gradient depths": [4, 8, 16, 32],
        "profile": 16,
        "draws": 8,
        "depths": [2, 4, 8, 16],
        "lrs": [3e-3, 1e-2],
        "width": {"theorem": 64, "gradient": 64, "train": 32, "as written": 64},
        "rows": {"theorem": 32, "gradient": 32, "train": 8, "as written": 4},
        "steps": {"train": 200, "as written": 120},
        "length": {"theorem": 32, "gradient": 32, "train": 32, "as written": 64},
        "held out": 8192,
        "seeds": 3,
    },
    quick={
        "gradient depths": [4, 16],
        "profile": 16,
        "draws": 2,
        "depths": [4, 8],
        "lrs": [3e-3, 1e-2],
        "width": {"theorem": 32, "gradient": 32, "train": 16, "as written": 16},
        "rows": {"theorem": 8, "gradient": 8, "train": 4, "as written": 1},
        "steps": {"train": 2, "as written": 5},
        "length": {"theorem": 32, "gradient": 32, "train": 16, "as written": 64},
        "held out": 64,
        "seeds": 1,
    },
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
    size=(7.6, 3.4),
    parts=parts,
)
