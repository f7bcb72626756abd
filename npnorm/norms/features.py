"""The features that a norm averages over: the last axis, whole or split over the ranks of a group."""

import math
from numbers import Real
from typing import Any

from npnorm.arrays import Array, array_module, describe, dtype_name
from npnorm.group import Group, everywhere
from npnorm.layer import check_module

FLOATS = ("float16", "bfloat16", "float32", "float64")


class Features:
    """The axis of features: its checks and its means.

    Parameters
    ----------
    layer : str
        The name of the norm, for messages.
    params : dict
        The parameters that the norm has: each of shape (features of this rank,).
    eps : float
        Checked here: finite and not negative.
    group : Group
        The ranks over which the features are split, equally.
    """

    def __init__(self, layer: str, params: dict[str, Array], eps: float, group: Group) -> None:
        self.layer = layer
        self.params = params
        self.group = group
        self.width: int | None = None  # any, without parameters
        with everywhere(group):
            for name, array in params.items():
                if not hasattr(array, "shape"):
                    raise TypeError(
                        f"{layer}: {name} must be an array of shape (features,); a {type(array).__name__} came. "
                        f"{layer}.init(features) makes a weight of ones."
                    )
            group.agree(f"{layer} with eps={eps} and " + ", ".join(f"{n} {describe(a)}" for n, a in params.items()))
            if not (isinstance(eps, Real) and math.isfinite(eps) and eps >= 0):
                raise ValueError(f"{layer}: eps is {eps!r}. It must be a finite number, 0 or greater.")
            for name, array in params.items():
                self._check_dtype(name, array)
            shapes = {tuple(array.shape) for array in params.values()}
            if len(shapes) > 1 or any(len(shape) != 1 or shape == (0,) for shape in shapes):
                came = ", ".join(f"{name} {tuple(array.shape)}" for name, array in params.items())
                raise ValueError(
                    f"{layer}: each parameter must have shape (features,), the same for all; there came {came}."
                )
        if shapes:
            (self.width,) = shapes.pop()

    def check(self, **arrays: Array) -> None:
        """Raise one clear error, on every rank of the group, unless the arrays are floats with these features last.

        complex128 is let through for the complex step: the formulas are then continued analytically.
        """
        with everywhere(self.group):
            for name, x in arrays.items():
                check_module(self.layer, x, self.params)
                self._check_dtype(name, x)
                if x.ndim == 0 or x.shape[-1] == 0 or (self.width and x.shape[-1] != self.width):
                    held = f"holds {self.width} features" if self.width else "needs at least one feature"
                    last = f"must be {self.width}" if self.width else "must not be empty"
                    raise ValueError(f"{self.layer} {held}; {name} has shape {tuple(x.shape)}. The last axis {last}.")
            shapes = [tuple(x.shape) for x in arrays.values()]
            if shapes[0] != shapes[-1]:
                raise ValueError(
                    f"{self.layer}: dy has shape {shapes[0]}, and the x that was saved {shapes[-1]}. "
                    "Hand backward the gradient of the y that came with this saved."
                )

    def _check_dtype(self, name: str, x: Array) -> None:
        if dtype_name(x) not in (*FLOATS, "complex128"):
            raise TypeError(
                f"{self.layer} works on {', '.join(FLOATS)}; {name} is {dtype_name(x)}. "
                f"Convert it first, for example by {name}.astype(numpy.float32)."
            )

    def mean(self, *arrays: Array) -> Any:
        """Return the mean over the features, kept as an axis of length 1; several arrays share one message."""
        xp = array_module(arrays[0])
        n = arrays[0].shape[-1] * self.group.size
        sums = [xp.sum(a, axis=-1, keepdims=True) for a in arrays]
        total = self.group.sum(*sums, what=f"{self.layer} of {n} features")
        return total / n if len(arrays) == 1 else tuple(t / n for t in total)

    def centre(self, x: Array) -> tuple[Array, Array, Array]:
        """Return x minus its mean, the mean, and the variance; two messages.

        The mean is of shape (rows, 2): the mean as it came out of the sum, and what rounding had left of it, which is
        the mean of x minus its mean. Both are subtracted, so that a row far from zero loses nothing.
        """
        first = self.mean(x)
        x = x - first
        rest, square = self.mean(x, x * x)
        x -= rest
        return x, array_module(x).concat([first, rest], axis=-1), square - rest * rest


def affine(z: Array, w: Array | None, b: Array | None = None) -> Array:
    """Return z w + b; what the norm does not have is left out."""
    y = z if w is None else z * w
    return y if b is None else y + b


def centred(x: Array, mean: Array) -> Array:
    """Return x minus the mean that `Features.centre` gave."""
    x = x - mean[:, :1]
    x -= mean[:, 1:]
    return x
