"""The mean and variance of rows: on one rank, and three ways to find them on the ranks of a group.

    two-pass    mean(x), then mean((x - mean(x))^2)            two sums: the textbook
    packed      mean(x) and mean(x^2) together                 one sum; an error where the mean is too large
    gathered    each rank's count, mean and centred square,    one gather; as exact as one rank alone
                merged in the order of the ranks

On one rank all three are the same. The first mean is rounded, so the mean of x - mean is what it left; this is
subtracted, too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from npnorm.arrays import Array, array_module, sqrt
from npnorm.tree import show_shapes


@show_shapes
class Mean(NamedTuple):
    """The mean of each row, to twice the digits of an array: a rounded number, and what rounding left."""

    high: Any
    low: Any


class Centred(NamedTuple):
    """Rows without their mean."""

    c: Any  # x - mean(x)
    mean: Mean
    var: Any  # mean(c^2)
    n: Any  # the elements of a row, over all ranks


def subtract(x: Array, mean: Mean) -> Array:
    """Return x - mean(x)."""
    c = x - mean.high
    c -= mean.low
    return c


def local(row: Any, x: Array) -> Centred:
    """Return the statistics of rows that this rank holds in whole; no message. An empty row has the mean 0."""
    n = row.layout.local_size(x)
    at_least_one = max(n, 1)

    def around(high: Array) -> Centred:
        c = x - high
        low = row.local_sum(c) / at_least_one
        c -= low
        return Centred(c, Mean(high, low), row.local_sum(c * c) / at_least_one, n)

    xp, high = array_module(x), row.local_sum(x) / at_least_one
    found = around(high)
    near_constant = abs(found.mean.low) > 2.0**-10 * sqrt(abs(found.var))  # the mean is off by more than 2^-10 spreads
    if bool(xp.any(near_constant)):
        found = around(high + xp.where(near_constant, found.mean.low, 0 * found.mean.low))
    return found


def two_pass(row: Any, x: Array) -> Centred:
    """Return the statistics by two sums over the ranks. What rounding left of the mean travels with the squares."""
    high = row.mean(x)
    c = x - high
    low, square = row.mean(c, c * c)
    c -= low
    return Centred(c, Mean(high, low), square - low * low, row.layout.size(x))


def packed(row: Any, x: Array) -> Centred:
    """Return the statistics by one sum over the ranks, of x and x^2: var = mean(x^2) - mean(x)^2.

    If the mean is 10^d times the spread, 2 d of the 16 digits cancel. At a mean of 10^8 spreads nothing is left.

    Raises
    ------
    ValueError
        On every rank, if more than half of the digits of var + eps cancel in some row: the result would be noise.
    """
    high, square = row.mean(x, x * x)
    var = square - high * high
    if bool(array_module(x).any(abs(var + row.eps) < abs(square) * 2.0**-26)):
        raise ValueError(
            f"{row.layout.layer}: in some row the mean is so far beyond the spread that mean(x^2) - mean(x)^2 loses "
            "more than half of its digits. Take statistics='gathered', which is one message, too, and loses none."
        )
    return Centred(x - high, Mean(high, high - high), var, row.layout.size(x))


def gathered(row: Any, x: Array) -> Centred:
    """Return the statistics by one gather over the ranks, merged in their order."""
    xp, own = array_module(x), local(row, x)
    n = xp.full_like(abs(own.mean.high), float(own.n))
    parts = row.layout.group.gather(xp.stack([n, *own.mean, own.var * own.n])[None, ...], axis=0, label=row.label(x))
    n, high, low, squares = merge(parts)
    mean = Mean(high, low)
    return Centred(subtract(x, mean), mean, squares / n, n)


FORMS: dict[str, Callable[[Any, Array], Centred]] = {"two-pass": two_pass, "packed": packed, "gathered": gathered}


def merge(parts: Array) -> tuple[Array, Array, Array, Array]:
    """Merge counts, means and sums of centred squares of parts, in their order.

    Tony F. Chan, Gene H. Golub and Randall J. LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing Sample
    Variances", Stanford STAN-CS-79-773, 1979: with delta = mean_b - mean_a and n = n_a + n_b,

        mean = mean_a + delta n_b / n
        m2   = m2_a + m2_b + delta^2 n_a n_b / n

    Means are kept as distances from the first one, so that rows far from zero lose nothing. Empty parts do not count.

    Parameters
    ----------
    parts : array of shape (parts, 4, ...)
        Of each part: n, the mean in two summands, m2.

    Returns
    -------
    n, mean, rest, m2 : arrays of shape (...)
        The mean of all is mean + rest.

    Examples
    --------
    >>> import numpy as np
    >>> parts = np.array([[[2.0], [5.0], [0.0], [2.0]], [[2.0], [9.0], [0.0], [2.0]]])
    >>> merge(parts)  # of (4, 6) and (8, 10): mean 5 + 2, centred squares 9 + 1 + 1 + 9
    (array([4.]), array([5.]), array([2.]), array([20.]))
    """
    xp = array_module(parts)
    n, mean, rest, m2 = (parts[0, i, ...] for i in range(4))
    for part in range(1, parts.shape[0]):
        n_b, mean_b, rest_b, m2_b = (parts[part, i, ...] for i in range(4))
        mean = xp.where(abs(n) > 0, mean, mean_b)  # of the first part that is not empty
        delta = (mean_b - mean) + rest_b - rest
        n_a, n = n, n + n_b
        share = n_b / xp.where(abs(n) > 0, n, xp.ones_like(n))
        rest = rest + delta * share
        m2 = m2 + m2_b + delta * delta * n_a * share
    return n, mean, rest, m2
