"""What does RMSNorm lose in float16 and bfloat16? By the size of x, by the order of the casts, and in training.

The size of x is the root mean square of a row. There are three parts, of which `part` of a cell says which it is:

    range    the error of y by the size of x, over the range of the dtype: half_precision_range.py
    orders   the error of y, dx and dw by the order of the casts, for x of size 1, in ulps of the 16 bits
    train    the loss of a small transformer whose norms are in 16 bits, and all else in float32

`half_precision_norms.py` has the forms: the three generations of jingyaogong/minimind (2025-26), and the orders of
Llama, OLMo-2 and Gemma. The last three are `CastRMSNorm`. In the training, activations of size 200 come from a first
embedding that is 10^4 times larger; "nudged" is float32 again, with a first embedding that is one ulp larger: what
chance does to the loss.
"""

import contextlib
import functools
import math
from itertools import product
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from npnorm import CastRMSNorm
from npnorm.config import Config, init
from npnorm.conformance import textbook
from npnorm.conformance.ulps import unit
from npnorm.studies import half_precision_range
from npnorm.studies.half_precision_claims import claims
from npnorm.studies.half_precision_norms import FORMS, HALVES, ORDERS, InHalf
from npnorm.studies.half_precision_range import LABELS, RANGES, WRONG, errors, scales
from npnorm.studies.study import Cell, Results, Settings, Study
from npnorm.training import Characters, Recipe, evaluate, language_reference, train
from npnorm.training.text import split
from npnorm.transformer import Transformer
from npnorm.tree import Tree

TRAINED = {1.0: ("generation 1", "llama", "olmo2", "gemma"), 1e4: ("generation 1", "olmo2")}
"""By how much the first embedding, of N(0, 0.02^2), is larger."""


def cells(settings: Settings) -> list[Cell]:
    """Return the cells of the three parts."""
    orders = [{"part": "orders", "dtype": dtype, "form": form} for dtype, form in product(HALVES, ORDERS)]
    trained = [
        {"part": "train", "gain": gain, "dtype": dtype, "form": form}
        for gain in settings["gains"]
        for dtype, form in [("float32", "plain"), ("float32", "nudged"), *product(HALVES, TRAINED[gain])]
    ]
    some = half_precision_range.cells(settings) + orders + trained
    return [{**cell, "seed": seed} for cell in some for seed in range(settings["seeds"])]


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return what came out of a cell."""
    part = {"range": half_precision_range.measure, "orders": errors_in_ulps, "train": held_out_loss}
    return part[cell["part"]](settings, cell)


def errors_in_ulps(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return the bits of y, and errors in ulps of the dtype of x: of each row the largest, of these the mean."""
    rng = np.random.default_rng([2, cell["seed"]])
    dtype, form = cell["dtype"], cell["form"]
    offset = float(form == "gemma")
    x, dy = rng.standard_normal((2, 256, 512)).astype(dtype)
    w = (rng.uniform(0.5, 1.5, 512) - offset).astype(dtype)
    wide_w, wide_dy = w.astype(float) + offset, dy.astype(float)
    exact, z, rstd = textbook.forward(x.astype(float), wide_w, None, 1e-5, (-1,), centred=False)
    if form in FORMS:
        y = FORMS[form](x, w.astype("float32"), 1e-5)
        return {"bits": 8 * y.dtype.itemsize, "y": _ulps(y, exact, dtype)}
    norm = CastRMSNorm(w, eps=1e-5, cast=form, offset=offset)
    y, saved = norm.forward(x)
    dx, grads = norm.backward(dy, saved)
    exact_dx = textbook.backward(wide_dy, wide_w, z, rstd, (-1,), centred=False)
    exact_dw = (wide_dy * z).sum(axis=0)
    errors = {"dx": _ulps(dx, exact_dx, dtype), "dw": _ulps(grads["weight"], exact_dw, dtype)}
    return {"bits": 8 * y.dtype.itemsize, "y": _ulps(y, exact, dtype), **errors}


def _ulps(came: np.ndarray, exact: np.ndarray, dtype: str) -> float:
    place = unit(abs(exact).max(-1, keepdims=True), dtype)
    return float(np.ldexp(abs(came.astype(float) - exact), -place).max(-1).mean())


def held_out_loss(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return the loss after training, that of chance, and how many steps were taken while all numbers were finite."""
    learned, held_out, vocabulary = _text()
    length, steps = settings["length"], settings["steps"]
    config = Config(vocabulary, settings["width"], settings["depth"], heads=4, context=length)
    params = init(config, np.random.default_rng([3, cell["seed"]]))
    embedding = params["embedding"]
    embedding["weight"] *= np.float32(cell["gain"])
    if cell["form"] == "nudged":
        embedding["weight"] = np.nextafter(embedding["weight"], np.float32(np.inf))
    make = functools.partial(_norm, config, cell) if cell["dtype"] in HALVES else None
    model = Transformer(config, params, norm=make)
    recipe = Recipe(steps, settings["batch"], length, lr=2e-3, warmup=steps // 10)
    taken = 0
    with contextlib.suppress(FloatingPointError):
        for _ in train(model, learned, recipe, np.random.default_rng([4, cell["seed"]])):
            taken += 1
    loss = evaluate(model, held_out[: settings["held_out"]], 32, length)
    return {"loss": loss, "chance": math.log(vocabulary), "finite steps": taken}


def _norm(config: Config, cell: Cell, params: Tree) -> InHalf:
    weight = params["weight"] - np.float32(cell["form"] == "gemma")
    return InHalf(weight, cell["dtype"], cell["form"], config.eps, loss_scale=2.0**12)


@functools.cache
def _text() -> tuple[np.ndarray, np.ndarray, int]:
    text = language_reference()
    characters = Characters(text)
    return *split(characters.encode(text), 1000), characters.size


def table(results: Results) -> list[dict[str, str]]:
    """Return a line for each dtype, eps and form: the error of y at size 1, and the sizes where it is below 1 %."""
    n, rows = half_precision_range.features(results), []
    for dtype, eps in RANGES:
        for form, label in LABELS.items():
            row = {"dtype": dtype, "eps": f"{eps:g}", "form": label}
            for some in results.settings["features"]:
                error = errors(results, dtype, form, eps, some)[:, scales(dtype) == 0]
                row[f"error of y at size 1, n = {some} (%)"] = f"{100 * error.mean():.2g}"
            right = scales(dtype)[errors(results, dtype, form, eps).max(axis=0) <= WRONG]
            ends = [f"2^{right[i]}" if right.size else "nowhere" for i in (0, -1)]
            row[f"n = {n}: below 1 % from size"], row["to size"] = ends
            rows.append(row)
    return rows


def draw(results: Results, figure: Figure) -> None:
    """Draw the error of y by the size of x, and say of how many features."""
    half_precision_range.draw(results, figure)
    figure.suptitle(f"RMSNorm of rows of {half_precision_range.features(results)} features", fontsize="medium")


def more_tables(results: Results) -> dict[str, str]:
    """Return the errors by order, and the losses."""
    orders = []
    for dtype, form in product(HALVES, ORDERS):
        some = results.where(part="orders", dtype=dtype, form=form)
        row = {"dtype of x": dtype, "form": form, "bits of y": str(some.lines[0]["bits"])}
        for name in ("y", "dx", "dw"):
            row[f"{name} (ulps)"] = f"{some.values(name).mean():.2f}" if name in some.lines[0] else ""
        orders.append(row)
    losses = []
    trained = results.where(part="train")
    for gain, dtype, form in dict.fromkeys((line["gain"], line["dtype"], line["form"]) for line in trained.lines):
        some = trained.where(gain=gain, dtype=dtype, form=form)
        beside = 1000 * (some.values("loss") - trained.values("loss", gain=gain, form="plain"))
        row = {"size of activations": f"{0.02 * gain:g}", "dtype": dtype, "form": form}
        row["loss (nats)"] = f"{some.values('loss').mean():.3f}"
        row["mean difference from float32 (0.001 nats)"] = f"{beside.mean():+.1f}"
        row["smallest of the seeds"], row["largest of the seeds"] = f"{beside.min():+.1f}", f"{beside.max():+.1f}"
        row["steps with finite numbers"] = str(some.values("finite steps").min())
        losses.append(row)
    return {
        name: tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
        for name, rows in (("orders", orders), ("losses", losses))
    }


STUDY = Study(
    shows="what RMSNorm loses in float16 and bfloat16, by the size of x and the order of its casts",
    minutes=20,
    full={
        "features": [512, 4096],
        "rows": 8,
        "gains": [1.0, 1e4],
        "width": 64,
        "depth": 2,
        "length": 32,
        "batch": 8,
        "steps": 250,
        "held_out": 10_000,
        "seeds": 5,
    },
    quick={
        "features": [2048],
        "rows": 2,
        "gains": [1e4],
        "width": 16,
        "depth": 1,
        "length": 16,
        "batch": 4,
        "steps": 5,
        "held_out": 1_000,
        "seeds": 2,
    },
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
    parts=more_tables,
    packages=("ml_dtypes",),
    size=(7.4, 3.8),
)
