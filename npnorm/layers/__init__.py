"""One page per layer: the formula and its backward pass."""

from npnorm.layers.activations import GELU, ReLU, SiLU
from npnorm.layers.attention import Attention
from npnorm.layers.cross_entropy import CrossEntropy
from npnorm.layers.embedding import Embedding, Positions
from npnorm.layers.linear import Linear
from npnorm.layers.mlp import MLP, SwiGLU
from npnorm.layers.recurrent import GRU, GRUCell
from npnorm.layers.rope import Rotary

__all__ = [
    "GELU",
    "GRU",
    "MLP",
    "Attention",
    "CrossEntropy",
    "Embedding",
    "GRUCell",
    "Linear",
    "Positions",
    "ReLU",
    "Rotary",
    "SiLU",
    "SwiGLU",
]
