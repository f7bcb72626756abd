"""Normalization from the formula to the cluster, in NumPy."""

from npnorm import norms
from npnorm.config import Config
from npnorm.group import SOLO
from npnorm.norms import *  # noqa: F403
from npnorm.transformer import Transformer

__all__ = ["SOLO", "Config", "Transformer", *norms.__all__]
