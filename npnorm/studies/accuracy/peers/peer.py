"""What a peer is."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from npnorm.studies.accuracy.problems import Problem

Results = dict[str, np.ndarray]
"""y and dx in the layout of x, dw and, where the norm has a bias, db; all in the dtype of x."""


class Peer(NamedTuple):
    """An implementation of norms.

    Parameters
    ----------
    name : str
    about : str
        One line: which functions, with which settings.
    packages : tuple of str
        The distributions whose versions matter.
    results : callable
        From a Problem to its Results. Raises NotImplementedError where the peer has no such norm, and what it wants
        where it refuses the problem.
    """

    name: str
    about: str
    packages: tuple[str, ...]
    results: Callable[[Problem], Results]
