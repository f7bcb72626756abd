"""The small transformers of `norm_comparison` and `pre_vs_post`: their first parameters, their data, their training.

Two kinds. `as_written` is the network of the teaching experiments, joyehuang/minimind-notes, 01-normalization, 2025: no
mask, no positions, no norm before the head, trained on random tokens. The other is a language model, a `Transformer`,
trained on the characters of Python's own language reference. All randomness of a run follows from its seed: the same
seed is the same first weights and the same data, wherever the norms stand.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np

from npnorm.blocks import Chain
from npnorm.config import Config, init
from npnorm.layers import CrossEntropy, Linear
from npnorm.training import AdamW, Characters, Recipe, clip, evaluate, global_norm, language_reference, train
from npnorm.training.text import split
from npnorm.transformer import Transformer
from npnorm.tree import Tree, leaves

VOCABULARY = 1000
"""Random tokens of the teaching experiments."""


def torch_init(config: Config, rng: np.random.Generator) -> Tree:
    """Return parameters as the constructors of torch draw them.

    nn.Embedding draws from N(0, 1); nn.Linear draws weight and bias from U(-b, b) with b = 1 / sqrt(inputs), and so
    does nn.MultiheadAttention the weight of its output. Its queries, keys and values are one matrix of 3 n rows, from
    U(-b, b) with Xavier's b = sqrt(6 / (n + 3 n)); its biases are 0. Norms are ones and zeros.
    """
    n, hidden = config.width, config.hidden_features
    xavier, linear = math.sqrt(6 / (4 * n)), 1 / math.sqrt(n)
    bounds = {
        "q_proj.weight": xavier,
        "k_proj.weight": xavier,
        "v_proj.weight": xavier,
        "o_proj.weight": linear,
        "up_proj.weight": linear,
        "up_proj.bias": linear,
        "down_proj.weight": 1 / math.sqrt(hidden),
        "down_proj.bias": 1 / math.sqrt(hidden),
        "head.weight": linear,
    }
    params = init(config, rng)  # of these the norms, and the biases of attention, stay
    for name, array in leaves(params):
        last = ".".join(name.split(".")[-2:])
        if last in ("embedding.weight", "positions.weight"):
            array[...] = rng.standard_normal(array.shape)
        elif last in bounds:
            array[...] = rng.uniform(-bounds[last], bounds[last], array.shape)
    return params


def xavier_init(config: Config, rng: np.random.Generator) -> Tree:
    """Return parameters drawn as in Ruibin Xiong et al., 2020, arXiv:2002.04745, section 3.3.

    A matrix is drawn from N(0, 2 / (inputs + outputs)), biases are 0; here the embeddings are drawn from N(0, 1), the
    head from N(0, 1 / inputs). With placement="deep" all matrices but queries and keys are smaller by (8 depth)^(-1/4).
    """
    gain = (8 * config.depth) ** -0.25 if config.placement == "deep" else 1.0
    params = init(config, rng)  # of these norms and biases stay
    for name, array in leaves(params):
        if array.ndim < 2:
            continue
        layer, (outputs, inputs) = name.split(".")[-2], array.shape
        std = math.sqrt(2 / (inputs + outputs))
        std = {"embedding": 1.0, "positions": 1.0, "head": inputs**-0.5, "q_proj": std, "k_proj": std}.get(
            layer, gain * std
        )
        array[...] = std * rng.standard_normal(array.shape)
    return params


# The teaching experiments


def as_written(config: Config, rng: np.random.Generator) -> Chain:
    """Return the network of the teaching experiments: no norm before the head, which has a bias."""
    model = Transformer(config, torch_init(config, rng))
    bound = 1 / math.sqrt(config.width)
    head = Linear(model.head.params["weight"], rng.uniform(-bound, bound, config.vocabulary).astype("float32"))
    return Chain({"embedding": model.embedding, "blocks": model.stack.layers["blocks"], "head": head})


def train_on_random_tokens(
    model: Chain, steps: int, rows: int, length: int, lr: float, max_norm: float, rng: np.random.Generator
) -> np.ndarray:
    """Train as the teaching experiments do, and return the loss of each step: not a number once one was not finite.

    Each step has new random tokens; the target of a position is the token of the next, of the last that of the first.
    Adam has torch's betas and no decay, and lr is constant.
    """
    optimizer, losses = AdamW(model.params, betas=(0.9, 0.999), weight_decay=0.0), np.full(steps, math.nan)
    for step in range(steps):
        ids = rng.integers(0, VOCABULARY, (rows, length))
        with np.errstate(all="ignore"):  # what is not finite is found below
            logits, saved = model.forward(ids)
            loss, saved_loss = CrossEntropy().forward(logits, np.roll(ids, -1, axis=1))
            if not math.isfinite(loss):
                break
            losses[step] = loss
            _, grads = model.backward(CrossEntropy().backward(1.0, saved_loss), saved)
            optimizer.step(clip(grads, global_norm(grads, model.shards), max_norm), lr)
    return losses


# Text


MARGIN = 0.2
"""A model trains if it ends so many nats below what needs no context. It was chosen before anything was measured."""


class Text(NamedTuple):
    """Python's own language reference as characters."""

    vocabulary: int
    learn: np.ndarray
    held_out: np.ndarray
    no_context: float
    """The loss on what is held out of the frequencies of the characters, in nats."""


@functools.cache
def text(held_out: int) -> Text:
    """Return the text: it is learned but for the last tenth, and the first so many characters of that are held out."""
    whole = language_reference()
    characters = Characters(whole)
    learn, rest = split(characters.encode(whole), held_out)
    counts = np.bincount(learn, minlength=characters.size) + 1
    rest = rest[: held_out + 1]
    return Text(characters.size, learn, rest, float(-np.log(counts / counts.sum())[rest[1:]].mean()))


def train_on_text(model: Transformer, data: Text, recipe: Recipe, rng: np.random.Generator) -> dict[str, Any]:
    """Train on windows of the text, and return the loss on what is held out, in nats for each character.

    It is at most ln(vocabulary), chance: of a run that diverged, too. "trains" says whether it is MARGIN below
    "no context", the loss that needs none; "finite steps", how many steps had a finite loss and gradient.
    """
    finite, held_out = 0, math.inf
    try:
        for _ in train(model, data.learn, recipe, rng):
            finite += 1
        with np.errstate(all="ignore"):  # what is not finite counts as chance
            held_out = evaluate(model, data.held_out, recipe.rows, recipe.length)
    except FloatingPointError:  # the loss, or the gradient, is not finite
        pass
    loss = float(np.fmin(held_out, math.log(data.vocabulary)))
    judged = {"no context": data.no_context, "trains": loss < data.no_context - MARGIN}
    return {"held-out loss": loss, "finite steps": finite, **judged}
