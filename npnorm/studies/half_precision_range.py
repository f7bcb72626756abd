"""The error of RMSNorm in 16 bits by the size of x, over the range of the dtype: a part of the study half_precision.

Theory, for a row of n features with root mean square r. A dtype of p bits has numbers up to M, its smallest is t:

    x^2 overflows where |x| >= sqrt(M)             float16: 256             bfloat16: 2^64
    their sum overflows where r >= sqrt(M / n)     float16, n = 4096: 4     bfloat16, n = 4096: 2^58
    x^2 is 0 where |x| <= sqrt(t / 2)              float16: 2^-12.5         bfloat16: 2^-67
    a term below 2^-p of the sum is lost           float16: 2^-11           bfloat16: 2^-8

An overflow makes rstd = 1 / inf = 0, so that y = 0 and dx = 0: finite, and wrong. What vanishes is missed only where
eps does not cover it. float32 has the M and t of bfloat16 but for the digits, and p = 24.
"""

import math
from typing import Any

import ml_dtypes
import numpy as np
from matplotlib.figure import Figure

from npnorm.conformance import textbook
from npnorm.plotting import LOOKS, REFERENCE
from npnorm.studies.half_precision_norms import FORMS
from npnorm.studies.study import Cell, Results, Settings

RANGES = (("float16", 1e-5), ("float16", 1e-8), ("bfloat16", 1e-5))
"""The dtypes, and eps."""

LABELS = {
    "in the dtype": "all in 16 bits",
    "generation 1": "squares in 16 bits, sum in float32",
    "generation 3": "statistics in float32",
    "npnorm": "npnorm",
    "LayerNorm in the dtype": "LayerNorm, all in 16 bits",
}
"""The forms that are measured, as the table and the picture call them."""

WRONG, LOST = 0.01, 0.5
"""An error of y beside the largest of its row: 1 % is more than two roundings to 8 bits make; half is all."""

TOP = 10.0
"""Where the picture has what is infinite or NaN."""


def scales(dtype: str) -> np.ndarray:
    """Return the root mean squares of x from the smallest number of the dtype to its largest, as exponents of 2.

    Examples
    --------
    >>> scales("float16")[[0, -1]], scales("bfloat16")[[0, -1]]
    (array([-24,  14]), array([-132,  126]))
    """
    return np.arange(-24, 15) if dtype == "float16" else np.arange(-132, 127, 6)


def overflow(dtype: str, features: int = 1) -> float:
    """Return the root mean square from which on the sum of the squares overflows; of one feature, x^2 itself.

    Examples
    --------
    >>> overflow("float16"), overflow("float16", 4096), math.log2(overflow("bfloat16", 4096))
    (256.0, 4.0, 58.0)
    """
    return math.sqrt(2.0 ** int(ml_dtypes.finfo(dtype).maxexp) / features)


def vanishing(dtype: str) -> float:
    """Return the largest |x| whose square is rounded to 0.

    Examples
    --------
    >>> math.log2(vanishing("float16")), math.log2(vanishing("bfloat16"))
    (-12.5, -67.0)
    """
    return math.sqrt(float(ml_dtypes.finfo(dtype).smallest_subnormal) / 2)


def cells(settings: Settings) -> list[Cell]:
    """Return a cell for each dtype and eps, number of features, and form."""
    return [
        {"part": "range", "dtype": dtype, "eps": eps, "features": n, "form": form}
        for dtype, eps in RANGES
        for n in settings["features"]
        for form in LABELS
    ]


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return, for each scale, the error of y beside the largest of its row, the median of the rows; and (1e-4)^2."""
    rng = np.random.default_rng([1, cell["seed"]])
    one = rng.standard_normal((settings["rows"], cell["features"]))
    one, w = np.clip(one, -3.9, 3.9), np.ones(cell["features"])  # so that x itself does not overflow
    x = (np.exp2(scales(cell["dtype"]))[:, None, None] * one).astype(cell["dtype"])
    centred = cell["form"].startswith("LayerNorm")
    exact, _, _ = textbook.forward(x.astype(float), w, None, cell["eps"], (-1,), centred)
    with np.errstate(all="ignore"):
        y = FORMS[cell["form"]](x, w.astype(cell["dtype"]), cell["eps"]).astype(float)
        error = abs(y - exact).max(-1) / abs(exact).max(-1)
    median = np.median(np.where(np.isfinite(error), error, math.inf), axis=-1)
    tiny = np.array(1e-4, cell["dtype"])
    return {"error": [float(f"{e:.3g}") for e in median], "tiny": float(tiny * tiny)}


def features(results: Results) -> int:
    """Return the number of features that the claims and the picture are about: the largest."""
    return results.settings["features"][-1]


def errors(results: Results, dtype: str, form: str, eps: float = 1e-5, n: int | None = None) -> np.ndarray:
    """Return the errors by seed and scale."""
    n = n or features(results)
    return results.values("error", part="range", dtype=dtype, form=form, eps=eps, features=n)


def first_lost(results: Results, dtype: str, form: str) -> np.ndarray:
    """Return for each seed the root mean square of x from which on y is lost."""
    lost = np.logical_and.accumulate(errors(results, dtype, form)[:, ::-1] > LOST, axis=1)[:, ::-1]
    return np.array([np.exp2(scales(dtype)[row].min()) if row.any() else math.inf for row in lost])


def share_wrong(error: np.ndarray, dtype: str, below: float = math.inf) -> np.ndarray:
    """Return for each seed the share of the scales up to a root mean square where y is wrong."""
    return np.mean(error[:, np.exp2(scales(dtype)) <= below] > WRONG, axis=1)


def draw(results: Results, figure: Figure) -> None:
    """Draw the error of y by the size of x, a column for each dtype and eps, with the lines of the theory."""
    n = features(results)
    axes = figure.subplots(1, len(RANGES), sharey=True)
    below = {**LOOKS[0], "marker": "", "linewidth": 3.5, "zorder": 1.5}  # others lie on it
    looks = (LOOKS[3], LOOKS[1], {**LOOKS[4], "markersize": 3}, below)
    for ax, (dtype, eps) in zip(axes, RANGES, strict=True):
        for (form, label), look in zip(LABELS.items(), looks, strict=False):  # LayerNorm lies on the first
            error = np.median(errors(results, dtype, form, eps), axis=0)
            ax.plot(scales(dtype), np.minimum(error, TOP), label=label, markevery=4, **look)
        theory = [("x² = 0", vanishing(dtype)), ("Σx² = ∞", overflow(dtype, n)), ("x² = ∞", overflow(dtype))]
        for (text, at), side in zip(theory, ("right", "right", "left"), strict=True):
            ax.axvline(math.log2(at), **REFERENCE)
            ax.text(math.log2(at), 0.8 * TOP, text, rotation=90, ha=side, va="top", fontsize=7)
        ax.set(title=f"{dtype}, eps = {eps:g}", xlabel="root mean square of x", yscale="log", ylim=(1e-4, 2 * TOP))
        ax.xaxis.set_major_formatter("$2^{{{x:.0f}}}$")
    axes[0].set_yticks([1e-4, 1e-3, 1e-2, 1e-1, 1, TOP], ["0.01 %", "0.1 %", "1 %", "10 %", "100 %", "infinite"])
    axes[0].set_ylabel("error of y beside\nthe largest |y| of its row")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
