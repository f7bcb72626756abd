"""Rotary positions.

Jianlin Su et al., "RoFormer", 2021, arXiv:2104.09864, equation 34. Feature i and feature i + d/2 of a head of d
features are the two coordinates of a point, turned by an angle that grows with the position t:

    angle = t base^(-2 i / d),  i = 0 ... d/2 - 1
    y1 = x1 cos(angle) - x2 sin(angle)
    y2 = x1 sin(angle) + x2 cos(angle)

so that the product of a query and a key depends on the distance of their positions only. Backward is the rotation by
the opposite angle. The pairing (i, i + d/2) is that of Llama and GPT-NeoX; the paper pairs (2i, 2i + 1), which is the
same up to the order of the features.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module, contiguous, dtype_name, from_numpy
from npnorm.tree import show_shapes


@show_shapes
class Saved(NamedTuple):
    """What backward needs of forward: (length, d/2) each."""

    cos: Array
    sin: Array


class Rotary:
    """Turn pairs of features by angles that grow with the position, for x of shape (..., length, d).

    Parameters
    ----------
    base : float
        The first pair turns by 1 radian from one position to the next, the last pair by about 1 / base; 10000 in the
        paper.

    Examples
    --------
    >>> y, saved = Rotary().forward(np.array([[1.0, 0.0], [1.0, 0.0]]))  # turned by 0, then by 1 radian
    >>> y.round(4)
    array([[1.    , 0.    ],
           [0.5403, 0.8415]])
    """

    params: dict[str, Array] = {}
    shards: dict[str, None] = {}

    def __init__(self, base: float = 10000.0) -> None:
        self.base = base

    def __repr__(self) -> str:
        return f"Rotary(base={self.base})"

    def forward(self, x: Array) -> tuple[Any, Saved]:
        """Return y of the shape of x."""
        if x.ndim < 2 or x.shape[-1] % 2:
            raise ValueError(
                f"Rotary turns pairs of features of each position; x has shape {tuple(x.shape)}. "
                "It must be (..., length, an even number)."
            )
        length, d = x.shape[-2:]
        real = "float32" if dtype_name(x) == "float32" else "float64"
        cos, sin = (from_numpy(table, x) for table in _tables(length, d, self.base, real))
        return _turn(x, cos, sin), Saved(cos, sin)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, dict[str, Array]]:
        """Return dx, and no gradients."""
        return _turn(dy, saved.cos, -saved.sin), {}


@functools.lru_cache(maxsize=4)
def _tables(length: int, d: int, base: float, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return cos and sin of the angles, not to be written to: every layer and every batch asks for the same."""
    angle = np.outer(np.arange(length), base ** (-np.arange(0, d, 2) / d))
    tables = np.cos(angle).astype(dtype), np.sin(angle).astype(dtype)
    for table in tables:
        table.setflags(write=False)
    return tables


def _turn(x: Array, cos: Array, sin: Array) -> Array:
    xp, half = array_module(x), x.shape[-1] // 2
    x = contiguous(x)  # attention hands a transposed view, in which a run is one head long
    y = xp.concat([x[..., half:], x[..., :half]], axis=-1)
    y *= xp.concat([-sin, sin], axis=-1)
    y += x * xp.concat([cos, cos], axis=-1)
    return y
