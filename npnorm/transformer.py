"""The autograd-free transformer: embedding, blocks, final norm, head.

One code, many settings. `Config.original` is the transformer with layer normalization after each residual connection,
GELU and learned positions; `Config.modern` has root mean square normalization before each sub-layer, a gated MLP and
rotary positions. With either, `kv_heads=` lets queries share keys and values, and `placement=` says where norms stand.

    x      = embedding(ids)  (+ positions)
    x      = block(x)             for each block: attention, then MLP, each within a placement of `npnorm.blocks`
    x      = norm(x)              where the placement does not normalize x itself (`Config.final_norm`)
    logits = x W^T                W: the head's own matrix, or the embedding's table (tied)

On a group heads, hidden features and vocabulary are split; activations and norms are replicated. Communicated: forward
one sum for the embedding and one for each sub-layer; backward one for each sub-layer and one for the head. The logits
are a shard of the vocabulary, as `CrossEntropy(group=group)` takes them.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from npnorm.arrays import Array, dtype_name
from npnorm.blocks import Chain, DeepNorm, PostNorm, PreNorm, Residual, ResPostNorm, SandwichNorm
from npnorm.checks import check_module
from npnorm.config import Config, layout
from npnorm.group import SOLO, Group, errors_on_all_ranks, shard_slice
from npnorm.layers import MLP, Attention, Embedding, Linear, Positions, ReLU, Rotary, SwiGLU
from npnorm.norms import LayerNorm, RMSNorm
from npnorm.norms.options import Compute
from npnorm.tree import Layer, Tree, checksum, hand_down, leaves, map_tree, show_shapes

PLACEMENTS: dict[str, Callable[..., Layer]] = {
    "none": Residual,
    "post": PostNorm,
    "pre": PreNorm,
    "res-post": ResPostNorm,
    "sandwich": SandwichNorm,
    "deep": DeepNorm,
}
MLPS: dict[str, Callable[..., Layer]] = {"relu": partial(MLP, activation=ReLU()), "gelu": MLP, "swiglu": SwiGLU}
"""What `Config.placement` and `Config.mlp` name."""


@show_shapes
class Saved(NamedTuple):
    """What each part saved."""

    embedding: Any
    stack: Any
    head: Any


class Transformer:
    """A language model: logits of the next token at each position.

    Parameters
    ----------
    config : Config
    params : tree of arrays
        Whole arrays, as `npnorm.config.init` returns them. A rank keeps copies of its shards.
    group : Group
        The ranks over which heads, hidden features and vocabulary are split equally.
    norm : function or None
        Makes each norm of its parameters, a dict with "weight" and, for config.norm="layer", "bias"; None: what
        config.norm names, with config.eps. So any layer over features can stand in the place of the norms:
        `norm=lambda params: PartialRMSNorm(**params, p=0.25)`. It may add parameters of its own; `params` has them. On
        a group each rank calls it, with copies of whole arrays, and has to make the same layer.

    Raises
    ------
    ValueError
        On every rank, if the ranks do not divide heads, hidden features or vocabulary.
    """

    def __init__(
        self, config: Config, params: Tree, *, group: Group = SOLO, norm: Callable[[Tree], Layer] | None = None
    ) -> None:
        with errors_on_all_ranks(group):
            group.require_same(f"Transformer {config}")
            _check_params(config, params)
            if group.size > 1:
                group.require_same(f"Transformer of whole arrays, checksum {checksum(params):08x}")
        shard_slice(group, config.vocabulary, f"a vocabulary of {config.vocabulary}")

        def norm_of(params: Tree) -> Layer:
            held = map_tree(lambda a: group.shard(a, None), params)
            with errors_on_all_ranks(group):
                return norm(held) if norm else _norm(config, held)

        self.config = config
        self.group = group
        self.embedding = Embedding(group.shard(params["embedding"]["weight"], 0), group=group)
        parts: dict[str, Layer] = {}
        if config.positions == "learned":
            parts["positions"] = Positions(group.shard(params["positions"]["weight"], None))
        parts["blocks"] = Chain({str(i): self._block(params["blocks"][str(i)], norm_of) for i in range(config.depth)})
        if config.final_norm:
            parts["norm"] = norm_of(params["norm"])
        self.stack = Chain(parts)
        table = self.embedding.params["weight"] if config.tied else group.shard(params["head"]["weight"], 0)
        self.head = Linear(table)  # a column split: it holds this rank's part of the vocabulary
        self.params = {"embedding": self.embedding.params, **self.stack.params}
        self.shards = {"embedding": self.embedding.shards, **self.stack.shards}
        if not config.tied:
            self.params["head"] = self.head.params
            self.shards["head"] = {"weight": 0}

    def _block(self, params: Tree, norm_of: Callable[[Tree], Layer]) -> Layer:
        c, group = self.config, self.group
        rotary = Rotary() if c.positions == "rotary" else None
        attention = Attention(
            params["attention"]["sublayer"], c.heads, c.kv_heads, rotary, causal=c.causal, group=group
        )
        mlp = MLPS[c.mlp](params["mlp"]["sublayer"], group=group)
        return Chain(
            {
                "attention": self._place(params["attention"], attention, norm_of),
                "mlp": self._place(params["mlp"], mlp, norm_of),
            }
        )

    def _place(self, params: Tree, sublayer: Layer, norm_of: Callable[[Tree], Layer]) -> Layer:
        c = self.config
        norms = {name: norm_of(part) for name, part in params.items() if name != "sublayer"}
        alpha = {"alpha": (2 * c.depth) ** 0.25} if c.placement == "deep" else {}
        return PLACEMENTS[c.placement](**norms, sublayer=sublayer, **alpha)

    def __repr__(self) -> str:
        shared = map_tree(lambda axis: 1 if axis is None else self.group.size, self.shards)
        sizes = map_tree(lambda array, ranks: math.prod(array.shape) * ranks, self.params, shared)
        return f"Transformer({self.config!r}, {sum(size for _, size in leaves(sizes)):,} parameters)"

    def forward(self, ids: Array) -> tuple[Any, Saved]:
        """Return logits of shape (batch, length, vocabulary of this rank) for ids of shape (batch, length)."""
        with errors_on_all_ranks(self.group):
            check_module("Transformer", ids, self.params["embedding"])
            if ids.ndim != 2 or not 0 < ids.shape[1] <= self.config.context:
                raise ValueError(
                    f"Transformer takes ids of shape (batch, length) with 1 to {self.config.context} positions; "
                    f"got {tuple(ids.shape)}. Use a larger context or a shorter input."
                )
        self._hand_down()
        x, embedding = self.embedding.forward(ids)
        x, stack = self.stack.forward(x)
        logits, head = self.head.forward(x)
        return logits, Saved(embedding, stack, head)

    def backward(self, dlogits: Array, saved: Saved) -> tuple[None, Tree]:
        """Return None, since ids have no gradient, and the gradients of this rank's shards."""
        self._hand_down()
        with errors_on_all_ranks(self.group):
            dx, head = self.head.backward(dlogits, saved.head)
        dx = self.group.sum(dx, label="the head's backward")
        dx, stack = self.stack.backward(dx, saved.stack)
        _, embedding = self.embedding.backward(dx, saved.embedding)
        if self.config.tied:  # one table, used twice
            return None, {"embedding": {"weight": embedding["weight"] + head["weight"]}, **stack}
        return None, {"embedding": embedding, **stack, "head": head}

    def _hand_down(self) -> None:
        """Let each part use what `params` holds; a tied head uses the table of the embedding."""
        head = self.params["embedding" if self.config.tied else "head"]
        hand_down({**self.params, "head": head}, {"embedding": self.embedding, "head": self.head})
        self.stack.params = {name: self.params[name] for name in self.stack.layers}


def _norm(config: Config, params: Tree) -> Layer:
    """Return the norm that the configuration names."""
    kind = LayerNorm if config.norm == "layer" else RMSNorm
    compute: Compute = "float32" if dtype_name(params["weight"]) == "float32" else None
    return kind(**params, eps=config.eps, compute=compute)


def _check_params(config: Config, params: Tree) -> None:
    """Raise unless the tree has the names and shapes of `layout`."""
    expected = {name: leaf.shape for name, leaf in leaves(layout(config))}
    actual = {name: tuple(array.shape) for name, array in leaves(params)}
    if actual != expected:
        wrong = [
            f"{name}: expected {expected.get(name, 'nothing')}, got {actual.get(name, 'nothing')}"
            for name in [*expected, *(set(actual) - set(expected))]
            if expected.get(name) != actual.get(name)
        ]
        raise ValueError("Transformer: the parameters do not fit the configuration.\n  " + "\n  ".join(wrong))
