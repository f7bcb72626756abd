"""Normalization from the formula to the cluster, in NumPy."""

from npnorm.group import SOLO
from npnorm.norms import LayerNorm, RMSNorm
from npnorm.transformer import Config, Transformer, init

__all__ = ["SOLO", "Config", "LayerNorm", "RMSNorm", "Transformer", "init"]
