"""The gate before the norm: the order of Mamba-2 in `npnorm.norms.gated_rms_norm`.

Tri Dao and Albert Gu, "Transformers are SSMs", ICML 2024, arXiv:2405.21060, section 7.1.

Forward, for each row x with its gate g, and the norm of `npnorm.norms.rms_norm`:

    silu = g sigmoid(g)                   sigmoid(g) = 1 / (1 + exp(-g))
    u = x silu
    y = norm(u, w)

Backward, given dy, with norm' the backward pass of norm:

    s = sigmoid(g)
    silu = g s
    dsilu = s + g s (1 - s)               the derivative of silu by g
    u = x silu
    du, dw = norm'(dy, u, w)
    dx = du silu
    dg = du x dsilu

Where one element of u is far larger than the others, its du is far smaller: a norm nearly takes it out. Then dx and dg
multiply the smallest du by the largest silu or x, so that every element of du must have its digits. What is
communicated is what RMSNorm communicates.
"""

from npnorm.arrays import Array, sigmoid
from npnorm.engine import Row
from npnorm.norms import rms_norm


def measured(row: Row, x: Array, g: Array) -> Array:
    """Return u, whose root mean square it is."""
    return x * (g * sigmoid(g))


def forward(row: Row, x: Array, g: Array, w: Array) -> tuple[Array, tuple[Array]]:
    """Return y, and the statistics to save."""
    silu = g * sigmoid(g)
    u = x * silu
    y, statistics = rms_norm.forward(row, u, w, row.without_bias(u))
    return y, statistics


def backward(row: Row, dy: Array, x: Array, g: Array, w: Array, rstd: Array) -> tuple[Array, Array, Array]:
    """Return dx and dg, and dw before its sum over the rows."""
    s = sigmoid(g)
    silu = g * s
    dsilu = s + g * s * (1 - s)
    u = x * silu
    du, dw, _ = rms_norm.backward(row.for_products(silu, x * dsilu), dy, u, w, rstd)
    dx = du * silu
    dg = du * x * dsilu
    return dx, dg, dw
