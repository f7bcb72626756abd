"""One page per layer: the formula and its backward pass."""

from npnorm.layers.activations import GELU, ReLU, SiLU
from npnorm.layers.attention import Attention
from npnorm.layers.convolution import Conv2d
from npnorm.layers.cross_entropy import CrossEntropy
from npnorm.layers.embedding import Embedding, Positions
from npnorm.layers.linear import Linear
from npnorm.layers.mlp import MLP, SwiGLU
from npnorm.layers.pooling import AvgPool2d, GlobalAvgPool2d, MaxPool2d
from npnorm.layers.recurrent import GRU, GRUCell
from npnorm.layers.rope import Rotary

__all__ = [
    "GELU",
    "GRU",
    "MLP",
    "Attention",
    "AvgPool2d",
    "Conv2d",
    "CrossEntropy",
    "Embedding",
    "GRUCell",
    "GlobalAvgPool2d",
    "Linear",
    "MaxPool2d",
    "Positions",
    "ReLU",
    "Rotary",
    "SiLU",
    "SwiGLU",
]
