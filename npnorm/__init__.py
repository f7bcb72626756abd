"""Normalization from the formula to the cluster, in NumPy."""

from npnorm.config import Config
from npnorm.group import SOLO
from npnorm.norms import LayerNorm, RMSNorm
from npnorm.transformer import Transformer

__all__ = ["SOLO", "Config", "LayerNorm", "RMSNorm", "Transformer"]
