"""Does a signal survive ten layers? Activations and gradients by depth, the same weights with and without a norm.

The network of the teaching experiment, joyehuang/minimind-notes, 01-normalization, exp1_gradient_vanishing.py (2025):

    x_0 ~ N(0, 1),  x_l = norm(relu(W x_{l-1} + b)),  l = 1 ... 10

512 wide, a batch of 100. torch's own initialization draws W and b uniformly from -1/sqrt(n) to 1/sqrt(n). Here W is
also taken `gain` times larger: with sqrt(6) the signal keeps its size, with 6 it explodes.

Theory. With m = mean(x_{l-1}^2), W x + b has variance v and the ReLU of it halves the square:

    v_l = gain^2 m_{l-1} / 3 + 1 / (3 n),  m_l = v_l / 2,  std(x_l) = sqrt(v_l (1/2 - 1/(2 pi)))

For gain 1, v tends to 2 / (5 n): a floor that the bias makes. After RMSNorm m_l = 1, and the mean of a ReLU remains, so
that std(x_l) = sqrt(1 - 1/pi). A norm that centres divides by a standard deviation that is smaller by that, so that on
the way back each layer makes the gradient sqrt(pi/(pi - 1)) = 1.21 times longer: Greg Yang et al., "A Mean Field Theory
of Batch Normalization", 2019, arXiv:1902.08129.

Two things come nearer to what is measured. The bias is uniform, not normal, and makes most of what is at the floor, so
that the floor is a little lower. And a standard deviation of few numbers strays: the mean of 1 / std^2 is above 1 / the
mean of std^2, so that the gradient grows more, the fewer the numbers are that a norm takes its statistics over.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.stats
from matplotlib.figure import Figure
from tabulate import tabulate

from npnorm import norms
from npnorm.blocks import Chain
from npnorm.layers import Linear, ReLU
from npnorm.plotting import LOOK_OF, LOOKS, REFERENCE, reference
from npnorm.studies.study import Cell, Claim, Results, Settings, Study
from npnorm.tree import Layer

TEXT = "minimind-notes, 01-normalization/teaching.md, 2025, section {}"
SCRIPT = "minimind-notes, 01-normalization/exp1_gradient_vanishing.py, 2025"
YANG = "Yang et al. 2019, arXiv:1902.08129"
OURS = "npnorm, Vanishing and exploding, theory"
KEEPS = math.sqrt(6)
RMS_PLATEAU = math.sqrt(1 - 1 / math.pi)

NORMS: dict[str, Callable[[int], Layer]] = {
    "LayerNorm": norms.LayerNorm.init,
    "RMSNorm": norms.RMSNorm.init,
    "pRMSNorm": norms.PartialRMSNorm.init,
    "BatchNorm": norms.BatchNorm.init,
    "GroupNorm": lambda n: norms.GroupNorm.init(32, n),
    "ScaleNorm": lambda n: norms.ScaleNorm(np.array([math.sqrt(n)])),
    "L2Norm": lambda n: norms.L2Norm(),
    "DyT": norms.DyT.init,
    "Derf": norms.Derf.init,
}
"""The norms of activations that apply to an array of (batch, features); WeightNorm takes the weights instead."""

GRADIENT_SOURCES = {
    "LayerNorm": f"implied by {SCRIPT}: LayerNorm is about as stable",
    "RMSNorm": f"{SCRIPT}, concluded from activations",
    "BatchNorm": f"implied by {TEXT.format(1)}, which speaks of norms in general",
}
"""Who says that the gradient does not vanish."""

DOCUMENTED = {1: 1.04, 2: 0.85, 3: 0.62, 4: 0.38, 5: 0.21, 8: 0.016}
"""The standard deviation by layer, as the teaching text has it."""


def theory(gain: float, width: int, depth: int) -> np.ndarray:
    """Return std(x_l) without a norm, for l = 0 ... depth.

    Examples
    --------
    >>> theory(1.0, 512, 10).round(4)[[0, 1, 2, 10]]
    array([1.    , 0.3374, 0.1385, 0.0163])
    """
    m, found = 1.0, [1.0]
    for _ in range(depth):
        v = gain**2 * m / 3 + 1 / (3 * width)
        m = v / 2
        found.append(math.sqrt(v * (0.5 - 0.5 / math.pi)))
    return np.array(found)


def cells(settings: Settings) -> list[Cell]:
    """Return a cell for each norm, gain and seed."""
    seeds = range(settings["seeds"])
    gains, names = settings["gains"], settings["norms"]
    return [{"norm": norm, "gain": gain, "seed": s} for gain in gains for norm in names for s in seeds]


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return the standard deviation of x_l, and the length of dL/dx_l / that at the output, for l = 0 ... depth."""
    n, depth = settings["width"], settings["depth"]
    rng = np.random.default_rng(cell["seed"])  # the same weights and data for every norm
    layers = [_layer(cell, n, rng) for _ in range(depth)]
    x, dy = rng.standard_normal((2, settings["batch"], n))
    std, tape = [float(x.std())], []
    for layer in layers:
        x, saved = layer.forward(x)
        std.append(float(x.std()))
        tape.append(saved)
    lengths = [np.linalg.norm(dy)]
    for layer, saved in zip(reversed(layers), reversed(tape), strict=True):
        dy, _ = layer.backward(dy, saved)
        lengths.append(np.linalg.norm(dy))
    return {"std": std, "gradient": [float(length / lengths[0]) for length in reversed(lengths)]}


def _layer(cell: Cell, n: int, rng: np.random.Generator) -> Layer:
    bound = 1 / math.sqrt(n)
    weight, bias = rng.uniform(-bound, bound, (n, n)) * cell["gain"], rng.uniform(-bound, bound, n)
    if cell["norm"] == "WeightNorm":
        weight, _ = norms.WeightNorm(np.ones(n)).forward(weight)
    parts: dict[str, Layer] = {"linear": Linear(weight, bias), "relu": ReLU()}
    if cell["norm"] in NORMS:
        parts["norm"] = NORMS[cell["norm"]](n)
    return Chain(parts)


def claims(results: Results) -> list[Claim]:
    """Return what is said of the network, with the numbers; a number of the source or the theory is given 5 %."""
    depth = results.settings["depth"]
    plain = results.where(norm="none", gain=1.0)
    rms = results.where(norm="RMSNorm", gain=1.0).values("std")
    std, gradient = plain.values("std"), plain.values("gradient")
    larger = results.where(gain=6.0)
    floor = theory(1.0, results.settings["width"], 100)[-1]
    last = f"std of the activations after layer {depth}"
    ratio = "length of the gradient at the input / at the output"
    return [
        Claim(
            "Without a norm the standard deviation after layer 8 is 0.016.",
            TEXT.format(1),
            "std of the activations after layer 8 / 0.016",
            std[:, 8] / 0.016,
            0.95,
            1.05,
        ),
        Claim(
            "Without a norm the standard deviation falls slowly: 1.04, 0.85, 0.62, 0.38, 0.21 after layers 1 to 5.",
            TEXT.format(1),
            "std of the activations after layer 3 / 0.62",
            std[:, 3] / DOCUMENTED[3],
            0.9,
            1.1,
        ),
        Claim(
            "Without a norm the standard deviation goes on falling after layer 8.",
            f"implied by {SCRIPT}: it prints 0.00X after layer 10",
            f"{last} / after layer 8",
            std[:, depth] / std[:, 8],
            high=0.9,
        ),
        Claim(
            "Without a norm the standard deviation falls to a floor of the bias, sqrt((1/2 - 1/(2 pi)) 2/(5 n)).",
            OURS,
            f"{last} / {floor:.4f}",
            std[:, depth] / floor,
            0.95,
            1.05,
        ),
        Claim("After RMSNorm the standard deviation is about 1.0.", TEXT.format(3), last, rms[:, depth], 0.95, 1.05),
        Claim(
            "After RMSNorm the standard deviation is sqrt(1 - 1/pi) = 0.826.",
            OURS,
            last,
            rms[:, depth],
            0.95 * RMS_PLATEAU,
            1.05 * RMS_PLATEAU,
        ),
        Claim(
            "Without a norm the gradient vanishes.",
            f"{SCRIPT}, concluded from activations",
            ratio,
            gradient[:, 0],
            high=0.01,
        ),
        *(
            Claim(
                f"With {norm} the gradient does not vanish.",
                source,
                ratio,
                results.values("gradient", norm=norm, gain=1.0)[:, 0],
                low=0.1,
            )
            for norm, source in GRADIENT_SOURCES.items()
        ),
        *(
            Claim(
                f"With {norm}, which centres, the gradient grows by sqrt(pi/(pi - 1)) = 1.211 with each layer.",
                source,
                "growth of the gradient's length per layer, a factor",
                results.values("gradient", norm=norm, gain=1.0)[:, 0] ** (1 / depth),
                1.19,
                1.23,
            )
            for norm, source in (
                ("LayerNorm", f"implied by {YANG}, who show it for BatchNorm"),
                ("BatchNorm", YANG),
            )
        ),
        Claim(
            "With weights 6 times larger the signal explodes without a norm.",
            OURS,
            f"{last} / at the input",
            larger.values("std", norm="none")[:, depth] / larger.values("std", norm="none")[:, 0],
            low=100,
        ),
        Claim(
            "With weights 6 times larger the signal does not explode with RMSNorm.",
            OURS,
            last,
            larger.values("std", norm="RMSNorm")[:, depth],
            high=1,
        ),
    ]


def table(results: Results) -> list[dict[str, str]]:
    """Return a line for each norm and gain: means over the seeds."""
    depth = results.settings["depth"]
    rows = []
    for gain in results.distinct("gain"):
        for norm in results.distinct("norm"):
            std = results.values("std", norm=norm, gain=gain).mean(axis=0)
            gradient = results.values("gradient", norm=norm, gain=gain).mean(axis=0)
            rows.append(
                {
                    "weights / torch's": f"{gain:.3g}",
                    "norm": norm,
                    "std after layer 1": f"{std[1]:.3g}",
                    "after layer 4": f"{std[4]:.3g}",
                    f"after layer {depth}": f"{std[depth]:.3g}",
                    "gradient, input / output": f"{gradient[0]:.2g}",
                }
            )
    return rows


def uniform_floor() -> float:
    """Return how far down the floor is with a uniform bias, beside that with a normal one.

    At the floor 5/6 of the variance of W x + b are those of b, and W x is normal. The mean of the ReLU is found from
    H, for which H' is the mean of a ReLU of N(u, t^2); the mean square is 1/2, whatever is symmetric.

    Examples
    --------
    >>> round(uniform_floor(), 4)
    0.9723
    """
    bound, t = math.sqrt(3 * 5 / 6), math.sqrt(1 / 6)
    u = np.array([-bound, bound])
    normal = scipy.stats.norm(scale=t)
    low, high = (u**2 + t**2) / 2 * normal.cdf(u) + u * t**2 / 2 * normal.pdf(u)
    mean = (high - low) / (2 * bound)
    return math.sqrt((0.5 - mean**2) / (0.5 - 0.5 / math.pi))


def growth(count: int) -> float:
    """Return by how much a layer makes a gradient longer whose norm centres over `count` numbers.

    They are drawn, independent, as behind torch's weights: ReLUs of N(0, 1/3). The result is good to about 0.003.

    Examples
    --------
    >>> abs(growth(4000) - math.sqrt(math.pi / (math.pi - 1))) < 0.003
    True
    """
    rng = np.random.default_rng(0)
    drawn = rng.standard_normal((4_000_000 // count, count)) / math.sqrt(3)
    dy = rng.standard_normal(drawn.shape)
    norm = norms.LayerNorm.init(count)
    _, saved = norm.forward(np.maximum(drawn, 0))
    dx = norm.backward(dy, saved)[0] * (drawn > 0)
    return float(np.linalg.norm(dx) / np.linalg.norm(dy) / math.sqrt(3))  # back through W, of variance 1 / (3 n)


def parts(results: Results) -> dict[str, str]:
    """Return the two theories beside what was measured."""
    settings, depth = results.settings, results.settings["depth"]
    some = results.where(gain=1.0)
    floor = theory(1.0, settings["width"], 100)[-1]
    limit = math.sqrt(math.pi / (math.pi - 1))
    std = some.values("std", norm="none")[:, depth]
    rows = [_theories("std at the floor", "none", "a uniform bias", floor, floor * uniform_floor(), std)]
    for norm, count, what in (
        ("LayerNorm", settings["width"], "features"),
        ("BatchNorm", settings["batch"], "vectors of the batch"),
        ("GroupNorm", settings["width"] // 32, "features of a group"),
    ):
        if norm in some.distinct("norm"):
            grown = some.values("gradient", norm=norm)[:, 0] ** (1 / depth)
            over = f"statistics over {count} {what}"
            rows.append(_theories("growth of the gradient per layer", norm, over, limit, growth(count), grown))
    return {"theories": tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)}


def _theories(quantity: str, norm: str, with_: str, simple: float, nearer: float, values: np.ndarray) -> dict[str, str]:
    return {
        "quantity": quantity,
        "norm": norm,
        "theory of the claims": f"{simple:.4g}",
        "nearer theory": f"{nearer:.4g}, with {with_}",
        "measured": Claim("", "", "", values, low=0).measured,
    }


SHOWN = {
    "none": "no norm",
    "LayerNorm": "LayerNorm (BatchNorm is near)",
    "RMSNorm": "RMSNorm (ScaleNorm is the same)",
    "WeightNorm": "WeightNorm",
    "DyT": "DyT (Derf is near)",
}
"""The norms of the picture, and which others would lie on them or beside them."""


def draw(results: Results, figure: Figure) -> None:
    """Draw std and gradient by depth, a column for each gain, with the lines of the theory."""
    settings, gains = results.settings, results.distinct("gain")
    layers = np.arange(settings["depth"] + 1)
    axes = figure.subplots(2, len(gains), sharex=True, sharey="row", squeeze=False)
    for column, gain in zip(axes.T, gains, strict=True):
        for norm, label in SHOWN.items():
            for ax, name in zip(column, ("std", "gradient"), strict=True):
                mean = results.values(name, norm=norm, gain=gain).mean(axis=0)
                ax.plot(layers, mean, label=label, **LOOK_OF.get(norm, LOOKS[6]))
        expected = theory(gain, settings["width"], settings["depth"])
        column[0].plot(layers, expected, color="black", linewidth=0.8, label="theory, no norm")
        column[0].set_title(f"weights {gain:.3g} times torch's")
        column[1].set_xlabel("layer")
        column[1].set_xticks(layers[::5])
        for ax in column:
            ax.set_yscale("log")
            ax.minorticks_off()
    axes[0][0].axhline(0.0163, label="floor of the bias, 0.0163", **REFERENCE)
    reference(axes[0][-1], RMS_PLATEAU, "√(1 - 1/π) = 0.826", gap=7)
    centred = math.sqrt(math.pi / (math.pi - 1)) ** (settings["depth"] - layers)
    axes[1][0].plot(layers, centred, color="black", linestyle=":", linewidth=0.8, label="theory, norms that centre")
    axes[0][0].plot(*zip(*DOCUMENTED.items(), strict=True), "k*", markersize=6, label="as documented, no norm")
    axes[0][0].set_ylabel("standard deviation\nof activations")
    axes[1][0].set_ylabel("length of the gradient\n/ that at the output")
    lines = [*axes[0][0].get_lines(), *axes[1][0].get_lines()]
    handles = {line.get_label(): line for line in lines if not str(line.get_label()).startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)


SIZES = {"width": 512, "depth": 10, "batch": 100}

STUDY = Study(
    shows="whether activations and gradients survive ten layers, with and without each norm",
    minutes=2,
    full={**SIZES, "gains": [1.0, KEEPS, 6.0], "norms": ["none", *NORMS, "WeightNorm"], "seeds": 20},
    quick={**SIZES, "gains": [1.0, 6.0], "norms": [*SHOWN, "BatchNorm"], "seeds": 3},
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
    parts=parts,
    size=(7.2, 5.2),
)
