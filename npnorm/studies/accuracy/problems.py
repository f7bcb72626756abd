"""The rows of a case as the input of a norm, so that every norm sees the same numbers in its rows.

A row is what is normalized together. For exact arithmetic, x of every norm is a view with four axes, of which the last
two are the row and the middle two have a weight:

                 x               with four axes: (samples, groups, channels of a group, positions)
    LayerNorm    (rows, n)       (rows, 1, n, 1)
    RMSNorm      (rows, n)       (rows, 1, n, 1)
    GroupNorm    (N, C, L)       (N, G, C / G, L)       a row is a group
    BatchNorm    (N, C)          (1, C, 1, N)           a row is a channel
"""

from typing import NamedTuple

import numpy as np

from npnorm.studies.accuracy.cases import Case

NORMS = {"layer": "LayerNorm", "rms": "RMSNorm", "group": "GroupNorm", "batch": "BatchNorm"}
GROUPS = 2


class Problem(NamedTuple):
    """What a norm is given: x and dy in its layout, its parameters (bias None for RMSNorm), eps, and the groups.

    `groups` are the second of the four axes: those of a GroupNorm, the channels of a BatchNorm, else 1.
    """

    norm: str
    x: np.ndarray
    dy: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    eps: float
    groups: int

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of what is measured: the gradients dw and db are those of weight and bias."""
        return ("y", "dx", "dw") if self.bias is None else ("y", "dx", "dw", "db")

    def four_axes(self, a: np.ndarray) -> np.ndarray:
        """Return an array of the shape of x as one of four axes."""
        if self.norm == "batch":
            return a.T[None, :, None, :]
        if self.norm == "group":
            return a.reshape(len(a), self.groups, -1, a.shape[-1])
        return a[:, None, :, None]

    def three_axes(self, param: np.ndarray) -> np.ndarray:
        """Return a parameter as an array of the last three of the four axes."""
        return param.reshape(self.groups, -1, 1)


def pose(norm: str, case: Case) -> Problem:
    """Return the rows of a case as the input of a norm, with a random weight, and a bias: random or zero."""
    rows, n = (int(size) for size in case.x.shape)
    shape: tuple[int, ...] = (rows, n)
    groups, channels = 1, n
    if norm == "group":
        groups = GROUPS
        of_a_group = next(k for k in (8, 4, 3, 2, 1) if n % k == 0)
        channels = groups * of_a_group
        shape = rows // groups, channels, n // of_a_group
    elif norm == "batch":
        groups = channels = rows
    x, dy = (np.ascontiguousarray(a.T if norm == "batch" else a.reshape(shape)) for a in (case.x, case.dy))
    rng = np.random.default_rng([case.seed, channels])
    weight = rng.uniform(0.5, 1.5, channels).astype(x.dtype)
    bias = (rng.standard_normal(channels) * case.with_bias).astype(x.dtype)
    return Problem(norm, x, dy, weight, None if norm == "rms" else bias, case.eps, groups)
