"""Normalization from the formula to the cluster, in NumPy."""

from npnorm.group import SOLO
from npnorm.norms import LayerNorm, RMSNorm
from npnorm.transformer import Config, Transformer

__all__ = ["SOLO", "Config", "LayerNorm", "RMSNorm", "Transformer"]
