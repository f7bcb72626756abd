"""Activations: functions of each element, without parameters.

ReLU: Vinod Nair and Geoffrey E. Hinton, "Rectified Linear Units Improve Restricted Boltzmann Machines", ICML 2010.

    y  = 0 where x <= 0, x elsewhere
    dx = 0 where x <= 0, dy elsewhere

GELU in its tanh form: Dan Hendrycks and Kevin Gimpel, "Gaussian Error Linear Units", 2016, arXiv:1606.08415, section 2.

    t  = tanh(c (x + a x^3)),  c = sqrt(2 / pi), a = 0.044715
    y  = x (1 + t) / 2
    dx = dy ((1 + t) / 2 + x (1 - t^2) c (1 + 3 a x^2) / 2)

SiLU: Stefan Elfwing, Eiji Uchibe and Kenji Doya, "Sigmoid-Weighted Linear Units", 2017, arXiv:1702.03118.

    s  = 1 / (1 + exp(-x))
    y  = x s
    dx = dy s (1 + x (1 - s))
"""

import math
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module
from npnorm.layers.inplace import elementwise, exp, tanh
from npnorm.tree import show_shapes

C = math.sqrt(2 / math.pi)
A = 0.044715


def relu(x: Array) -> tuple[Array]:
    """Return y, element by element; of complex numbers, of the complex step, the real part decides."""
    return (array_module(x).maximum(x, 0),)


def relu_backward(dy: Array, x: Array) -> tuple[Array]:
    """Return dx, element by element; by a product, since a choice takes a CPU up to ten times as long."""
    return (dy * array_module(dy).astype(~(x <= 0), dy.dtype),)


def gelu(x: Array) -> tuple[Array, Array]:
    """Return y and t, element by element."""
    t = x * x
    t *= C * A
    t += C
    t *= x
    t = tanh(t)  # of c (x + a x^3)
    y = t + 1
    y *= x
    y *= 0.5
    return y, t


def gelu_backward(dy: Array, x: Array, t: Array) -> tuple[Array]:
    """Return dx, element by element."""
    d = x * x
    d *= 1.5 * C * A
    d += 0.5 * C
    d *= x
    d *= 1 - t * t  # x (1 - t^2) c (1 + 3 a x^2) / 2
    half = 1 + t
    half *= 0.5
    d += half
    d *= dy
    return (d,)


def silu(x: Array) -> tuple[Array, Array]:
    """Return y and s, element by element."""
    with np.errstate(over="ignore"):  # exp(-x) = infinity gives s = 0, as it should
        s = exp(-x)
    s += 1
    s = 1 / s
    return x * s, s


def silu_backward(dy: Array, x: Array, s: Array) -> tuple[Array]:
    """Return dx, element by element."""
    d = 1 - s
    d *= x
    d += 1
    d *= s
    d *= dy
    return (d,)


@show_shapes
class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array
    gate: Array  # tanh for GELU, sigmoid for SiLU


@show_shapes
class SavedReLU(NamedTuple):
    """What backward needs of forward."""

    x: Array


class ReLU:
    """Keep what is positive: torch's ReLU.

    Examples
    --------
    >>> import numpy as np
    >>> y, saved = ReLU().forward(np.array([-1.0, 0.0, 1.0]))
    >>> y
    array([0., 0., 1.])
    """

    params: dict[str, Array] = {}
    shards: dict[str, None] = {}

    def __repr__(self) -> str:
        return "ReLU()"

    def forward(self, x: Array) -> tuple[Any, SavedReLU]:
        """Return y of the shape of x."""
        (y,) = elementwise(relu, x)
        return y, SavedReLU(x)

    def backward(self, dy: Array, saved: SavedReLU) -> tuple[Any, dict[str, Array]]:
        """Return dx, and no gradients."""
        (dx,) = elementwise(relu_backward, dy, *saved)
        return dx, {}


class GELU:
    """Weigh x by (about) the probability that a standard normal number is below it: torch's GELU("tanh").

    Examples
    --------
    >>> import numpy as np
    >>> y, saved = GELU().forward(np.array([-1.0, 0.0, 1.0]))
    >>> y.round(4)
    array([-0.1588,  0.    ,  0.8412])
    """

    params: dict[str, Array] = {}
    shards: dict[str, None] = {}

    def __repr__(self) -> str:
        return "GELU()"

    def forward(self, x: Array) -> tuple[Any, Saved]:
        """Return y of the shape of x."""
        y, t = elementwise(gelu, x)
        return y, Saved(x, t)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, dict[str, Array]]:
        """Return dx, and no gradients."""
        (dx,) = elementwise(gelu_backward, dy, *saved)
        return dx, {}


class SiLU:
    """Weigh x by its sigmoid: torch's SiLU, also called swish.

    Examples
    --------
    >>> import numpy as np
    >>> y, saved = SiLU().forward(np.array([-1.0, 0.0, 1.0]))
    >>> y.round(4)
    array([-0.2689,  0.    ,  0.7311])
    """

    params: dict[str, Array] = {}
    shards: dict[str, None] = {}

    def __repr__(self) -> str:
        return "SiLU()"

    def forward(self, x: Array) -> tuple[Any, Saved]:
        """Return y of the shape of x."""
        y, s = elementwise(silu, x)
        return y, Saved(x, s)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, dict[str, Array]]:
        """Return dx, and no gradients."""
        (dx,) = elementwise(silu_backward, dy, *saved)
        return dx, {}
