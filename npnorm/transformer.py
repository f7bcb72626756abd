"""The autograd-free transformer: embedding, blocks, final norm, head.

One text, many settings. `Config.original` is the transformer with layer normalization after each residual connection,
GELU and learned positions; `Config.modern` has root mean square normalization before each sub-layer, a gated MLP,
rotary positions, and queries that share keys and values.

    x      = embedding(ids)  (+ positions)
    x      = block(x)             for each block: attention, then MLP, each within PostNorm or PreNorm
    x      = norm(x)              with PreNorm; PostNorm has normalized already
    logits = x W^T                W: the head's own matrix, or the embedding's table (tied)

On a group heads, hidden features and vocabulary are split; activations and norms are replicated. Communicated: forward
one sum for the embedding and one for each sub-layer; backward one for each sub-layer and one for the head. The logits
are a shard of the vocabulary, as `CrossEntropy(group=group)` takes them.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from npnorm.arrays import Array
from npnorm.blocks import Chain, PostNorm, PreNorm
from npnorm.group import SOLO, Group, part
from npnorm.layer import Layer, Tree, leaves, map_tree
from npnorm.layers import MLP, Attention, Embedding, Linear, Positions, Rotary, SwiGLU
from npnorm.norms import LayerNorm, RMSNorm


@dataclass(frozen=True)
class Config:
    """The settings of a transformer.

    Attributes
    ----------
    vocabulary, width, depth, heads, context : int
        Tokens; features of a position; blocks; heads of attention; the longest input.
    hidden : int or None
        Hidden features of the MLP; None: 4 width, or for the gated MLP 8/3 width rounded up to a multiple of 32.
    kv_heads : int or None
        Heads of keys and values; None: as many as heads.
    norm, placement, mlp, positions : str
        Which page each part is taken from.
    tied : bool
        Whether the head uses the table of the embedding.
    bias : bool
        Whether linear layers have a bias; layer normalization always has one.
    eps : float
    """

    vocabulary: int
    width: int = 128
    depth: int = 4
    heads: int = 4
    context: int = 128
    hidden: int | None = None
    kv_heads: int | None = None
    norm: Literal["layer", "rms"] = "rms"
    placement: Literal["post", "pre"] = "pre"
    mlp: Literal["gelu", "swiglu"] = "swiglu"
    positions: Literal["learned", "rotary"] = "rotary"
    tied: bool = False
    bias: bool = False
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, choices in (
            ("norm", ("layer", "rms")),
            ("placement", ("post", "pre")),
            ("mlp", ("gelu", "swiglu")),
            ("positions", ("learned", "rotary")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"Config: {name} is {getattr(self, name)!r}. Choose one of {', '.join(choices)}.")
        for name in ("vocabulary", "width", "depth", "heads", "context", "hidden", "kv_heads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Config: {name} is {value}. It must be at least 1.")
        if self.width % self.heads:
            raise ValueError(
                f"Config: {self.heads} heads cannot share {self.width} features. Make width a multiple of heads."
            )
        if self.positions == "rotary" and self.width // self.heads % 2:
            raise ValueError(
                f"Config: rotary positions turn pairs of features, and a head has {self.width // self.heads}. "
                "Choose width and heads so that it is an even number."
            )
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(
                f"Config: {self.heads} heads cannot share {self.kv_heads} heads of keys and values equally. "
                "Make heads a multiple of kv_heads."
            )

    @classmethod
    def original(cls, vocabulary: int, **sizes: Any) -> "Config":
        """Return the settings of 2017-18: post-LayerNorm, GELU, learned positions, biases, a tied head."""
        choice: Any = {
            "norm": "layer",
            "placement": "post",
            "mlp": "gelu",
            "positions": "learned",
            "tied": True,
            "bias": True,
        }
        return cls(vocabulary, **(choice | sizes))

    @classmethod
    def modern(cls, vocabulary: int, **sizes: Any) -> "Config":
        """Return the settings of today: pre-RMSNorm, SwiGLU, rotary positions, no bias, a head of its own."""
        choice: Any = {
            "norm": "rms",
            "placement": "pre",
            "mlp": "swiglu",
            "positions": "rotary",
            "tied": False,
            "bias": False,
        }
        return cls(vocabulary, **(choice | sizes))

    @property
    def hidden_features(self) -> int:
        """The hidden features of the MLP."""
        gated = -(-8 * self.width // 3 // 32) * 32
        return self.hidden or (gated if self.mlp == "swiglu" else 4 * self.width)


class Drawn(NamedTuple):
    """A parameter to be drawn from N(mean, std^2)."""

    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0


def layout(config: Config) -> Tree:
    """Return the tree of a transformer's parameters: for each its shape and how it is drawn.

    Weights are drawn from N(0, 0.02^2), norms are ones, biases zeros. The projections that end in a residual
    connection are drawn smaller by sqrt(2 depth), the number of them that the last position sums: Alec Radford et al.,
    "Language Models are Unsupervised Multitask Learners", 2019, section 2.3.
    """
    c = config
    kv_width = c.width // c.heads * (c.kv_heads or c.heads)
    std, last = 0.02, 0.02 / (2 * c.depth) ** 0.5

    def linear(outputs: int, inputs: int, std: float = std) -> Tree:
        weight = Drawn((outputs, inputs), std=std)
        return {"weight": weight, "bias": Drawn((outputs,))} if c.bias else {"weight": weight}

    def norm() -> Tree:
        weight = Drawn((c.width,), mean=1.0)
        return {"weight": weight, "bias": Drawn((c.width,))} if c.norm == "layer" else {"weight": weight}

    def block() -> Tree:
        attention = {
            "q_proj": linear(c.width, c.width),
            "k_proj": linear(kv_width, c.width),
            "v_proj": linear(kv_width, c.width),
            "o_proj": linear(c.width, c.width, last),
        }
        mlp = {
            "gate_proj": linear(c.hidden_features, c.width),
            "up_proj": linear(c.hidden_features, c.width),
            "down_proj": linear(c.width, c.hidden_features, last),
        }
        if c.mlp == "gelu":
            del mlp["gate_proj"]
        return {"attention": {"norm": norm(), "sublayer": attention}, "mlp": {"norm": norm(), "sublayer": mlp}}

    tree: Tree = {"embedding": {"weight": Drawn((c.vocabulary, c.width), std=std)}}
    if c.positions == "learned":
        tree["positions"] = {"weight": Drawn((c.context, c.width), std=std)}
    tree["blocks"] = {str(i): block() for i in range(c.depth)}
    if c.placement == "pre":
        tree["norm"] = norm()
    if not c.tied:
        tree["head"] = {"weight": Drawn((c.vocabulary, c.width), std=std)}
    return tree


def init(config: Config, rng: np.random.Generator, dtype: str = "float32") -> Tree:
    """Return the whole parameters of a transformer, drawn as `layout` says.

    On a group every rank draws the same from the same seed, and `Transformer` takes its shards.
    """

    def draw(leaf: Drawn) -> Array:
        noise = rng.standard_normal(leaf.shape) if leaf.std else np.zeros(leaf.shape)
        return (leaf.mean + leaf.std * noise).astype(dtype)

    return map_tree(draw, layout(config))


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
        Whole arrays, in the shape that `init` returns. A rank keeps copies of its shards.
    group : Group
        The ranks over which heads, hidden features and vocabulary are split equally.

    Raises
    ------
    ValueError
        On every rank, if the ranks do not divide heads, hidden features or vocabulary.
    """

    def __init__(self, config: Config, params: Tree, *, group: Group = SOLO) -> None:
        group.agree(f"Transformer {config}")
        _check_params(config, params)
        part(group, config.vocabulary, f"a vocabulary of {config.vocabulary}")
        self.config = config
        self.group = group
        self.embedding = Embedding(group.shard(params["embedding"]["weight"], 0), group=group)
        parts: dict[str, Layer] = {}
        if config.positions == "learned":
            parts["positions"] = Positions(group.shard(params["positions"]["weight"], None))
        parts["blocks"] = Chain({i: self._block(block) for i, block in params["blocks"].items()})
        if config.placement == "pre":
            parts["norm"] = self._norm(params["norm"])
        self.stack = Chain(parts)
        table = self.embedding.params["weight"] if config.tied else group.shard(params["head"]["weight"], 0)
        self.head = Linear(table)  # a column split: it holds this rank's part of the vocabulary
        self.params = {"embedding": self.embedding.params, **self.stack.params}
        self.shards = {"embedding": self.embedding.shards, **self.stack.shards}
        if not config.tied:
            self.params["head"] = self.head.params
            self.shards["head"] = {"weight": 0}

    def _norm(self, params: Tree) -> Layer:
        kind = LayerNorm if self.config.norm == "layer" else RMSNorm
        return kind(**map_tree(lambda a: self.group.shard(a, None), params), eps=self.config.eps)

    def _block(self, params: Tree) -> Layer:
        c, group = self.config, self.group
        place = PostNorm if c.placement == "post" else PreNorm
        rotary = Rotary() if c.positions == "rotary" else None
        attention = Attention(params["attention"]["sublayer"], c.heads, c.kv_heads, rotary, group=group)
        mlp = (MLP if c.mlp == "gelu" else SwiGLU)(params["mlp"]["sublayer"], group=group)
        return Chain(
            {
                "attention": place(self._norm(params["attention"]["norm"]), attention),
                "mlp": place(self._norm(params["mlp"]["norm"]), mlp),
            }
        )

    def forward(self, ids: Array) -> tuple[Array, Saved]:
        """Return logits of shape (batch, length, vocabulary of this rank) for ids of shape (batch, length)."""
        if ids.ndim != 2 or not 0 < ids.shape[1] <= self.config.context:
            raise self.group.error(
                ValueError(
                    f"Transformer takes ids of shape (batch, length) with 1 to {self.config.context} positions; "
                    f"{tuple(ids.shape)} came. Use a larger context or a shorter input."
                )
            )
        x, embedding = self.embedding.forward(ids)
        x, stack = self.stack.forward(x)
        logits, head = self.head.forward(x)
        return logits, Saved(embedding, stack, head)

    def backward(self, dlogits: Array, saved: Saved) -> tuple[None, Tree]:
        """Return None, since ids have no gradient, and the gradients of this rank's shards."""
        dx, head = self.head.backward(dlogits, saved.head)
        dx = self.group.sum(dx, what="the head's backward")
        dx, stack = self.stack.backward(dx, saved.stack)
        _, embedding = self.embedding.backward(dx, saved.embedding)
        if self.config.tied:  # one table, used twice
            return None, {"embedding": {"weight": embedding["weight"] + head["weight"]}, **stack}
        return None, {"embedding": embedding, **stack, "head": head}


def _check_params(config: Config, params: Tree) -> None:
    """Raise unless the tree has the names and shapes of `layout`."""
    expected = {name: leaf.shape for name, leaf in leaves(layout(config))}
    came = {name: tuple(array.shape) for name, array in leaves(params)}
    if came != expected:
        wrong = [
            f"{name}: expected {expected.get(name, 'nothing')}, came {came.get(name, 'nothing')}"
            for name in [*expected, *(set(came) - set(expected))]
            if expected.get(name) != came.get(name)
        ]
        raise ValueError("Transformer: the parameters do not fit the configuration.\n  " + "\n  ".join(wrong))
