"""What leaves the output of a norm as it was? Six changes of weights and data, decided by numbers.

Table 1 of Biao Zhang and Rico Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, arXiv:1910.07467, which
extends section 5.1 of Jimmy Lei Ba et al., "Layer Normalization", 2016, arXiv:1607.06450. With x of shape (cases,
inputs), W of (outputs, inputs), and vectors c as large as what they are added to:

    y = norm(x W^T)                       WeightNorm: y = x norm(W)^T; BatchNorm: training, the dataset is the batch

    weight matrix re-scaling    W' = 3 W                      dataset re-scaling        x' = 3 x
    weight matrix re-centring   W' = W + 1 c^T, every row     dataset re-centring       x' = x + 1 c^T, every case
    weight vector re-scaling    W'_j = 3 W_j, one row         single case re-scaling    x'_i = 3 x_i, one case

The change of the output is max |y' - y| / max |y| over all cases and features: rounding alone without eps, where it is
invariant. With eps a scale s changes rstd = 1 / sqrt(s^2 RMS^2 + eps) a little. Of the output that is

    (1 - 1 / s^2) eps / (2 RMS^2), at most eps / (2 RMS^2) for s > 1, in the row whose RMS is the smallest

The gradient follows: if L(s W) = L(W), then dL/dW(s W) = dL/dW(W) / s. The paper, section 4.2, calls that an implicit
adaptor of the learning rate. And if L(s x) = L(x), then dL/dW is as it was.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from npnorm import norms
from npnorm.layers import Linear
from npnorm.studies.study import Cell, Claim, Results, Settings, Study
from npnorm.tree import Layer

PAPER = "Zhang and Sennrich 2019, arXiv:1910.07467"
OURS = "npnorm, Invariance, theory"
SCALE = 3.0  # no power of two: that would not even round
INVARIANT, CHANGED = 1e-10, 1e-3
"""Of float64 a change up to the first is rounding; one from the second on is none. Between them nothing is decided."""


def scaled_row(a: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the matrix with one of its rows scaled.

    Examples
    --------
    >>> scaled_row(np.ones((1, 2)), np.random.default_rng(0))
    array([[3., 3.]])
    """
    factor = np.ones((len(a), 1))
    factor[rng.integers(len(a))] = SCALE
    return a * factor


CHANGES: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]] = {
    "weight matrix re-scaling": lambda x, w, rng: (x, SCALE * w),
    "weight matrix re-centring": lambda x, w, rng: (x, w + w.std() * rng.standard_normal(w.shape[1])),
    "weight vector re-scaling": lambda x, w, rng: (x, scaled_row(w, rng)),
    "dataset re-scaling": lambda x, w, rng: (SCALE * x, w),
    "dataset re-centring": lambda x, w, rng: (x + x.std() * rng.standard_normal(x.shape[1]), w),
    "single case re-scaling": lambda x, w, rng: (scaled_row(x, rng), w),
}

SHORT = dict(zip(CHANGES, ("W scaled", "W shifted", "W_j scaled", "x scaled", "x shifted", "x_i scaled"), strict=True))
"""The names of the changes in the table."""

PUBLISHED = {
    "BatchNorm": "yes no yes yes yes no",
    "WeightNorm": "yes no yes no no no",
    "LayerNorm": "yes yes no yes no yes",
    "RMSNorm": "yes no no yes no yes",
    "pRMSNorm": "yes no no yes no yes",
}
"""The paper's table, in the order of `CHANGES`."""

BEYOND = {
    "GroupNorm": PUBLISHED["LayerNorm"],
    "L2Norm": PUBLISHED["RMSNorm"],
    "DyT": "no no no no no no",
}
"""What theory says of norms that the table does not have: L2Norm is RMSNorm over sqrt(n); tanh is invariant to none."""

EXPECTED = PUBLISHED | BEYOND

NORMS: dict[str, Callable[[np.ndarray, float], Layer]] = {
    "BatchNorm": lambda g, eps: norms.BatchNorm(g, eps=eps),
    "WeightNorm": lambda g, eps: norms.WeightNorm(g),
    "LayerNorm": lambda g, eps: norms.LayerNorm(g, eps=eps),
    "RMSNorm": lambda g, eps: norms.RMSNorm(g, eps=eps),
    "pRMSNorm": lambda g, eps: norms.PartialRMSNorm(g, p=0.0625, eps=eps),
    "GroupNorm": lambda g, eps: norms.GroupNorm(4, g, eps=eps),
    "L2Norm": lambda g, eps: norms.L2Norm(eps=eps),
    "DyT": lambda g, eps: norms.DyT(np.array([0.5]), g),
}
"""Each of its gains g, one for each output, and eps. WeightNorm and DyT have none; that of L2Norm is a least length."""


class Passes(NamedTuple):
    """What forward and backward gave."""

    y: np.ndarray
    dw: np.ndarray  # dL/dW
    dg: np.ndarray  # dL/dg, of the gain; NaN where there is none
    rstd: np.ndarray  # 0 where there is none


def both_passes(norm: Layer, x: np.ndarray, w: np.ndarray, dy: np.ndarray) -> Passes:
    """Return y = norm(x W^T), or x norm(W)^T, and the gradients for the upstream gradient dy."""
    if isinstance(norm, norms.WeightNorm):
        normalized, saved = norm.forward(w)
        linear = Linear(normalized)
        y, saved_linear = linear.forward(x)
        dw, grads = norm.backward(linear.backward(dy, saved_linear)[1]["weight"], saved)
    else:
        linear = Linear(w)
        a, saved_linear = linear.forward(x)
        y, saved = norm.forward(a)
        da, grads = norm.backward(dy, saved)
        dw = linear.backward(da, saved_linear)[1]["weight"]
    dg = next((d for name, d in grads.items() if name.startswith("weight")), np.full(1, np.nan))
    return Passes(y, dw, dg, getattr(saved, "rstd", np.zeros(1)))


def cells(settings: Settings) -> list[Cell]:
    """Return a cell for each norm, eps and seed."""
    seeds = range(settings["seeds"])
    return [{"norm": norm, "eps": eps, "seed": s} for norm in NORMS for eps in settings["eps"] for s in seeds]


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return how much each change changes y, and how the gradients grow with the scales of W and of x."""
    rng = np.random.default_rng(cell["seed"])  # the same weights and data for every norm
    x = rng.standard_normal((settings["cases"], settings["inputs"]))
    w = rng.standard_normal((settings["outputs"], settings["inputs"])) / np.sqrt(settings["inputs"])
    dy = rng.standard_normal((settings["cases"], settings["outputs"]))
    norm = NORMS[cell["norm"]](rng.standard_normal((settings["outputs"],)), cell["eps"])
    before = both_passes(norm, x, w, dy)
    changes = []
    for change in CHANGES.values():
        y = both_passes(norm, *change(x, w, rng), dy).y
        changes.append(np.max(abs(y - before.y)) / np.max(abs(before.y)))
    small_w, large_w = (both_passes(norm, x, s * w, dy) for s in (1 / SCALE, SCALE))
    small_x, large_x = (both_passes(norm, s * x, w, dy) for s in (1 / SCALE, SCALE))
    return {
        "change": changes,
        "bound": cell["eps"] * np.max(before.rstd) ** 2 / 2,
        "dW by W": exponent(small_w.dw, large_w.dw),
        "dW by x": exponent(small_x.dw, large_x.dw),
        "dg by W": exponent(small_w.dg, large_w.dg),
        "dg by x": exponent(small_x.dg, large_x.dg),
    }


def exponent(small: np.ndarray, large: np.ndarray) -> float:
    """Return k, where the length of a gradient goes as scale^k between the scales 1/3 and 3.

    Examples
    --------
    >>> round(exponent(np.array([3.0, 4.0]), np.array([27.0, 36.0])), 12)
    1.0
    """
    return float(np.log(np.linalg.norm(large) / np.linalg.norm(small)) / np.log(SCALE**2))


def decided(changes: np.ndarray) -> list[str]:
    """Return yes for what left y as it was with each seed, no for what changed it with each seed, else a question mark.

    Examples
    --------
    >>> decided(np.array([[1e-16, 0.3, 1e-6], [1e-15, 0.2, 1e-6]]))  # two seeds, three changes
    ['yes', 'no', '?']
    """
    least, most = changes.min(axis=0), changes.max(axis=0)
    return ["yes" if b <= INVARIANT else "no" if a >= CHANGED else "?" for a, b in zip(least, most, strict=True)]


def nearest(changes: np.ndarray) -> np.ndarray:
    """Return, of each change, the size that speaks most against `decided`: for yes the largest, for no the least."""
    return np.where(np.array(decided(changes)) == "no", changes.min(axis=0), changes.max(axis=0))


def claims(results: Results) -> list[Claim]:
    """Return the rows of the table, and what is said of eps and of the gradient."""
    exact = results.where(eps=0.0)
    eps = results.distinct("eps")[-1]
    bounded = [line for line in _with_eps(results).lines if line["bound"] > 0]
    seeds, several = len(exact.distinct("seed")), len({line["norm"] for line in bounded})
    return [
        *(_row(norm, exact.values("change", norm=norm)) for norm in EXPECTED),
        Claim(
            "With eps, what is invariant without it changes by at most eps / (2 RMS^2).",
            OURS,
            f"largest change of y / bound, eps = {eps:g}, least and most over {several} norms and {seeds} seeds",
            [np.max(np.array(line["change"])[_is_yes(line["norm"])]) / line["bound"] for line in bounded],
            high=1,
            exact=True,
        ),
        _power("After RMSNorm dL/dW is in inverse proportion to the scale of W.", exact, "dW by W", -1),
        _power("After RMSNorm dL/dW does not depend on the scale of x.", exact, "dW by x", 0),
        _power("The gradient of RMSNorm's gain does not depend on the scale of W.", exact, "dg by W", 0),
        _power("The gradient of RMSNorm's gain does not depend on the scale of x.", exact, "dg by x", 0),
    ]


def _with_eps(results: Results) -> Results:
    return results.where(eps=results.distinct("eps")[-1])


def _is_yes(norm: str) -> np.ndarray:
    return np.array(EXPECTED[norm].split()) == "yes"


def _row(norm: str, changes: np.ndarray) -> Claim:
    to = [change for change, yes in zip(CHANGES, _is_yes(norm), strict=True) if yes]
    others = f"{', '.join(to)}, and to no other of the six changes" if to else "none of the six changes"
    return Claim(
        f"{norm} is invariant to {others}.",
        f"{PAPER}, table 1" if norm in PUBLISHED else OURS,
        f"answers of 6 that agree, eps = 0, least over {len(changes)} seeds",
        [np.sum(np.array(decided(change[None])) == EXPECTED[norm].split()) for change in changes],
        low=6,
        exact=True,
    )


def _power(says: str, exact: Results, name: str, expected: float) -> Claim:
    distance = abs(exact.values(name, norm="RMSNorm") - expected)
    of, by = name.split(" by ")
    return Claim(
        says,
        f"{PAPER}, section 4.2",
        f"distance from {expected} of k, where |dL/{of}| goes as |{by}|^k, eps = 0, {len(distance)} seeds",
        distance,
        high=INVARIANT,
        exact=True,
    )


def table(results: Results) -> list[dict[str, str]]:
    """Return two lines for each norm: with the answers, without eps, and with the sizes alone, with eps."""
    rows = []
    for norm in EXPECTED:
        for eps in results.distinct("eps"):
            some = results.where(norm=norm, eps=eps)
            changes = some.values("change")
            answers = decided(changes) if eps == 0 else [""] * len(CHANGES)
            columns = zip(SHORT.values(), answers, nearest(changes), strict=True)
            rows.append(
                {
                    "norm": norm,
                    "eps": f"{eps:g}",
                    **{change: f"{answer} {size:.1g}".strip() for change, answer, size in columns},
                    "dL/dW by W": f"{some.values('dW by W').mean():z.3f}",
                    "by x": f"{some.values('dW by x').mean():z.3f}",
                }
            )
    return rows


def draw(results: Results, figure: Figure) -> None:
    """Draw what was measured: the darker a cell, the less y changed; below stands what was expected.

    A cell whose answer is another one is framed.
    """
    ax = figure.subplots()
    eps, agree = results.distinct("eps")[-1], 0
    changes = {norm: results.values("change", norm=norm, eps=0.0) for norm in EXPECTED}
    sizes = np.array([nearest(change) for change in changes.values()])
    shade = np.log10(np.maximum(sizes, 1e-17))
    mesh = ax.pcolormesh(shade, cmap="Blues_r", vmin=-17, vmax=1, edgecolors="white", linewidth=2)
    for i, (norm, expected) in enumerate(EXPECTED.items()):
        with_eps = nearest(_with_eps(results).values("change", norm=norm))
        by = "published" if norm in PUBLISHED else "theory"
        for j, (answer, wanted) in enumerate(zip(decided(changes[norm]), expected.split(), strict=True)):
            color = "white" if shade[i, j] < -8 else "black"
            agree += answer == wanted
            if answer != wanted:
                frame = Rectangle((j + 0.03, i + 0.03), 0.94, 0.94, fill=False, edgecolor="black", linewidth=3)
                ax.add_patch(frame)
            ax.text(j + 0.5, i + 0.42, answer, ha="center", va="bottom", fontsize=11, weight="bold", color=color)
            text = f"{by}: {wanted}\n{sizes[i, j]:.1g} | {with_eps[j]:.1g}"
            ax.text(j + 0.5, i + 0.46, text, ha="center", va="top", fontsize=7, color=color, linespacing=1.1)
    ax.axhline(len(PUBLISHED), color="black", linewidth=1.5)
    ax.set_xticks(np.arange(len(CHANGES)) + 0.5, [name.replace(" re-", "\nre-") for name in CHANGES], fontsize=8)
    ax.set_yticks(np.arange(len(EXPECTED)) + 0.5, list(EXPECTED))
    ax.invert_yaxis()
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[["left", "bottom"]].set_visible(False)
    ax.set_xlabel(
        f"bold: whether y was invariant, measured; {agree} of {shade.size} answers agree with what stands below them\n"
        f"numbers: the relative change of y without eps | with eps = {eps:g}"
    )
    figure.colorbar(mesh, ax=ax, fraction=0.03, label="log10 of the relative change of y without eps")


STUDY = Study(
    shows="which changes of weights and data leave the output of each norm as it was",
    minutes=0.2,
    full={"cases": 32, "inputs": 48, "outputs": 64, "eps": [0.0, 1e-5], "seeds": 20},
    quick={"cases": 32, "inputs": 48, "outputs": 64, "eps": [0.0, 1e-5], "seeds": 3},
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
    size=(7.2, 5.4),
)
