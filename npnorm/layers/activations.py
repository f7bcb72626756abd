"""Activations: functions of each element, without parameters.

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
from typing import NamedTuple

import numpy as np

from npnorm.arrays import Array, exp, tanh

C = math.sqrt(2 / math.pi)
A = 0.044715


class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array
    gate: Array  # tanh for GELU, sigmoid for SiLU


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

    def forward(self, x: Array) -> tuple[Array, Saved]:
        """Return y of the shape of x."""
        t = tanh(C * (x + A * (x * x * x)))
        y = x * (1 + t) / 2
        return y, Saved(x, t)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
        """Return dx, and no gradients."""
        x, t = saved
        dx = dy * ((1 + t) / 2 + x * (1 - t * t) * (C * (1 + 3 * A * (x * x))) / 2)
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

    def forward(self, x: Array) -> tuple[Array, Saved]:
        """Return y of the shape of x."""
        with np.errstate(over="ignore"):  # exp(-x) = infinity gives s = 0, as it should
            s = 1 / (1 + exp(-x))
        y = x * s
        return y, Saved(x, s)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, dict[str, Array]]:
        """Return dx, and no gradients."""
        x, s = saved
        dx = dy * s * (1 + x * (1 - s))
        return dx, {}
