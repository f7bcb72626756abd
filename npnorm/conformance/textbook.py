"""The textbook in NumPy: four norms as they are written first, on whole arrays and in the dtype of x.

Forward, for each row x, with mean(a) its mean; RMSNorm has c = x:

    c    = x - mean(x)
    rstd = 1 / sqrt(mean(c^2) + eps)
    z    = c rstd
    y    = z w + b

Backward, given dy; RMSNorm has no mean(dz):

    dz = dy w
    dx = rstd (dz - mean(dz) - z mean(dz z))
    dw = sum over samples of dy z
    db = sum over samples of dy

This is what npnorm is held against: for its speed, and, in numbers of 400 bits, for its accuracy.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm")
"""The norms of the textbook."""


class Layout(NamedTuple):
    """How a norm sees x: in which shape, with a weight of which shape, the axes of a row, and those of samples."""

    shape: tuple[int, ...]
    weight: tuple[int, ...]
    row: tuple[int, ...]
    samples: tuple[int, ...]


def layout(norm: str, shape: tuple[int, ...], groups: int = 1) -> Layout:
    """Return how a norm sees an x of this shape: (..., features), or (N, C, ...) for GroupNorm and BatchNorm.

    Examples
    --------
    >>> layout("GroupNorm", (2, 6, 5), groups=3)
    Layout(shape=(2, 3, 2, 5), weight=(3, 2, 1), row=(2, 3), samples=(0, 3))
    """
    axes = range(len(shape))
    space = (1,) * len(axes[2:])
    if norm == "BatchNorm":
        return Layout(shape, (shape[1], *space), (0, *axes[2:]), (0, *axes[2:]))
    if norm == "GroupNorm":
        each, last = shape[1] // groups, len(shape)
        seen = shape[0], groups, each, *shape[2:]
        return Layout(seen, (groups, each, *space), (*axes[2:], last), (0, *axes[3:], *((last,) if space else ())))
    return Layout(shape, shape[-1:], (axes[-1],), tuple(axes[:-1]))


def forward(
    x: Any, w: Any, b: Any, eps: Any, row: tuple[int, ...], centred: bool = True, sqrt: Callable = np.sqrt
) -> tuple[Any, Any, Any]:
    """Return y, z and rstd."""
    c = x - x.mean(row, keepdims=True) if centred else x
    rstd = 1 / sqrt((c * c).mean(row, keepdims=True) + eps)
    z = c * rstd
    return z * w if b is None else z * w + b, z, rstd


def backward(dy: Any, w: Any, z: Any, rstd: Any, row: tuple[int, ...], centred: bool = True) -> Any:
    """Return dx."""
    dz = dy * w
    along_z = z * (dz * z).mean(row, keepdims=True)
    return rstd * (dz - dz.mean(row, keepdims=True) - along_z) if centred else rstd * (dz - along_z)


class Textbook:
    """One of NORMS with the two methods of npnorm's layers.

    Parameters
    ----------
    norm : str
        A name in NORMS.
    weight, bias : arrays
        The bias may be None.
    eps : float
    groups : int
        Those of a GroupNorm.

    Examples
    --------
    >>> norm = Textbook("LayerNorm", np.ones(2), np.zeros(2), eps=0)
    >>> y, saved = norm.forward(np.array([[1.0, 3.0]]))
    >>> y
    array([[-1.,  1.]])
    >>> norm.backward(np.array([[1.0, 0.0]]), saved)
    (array([[0., 0.]]), {'weight': array([-1.,  0.]), 'bias': array([1., 0.])})
    """

    def __init__(self, norm: str, weight: Any, bias: Any = None, eps: float = 1e-5, groups: int = 1) -> None:
        self.norm, self.weight, self.bias, self.eps, self.groups = norm, weight, bias, eps, groups

    def forward(self, x: Any) -> tuple[Any, tuple[Any, Any]]:
        """Return y, and z and rstd for backward."""
        shape, weight, row, _ = layout(self.norm, x.shape, self.groups)
        b = None if self.bias is None else self.bias.reshape(weight)
        eps, centred = x.dtype.type(self.eps), self.norm != "RMSNorm"
        y, *saved = forward(x.reshape(shape), self.weight.reshape(weight), b, eps, row, centred)
        return y.reshape(x.shape), tuple(saved)

    def backward(self, dy: Any, saved: tuple[Any, Any]) -> tuple[Any, dict[str, Any]]:
        """Return dx, and the gradients of weight and bias."""
        shape, weight, row, samples = layout(self.norm, dy.shape, self.groups)
        dy_, (z, rstd) = dy.reshape(shape), saved
        dx = backward(dy_, self.weight.reshape(weight), z, rstd, row, self.norm != "RMSNorm")
        grads = {"weight": (dy_ * z).sum(samples).ravel()}
        if self.bias is not None:
            grads["bias"] = dy_.sum(samples).ravel()
        return dx.reshape(dy.shape), grads
