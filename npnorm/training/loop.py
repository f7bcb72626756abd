"""The training loop, the held-out loss, and text from the model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from npnorm.arrays import Array, from_numpy, to_numpy
from npnorm.layers import CrossEntropy
from npnorm.training.adamw import AdamW
from npnorm.training.clip import clip, global_norm
from npnorm.training.gradients import loss_and_grads
from npnorm.training.schedule import warmup_cosine
from npnorm.training.text import batch
from npnorm.transformer import Transformer
from npnorm.tree import leaves


@dataclass(frozen=True)
class Recipe:
    """How to train: `rows` windows of `length` characters a step; the rest in the words of AdamW and the schedule."""

    steps: int = 500
    rows: int = 16
    length: int = 128
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.1
    max_norm: float = 1.0


class Step(NamedTuple):
    """What one step of training gave."""

    loss: float  # nats for each character
    norm: float  # of the whole gradient, before clipping
    lr: float


def train(model: Transformer, ids: np.ndarray, recipe: Recipe, rng: np.random.Generator) -> Iterator[Step]:
    """Train the model in place, one step for each item that is taken.

    On a group every rank draws the same windows, from the same `rng`.

    Raises
    ------
    FloatingPointError
        If the loss or the gradient is not finite; the parameters are then as they were before the step.
    """
    optimizer = AdamW(model.params, weight_decay=recipe.weight_decay)
    for step in range(recipe.steps):
        lr = warmup_cosine(step, recipe.steps, recipe.warmup, recipe.lr)
        inputs, targets = (_to_device(a, model) for a in batch(ids, recipe.rows, recipe.length, rng))
        with np.errstate(all="ignore"):  # what is not finite is found below
            loss, grads = loss_and_grads(model, inputs, targets)
            norm = global_norm(grads, model.shards, model.group)
        if not math.isfinite(norm + float(loss)):
            raise FloatingPointError(
                f"step {step}: the loss is {float(loss)}, the norm of the gradient {norm}. "
                "Take a lower learning rate or a longer warm-up."
            )
        optimizer.step(clip(grads, norm, recipe.max_norm), lr)
        yield Step(float(loss), norm, lr)


def evaluate(model: Transformer, ids: np.ndarray, rows: int, length: int) -> float:
    """Return the mean loss over all windows of `length` that follow each other in `ids`, in nats for each character."""
    count = (len(ids) - 1) // length
    if count < 1:
        raise ValueError(f"evaluate: {len(ids)} ids hold no window of {length} and its next id.")
    inputs, targets = (ids[shift : shift + count * length].reshape(count, length) for shift in (0, 1))
    loss_layer, total = CrossEntropy(group=model.group), 0.0
    for start in range(0, count, rows):
        some = slice(start, start + rows)
        logits, _ = model.forward(_to_device(inputs[some], model))
        loss, _ = loss_layer.forward(logits, _to_device(targets[some], model))
        total += float(loss) * len(inputs[some])
    return total / count


def generate(
    model: Transformer, ids: np.ndarray, count: int, vocabulary: int, rng: np.random.Generator, temperature: float = 0.8
) -> np.ndarray:
    """Return `ids` of shape (length,) continued by `count` drawn ids below `vocabulary`.

    On a group every rank draws the same, from the same `rng`.
    """
    if not temperature > 0:
        raise ValueError(f"generate: temperature is {temperature}. It must be greater than 0; 0.01 is almost greedy.")
    for _ in range(count):
        window = ids[None, -model.config.context :]
        logits, _ = model.forward(_to_device(window, model))
        last = to_numpy(model.group.gather(logits[:, -1, :], axis=-1, label="generate"))[0, :vocabulary]
        x = last.astype(np.float64) / temperature
        p = np.exp(x - x.max())
        ids = np.append(ids, rng.choice(vocabulary, p=p / p.sum()))
    return ids


def _to_device(values: np.ndarray, model: Transformer) -> Array:
    return from_numpy(values, next(leaves(model.params))[1])
