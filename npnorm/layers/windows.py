"""Windows that slide over images: what convolution and pooling share.

Windows stand `stride` elements apart on images that have `padding` more elements on each side. What all windows have at
one of their places is a slice of the images with that stride, so that a window of height x width elements is read, and
written, by height * width slices, on every array module.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, from_numpy
from npnorm.checks import check_input, check_module, is_count
from npnorm.tree import Tree


class Windows:
    """Windows of height x width elements on images of shape (..., H, W, ...): which axes they are, each method says.

    Parameters
    ----------
    layer : str
        Whose windows they are, for messages.
    height, width, stride, padding : int

    Examples
    --------
    >>> windows = Windows("MaxPool2d", 2, 2, stride=1, padding=0)
    >>> image = np.array([[[1, 2, 3], [4, 5, 6]]])  # with two windows
    >>> [place.tolist() for place in windows.places(image)]
    [[[[1, 2]]], [[[2, 3]]], [[[4, 5]]], [[[5, 6]]]]
    """

    def __init__(self, layer: str, height: int, width: int, stride: int, padding: int) -> None:
        if not all(map(is_count, (height, width, stride))) or not (padding == 0 or is_count(padding)):
            raise ValueError(
                f"{layer}: a window of {height!r} x {width!r}, stride {stride!r}, padding {padding!r}. "
                "Each must be an integer, padding 0 or more, the others 1 or more."
            )
        self.layer, self.height, self.width, self.stride, self.padding = layer, height, width, stride, padding

    def count(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return how many rows and columns of windows images of shape (N, C, H, W) hold."""
        rows, columns = (
            (size + 2 * self.padding - of_window) // self.stride + 1
            for size, of_window in zip(shape[2:], (self.height, self.width), strict=True)
        )
        if rows < 1 or columns < 1:
            raise ValueError(
                f"{self.layer}: images of {shape[2]} x {shape[3]}, with padding {self.padding} on each side, are "
                f"smaller than a window of {self.height} x {self.width}. Take larger images, or more padding."
            )
        return rows, columns

    def pad(self, x: Array, value: float = 0.0) -> Any:
        """Return a copy of x, of shape (..., H, W, ...) with H in axis 1, that has `value` all around its images."""
        padded = self.padded(x.shape, value, x)
        self.inside(padded)[...] = x
        return padded

    def padded(self, shape: tuple[int, ...], value: float, like: Array) -> Any:
        """Return an array of one value for images of this shape, with H in axis 1, and what is all around them."""
        first, height, width, *rest = shape
        return full((first, height + 2 * self.padding, width + 2 * self.padding, *rest), value, like)

    def inside(self, padded: Array) -> Any:
        """Return a view of what `pad` has put its values around."""
        p = self.padding
        return padded[:, p : padded.shape[1] - p, p : padded.shape[2] - p, ...]

    def places(self, padded: Array) -> Iterator[Any]:
        """Yield, for each place in a window, row by row, what all windows have there: views to be read or written.

        Axes 1 and 2 are the height and width of the images, in the views the rows and columns of windows.
        """
        after_i, after_j = padded.shape[1] - self.height + 1, padded.shape[2] - self.width + 1
        for i in range(self.height):
            for j in range(self.width):
                yield padded[:, i : after_i + i : self.stride, j : after_j + j : self.stride, ...]


def full(shape: tuple[int, ...], value: float, *like: Array) -> Any:
    """Return an array of one value, of the module and device of the arrays `like`, and of their common dtype.

    Examples
    --------
    >>> full((2, 3), 1, np.ones(1), np.ones(1, "float32"))
    array([[1., 1., 1.],
           [1., 1., 1.]])
    """
    xp = array_module(like[0])
    one = xp.astype(from_numpy(np.full(1, value), like[0]), xp.result_type(*like))
    return xp.reshape(xp.repeat(one, math.prod(shape)), shape)


def check_images(layer: str, x: Array, params: Tree = None, channels: int | None = None) -> None:
    """Raise one clear error unless `x` is (N, C, H, W), with so many channels, and goes with the parameters."""
    params = {} if params is None else params
    check_module(layer, x, params)
    if x.ndim != 4 or (channels is not None and x.shape[1] != channels):
        held = "C" if channels is None else channels
        raise ValueError(
            f"{layer} takes images of shape (N, {held}, H, W); x has shape {tuple(x.shape)}. "
            "The channels are axis 1, before height and width."
        )
    check_input(layer, x, params, x.shape[3])  # the dtype; of any width


def check_gradient(layer: str, dy: Array, shape: tuple[int, ...], like: Array | None = None) -> None:
    """Raise one clear error unless `dy` has the shape of y, and the module and device of `like`."""
    check_module(f"{layer}.backward", dy if like is None else like, {"dy": dy}, "what was saved")
    if tuple(dy.shape) != shape:
        raise ValueError(
            f"{layer}.backward takes dy of the shape of y, {shape}; got {tuple(dy.shape)}. "
            "Hand it the gradient of the y that belongs to this saved."
        )
