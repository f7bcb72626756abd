"""The convolution of images, which like that of other libraries does not turn its kernel around.

As one product of matrices: Kumar Chellapilla, Sidd Puri and Patrice Simard, "High Performance Convolutional Neural
Networks for Document Processing", 2006, HAL inria-00112631 (unrolled convolution; others say im2col).

Forward, for images x of C channels, and kernels of kh x kw; P has a column for each place where a kernel is laid on an
image, with the C kh kw elements under it, and W a row for each kernel:

    P = patches(x)
    y = W P + b

Backward, given dy:

    db = sum over columns of dy
    dW = dy P^T
    dP = W^T dy
    dx = for each element of x the sum over all places in dP that hold it

In the code the images come in blocks, and their index last: so the copies to and from P are long runs of elements.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module, contiguous, describe
from npnorm.checks import check_module, check_saved
from npnorm.layers.inplace import add_into
from npnorm.layers.windows import Windows, check_gradient, check_images, full
from npnorm.threads import parallel_for
from npnorm.tree import show_shapes, summary

COLUMNS = 1024
"""Columns of P in a block, or those of one image: with fewer the products are too small, with more P leaves cache."""


@show_shapes
class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array  # not P, which is kh kw times as large: to make it anew, in cache, takes less time than to fetch it


class Conv2d:
    """Lay kernels on images and sum the products, at every place: y = W P + b, torch's Conv2d.

    Parameters
    ----------
    weight : array of shape (channels of y, channels of x, kh, kw)
    bias : array of shape (channels of y,), or None
    stride : int
        How many elements the places of a kernel are apart, in both directions.
    padding : int
        How many zeros are put on each side of the images.

    Examples
    --------
    >>> import numpy as np
    >>> image = np.array([[[[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]]])
    >>> y, saved = Conv2d(np.array([[[[-1.0, 1.0]]]])).forward(image)
    >>> y
    array([[[[ 1.,  2.],
             [ 8., 16.]]]])
    """

    def __init__(self, weight: Array, bias: Array | None = None, stride: int = 1, padding: int = 0) -> None:
        self.params: dict[str, Any] = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        self.shards = dict.fromkeys(self.params)
        check_module("Conv2d", weight, self.params, "weight")
        shape = tuple(weight.shape)
        if len(shape) != 4 or 0 in shape or (bias is not None and tuple(bias.shape) != shape[:1]):
            described = ", ".join(f"{name} {describe(array)}" for name, array in self.params.items())
            raise ValueError(
                "Conv2d: weight must have shape (channels of y, channels of x, kh, kw), nothing empty, bias "
                f"(channels of y,); got {described}."
            )
        self.windows = Windows("Conv2d", *shape[2:], stride, padding)

    def __repr__(self) -> str:
        return summary("Conv2d", self.params, stride=self.windows.stride, padding=self.windows.padding)

    def forward(self, x: Array) -> tuple[Any, Saved]:
        """Return y of shape (N, channels of y, rows, columns) for x of shape (N, channels of x, H, W)."""
        w, b = self.params["weight"], self.params.get("bias")
        check_images("Conv2d", x, self.params, w.shape[1])
        y = full((x.shape[0], w.shape[0], *self.windows.count(x.shape)), 0, x, *self.params.values())

        def write(some: slice) -> None:
            p = self._patches(x[some, ...])
            y_some = _rows(w) @ p
            y_some = y_some if b is None else add_into(y_some, b[:, None])
            y[some, ...] = _images_first(array_module(x).reshape(y_some, (*y.shape[1:], -1)))

        _for_blocks(write, x, y)
        return y, Saved(x)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, dict[str, Array]]:
        """Return dx, and the gradients of weight and bias."""
        w = self.params["weight"]
        check_saved("Conv2d", saved, Saved)
        x, xp = saved.x, array_module(saved.x)
        check_gradient("Conv2d", dy, (x.shape[0], w.shape[0], *self.windows.count(x.shape)), x)
        dx = full(x.shape, 0, dy, w)
        sums: dict[int, tuple[Any, Any]] = {}  # over the columns of a block, by its first image

        def write(some: slice) -> None:
            p = self._patches(x[some, ...])
            dy_some = contiguous(_rows(_images_last(dy[some, ...])))
            db = xp.sum(dy_some, axis=1)
            dw = dy_some @ p.T
            dp = _rows(w).T @ dy_some
            dx[some, ...] = self._sum_patches(dp, x[some, ...])
            sums[some.start] = db, dw

        _for_blocks(write, x, dy)
        db, dw = (reduce(add_into, parts) for parts in zip(*(sums[first] for first in sorted(sums)), strict=True))
        grads = {"weight": xp.reshape(dw, w.shape), "bias": db}
        return dx, {name: grads[name] for name in self.params}

    def _patches(self, x: Array) -> Any:
        """Return P of shape (C kh kw, columns), the columns being rows x columns of windows x images."""
        xp = array_module(x)
        places = list(self.windows.places(self.windows.pad(_images_last(x))))
        return xp.reshape(xp.stack(places, axis=1), (x.shape[1] * len(places), -1))

    def _sum_patches(self, dp: Array, x: Array) -> Any:
        """Return dx, of the shape of x, for dP of the shape of P."""
        xp = array_module(dp)
        padded = self.windows.padded(_images_last(x).shape, 0, dp)
        places = list(self.windows.places(padded))
        dp = xp.reshape(dp, (x.shape[1], len(places), *places[0].shape[1:]))
        for k, place in enumerate(places):
            place += dp[:, k, ...]
        return _images_first(self.windows.inside(padded))


def _for_blocks(write: Callable[[slice], None], x: Array, y: Array) -> None:
    """Call `write(some)` for all images, some at a time: on NumPy in blocks, which do not depend on the threads."""
    n, _, rows, columns = y.shape
    step = max(1, COLUMNS // (rows * columns)) if array_module(x) is np else max(1, n)
    blocks = [slice(start, min(start + step, n)) for start in range(0, max(1, n), step)]
    parallel_for(lambda i: write(blocks[i]), len(blocks))


def _rows(x: Array) -> Any:
    """Return x as a matrix that has a row for each index of its first axis."""
    return array_module(x).reshape(x, (x.shape[0], -1))


def _images_last(x: Array) -> Any:
    """Take (images, channels, height, width) to (channels, height, width, images): a view."""
    return array_module(x).permute_dims(x, (1, 2, 3, 0))


def _images_first(x: Array) -> Any:
    """Take (channels, height, width, images) to (images, channels, height, width): a view."""
    return array_module(x).permute_dims(x, (3, 0, 1, 2))
