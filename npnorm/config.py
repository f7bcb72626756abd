"""The settings of a transformer, and the parameters that they ask for.

`Config.original` and `Config.modern` are two settings of the one code in `npnorm.transformer`. `layout` lists the
parameters of a configuration, `init` draws them.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args, get_origin

import numpy as np

from npnorm.arrays import Array
from npnorm.tree import Tree, map_tree


@dataclass(frozen=True, repr=False)
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
    norm, mlp, positions : str
        Which page each part is taken from. positions="none" tells no layer where a token stands.
    placement : str
        Where the norms stand: see `npnorm.blocks`. "none" is a transformer without norms, "res-post" the order of
        OLMo-2, "sandwich" that of Gemma 2 and 3; "deep" also has its own first parameters (see `layout`).
    causal : bool
        Whether a position reads from those up to it alone; False: from all.
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
    placement: Literal["none", "post", "pre", "res-post", "sandwich", "deep"] = "pre"
    mlp: Literal["relu", "gelu", "swiglu"] = "swiglu"
    positions: Literal["none", "learned", "rotary"] = "rotary"
    causal: bool = True
    tied: bool = False
    bias: bool = False
    eps: float = 1e-5

    def __repr__(self) -> str:
        """Return the sizes, and what differs from the defaults."""
        shown = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name in ("width", "depth", "heads", "context") or getattr(self, field.name) != field.default
        }
        return f"Config({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __post_init__(self) -> None:
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(field.type)
            if get_origin(field.type) is Literal and value not in choices:
                raise ValueError(f"Config: {field.name} is {value!r}. Choose one of {', '.join(choices)}.")
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
        return cls(vocabulary, **sizes)

    @property
    def hidden_features(self) -> int:
        """The hidden features of the MLP."""
        gated = -(-8 * self.width // 3 // 32) * 32
        return self.hidden or (gated if self.mlp == "swiglu" else 4 * self.width)

    @property
    def final_norm(self) -> bool:
        """Whether a norm stands between the last block and the head: where none stands between the blocks."""
        return self.placement in ("pre", "res-post", "sandwich")


class Drawn(NamedTuple):
    """A parameter to be drawn from N(mean, std^2)."""

    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0


def layout(config: Config) -> Tree:
    """Return the tree of a transformer's parameters: for each its shape and how it is drawn.

    Weights are drawn from N(0, 0.02^2), norms are ones, biases zeros. Of the projections that end in a residual
    connection, 2 depth add up; they are drawn smaller by sqrt(2 depth): Alec Radford et al., "Language Models are
    Unsupervised Multitask Learners", 2019, section 2.3.

    With placement="deep", the matrices of a block are drawn from N(0, gain^2 2 / (inputs + outputs)), Xavier's normal
    distribution; gain is 1 for queries and keys, and (8 depth)^(-1/4) for all others: Hongyu Wang et al., "DeepNet",
    2022, arXiv:2203.00555, figure 2. Embedding, positions and head are as above.
    """
    c = config
    kv_width = c.width // c.heads * (c.kv_heads or c.heads)
    std, last, beta = 0.02, 0.02 / (2 * c.depth) ** 0.5, (8 * c.depth) ** -0.25

    def linear(outputs: int, inputs: int, std: float = std, gain: float = 1.0) -> Tree:
        if c.placement == "deep":
            std = gain * (2 / (inputs + outputs)) ** 0.5
        weight = Drawn((outputs, inputs), std=std)
        return {"weight": weight, "bias": Drawn((outputs,))} if c.bias else {"weight": weight}

    def norm() -> Tree:
        weight = Drawn((c.width,), mean=1.0)
        return {"weight": weight, "bias": Drawn((c.width,))} if c.norm == "layer" else {"weight": weight}

    def placed(sublayer: Tree) -> Tree:
        names = {"none": (), "sandwich": ("norm1", "norm2")}.get(c.placement, ("norm",))
        return {**{name: norm() for name in names}, "sublayer": sublayer}

    def block() -> Tree:
        attention = {
            "q_proj": linear(c.width, c.width),
            "k_proj": linear(kv_width, c.width),
            "v_proj": linear(kv_width, c.width, gain=beta),
            "o_proj": linear(c.width, c.width, last, beta),
        }
        mlp = {
            "gate_proj": linear(c.hidden_features, c.width, gain=beta),
            "up_proj": linear(c.hidden_features, c.width, gain=beta),
            "down_proj": linear(c.width, c.hidden_features, last, beta),
        }
        if c.mlp != "swiglu":
            del mlp["gate_proj"]
        return {"attention": placed(attention), "mlp": placed(mlp)}

    tree: Tree = {"embedding": {"weight": Drawn((c.vocabulary, c.width), std=std)}}
    if c.positions == "learned":
        tree["positions"] = {"weight": Drawn((c.context, c.width), std=std)}
    tree["blocks"] = {str(i): block() for i in range(c.depth)}
    if c.final_norm:
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
