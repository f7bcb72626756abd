"""The command that trains a language model on text and shows what came of it, on one rank or on many."""

import argparse
import contextlib
import math
import os
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm

from npnorm.arrays import Array
from npnorm.config import Config, init
from npnorm.group import Group
from npnorm.layer import checksum, leaves
from npnorm.training.loop import Recipe, evaluate, generate, train
from npnorm.training.text import Characters, language_reference, read, split, unigram_entropy
from npnorm.transformer import Transformer

PADDING = 16
"""The vocabulary is rounded up to a multiple of this and of the number of ranks, so that the ranks can share it."""


def arguments(group: Group, description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings of the command line; only rank 0 prints help or complains."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--text", metavar="FILE", help="UTF-8 text to learn; default: Python's own language reference")
    add("--steps", type=_positive, default=Recipe.steps, help="steps of training")
    add("--seed", type=int, default=0, help="of the parameters, the windows and the sample")
    add("--rows", type=_positive, default=Recipe.rows, help="windows in a step")
    add("--context", type=_positive, default=Recipe.length, help="characters in a window")
    add("--width", type=_positive, default=Config.width, help="features of a position")
    add("--depth", type=_positive, default=Config.depth, help="blocks")
    add("--heads", type=_positive, default=Config.heads, help="heads of attention; the ranks must divide them")
    add("--lr", type=float, default=Recipe.lr, help="the highest learning rate")
    add("--sample", type=int, default=400, help="characters to write at the end")
    if group.rank == 0:
        return parser.parse_args(argv)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return parser.parse_args(argv)


def train_on_text(group: Group, make_config: Callable[..., Config], settings: argparse.Namespace) -> float:
    """Train a transformer on text, report on rank 0, and return the held-out loss in nats for each character.

    Parameters
    ----------
    group : Group
    make_config : callable
        `Config.original` or `Config.modern`.
    settings : argparse.Namespace
        As `arguments` returns them.
    """
    speak = print if group.rank == 0 else lambda *_, **__: None
    text = read(settings.text) if settings.text else language_reference()
    group.agree(f"a text of {len(text)} characters, checksum {zlib.crc32(text.encode()):08x}")
    characters = Characters(text)
    ids = characters.encode(text)
    learn, held_out = split(ids, settings.context)
    entropy = unigram_entropy(ids)

    multiple = math.lcm(PADDING, group.size)
    config = make_config(
        -(-characters.size // multiple) * multiple,
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        context=settings.context,
    )
    params = init(config, np.random.default_rng(settings.seed))
    model = Transformer(config, params, group=group)
    whole = sum(array.size for _, array in leaves(params))
    mine = sum(array.size for _, array in leaves(model.params))
    name, c = settings.text or "the Python language reference", config
    speak(f"text    {name}: {len(text):,} characters, {characters.size} distinct")
    speak(f"model   {c.placement}-{c.norm} norm, {c.mlp}, {c.positions} positions: {whole:,} parameters")
    speak(f"ranks   {group.size}; this one holds {mine:,} parameters")
    speak(f"losses  in nats for each character; unigram entropy of the text {entropy:.3f}", flush=True)

    warmup = min(Recipe.warmup, settings.steps // 10 + 1)
    recipe = Recipe(settings.steps, settings.rows, settings.context, settings.lr, warmup)
    rng = np.random.default_rng([settings.seed, 1])
    each = recipe.rows * recipe.length
    bar = tqdm(total=recipe.steps * each, unit=" tokens", unit_scale=True, disable=group.rank > 0, dynamic_ncols=True)
    with bar:
        for step in train(model, learn, recipe, rng):
            bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
            bar.update(each)
    group.agree(f"the replicated parameters after training, checksum {checksum(_replicated(model)):08x}")

    loss = evaluate(model, held_out, recipe.rows, recipe.length)
    speak(f"held-out loss {loss:.3f} (unigram entropy {entropy:.3f}; the last tenth of the text)")
    if settings.sample:
        rng = np.random.default_rng([settings.seed, 2])
        sample = generate(model, held_out[:1], settings.sample, characters.size, rng)
        speak(f"sample\n{characters.decode(sample)}", flush=True)
    return loss


def _replicated(model: Transformer) -> dict[str, Array]:
    """Return the arrays that must have the same bits on every rank."""
    axes = dict(leaves(model.shards))
    return {name: array for name, array in leaves(model.params) if axes[name] is None}


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number
