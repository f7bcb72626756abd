"""How few features tell how large all are? pRMSNorm by the part p that it measures: its errors, a transformer's loss.

Biao Zhang and Rico Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, arXiv:1910.07467, section 5: all n
features are divided by RMS_k, the root mean square of the first k = ceil(n p), since features are taken to be alike.
The paper trains with 6.25 %, and tells that "the gradient tends to explode" with small parts.

The errors of the RMS and of the gradient are measured on normal features, on such with an outlier as the last one, and
on those of a trained transformer; `partial_error` has the theory, by which they depend on k and hardly on p. Then a
small transformer is trained with each k, with the same first weights and data.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from npnorm import norms
from npnorm.config import Config, init
from npnorm.plotting import LOOKS, REFERENCE, reference
from npnorm.studies.partial_error import error_of_gradient, error_of_rms, errors
from npnorm.studies.small_transformers import text
from npnorm.studies.study import Cell, Claim, Results, Settings, Study
from npnorm.training import Recipe, evaluate, train
from npnorm.transformer import Transformer
from npnorm.tree import Layer, Tree

PAPER = "Zhang and Sennrich 2019, arXiv:1910.07467"
OURS = "npnorm, Partial RMSNorm, theory"
PARTS = ("first", "random")
OUTLIER = 10.0
"""How many times larger than the others the last feature is, where there is an outlier."""

FEATURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "normal": lambda x: x,
    "outlier": lambda x: x * np.append(np.ones(x.shape[-1] - 1), OUTLIER),
}


class Redrawn(norms.PartialRMSNorm):
    """A pRMSNorm that measures another random part in each forward pass.

    Parameters
    ----------
    rng : numpy.random.Generator
        Draws the parts.
    **settings : weight, bias, p, eps, group, compute
        As for `PartialRMSNorm`.
    """

    drawing: np.random.Generator

    def __init__(self, rng: np.random.Generator, **settings: Any) -> None:
        super().__init__(**settings)
        self._set(drawing=rng)

    def forward(self, x: Any, rng: np.random.Generator | None = None, *, out: Any = None) -> tuple[Any, Any]:
        """Return y, and what backward needs."""
        return super().forward(x, self.drawing, out=out)


def cells(settings: Settings) -> list[Cell]:
    """Return the cells of the errors, then those of the transformers."""
    ks = {features: {part: settings["k"] for part in PARTS} for features in FEATURES}
    ks["trained"] = {"first": settings["trained first"], "random": settings["trained random"]}
    return [
        {"features": features, "part": part, "k": k, "seed": seed}
        for features, of_parts in ks.items()
        for part, some in of_parts.items()
        for k in some
        for seed in range(settings["seeds"])
    ]


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return the errors for features that are drawn, or train a transformer."""
    if cell["features"] == "trained":
        return _train(settings, cell)
    rng = np.random.default_rng(cell["seed"])  # the same features for every part
    x, dy = rng.standard_normal((2, settings["draws"], settings["rows"], settings["width"]))
    return errors(FEATURES[cell["features"]](x), dy, cell["k"], _drawing(cell["part"], cell["seed"]))


def _drawing(part: str, seed: int) -> np.random.Generator | None:
    return np.random.default_rng([seed, 2]) if part == "random" else None


def _train(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return a transformer's held-out loss and largest gradient, and for k = n the errors of the RMS by parts.

    A step has so few tokens that `loss_and_grads` takes them in one piece: the parts are always drawn in one order.
    """
    length, batch, n = (settings[name] for name in ("length", "batch", "width"))
    k, seed, data = cell["k"], cell["seed"], text(settings["held out"])
    config = Config.modern(data.vocabulary, width=n, depth=settings["depth"], heads=4, context=length)
    rng = _drawing(cell["part"], seed)

    def norm(params: Tree) -> Layer:
        options: Any = {**params, "p": k / n, "eps": config.eps, "compute": "float32"}
        return norms.PartialRMSNorm(**options) if rng is None else Redrawn(rng, **options)

    model = Transformer(config, init(config, np.random.default_rng([seed, 0])), norm=norm)
    recipe = Recipe(settings["steps"], batch, length, warmup=settings["steps"] // 10)
    gradients: list[float] = []
    loss = math.log(config.vocabulary)  # by chance, if it stops
    with contextlib.suppress(FloatingPointError):
        for step in train(model, data.learn, recipe, np.random.default_rng([seed, 1])):  # for every k the same
            gradients.append(step.norm)
        loss = evaluate(model, data.held_out, 32, length)
    found: dict[str, Any] = {
        "loss": loss,
        "largest gradient": max(gradients, default=math.nan),
        "finite steps": len(gradients),
    }
    if k == n:
        x = model.forward(data.held_out[: batch * length].reshape(batch, length))[1].stack["norm"].x
        x = x.astype(np.float64)
        found |= {
            part: [errors(x, np.ones_like(x), j, _drawing(part, seed))["RMS"] for j in settings["k"]] for part in PARTS
        }
    return found


def claims(results: Results) -> list[Claim]:
    """Return what is said of pRMSNorm, with the numbers; bounds that the sources do not name are noted."""
    n, ks = results.settings["width"], results.settings["k"]
    part, k_of_paper, half = n // 16, 32, n // 2  # 6.25 % of n; 6.25 % of the paper's 512
    drawn, outlier = results.where(features="normal", part="first"), results.where(features="outlier", part="first")
    trained, redrawn = (results.where(features="trained", part=which) for which in PARTS)
    loss, largest = (trained.values(name, k=n) for name in ("loss", "largest gradient"))
    alike = trained.values("first", k=n)[:, ks.index(part)] / error_of_rms(part, n)
    as_well = 0.02  # nats per character: what a reader of two curves sees
    return [
        Claim(
            "The RMS of k of n normal features errs by the formula, about sqrt((1 - p) / (2 k)).",
            OURS,
            f"error of the RMS / that of the formula, k = {part} of {n}",
            drawn.values("RMS", k=part) / error_of_rms(part, n),
            0.95,
            1.05,
        ),
        Claim(
            "The gradient errs by the formula, about sqrt(3 (1 - p) / (2 k)), for normal features.",
            OURS,
            f"error of the gradient / that of the formula, k = {k_of_paper} of {n}",
            drawn.values("gradient", k=k_of_paper) / error_of_gradient(k_of_paper, n),
            0.95,
            1.05,
        ),
        Claim(
            "pRMSNorm's backward can make a gradient longer by a factor of about 1 / sqrt(p).",
            OURS,
            f"median over rows of the largest gain, k = {part} of {n}, 1 / sqrt(p) = 4",
            drawn.values("gain", k=part),
            3,
            5,  # the median of t^2, in the gain, is a little above 1
        ),
        Claim(
            f"Where the last feature is {OUTLIER:.0f} times larger, the RMS of the first half is a quarter too small.",
            OURS,  # 1 - 1 / sqrt(1 + (10^2 - 1) / 128)
            f"error of the RMS, k = {half} of {n}",
            outlier.values("RMS", k=half),
            0.2,
            0.3,
        ),
        Claim(
            "The features of a trained transformer are so alike that the RMS of the first k errs as of normal ones.",
            f"implied by {PAPER}, section 5: features are often independent and identically distributed",
            f"error of the RMS / that of the formula, k = {part} of {n}",
            alike,
            0.8,
            1.2,  # within a fifth
        ),
        Claim(
            "The gradient explodes with a small part.",
            f"{PAPER}, section 5",
            f"largest gradient in training, k = 1 / k = {n}, powers of 10",
            np.log10(trained.values("largest gradient", k=1) / largest),
            low=1,
        ),
        Claim(
            "6.25 % of the features do as well as all.",
            f"{PAPER}, section 6",
            f"held-out loss, k = {part} - k = {n}, nats per character",
            trained.values("loss", k=part) - loss,
            high=as_well,
        ),
        Claim(
            f"{k_of_paper} features, as many as 6.25 % of 512, do as well as all.",
            f"implied by {PAPER}, section 6, if the number of features counts",
            f"held-out loss, k = {k_of_paper} - k = {n}, nats per character",
            trained.values("loss", k=k_of_paper) - loss,
            high=as_well,
        ),
        Claim(
            "A part that is drawn anew in each forward pass does as well as the first k, since features are alike.",
            f"implied by {PAPER}, section 5, which takes features to be alike",
            f"held-out loss, drawn anew - first k, k = {part}, nats per character",
            redrawn.values("loss", k=part) - trained.values("loss", k=part),
            high=as_well,
        ),
    ]


def table(results: Results) -> list[dict[str, str]]:
    """Return a line for each k: means over the seeds."""
    n = results.settings["width"]
    drawn, trained = results.where(features="normal", part="first"), results.where(features="trained", part="first")
    redrawn = results.where(features="trained", part="random")

    def mean(some: Results, name: str, k: int, form: str) -> str:
        values = some.values(name, k=k)
        return format(values.mean(), form) if values.size else "-"

    return [
        {
            "p": f"{k / n:.3g}",
            "k": str(k),
            "RMS error (theory)": f"{mean(drawn, 'RMS', k, '.3f')} ({error_of_rms(k, n):.3f})",
            "gradient error (theory)": f"{mean(drawn, 'gradient', k, '.3g')} ({error_of_gradient(k, n):.3g})",
            "largest gain": mean(drawn, "gain", k, ".3g"),
            "held-out loss, nats": mean(trained, "loss", k, ".3f"),
            "drawn anew, nats": mean(redrawn, "loss", k, ".3f"),
            "largest gradient": mean(trained, "largest gradient", k, ".2g"),
            "finite steps": mean(trained, "finite steps", k, ".0f"),
        }
        for k in results.settings["k"]
    ]


def draw(results: Results, figure: Figure) -> None:
    """Draw the errors by k, with the lines of the theory, and the loss by k."""
    n, ks = results.settings["width"], results.settings["k"][:-1]  # all features have no error
    left, right = figure.subplots(1, 2)
    for (name, features, part, label), look in zip(
        (
            ("RMS", "normal", "first", "RMS, normal features"),
            ("gradient", "normal", "first", "gradient, normal features"),
            ("RMS", "outlier", "first", "RMS, outlier, first k"),
            ("RMS", "outlier", "random", "RMS, outlier, random k"),
        ),
        LOOKS,
        strict=False,
    ):
        means = [results.values(name, features=features, part=part, k=k).mean() for k in ks]
        left.plot(ks, means, label=label, **look)
    trained = results.values("first", features="trained", k=n).mean(axis=0)
    left.plot(ks, trained[:-1], label="RMS, trained features", **LOOKS[4])
    for theory in (error_of_rms, error_of_gradient):
        many = np.geomspace(1, n - 1, 100)
        left.plot(many, [theory(k, n) for k in many], **REFERENCE, label="theory" * (theory is error_of_rms))
    left.set(yscale="log", ylim=(0.04, 20), ylabel="relative error")
    left.legend()
    for part, label, look in (("first", "first k", LOOKS[0]), ("random", "drawn anew", LOOKS[1])):
        some = results.where(features="trained", part=part)
        losses = np.array([some.values("loss", k=k) for k in some.distinct("k")])
        mean = losses.mean(axis=1)
        spread = abs(np.array([losses.min(axis=1), losses.max(axis=1)]) - mean)
        right.errorbar(some.distinct("k"), mean, spread, label=label, capsize=3, **look)
    reference(right, results.values("loss", features="trained", part="first", k=n).mean(), " all features", left=True)
    right.set(ylabel="held-out loss, nats per character")
    right.legend()
    for ax in (left, right):
        ticks = results.settings["k"]
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{k}\n{k / n:.1%}" if i % 2 == 0 else str(k) for i, k in enumerate(ticks)])
        ax.set_xlabel(f"k, and p = k / {n}")


STUDY = Study(
    shows="how well a part of the features tells the size of all, and what pRMSNorm loses by it",
    minutes=19,
    full={
        "width": 128,
        "k": [1, 2, 4, 8, 16, 32, 64, 128],
        "draws": 40,
        "rows": 50,
        "trained first": [1, 2, 4, 8, 32, 128],
        "trained random": [8, 32],
        "depth": 2,
        "batch": 8,
        "length": 64,
        "steps": 300,
        "held out": 16384,
        "seeds": 5,
    },
    quick={
        "width": 128,
        "k": [1, 8, 32, 64, 128],
        "draws": 10,
        "rows": 50,
        "trained first": [1, 8, 32, 128],
        "trained random": [8],
        "depth": 1,
        "batch": 4,
        "length": 16,
        "steps": 10,
        "held out": 1024,
        "seeds": 2,
    },
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
    size=(7.2, 3.8),
)
