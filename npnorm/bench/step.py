"""A step of training a small transformer: loss, gradients, clipping, AdamW. The same in npnorm and in torch."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npnorm import Config, Transformer
from npnorm.bench.grid import Sizes
from npnorm.bench.timing import Contender
from npnorm.bench.torch_step import ADAM_EPS, BETAS, DECAY, MAX_NORM, torch_step
from npnorm.config import init
from npnorm.training import AdamW, clip, global_norm, loss_and_grads
from npnorm.tree import Tree, map_tree

LR = 1e-3
CHECKED = 3
"""Steps whose losses are compared before anything is timed."""

DIGITS = 5
"""To which they must agree."""

MODELS = ("LayerNorm, GELU", "RMSNorm, SwiGLU")
"""Two transformers, both with the norm before each sub-layer: that of 2019, and `Config.modern`."""


def config_of(model: str, sizes: Sizes) -> Config:
    """Return the settings of one of MODELS.

    Examples
    --------
    >>> config_of("RMSNorm, SwiGLU", Sizes()).norm
    'rms'
    """
    chosen: dict[str, Any] = {
        "depth": sizes.depth,
        "width": sizes.width,
        "heads": sizes.heads,
        "context": sizes.length,
    }
    if model == MODELS[0]:
        return Config.original(sizes.vocabulary, placement="pre", tied=False, **chosen)
    return Config.modern(sizes.vocabulary, **chosen)


def own_step(config: Config, params: Tree, ids: np.ndarray, lr: float) -> Callable[[], float]:
    """Return a function that takes a step of training on ids of shape (batch, length + 1), and returns the loss."""
    model = Transformer(config, map_tree(np.copy, params))
    optimizer = AdamW(model.params, betas=BETAS, eps=ADAM_EPS, weight_decay=DECAY)
    inputs, targets = ids[:, :-1], ids[:, 1:]

    def step() -> float:
        loss, grads = loss_and_grads(model, inputs, targets)
        norm = global_norm(grads, model.shards, model.group)
        optimizer.step(clip(grads, norm, MAX_NORM), lr)
        return float(loss)

    return step


def steps(model: str, sizes: Sizes, peers: Sequence[str]) -> dict[str, Contender]:
    """Return the contenders of a training step by name, after a few steps that hold their losses together.

    Raises
    ------
    RuntimeError
        If the losses do not agree.
    """
    config, rng = config_of(model, sizes), np.random.default_rng(0)
    params = init(config, rng)
    ids = rng.integers(0, sizes.vocabulary, (sizes.batch, sizes.length + 1))
    found = {"npnorm": own_step(config, params, ids, LR)}
    for name in ("torch", "compile"):
        if name in peers:
            found[name] = torch_step(config, params, ids, LR, compiled=name == "compile")
    agree({name: [step() for _ in range(CHECKED)] for name, step in found.items()})
    return {name: Contender(step) for name, step in found.items()}


def agree(losses: dict[str, list[float]]) -> None:
    """Raise unless all sequences of losses are the same to DIGITS digits.

    Examples
    --------
    >>> agree({"ours": [3.0, 2.0], "theirs": [3.000001, 2.0]})
    """
    (first, ours), *others = losses.items()
    for name, theirs in others:
        if not np.allclose(ours, theirs, rtol=10.0**-DIGITS, atol=0):
            raise RuntimeError(f"The training steps of {first} and {name} do not agree; losses: {ours} and {theirs}.")
