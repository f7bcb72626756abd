"""The mean and variance of rows, and what cancellation takes from a gradient: the care that every centred norm needs.

Three ways to the mean and variance of rows that are split over the ranks of a group, by name:

    two-pass    mean(x), then mean((x - mean(x))^2)            two sums: the textbook
    packed      mean(x) and mean(x^2) together                 one sum; an error where the mean is too large
    gathered    each rank's count, mean and centred square,    one gather; as exact as one rank alone
                merged in the order of the ranks

Alone all three are the same: the mean is subtracted twice, since the first mean is rounded, and what it left is the
mean of the rest.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from npnorm.arrays import Array, array_module, sqrt
from npnorm.axes import Axes
from npnorm.group import Solo
from npnorm.norms.pairs import two_product, two_sum
from npnorm.terms import is_written


class Centred(NamedTuple):
    """Rows without their mean."""

    c: Array  # x - mean(x) = x - mean - rest
    mean: Array
    rest: Array  # what rounding had left of the mean
    var: Array  # mean(c^2)
    n: Array | int  # the elements of a row, over all ranks


def centred(x: Array, mean: Array, rest: Array) -> Array:
    """Return x - mean(x) from the two parts of the mean."""
    if is_written(x):
        return written_centred(x, mean)
    c = x - mean
    c -= rest
    return c


def alone(axes: Axes, x: Array, eps: Array = 0) -> Centred:
    """Return the statistics of rows that this rank holds in whole; no message. An empty row has the mean 0."""
    n = axes.held(x)
    at_least_one = max(n, 1)

    def around(mean: Array) -> Centred:
        c = x - mean
        rest = axes.held_sum(c) / at_least_one
        c -= rest
        return Centred(c, mean, rest, axes.held_sum(c * c) / at_least_one, n)

    xp, mean = array_module(x), axes.held_sum(x) / at_least_one
    found = around(mean)
    near_constant = abs(found.rest) > 2.0**-10 * sqrt(abs(found.var))  # the mean is off by more than the row spreads
    if bool(xp.any(near_constant)):
        found = around(mean + xp.where(near_constant, found.rest, 0 * found.rest))
    return found


def written(axes: Axes, x: Array, eps: Array) -> Centred:
    """Return the statistics in the textbook's way; rows for which it is not exact enough are found by their mean.

    Where factors fold, var = mean(x^2) - mean(x)^2, and x need not be written without its mean.
    """
    n = axes.held(x)
    mean = axes.held_sum(x) / n
    c = written_centred(x, mean)
    var = axes.held_sum(x * x) / n - mean * mean if x.tape.folds else axes.held_sum(c * c) / n
    return Centred(c, mean, 0 * mean, var, n)


def written_centred(x: Array, mean: Array) -> Array:
    """Return x - mean, and note that the mean, in units of the spread, says how much cancels."""
    x.tape.means.append(mean)
    c = x - mean
    return c if x.tape.folds else c.formed()


def difference(x: Array, mean: Array) -> Array:
    """Return x - mean for a mean that may be far from x: as one array, also where factors fold."""
    c = x - mean
    return c.formed() if is_written(c) else c


def two_pass(axes: Axes, x: Array, eps: Array) -> Centred:
    """Return the statistics by two sums over the ranks; what rounding left of the mean travels with the squares."""
    mean = axes.mean(x)
    c = x - mean
    rest, square = axes.mean(c, c * c)
    c -= rest
    return Centred(c, mean, rest, square - rest * rest, axes.n(x))


def packed(axes: Axes, x: Array, eps: Array) -> Centred:
    """Return the statistics by one sum over the ranks, of x and x^2: var = mean(x^2) - mean(x)^2.

    Where the mean is 10^d times the spread, 2 d of the 16 digits cancel: at a mean of 10^8 nothing is left.

    Raises
    ------
    ValueError
        On every rank, where more than half of the digits of var + eps cancel in some row: the result would be noise.
    """
    mean, square = axes.mean(x, x * x)
    if bool(array_module(x).any(abs(square - mean * mean + eps) < abs(square) * 2.0**-26)):
        raise ValueError(
            f"{axes.layer}: in some row the mean is so far beyond the spread that mean(x^2) - mean(x)^2 loses more "
            "than half of its digits. Take statistics='gathered', which is one message, too, and loses none."
        )
    return Centred(x - mean, mean, mean - mean, square - mean * mean, axes.n(x))


def gathered(axes: Axes, x: Array, eps: Array) -> Centred:
    """Return the statistics by one gather over the ranks, merged in their order."""
    mine = alone(axes, x)
    n = array_module(x).full_like(abs(mine.mean), float(mine.n))
    parts = axes.group.gather(
        array_module(x).stack([n, mine.mean, mine.rest, mine.var * mine.n])[None, ...], axis=0, label=axes.layer
    )
    n, mean, rest, squares = merge(parts)
    return Centred(centred(x, mean, rest), mean, rest, squares / n, n)


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


Form = Callable[[Axes, Array, Array], Centred]
FORMS: dict[str, Form] = {"two-pass": two_pass, "packed": packed, "gathered": gathered}


def centre(axes: Axes, x: Array, form: str, eps: Array) -> Centred:
    """Return x minus its mean, and the statistics, by the named form where the rows are split over a group."""
    if is_written(x):
        return written(axes, x, eps)
    return (alone if isinstance(axes.group, Solo) else FORMS[form])(axes, x, eps)


def refine(
    axes: Axes,
    d: Array,
    dz: tuple[Array, Array | None],
    x: Array,
    eps_share: Array,
    mean: tuple[Array, Array] | None = None,
) -> Array:
    """Return d = dz - mean(dz) - z mean(dz z), where little is left of dz with the digits that cancelled.

    With c = x - mean(x), or x for a norm that does not centre, dz is p + beta c + a constant, with p at right angles to
    c and to 1. Of these d keeps p and beta c (1 - mean(z^2)); and 1 - mean(z^2) = eps / (var + eps) is known without a
    subtraction. This matters for rows of a few elements, and where dz is nearly z. p is found in pairs of floats, since
    it may be far below the rounding of dz. Rows that are split over a group stay as they are: they would need messages.

    Parameters
    ----------
    d : array
        As the formula has it.
    dz : pair of arrays
        dy and w, whose product dz is; w may be None.
    x : array
    eps_share : array
        eps rstd^2, of each row.
    mean : pair of arrays, or None
        The mean of x and what rounding had left of it; None for a norm that does not centre.
    """
    if not isinstance(axes.group, Solo):
        return d
    if is_written(d):
        whole = affine(*dz)
        d.tape.cancelling.append((whole, axes.held_sum(whole * d.less(whole))))
        return d
    xp, (dy, w) = array_module(d), dz
    lost = axes.held_square(d) < axes.held_square(affine(dy, w)) / 4
    if not bool(xp.any(lost)):
        return d
    rows = xp.reshape(lost, (-1,))

    def of_rows(a: Array) -> Array:
        return a[rows] if a.ndim == d.ndim else a  # w may be the same for all rows

    found = _along_and_across(
        axes,
        (of_rows(dy), None if w is None else of_rows(w)),
        of_rows(x),
        of_rows(eps_share),
        None if mean is None else (of_rows(mean[0]), of_rows(mean[1])),
    )
    refined = xp.astype(d, d.dtype)
    refined[rows] = xp.where(abs(found) < math.inf, found, of_rows(d))
    return refined


def _along_and_across(
    axes: Axes, dz: tuple[Array, Array | None], x: Array, eps_share: Array, mean: tuple[Array, Array] | None
) -> Array:
    """Return p + beta c eps_share for dz = p + beta c + a constant, as `refine` has it."""
    xp, (dy, w) = array_module(dz[0]), dz
    n = axes.held(x)
    c, c_rest = (x, 0 * x) if mean is None else _difference(x, *mean)
    square = axes.held_sum(c * c)
    along = xp.where(abs(square) > 0, 1 / square, 0 * square)  # a constant row has no direction
    p, p_rest = (dy, 0 * dy) if w is None else two_product(dy, w)
    beta = 0 * square
    for _ in range(3):  # again and again, for what rounding left
        if mean is not None:
            p, rest = two_sum(p, -axes.held_sum(p) / n)
            p_rest = p_rest + rest
        step = axes.held_sum(p * c) * along
        part, part_rest = two_product(c, step + 0 * c)
        p, rest = two_sum(p, -part)
        p, p_rest = two_sum(p, p_rest + rest - (part_rest + c_rest * step))
        beta = beta + step
    return p + c * (beta * eps_share)


def _difference(x: Array, mean: Array, rest: Array) -> tuple[Array, Array]:
    """Return x - mean - rest as a pair."""
    c, first = two_sum(x, -mean)
    c, second = two_sum(c, -rest)
    return c, first + second


def times_z(axes: Axes, dy: Array, c: Array, z: Array, rstd: Array) -> Array:
    """Return dy z, summed within a row where elements share a parameter.

    z = c rstd may be subnormal, where rows are tiny beside eps; then dy c, which is scaled, is summed first. On a group
    dy is not scaled, and dy c might leave the range.
    """
    return axes.within(dy * c) * rstd if isinstance(axes.group, Solo) else axes.within(dy * z)


def affine(z: Array, w: Array | None, b: Array | None = None) -> Array:
    """Return z w + b; what the norm does not have is left out."""
    y = z if w is None else z * w
    return y if b is None else y + b
