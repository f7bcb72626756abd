"""Holds a transformer that is split over the ranks against the same one on a single rank."""

from collections.abc import Callable

import numpy as np
from against_serial import Table, count

from npnorm.config import Config, init
from npnorm.layers import CrossEntropy
from npnorm.mpi import Ranks
from npnorm.transformer import Transformer
from npnorm.tree import Tree, leaves, shard


def check_transformer(group: Ranks, make_config: Callable[..., Config]) -> None:
    """Compare loss and all gradients of a small model in float64, and print the table of its messages.

    12 heads, and sizes that are multiples of 12, so that 1, 2, 3, 4 and 6 ranks can share them.
    """
    config = make_config(48, width=48, depth=2, heads=12, hidden=96, context=16)
    rng = np.random.default_rng(0)  # the same arrays on every rank
    params = init(config, rng, "float64")
    ids, targets = rng.integers(0, config.vocabulary, (2, 3, 16))

    serial, serial_loss = Transformer(config, params), CrossEntropy()
    logits, saved = serial.forward(ids)
    loss, saved_loss = serial_loss.forward(logits, targets)
    _, grads = serial.backward(serial_loss.backward(1.0, saved_loss), saved)

    title = f"{config.placement}-{config.norm} transformer, {config.depth} blocks, on {count(group.size)}; float64"
    table = Table(group, title)
    model, model_loss = Transformer(config, params, group=group), CrossEntropy(group=group)
    with table.step("forward"):
        my_logits, saved = model.forward(ids)
    with table.step("loss"):
        my_loss, saved_loss = model_loss.forward(my_logits, targets)
    with table.step("backward"):
        _, my_grads = model.backward(model_loss.backward(1.0, saved_loss), saved)
    table.compare("forward", logits=(my_logits, group.shard(logits, -1)))
    table.compare("loss", loss=(my_loss, loss))
    table.compare("backward", gradients=(_vector(my_grads), _vector(shard(grads, model.shards, group))))
    table.finish()


def _vector(tree: Tree) -> np.ndarray:
    """Return all arrays of a tree as one, since some gradients are exactly 0 but for rounding."""
    return np.concatenate([array.ravel() for _, array in sorted(leaves(tree), key=lambda leaf: leaf[0])])
