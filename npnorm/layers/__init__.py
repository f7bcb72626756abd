"""One page per layer: the formula and its backward pass."""

from npnorm.layers.activations import GELU, SiLU
from npnorm.layers.attention import Attention
from npnorm.layers.cross_entropy import CrossEntropy
from npnorm.layers.embedding import Embedding, Positions
from npnorm.layers.linear import Linear
from npnorm.layers.mlp import MLP, SwiGLU
from npnorm.layers.rope import Rotary

__all__ = ["GELU", "MLP", "Attention", "CrossEntropy", "Embedding", "Linear", "Positions", "Rotary", "SiLU", "SwiGLU"]
