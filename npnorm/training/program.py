"""The command that trains a language model on text and shows what came of it, on one rank or on many."""

import argparse
import contextlib
import math
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from npnorm.arrays import Array, empty_on, from_numpy
from npnorm.config import Config, init, layout
from npnorm.group import Group
from npnorm.training.loop import Recipe, evaluate, generate, train
from npnorm.training.text import Characters, language_reference, read, split, unigram_entropy
from npnorm.transformer import Transformer
from npnorm.tree import checksum, leaves, map_tree

PADDING = 16
"""The vocabulary is rounded up to a multiple of this and of the number of ranks, so that the ranks can share it."""


def arguments(group: Group, description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the settings of the command line; only rank 0 prints help or complains."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--text", metavar="FILE", help="UTF-8 text to learn; default: Python's own language reference")
    add("--steps", type=positive_integer, default=Recipe.steps, help="steps of training")
    add("--seed", type=natural_number, default=0, help="of the parameters, the windows and the sample")
    add("--rows", type=positive_integer, default=Recipe.rows, help="windows in a step")
    add("--context", type=positive_integer, default=Recipe.length, help="characters in a window")
    add("--width", type=positive_integer, default=Config.width, help="features of a position")
    add("--depth", type=positive_integer, default=Config.depth, help="blocks")
    add("--heads", type=positive_integer, default=Config.heads, help="heads of attention; the ranks must divide them")
    add("--lr", type=positive_number, default=Recipe.lr, help="the highest learning rate")
    add("--sample", type=natural_number, default=400, help="characters to write at the end")
    add("--device", choices=("cpu", "gpu"), default="cpu", help="where the arrays lie; a GPU takes CuPy")
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
    try:
        characters, learn, held_out, model = _prepare(group, make_config, settings)
    except (ImportError, OSError, ValueError) as problem:  # what is asked for cannot be had: no place to show
        raise SystemExit(f"error: {problem}") from problem
    speak = print if group.rank == 0 else lambda *_, **__: None
    entropy = unigram_entropy(np.concatenate([learn, held_out]))
    name, c = settings.text or "the Python language reference", model.config
    whole = sum(math.prod(leaf.shape) for _, leaf in leaves(layout(c)))
    mine = sum(array.size for _, array in leaves(model.params))
    speak(f"text    {name}: {len(learn) + len(held_out):,} characters, {characters.size} distinct")
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
    group.require_same(f"the replicated parameters after training, checksum {checksum(_replicated(model)):08x}")

    loss = evaluate(model, held_out, recipe.rows, recipe.length)
    speak(f"held-out loss {loss:.3f} (unigram entropy {entropy:.3f}; the last tenth of the text)", flush=True)
    if settings.sample:
        rng = np.random.default_rng([settings.seed, 2])
        sample = generate(model, held_out[:1], settings.sample, characters.size, rng)
        speak(f"sample, after the first held-out character\n{characters.decode(sample)}", flush=True)
    return loss


def _prepare(
    group: Group, make_config: Callable[..., Config], settings: argparse.Namespace
) -> tuple[Characters, np.ndarray, np.ndarray, Transformer]:
    """Return the vocabulary, the ids to learn and those held out, and the model with its first parameters."""
    like = empty_on(settings.device)
    text = language_reference() if settings.text is None else read(settings.text)
    group.require_same(f"a text of {len(text)} characters, checksum {zlib.crc32(text.encode()):08x}")
    characters = Characters(text)
    learn, held_out = split(characters.encode(text), settings.context)
    multiple = math.lcm(PADDING, group.size)
    config = make_config(
        -(-characters.size // multiple) * multiple,
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        context=settings.context,
    )
    params = map_tree(lambda a: from_numpy(a, like), init(config, np.random.default_rng(settings.seed)))
    return characters, learn, held_out, Transformer(config, params, group=group)


def _replicated(model: Transformer) -> dict[str, Array]:
    """Return the arrays that must have the same bits on every rank."""
    axes = dict(leaves(model.shards))
    return {name: array for name, array in leaves(model.params) if axes[name] is None}


def positive_integer(text: str) -> int:
    """Return the number that the text stands for, or raise an error that argparse tells."""
    return _number(int(text), text, "an integer, at least 1", lambda number: number >= 1)


def natural_number(text: str) -> int:
    """Return the number that the text stands for, or raise an error that argparse tells."""
    return _number(int(text), text, "an integer, at least 0", lambda number: number >= 0)


def positive_number(text: str) -> float:
    """Return the number that the text stands for, or raise an error that argparse tells."""
    return _number(float(text), text, "finite and above 0", lambda number: 0 < number < math.inf)


def _number(number: Any, text: str, what: str, fits: Callable[[Any], bool]) -> Any:
    if not fits(number):
        raise argparse.ArgumentTypeError(f"it is {text}; it must be {what}")
    return number
