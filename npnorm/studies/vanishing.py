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
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from npnorm import norms
from npnorm.blocks import Chain
from npnorm.layers import Linear, ReLU
from npnorm.plotting import LOOK_OF, LOOKS, REFERENCE, reference
from npnorm.studies.study import Cell, Claim, Results, Settings, Study
from npnorm.tree import Layer

SOURCE = "minimind-notes, 01-normalization, 2025"
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
    """Return the standard deviation of x_l, and the length of dL/dx_l beside that at the top, for l = 0 ... depth."""
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
    return [
        Claim(
            "Without a norm the standard deviation after layer 8 is 0.016.",
            SOURCE,
            "measured / 0.016",
            std[:, 8] / 0.016,
            0.95,
            1.05,
        ),
        Claim(
            "Without a norm it falls slowly: 1.04, 0.85, 0.62, 0.38, 0.21 after layers 1 to 5.",
            SOURCE,
            "measured / documented, after layer 3",
            std[:, 3] / DOCUMENTED[3],
            0.9,
            1.1,
        ),
        Claim(
            "It goes on falling with more layers.",
            SOURCE,
            f"std after layer {depth} / std after layer 8",
            std[:, depth] / std[:, 8],
            high=0.9,
        ),
        Claim(
            "It falls to a floor that the bias makes, of sqrt((1/2 - 1/(2 pi)) 2/(5 n)).",
            "theory",
            f"std after layer {depth} / {floor:.4f}",
            std[:, depth] / floor,
            0.95,
            1.05,
        ),
        Claim("After RMSNorm the standard deviation is about 1.0.", SOURCE, "std", rms[:, depth], 0.95, 1.05),
        Claim(
            "After RMSNorm the standard deviation is sqrt(1 - 1/pi) = 0.826.",
            "theory",
            "std",
            rms[:, depth],
            0.95 * RMS_PLATEAU,
            1.05 * RMS_PLATEAU,
        ),
        Claim(
            "Without a norm the gradient vanishes.",
            SOURCE,
            "length at the input / at the top",
            gradient[:, 0],
            high=0.01,
        ),
        *(
            Claim(
                f"With {norm} it does not.",
                SOURCE,
                "length at the input / at the top",
                results.values("gradient", norm=norm, gain=1.0)[:, 0],
                low=0.1,
            )
            for norm in ("LayerNorm", "RMSNorm", "BatchNorm")
        ),
        *(
            Claim(
                f"With {norm}, which centres, it grows by sqrt(pi/(pi - 1)) = 1.211 with each layer.",
                "Yang et al. 2019, for BatchNorm",
                "growth of its length for each layer",
                results.values("gradient", norm=norm, gain=1.0)[:, 0] ** (1 / depth),
                1.19,
                1.23,
            )
            for norm in ("LayerNorm", "BatchNorm")
        ),
        Claim(
            "With weights 6 times larger the signal explodes without a norm.",
            "theory",
            f"std after layer {depth} / std at the input",
            larger.values("std", norm="none")[:, depth] / larger.values("std", norm="none")[:, 0],
            low=100,
        ),
        Claim(
            "With RMSNorm it does not.",
            "theory",
            f"std after layer {depth}",
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
                    "weights": f"{gain:.3g} x",
                    "norm": norm,
                    "std after 1": f"{std[1]:.3g}",
                    "after 4": f"{std[4]:.3g}",
                    f"after {depth}": f"{std[depth]:.3g}",
                    "gradient at the input / at the top": f"{gradient[0]:.2g}",
                }
            )
    return rows


SHOWN = {
    "none": "no norm",
    "LayerNorm": "LayerNorm, BatchNorm",
    "RMSNorm": "RMSNorm, ScaleNorm",
    "WeightNorm": "WeightNorm",
    "DyT": "DyT, Derf",
}
"""The norms of the picture, and what lies on them or beside them."""


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
        column[0].set_title(f"weights {gain:.3g} x torch's")
        column[1].set_xlabel("layer")
        column[1].set_xticks(layers[::5])
        for ax in column:
            ax.set_yscale("log")
            ax.minorticks_off()
    axes[0][0].axhline(0.0163, label="floor of the bias, 0.0163", **REFERENCE)
    reference(axes[0][-1], RMS_PLATEAU, "√(1 - 1/π) = 0.826", gap=7)
    growth = math.sqrt(math.pi / (math.pi - 1)) ** (settings["depth"] - layers)
    axes[1][0].plot(layers, growth, color="black", linestyle=":", linewidth=0.8, label="theory, centred")
    axes[0][0].plot(*zip(*DOCUMENTED.items(), strict=True), "k*", markersize=6, label="documented, no norm")
    axes[0][0].set_ylabel("standard deviation\nof activations")
    axes[1][0].set_ylabel("length of the gradient\n/ that at the top")
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
    size=(7.2, 5.2),
)
