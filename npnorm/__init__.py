"""Normalization from the formula to the cluster, in NumPy."""

from npnorm import norms
from npnorm.config import Config
from npnorm.group import SOLO
from npnorm.norms import *  # noqa: F403
from npnorm.threads import get_threads, set_threads
from npnorm.transformer import Transformer

__version__ = "0.1.0"

__all__ = ["SOLO", "Config", "Transformer", "get_threads", "set_threads", *norms.__all__]


def __dir__() -> list[str]:
    """Return the names for users; modules are imported by their own names, as npnorm.mpi."""
    return [*__all__, "__version__"]
