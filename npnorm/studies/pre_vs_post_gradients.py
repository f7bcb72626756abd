"""The gradients of each layer before any training, by where the norm stands: a part of the study pre_vs_post.

Ruibin Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020, arXiv:2002.04745. With matrices
drawn by Xavier's normal distribution, theorem 1 bounds the gradient of W2, the second MLP matrix, in the last of L
layers:

    Post-LN: O(d sqrt(ln d))          Pre-LN: O(d sqrt(ln d / L))

There x grows with L, and the last norm divides by its size. Of the other layers they expect that in Post-LN gradients
decay towards the input, and that in Pre-LN they are nearly alike. Two settings:

    theorem     of section 3.3: random tokens, one head, square matrices, no positions, queries and keys 0, so that
                attention is a mean
    gradient    of section 3.4: a language model, here of characters
"""

from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from npnorm.config import Config
from npnorm.plotting import LOOK_OF_PLACEMENT
from npnorm.studies import small_transformers as small
from npnorm.studies.study import Cell, Claim, Results, Settings
from npnorm.training import batch, loss_and_grads
from npnorm.transformer import Transformer

XIONG = "Xiong et al., arXiv:2002.04745"

PLACEMENTS = {"post": "Post-LN", "pre": "Pre-LN", "res-post": "OLMo-2", "sandwich": "sandwich", "deep": "DeepNorm"}

PARTS = {"theorem": "in the theorem's setting", "gradient": "in a language model"}


def cells(settings: Settings) -> list[Cell]:
    """Return a cell for each setting, placement, depth and draw."""
    varied = product(PARTS, PLACEMENTS, settings["gradient depths"], range(settings["draws"]))
    return [
        {"part": part, "placement": placement, "depth": depth, "seed": seed} for part, placement, depth, seed in varied
    ]


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return the Frobenius norm of the gradient of each layer's W2, from the input to the output."""
    part, depth, placement = cell["part"], cell["depth"], cell["placement"]
    weights, batches = np.random.default_rng([cell["seed"], 0]), np.random.default_rng([cell["seed"], 1])
    rows, length, n = settings["rows"][part], settings["length"][part], settings["width"][part]
    sizes: Any = {"width": n, "depth": depth, "context": length, "norm": "layer", "placement": placement, "mlp": "relu"}
    if part == "theorem":
        config = Config(small.VOCABULARY, **sizes, heads=1, hidden=n, positions="none", causal=False)
        ids, targets = batches.integers(0, small.VOCABULARY, (2, rows, length))
    else:
        data = small.text(settings["held out"])
        config = Config(data.vocabulary, **sizes, heads=4, positions="learned")
        ids, targets = batch(data.learn, rows, length, batches)
    params = small.xavier_init(config, weights)
    if part == "theorem":
        for block, name in product(params["blocks"].values(), ("q_proj", "k_proj")):
            block["attention"]["sublayer"][name]["weight"][...] = 0
    _, grads = loss_and_grads(Transformer(config, params), ids, targets)
    layers = [grads["blocks"][str(i)]["mlp"]["sublayer"]["down_proj"] for i in range(depth)]
    return {"gradient": [float(np.linalg.norm(layer["weight"])) for layer in layers]}


def by_layer(results: Results, placement: str, depth: int, part: str = "gradient") -> np.ndarray:
    """Return the norms of the gradients by seed and layer."""
    return results.values("gradient", part=part, placement=placement, depth=depth)


def exponent(results: Results, placement: str, part: str) -> np.ndarray:
    """Return p of gradient ~ L^p in the last of L layers, for each seed: the slope of a line through the logarithms."""
    depths = results.settings["gradient depths"]
    last = np.log([by_layer(results, placement, depth, part)[:, -1] for depth in depths])
    return np.polyfit(np.log(depths), last, 1)[0]


def claims(results: Results) -> list[Claim]:
    """Return what is said of the gradients, with the numbers."""
    profile, found = results.settings["profile"], []
    for part, where in PARTS.items():
        post, pre = (exponent(results, placement, part) for placement in ("post", "pre"))
        slope = f"p of gradient ~ L^p, {where}"
        found += [
            Claim(
                f"In Post-LN the gradient of the last layer does not change with L, {where}.",
                XIONG,
                slope,
                post,
                -0.1,
                0.1,
            ),
            Claim(
                f"In Pre-LN the gradient of the last layer falls as 1 / sqrt(L), {where}.",
                XIONG,
                slope,
                pre,
                -0.65,
                -0.35,
            ),
        ]
    post, pre = (by_layer(results, placement, profile) for placement in ("post", "pre"))
    ends = f"gradient of the first layer / of the last, {profile} layers"
    times = f"gradient of the last layer, Post-LN / Pre-LN, {profile} layers"
    return [
        *found,
        Claim(
            "In Post-LN the gradient of the last layer is much larger than in Pre-LN.",
            XIONG,
            times,
            post[:, -1] / pre[:, -1],
            low=2,
        ),
        Claim("In Post-LN gradients decay towards the input.", XIONG, ends, post[:, 0] / post[:, -1], high=0.5),
        Claim("In Pre-LN the gradients of all layers are nearly alike.", XIONG, ends, pre[:, 0] / pre[:, -1], 0.5, 2),
    ]


def table(results: Results) -> list[dict[str, str]]:
    """Return a line for each setting and placement: means over the seeds, and of p the standard deviation."""
    rows, profile, depths = [], results.settings["profile"], results.settings["gradient depths"]
    for part, (placement, name) in product(PARTS, PLACEMENTS.items()):
        first = f"{by_layer(results, placement, profile, part)[:, 0].mean():.3g}"
        last = {f"last of {d}": f"{by_layer(results, placement, d, part)[:, -1].mean():.3g}" for d in depths}
        p = exponent(results, placement, part)
        run = {"setting": part.replace("gradient", "language model"), "placement": name, f"first of {profile}": first}
        rows.append({**run, **last, "p of L^p": f"{p.mean():.2f} ± {p.std(ddof=1):.2f}"})
    return rows


def draw(results: Results, ax: Axes) -> None:
    """Draw the gradient by layer in the language model."""
    depth, ticks = results.settings["profile"], (0.1, 0.2, 0.5, 1, 2, 5)
    for placement, name in PLACEMENTS.items():
        mean = by_layer(results, placement, depth).mean(axis=0)
        ax.plot(np.arange(1, depth + 1), mean, label=name, markevery=3, **LOOK_OF_PLACEMENT[placement])
    ax.set(title="before training", xlabel=f"layer of {depth}", ylabel="norm of the gradient of W2", yscale="log")
    ax.set_yticks(ticks, map(str, ticks))
    ax.minorticks_off()
