"""Pooling: the largest element of each window of an image, or the mean of a window, or of the whole image.

MaxPool2d: Dominik Scherer, Andreas Müller and Sven Behnke, "Evaluation of Pooling Operations in Convolutional
Architectures for Object Recognition", ICANN 2010, section 3. Forward, for each window of k elements x_0, x_1, ..., row
by row, and backward, given dy:

    y     = max(x_0, x_1, ...)
    place = how many elements come before the first that is y
    dx_i  = dy where i = place, 0 elsewhere

AvgPool2d: Yann LeCun et al., "Gradient-Based Learning Applied to Document Recognition", 1998, section II.B, there with
a weight and a bias:

    y    = (x_0 + x_1 + ...) / k
    dx_i = dy / k

GlobalAvgPool2d: the same for one window, the whole image; Min Lin, Qiang Chen and Shuicheng Yan, "Network In Network",
2013, arXiv:1312.4400, section 3.2.

An element that lies in several windows has the sum of what each gives it.
"""

import math
from functools import reduce
from operator import add
from typing import Any, NamedTuple

from npnorm.arrays import Array, array_module, contiguous
from npnorm.checks import check_saved
from npnorm.layers.inplace import in_blocks
from npnorm.layers.windows import Windows, check_gradient, check_images, full
from npnorm.tree import show_shapes, summary


@show_shapes
class SavedMax(NamedTuple):
    """What backward needs of forward."""

    place: Array  # of the shape of y
    shape: tuple[int, ...]  # of x


@show_shapes
class SavedAvg(NamedTuple):
    """What backward needs of forward."""

    shape: tuple[int, ...]  # of x


class MaxPool2d:
    """Keep the largest element of each window: torch's MaxPool2d.

    Parameters
    ----------
    size : int
        How high and wide a window is.
    stride : int or None
        How many elements windows are apart; None: size, so that they lie side by side.
    padding : int
        How many elements are put on each side of the images, at most half of size; none of them is ever the largest.

    Examples
    --------
    >>> import numpy as np
    >>> y, saved = MaxPool2d(2).forward(np.array([[[[1.0, 5.0, 2.0, 2.0], [3.0, 4.0, 0.0, 2.0]]]]))
    >>> y
    array([[[[5., 2.]]]])
    >>> saved.place
    array([[[[1, 0]]]], dtype=int32)
    """

    params: dict[str, Array] = {}
    shards: dict[str, None] = {}

    def __init__(self, size: int, stride: int | None = None, padding: int = 0) -> None:
        self.windows = Windows("MaxPool2d", size, size, size if stride is None else stride, padding)
        if 2 * padding > size:
            raise ValueError(f"MaxPool2d: padding is {padding}, size {size}. It must be at most half of the size.")

    def __repr__(self) -> str:
        w = self.windows
        return summary("MaxPool2d", size=w.height, stride=w.stride, padding=w.padding)

    def forward(self, x: Array) -> tuple[Any, SavedMax]:
        """Return y of shape (N, C, rows, columns) for x of shape (N, C, H, W)."""
        check_images("MaxPool2d", x)
        y = full((*x.shape[:2], *self.windows.count(x.shape)), 0, x)
        xp = array_module(x)
        place = xp.zeros_like(y, dtype=xp.int32)
        in_blocks(self._forward, x.shape[2] * x.shape[3], _planes(y), _planes(place), _planes(x))
        return y, SavedMax(place, tuple(x.shape))

    def backward(self, dy: Array, saved: SavedMax) -> tuple[Any, dict[str, Array]]:
        """Return dx, and no gradients."""
        check_saved("MaxPool2d", saved, SavedMax)
        check_gradient("MaxPool2d", dy, tuple(saved.place.shape), saved.place)
        dx = full(saved.shape, 0, dy)
        in_blocks(self._backward, dx.shape[2] * dx.shape[3], _planes(dx), _planes(dy), _planes(saved.place))
        return dx, {}

    def _forward(self, y: Array, place: Array, x: Array) -> None:
        """Write y and place of some planes."""
        xp = array_module(x)
        xs = list(self.windows.places(self.windows.pad(x, -math.inf)))
        y[...] = reduce(xp.maximum, xs)  # of complex numbers, of the complex step, the real part decides
        before: Any = True
        for x_i in xs[:-1]:  # what is in none of these is in the last
            before = before & (x_i != y) & (x_i == x_i)  # a NaN is the largest
            place += xp.astype(before, place.dtype)

    def _backward(self, dx: Array, dy: Array, place: Array) -> None:
        """Write dx of some planes."""
        padded = self.windows.padded(dx.shape, 0, dx)
        for i, dx_i in enumerate(self.windows.places(padded)):
            dx_i += dy * array_module(dy).astype(place == i, dy.dtype)
        dx[...] = self.windows.inside(padded)


class AvgPool2d:
    """Take the mean of each window: torch's AvgPool2d.

    Parameters
    ----------
    size : int
        How high and wide a window is.
    stride : int or None
        How many elements windows are apart; None: size, so that they lie side by side.

    Examples
    --------
    >>> import numpy as np
    >>> y, saved = AvgPool2d(2).forward(np.array([[[[1.0, 5.0, 2.0, 2.0], [3.0, 7.0, 0.0, 2.0]]]]))
    >>> y
    array([[[[4. , 1.5]]]])
    """

    params: dict[str, Array] = {}
    shards: dict[str, None] = {}

    def __init__(self, size: int, stride: int | None = None) -> None:
        self.windows = Windows("AvgPool2d", size, size, size if stride is None else stride, 0)

    def __repr__(self) -> str:
        return summary("AvgPool2d", size=self.windows.height, stride=self.windows.stride)

    def forward(self, x: Array) -> tuple[Any, SavedAvg]:
        """Return y of shape (N, C, rows, columns) for x of shape (N, C, H, W)."""
        check_images("AvgPool2d", x)
        y = full((*x.shape[:2], *self.windows.count(x.shape)), 0, x)
        in_blocks(self._forward, x.shape[2] * x.shape[3], _planes(y), _planes(x))
        return y, SavedAvg(tuple(x.shape))

    def backward(self, dy: Array, saved: SavedAvg) -> tuple[Any, dict[str, Array]]:
        """Return dx, and no gradients."""
        check_saved("AvgPool2d", saved, SavedAvg)
        check_gradient("AvgPool2d", dy, (*saved.shape[:2], *self.windows.count(saved.shape)))
        dx = full(saved.shape, 0, dy)
        in_blocks(self._backward, dx.shape[2] * dx.shape[3], _planes(dx), _planes(dy))
        return dx, {}

    def _forward(self, y: Array, x: Array) -> None:
        """Write y of some planes."""
        y[...] = reduce(add, self.windows.places(x)) / self.windows.height**2

    def _backward(self, dx: Array, dy: Array) -> None:
        """Write dx, from zero, of some planes."""
        share = dy / self.windows.height**2
        for dx_i in self.windows.places(dx):
            dx_i += share


class GlobalAvgPool2d:
    """Take the mean of each channel of each image: torch's AdaptiveAvgPool2d(1), and Flatten.

    Examples
    --------
    >>> import numpy as np
    >>> y, saved = GlobalAvgPool2d().forward(np.array([[[[1.0, 5.0], [3.0, 7.0]], [[2.0, 2.0], [0.0, 2.0]]]]))
    >>> y
    array([[4. , 1.5]])
    """

    params: dict[str, Array] = {}
    shards: dict[str, None] = {}

    def __repr__(self) -> str:
        return "GlobalAvgPool2d()"

    def forward(self, x: Array) -> tuple[Any, SavedAvg]:
        """Return y of shape (N, C) for x of shape (N, C, H, W)."""
        check_images("GlobalAvgPool2d", x)
        if 0 in x.shape[2:]:
            raise ValueError(f"GlobalAvgPool2d: x has shape {tuple(x.shape)}. An image without elements has no mean.")
        return array_module(x).mean(contiguous(x), axis=(2, 3)), SavedAvg(tuple(x.shape))

    def backward(self, dy: Array, saved: SavedAvg) -> tuple[Any, dict[str, Array]]:
        """Return dx, and no gradients."""
        check_saved("GlobalAvgPool2d", saved, SavedAvg)
        check_gradient("GlobalAvgPool2d", dy, saved.shape[:2])
        dx = full(saved.shape, 0, dy)
        dx += (dy / math.prod(saved.shape[2:]))[:, :, None, None]
        return dx, {}


def _planes(x: Array) -> Any:
    """Return (N, C, H, W) as (N C, H, W): each channel of each image is pooled by itself."""
    return array_module(x).reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))
