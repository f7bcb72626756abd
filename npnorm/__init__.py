"""Normalization from the formula to the cluster, in NumPy."""

from npnorm import norms
from npnorm.config import Config
from npnorm.group import SOLO
from npnorm.norms import *  # noqa: F403
from npnorm.threads import get_threads, set_threads
from npnorm.transformer import Transformer

__all__ = ["SOLO", "Config", "Transformer", "get_threads", "set_threads", *norms.__all__]
