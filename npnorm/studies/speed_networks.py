"""The networks whose time the study of speed measures, in npnorm: each with every norm, and without one.

    norm           the norm alone
    GRU            Cho et al. 2014, with four norms, where the code of Zhang and Sennrich has them
    transformer    Vaswani et al. 2017: a norm after each residual connection, ReLU, learned positions; all float32
    convolution    three times convolution, norm, ReLU and pooling; then the mean of each channel

In the convolutional network a norm takes the height and width of one channel, as in Zhang and Sennrich's appendix A.4;
here without gains and biases. `npnorm.studies.speed_torch` has the same networks in torch.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module
from npnorm.blocks import Chain
from npnorm.config import Config, init
from npnorm.layers import GRU, AvgPool2d, Conv2d, MaxPool2d, ReLU
from npnorm.norms import LayerNorm, PartialRMSNorm, RMSNorm
from npnorm.transformer import Transformer
from npnorm.tree import Layer, Tree

Sizes = Mapping[str, Any]
"""The kind of a network, the shape of its input x, and what else it needs to know."""

Passes = Callable[[], Any]
"""Runs a network forward and backward once, and returns all gradients."""

PARTS = {"pRMSNorm 6.25 %": 0.0625, "pRMSNorm 25 %": 0.25}
"""The partial norms, and their p."""

NORMS = ("none", "LayerNorm", "RMSNorm", *PARTS)

EPS = 1e-5


def input_of(sizes: Sizes, rng: np.random.Generator) -> np.ndarray:
    """Return the input of a network: numbers, or the ids of tokens.

    Examples
    --------
    >>> input_of({"kind": "norm", "x": [2, 3]}, np.random.default_rng(0)).shape
    (2, 3)
    """
    if sizes["kind"] == "transformer":
        return rng.integers(sizes["vocabulary"], size=tuple(sizes["x"]))
    return rng.standard_normal(tuple(sizes["x"]), np.float32)


class OverSpace:
    """A norm of the numbers of each sample and channel of (samples, channels, height, width).

    Parameters
    ----------
    norm : layer
        Over the last axis, without parameters.
    """

    params: Tree = {}
    shards: Tree = {}

    def __init__(self, norm: Layer) -> None:
        self.norm = norm

    def forward(self, x: Array) -> tuple[Any, Any]:
        """Return y of the shape of x."""
        xp = array_module(x)
        y, saved = self.norm.forward(xp.reshape(x, (*x.shape[:2], -1)))
        return xp.reshape(y, x.shape), saved

    def backward(self, dy: Array, saved: Any) -> tuple[Any, Tree]:
        """Return dx, and no gradients."""
        xp = array_module(dy)
        dx, grads = self.norm.backward(xp.reshape(dy, (*dy.shape[:2], -1)), saved)
        return xp.reshape(dx, dy.shape), grads


def norm_of(name: str, features: int | None = None) -> Layer:
    """Return a norm in float32; without the number of features it has no parameters."""
    weight = None if features is None else np.ones(features, np.float32)
    if name in PARTS:
        return PartialRMSNorm(weight, p=PARTS[name], eps=EPS, compute="float32")
    if name == "RMSNorm":
        return RMSNorm(weight, eps=EPS, compute="float32")
    return LayerNorm(weight, None if weight is None else np.zeros_like(weight), eps=EPS, compute="float32")


def norm(name: str, sizes: Sizes, rng: np.random.Generator) -> Layer:
    """Return the norm alone."""
    return norm_of(name, sizes["x"][-1])


def gru(name: str, sizes: Sizes, rng: np.random.Generator) -> Layer:
    """Return a GRU with a norm in its four places."""
    inputs, dim = sizes["x"][-1], sizes["dim"]
    params = {
        "weight_ih": _drawn(rng, 3 * dim, inputs),
        "weight_hh": _drawn(rng, 3 * dim, dim),
        "bias_ih": np.zeros(3 * dim, np.float32),
        "bias_hh": np.zeros(3 * dim, np.float32),
    }
    features = {f"{side}_{part}": n for side in ("ih", "hh") for part, n in (("gates", 2 * dim), ("candidate", dim))}
    return GRU(params, {} if name == "none" else {part: norm_of(name, n) for part, n in features.items()})


def transformer(name: str, sizes: Sizes, rng: np.random.Generator) -> Layer:
    """Return a transformer with a norm after each residual connection."""
    shape = {key: sizes[key] for key in ("vocabulary", "width", "depth", "heads")}
    config = Config(
        **shape,
        context=sizes["x"][1],
        norm="layer" if name == "LayerNorm" else "rms",
        placement="none" if name == "none" else "post",
        mlp="relu",
        positions="learned",
    )
    return Transformer(config, init(config, rng), norm=lambda params: norm_of(name, config.width))


def convolution(name: str, sizes: Sizes, rng: np.random.Generator) -> Layer:
    """Return a convolutional network."""
    layers: dict[str, Layer] = {}
    inputs, side = sizes["x"][1:3]
    for i, outputs in enumerate(sizes["channels"]):
        layers[f"convolution {i}"] = Conv2d(_drawn(rng, outputs, inputs, 3, 3), padding=1)
        if name != "none":
            layers[f"norm {i}"] = OverSpace(norm_of(name))
        layers |= {f"relu {i}": ReLU(), f"pool {i}": MaxPool2d(2)}
        inputs, side = outputs, side // 2
    return Chain({**layers, "mean": AvgPool2d(side)})


def _drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return a weight whose product with x has about the size of x."""
    return rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(math.prod(shape[1:])))


KINDS: dict[str, Callable[[str, Sizes, np.random.Generator], Layer]] = {
    "norm": norm,
    "GRU": gru,
    "transformer": transformer,
    "convolution": convolution,
}


def networks(sizes: Sizes, seed: int) -> dict[str, Passes]:
    """Return both passes of a network with each norm, and without one; all have the same weights and data."""
    x = input_of(sizes, np.random.default_rng([seed, 0]))

    def passes(name: str) -> Passes:
        layer = KINDS[sizes["kind"]](name, sizes, np.random.default_rng([seed, 1]))
        y, _ = layer.forward(x)
        return partial(_both, layer, x, np.random.default_rng([seed, 2]).standard_normal(y.shape, np.float32))

    return {name: passes(name) for name in NORMS if (name, sizes["kind"]) != ("none", "norm")}


def _both(layer: Layer, x: np.ndarray, dy: np.ndarray) -> Any:
    _, saved = layer.forward(x)
    return layer.backward(dy, saved)
