"""The rows of a case as the input of a norm, so that every norm sees the same numbers in its rows."""

from typing import NamedTuple

import numpy as np

from npnorm.conformance.cases import Case

GROUPS = 2


class Problem(NamedTuple):
    """What a norm is given: its name, x and dy in its layout, its parameters, eps, and the groups of a GroupNorm.

    x has the shape (rows, n) for LayerNorm and RMSNorm, (n, rows) for BatchNorm, and (N, C, L) for GroupNorm, where a
    row is a group. RMSNorm has no bias.
    """

    norm: str
    x: np.ndarray
    dy: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    eps: float
    groups: int


def pose(norm: str, case: Case) -> Problem:
    """Return the rows of a case as the input of a norm, with a random weight, and a bias: random or zero.

    Examples
    --------
    >>> from npnorm.conformance.cases import SMALL, cases
    >>> pose("GroupNorm", cases("float32", SMALL)[0]).x.shape  # 16 rows of 128 numbers
    (8, 16, 16)
    """
    rows, n = case.x.shape
    groups, channels = 1, n
    shape: tuple[int, ...] = (rows, n)
    if norm == "GroupNorm":
        of_a_group = next(k for k in (8, 4, 3, 2, 1) if n % k == 0)
        groups, channels = GROUPS, GROUPS * of_a_group
        shape = rows // groups, channels, n // of_a_group
    elif norm == "BatchNorm":
        channels = rows
    x, dy = (np.ascontiguousarray(a.T if norm == "BatchNorm" else a.reshape(shape)) for a in (case.x, case.dy))
    rng = np.random.default_rng([case.seed, channels])
    weight = rng.uniform(0.5, 1.5, size=(channels,)).astype(x.dtype)
    bias = (rng.standard_normal((channels,)) * case.with_bias).astype(x.dtype)
    return Problem(norm, x, dy, weight, None if norm == "RMSNorm" else bias, case.eps, groups)
