"""The residual stream over training: its size, its largest activations, and the gains of the norms, by placement.

A small language model is trained with each placement of the norms, from the same first weights on the same data. At
some steps it reads the same held-out text, block by block; `outliers_stream.py` says what is measured of the stream.
It is also measured in random rotations of the stream, where nothing is due to single features.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from npnorm.config import Config
from npnorm.plotting import LOOK_OF_PLACEMENT, reference
from npnorm.studies.outliers_stream import alignment, gains, stream
from npnorm.studies.small_transformers import text, xavier_init
from npnorm.studies.study import Cell, Claim, Results, Settings, Study
from npnorm.training import Recipe, evaluate, train
from npnorm.transformer import Transformer

DEPTH = "Wenfang Sun et al., 2025, arXiv:2502.05795"
PERI = "Kim et al., 2025, arXiv:2502.02732"
INT8 = "Dettmers et al., 2022, arXiv:2208.07339"
MASSIVE = "Mingjie Sun et al., 2024, arXiv:2402.17762"
EMERGE = "He et al., 2024, arXiv:2405.19279"
BASES = "Elhage et al., Privileged Bases in the Transformer Residual Stream, 2023"
BUSTERS = "Kovaleva et al., 2021, arXiv:2105.06990"
ASKED = "asked here"

NAMES = {
    "post": "post-norm",
    "pre": "pre-norm",
    "res-post": "OLMo-2's order",
    "sandwich": "sandwich",
    "deep": "DeepNorm",
}

ROTATIONS = 4


def cells(settings: Settings) -> list[Cell]:
    """Return a cell for each placement and seed."""
    return [{"placement": name, "seed": s} for name in settings["placements"] for s in range(settings["seeds"])]


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return what `stream` and `gains` find at each of the steps, and what is left for the end."""
    weights, windows, turns = (np.random.default_rng([i, cell["seed"]]) for i in range(3))
    data, length = text(settings["held out"]), settings["length"]
    sizes: Any = {"width": settings["width"], "depth": settings["depth"], "placement": cell["placement"]}
    config = Config(data.vocabulary, heads=4, context=length, **sizes)
    model = Transformer(config, xavier_init(config, weights))
    recipe = Recipe(settings["at"][-1], settings["rows"], length, settings["lr"], settings["warmup"])
    held_out = data.held_out[: settings["windows"] * length].reshape(-1, length)
    rotations = [np.linalg.qr(turns.standard_normal((config.width, config.width)))[0] for _ in range(ROTATIONS)]

    steps, looks = train(model, data.learn, recipe, windows), []
    for before, at in pairwise([0, *settings["at"]]):
        for _ in range(at - before):
            next(steps)
        looks.append(stream(model, held_out, rotations) | gains(model))
    found: dict[str, Any] = {name: [look[name] for look in looks] for name in looks[0]}
    loss = evaluate(model, data.held_out, settings["windows"], length)
    return found | {"held-out loss": loss, "alignment": alignment(model, held_out)}


def of_normals(count: int) -> float:
    """Return the median of the largest |x| of so many standard normal numbers.

    Examples
    --------
    >>> round(of_normals(1024 * 96), 2)
    4.49
    """
    return float(scipy.stats.halfnorm.ppf(0.5 ** (1 / count)))


def at_the_end(results: Results, placement: str, name: str) -> np.ndarray:
    """Return what there is under a name at the last step: for each seed a list by depth."""
    return results.values(name, placement=placement)[:, -1]


def second_half(results: Results, placement: str) -> np.ndarray:
    """Return the variance that the second half of the blocks adds to the stream / that the first half adds."""
    variance = at_the_end(results, placement, "rms") ** 2
    middle = results.settings["depth"] // 2
    return (variance[:, -1] - variance[:, middle]) / (variance[:, middle] - variance[:, 0])


def same_feature(results: Results, placement: str) -> np.ndarray:
    """Return the share of the blocks that have the most frequent strongest feature."""
    features = at_the_end(results, placement, "feature")[:, 1:]
    return np.array([np.bincount(row).max() / row.size for row in features])


def claims(results: Results) -> list[Claim]:
    """Return what is said of the stream and of the gains, with the numbers.

    The bounds were chosen before anything was measured, from what the claims say in words.
    """
    placements = results.distinct("placement")
    rms = {name: at_the_end(results, name, "rms") for name in placements}
    massive = {name: at_the_end(results, name, "massive").max(axis=1) for name in placements}
    first, last = (results.where(placement="pre").values("kurtosis")[:, i, -1] for i in (0, -1))
    added = "variance that the second half of the blocks adds / that the first half adds"
    grows = "rms after the last block / after the first"
    return [
        Claim(
            "With pre-norm the stream grows with depth, to more than double.",
            DEPTH,
            grows,
            rms["pre"][:, -1] / rms["pre"][:, 1],
            low=2,
        ),
        Claim(
            "With pre-norm the variance of the stream grows exponentially with depth.",
            DEPTH,
            added,
            second_half(results, "pre"),
            low=2,  # linear growth gives 1
        ),
        Claim(
            "With a sandwich the variance of the stream grows linearly with depth.",
            PERI,
            added,
            second_half(results, "sandwich"),
            0.5,
            2,
        ),
        Claim(
            "With post-norm the stream has the same size at every depth.",
            PERI,
            grows,
            rms["post"][:, -1] / rms["post"][:, 1],
            2 / 3,
            3 / 2,
        ),
        Claim(
            "With pre-norm the stream grows with training.",
            DEPTH,
            "rms after the last block, at the end / at step 0",
            rms["pre"][:, -1] / results.values("rms", placement="pre")[:, 0, -1],
            low=1,
        ),
        *(
            Claim(
                f"With {words} the stream stays smaller than with pre-norm.",
                source,
                f"rms after the last block, {NAMES[name]} / pre-norm",
                rms[name][:, -1] / rms["pre"][:, -1],
                high=1,
            )
            for name, words, source in (("sandwich", "a sandwich", PERI), ("res-post", "OLMo-2's order", ASKED))
        ),
        *(
            Claim(
                f"With {NAMES[name]} there are activations of at least 6 rms.",
                f"{INT8}: the threshold",
                "largest |x| / rms(x), at the end",
                at_the_end(results, name, "largest").max(axis=1),
                low=6,
            )
            for name in ("pre", "post")
        ),
        Claim(
            "With pre-norm there are massive activations, 1,000 times larger than the median.",
            MASSIVE,
            "largest |x| / median |x|, at the end",
            massive["pre"],
            low=1000,
        ),
        Claim(
            "With a sandwich the largest activation stands out less than with pre-norm.",
            PERI,
            "largest |x| / median |x|, at the end, sandwich / pre-norm",
            massive["sandwich"] / massive["pre"],
            high=1,
        ),
        Claim(
            "With pre-norm, training makes features unequal.",
            EMERGE,
            "kurtosis after the last block, at the end / at step 0",
            last / first,
            low=2,  # it doubles at least
        ),
        *(
            Claim(
                f"With {NAMES[name]} features are unequal as features, not only as directions.",
                BASES,
                "kurtosis after the last block / that of rotations, at the end",
                (at_the_end(results, name, "kurtosis") / at_the_end(results, name, "kurtosis, rotated"))[:, -1],
                low=1.5,
            )
            for name in ("pre", "post")
        ),
        *(
            Claim(
                f"With {NAMES[name]} the strongest feature is the same throughout the model.",
                source,
                "share of the blocks that agree",
                same_feature(results, name),
                low=0.75,
            )
            for name, source in (("pre", MASSIVE), ("post", BUSTERS))
        ),
        Claim(
            "With post-norm single gains stand out.",
            BUSTERS,
            "(largest - mean) / standard deviation of the gains, mean over the norms",
            at_the_end(results, "post", "gain stands out").mean(axis=1),
            low=3,  # the largest of 96 normal numbers is 2.5 standard deviations above the mean
        ),
        *(
            Claim(
                f"With {NAMES[name]} gains are large where features are.",
                source,
                "rank correlation of gains and features, mean over the blocks",
                results.values("alignment", placement=name).mean(axis=1),
                low=0.5,
            )
            for name, source in (("post", BUSTERS), ("pre", ASKED))
        ),
    ]


def table(results: Results) -> list[dict[str, str]]:
    """Return a line for each placement at the first and at the last step: means, with the spread over the seeds."""
    rows = []
    for placement in results.distinct("placement"):
        some = results.where(placement=placement)
        for i, step in ((0, results.settings["at"][0]), (-1, results.settings["at"][-1])):
            rms, largest, rotated, massive, kurtosis, equal, small, large = (
                some.values(name)[:, i]
                for name in (
                    "rms",
                    "largest",
                    "largest, rotated",
                    "massive",
                    "kurtosis",
                    "kurtosis, rotated",
                    "smallest gain",
                    "largest gain",
                )
            )
            rows.append(
                {
                    "placement": NAMES[placement],
                    "step": str(step),
                    "rms after block 1": f"{rms[:, 1].mean():.2f}",
                    "after the last": _spread(rms[:, -1]),
                    "largest / rms (rotated)": f"{_spread(largest.max(axis=1))} ({rotated.max(axis=1).mean():.2f})",
                    "largest / median": f"{massive.max(axis=1).mean():.1f}",
                    "kurtosis after the last (rotated)": f"{_spread(kurtosis[:, -1])} ({equal[:, -1].mean():.2f})",
                    "gains": f"{small.min(axis=1).mean():.2f} to {large.max(axis=1).mean():.2f}",
                    "held-out loss, nats": _spread(some.values("held-out loss")) if i else "",
                }
            )
    return rows


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.2f} ± {values.std(ddof=1) if values.size > 1 else 0:.2f}"


def draw(results: Results, figure: Figure) -> None:
    """Draw the size of the stream by depth and by step, and how far activations and features stand out, by step.

    The black line is that of sub-layers which each add 1 to the variance: two for each block.
    """
    settings, steps = results.settings, results.settings["at"]
    (by_depth, by_step), (large, unequal) = figure.subplots(2, 2)
    for placement in results.distinct("placement"):
        look, some = LOOK_OF_PLACEMENT[placement], results.where(placement=placement)
        rms = some.values("rms").mean(axis=0)
        ratio = some.values("kurtosis") / some.values("kurtosis, rotated")
        by_depth.plot(range(settings["depth"] + 1), rms[-1], label=NAMES[placement], **look)
        by_step.plot(steps, rms[:, -1], **look)
        large.plot(steps, some.values("largest").max(axis=2).mean(axis=0), **look)
        unequal.plot(steps, ratio[:, :, -1].mean(axis=0), **look)
    depths = np.arange(settings["depth"] + 1)
    by_depth.plot(depths, np.sqrt(1 + 2 * depths), color="black", linewidth=0.8, label="√(1 + 2 block)")
    by_depth.set(title=f"by depth, at step {steps[-1]}", xlabel="block (0: the embedding)", ylabel="rms of the stream")
    by_depth.set_xticks(depths)
    by_step.set(title="after the last block, by step", xlabel="step", ylabel="rms of the stream")
    large.set(title="largest activation at any depth", xlabel="step", ylabel="largest |x| / rms")
    unequal.set(title="after the last block", xlabel="step", ylabel="kurtosis of features\n/ of rotations")
    for ax in (by_depth, by_step):
        ax.set_yscale("log", base=2)
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    for ax in (by_step, large, unequal):
        ax.set_xscale("symlog", linthresh=1)
        ax.set_xlim(0, steps[-1] * 1.2)
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    top = math.sqrt(settings["width"])
    large.set_ylim(2, max(top, 6) * 1.05)
    reference(large, of_normals(settings["windows"] * settings["length"] * settings["width"]), "normal numbers", gap=8)
    reference(large, 6, "threshold of LLM.int8()")
    reference(large, top, "all in one feature", gap=-9)
    unequal.set_ylim(0.5, 2)
    reference(unequal, 1, "no feature stands out", gap=12)
    figure.legend(*by_depth.get_legend_handles_labels(), loc="outside lower center", ncols=6)


STUDY = Study(
    shows="the size of the residual stream, its outliers and the norms' gains over training, by placement",
    minutes=14,
    full={
        "placements": list(NAMES),
        "width": 96,
        "depth": 8,
        "length": 64,
        "rows": 4,
        "lr": 1e-3,
        "warmup": 30,
        "at": [0, 1, 3, 10, 30, 60, 100, 200, 300],
        "windows": 16,
        "held out": 8192,
        "seeds": 4,
    },
    quick={
        "placements": ["post", "pre", "res-post", "sandwich"],
        "width": 32,
        "depth": 4,
        "length": 32,
        "rows": 4,
        "lr": 1e-3,
        "warmup": 5,
        "at": [0, 4, 16],
        "windows": 16,
        "held out": 512,
        "seeds": 2,
    },
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
    size=(7.2, 5.2),
)
