"""dx where it cancels, and sums and products of floats without error.

T. J. Dekker, "A Floating-Point Technique for Extending the Available Precision", Numerische Mathematik 18, 1971, has
the product. Donald E. Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B, has the sum. Takeshi
Ogita, Siegfried M. Rump and Shin'ichi Oishi, "Accurate Sum and Dot Product", SIAM Journal on Scientific Computing 26,
2005, algorithm 4.4, has the sum of many.
"""

import math
from typing import Any

from npnorm.arrays import Array, array_module, dtype_name, square_sum
from npnorm.engine.statistics import Mean, subtract

FIRST = {True: 2.0**-30, False: 0.25}
"""The least share of |dz|^2 in |dx / rstd|^2 for which the formula has enough digits; by low precision."""

ENOUGH = 2.0**-42, 2.0**-74
"""The same, of arrays of low precision, for the plain way to remove what lies along c and 1, and for one exact step."""


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a + b rounded, and what rounding took.

    Examples
    --------
    >>> two_sum(1.0, 1e-20)
    (1.0, 1e-20)
    """
    s = a + b
    of_b = s - a
    return s, (a - (s - of_b)) + (b - of_b)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a b rounded, and what rounding took; without overflow, a and b must be below 2^996.

    Examples
    --------
    >>> import numpy as np
    >>> p, rest = two_product(np.array(1 + 2.0**-30), np.array(1 + 2.0**-30))
    >>> p - 1 == 2.0**-29, rest == 2.0**-60
    (np.True_, np.True_)
    """
    p = a * b
    (a_high, a_low), (b_high, b_low) = halves(a), halves(b)
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def halves(a: Array) -> tuple[Array, Array]:
    """Return two numbers of half the digits (26 of 53) whose sum is `a`."""
    shifted = a * (2.0**27 + 1)
    high = shifted - (shifted - a)
    return high, a - high


def accurate_sum(first: Array, *others: Array) -> tuple[Array, Array]:
    """Return the sum of arrays, element by element, in twice the working precision: rounded, and what rounding took.

    Examples
    --------
    >>> accurate_sum(1e20, 1.0, -1e20)
    (1.0, 0.0)
    """
    s, rest = two_sum(first, others[0])
    for a in others[1:]:
        s, more = two_sum(s, a)
        rest = rest + more
    return two_sum(s, rest)


def dx_without_cancellation(
    row: Any, dx: Array, dy: Array, x: Array, w: Array, statistics: tuple[Any, ...], share: Array
) -> Array:
    """Return dx, found by `dx_where_it_cancels` in rows where too few digits of dz = dy w are left in it.

    Too few are left in dx itself, or in one of its products with `row.factors`.
    """
    if dtype_name(dx) != "float64":  # the complex step has no use for it
        return dx
    xp, rstd, dz = array_module(dx), statistics[-1], dy * w
    size = (1 / rstd) * (1 / rstd)
    lost = _square(row, dx) * size < _square(row, dz) * FIRST[row.low_precision]
    for factor in row.factors:
        factor = factor / _largest(row, factor)
        lost = lost | (_square(row, dx * factor) * size < _square(row, dz * factor) * FIRST[row.low_precision])
    lost = xp.reshape(lost, (-1,))
    if not bool(xp.any(lost)):
        return dx
    of = _of(lost, dx.ndim)
    given = tuple(Mean(*map(of, s)) if isinstance(s, Mean) else of(s) for s in statistics)
    found = dx_where_it_cancels(row, of(dy), of(x), of(w), given, of(share))
    dx = xp.astype(dx, dx.dtype)
    dx[lost] = xp.where(abs(found) < math.inf, found, dx[lost])
    return dx


def dx_where_it_cancels(row: Any, dy: Array, x: Array, w: Array, statistics: tuple[Any, ...], share: Array) -> Array:
    """Return dx = rstd (dz - mean(dz) - z mean(dz z)) with all digits, though little is left of dz = dy w.

    With c = x - mean(x), or x for a norm that does not centre, dz is p + beta c + a constant, with p at right angles to
    c and to 1. Of these dx keeps p and beta c (1 - mean(z^2)); and 1 - mean(z^2) = eps / (var + eps) is known without a
    subtraction. This matters for rows of a few elements, and where dz is nearly z.

    Parameters
    ----------
    row : Row
        Of whole rows, in float64.
    dy, x, w, statistics
        As the formula has them. Without a `Mean` among the statistics the norm does not centre.
    share : array
        1 - mean(z^2) = eps rstd^2, of each row.
    """
    xp, rstd, dz = array_module(dy), statistics[-1], dy * w
    mean = next((s for s in statistics if isinstance(s, Mean)), None)
    rest = 0 * dz if row.low_precision or not bool(getattr(w, "ndim", False)) else two_product(dy, w)[1]
    constant = share != share
    if mean is not None:  # of a constant dz nothing is left
        constant = _constant(row, dz) & _constant(row, rest)
    if bool(xp.all(constant)):
        return 0 * dz * rstd
    found = _along_and_across(row, dz, x, mean, share) if row.low_precision else 0 * dz
    for steps, enough in zip((1, 3) if row.low_precision else (3,), ENOUGH, strict=False):
        again = _square(row, found) <= _square(row, dz) * enough
        rows = xp.reshape(again & ~constant, (-1,))
        if not bool(xp.any(rows)):
            break
        of = _of(rows, dz.ndim)
        mean_ = None if mean is None else Mean(*map(of, mean))
        found = xp.astype(found, found.dtype)
        found[rows] = _with_more_digits(row, of(dz), of(rest), of(x), mean_, of(share), steps)
    return xp.where(constant, 0 * dz, found) * rstd


def _of(rows: Array, ndim: int) -> Any:
    """Return a function that takes these rows of an array; of a weight that all rows share, all of it."""
    return lambda a: a[rows] if getattr(a, "ndim", 0) == ndim else a


def _square(row: Any, a: Array) -> Array:
    xp = array_module(a)
    flat = xp.reshape(a, (a.shape[0], row.layout.local_size(a)))
    return xp.reshape(square_sum(flat), (a.shape[0], *[1] * (a.ndim - 1)))


def _largest(row: Any, a: Array) -> Array:
    xp = array_module(a)
    flat = xp.reshape(abs(a), (a.shape[0], row.layout.local_size(a)))
    return xp.reshape(xp.max(flat, axis=-1), (a.shape[0], *[1] * (a.ndim - 1)))


def _constant(row: Any, a: Array) -> Array:
    """Return which rows have one number throughout."""
    xp = array_module(a)
    flat = xp.reshape(a, (a.shape[0], row.layout.local_size(a)))
    return xp.reshape(xp.max(flat, axis=-1) == xp.min(flat, axis=-1), (a.shape[0], *[1] * (a.ndim - 1)))


class _Plane:
    """The directions 1 and c that the norm takes out of dz; c alone for a norm that does not centre."""

    def __init__(self, row: Any, x: Array, mean: Mean | None) -> None:
        self.row, self.n, self.mean = row, row.layout.local_size(x), mean
        self.c = x if mean is None else subtract(x, mean)
        square = row.local_sum(self.c * self.c)
        self.along = array_module(x).where(abs(square) > 0, 1 / square, 0 * square)  # a constant row has no direction

    def constant(self, p: Array) -> Any:
        """Return the constant in p."""
        return 0.0 if self.mean is None else self.row.local_sum(p) / self.n

    def beta(self, p: Array) -> Array:
        """Return how much of c is in p."""
        return self.row.local_sum(p * self.c) * self.along

    def remove(self, p: Array) -> tuple[Array, Array]:
        """Return p without what lies in the plane, and how much of c that was."""
        beta = self.beta(p)
        p = p - self.c * beta
        return p - self.constant(p), beta


def _along_and_across(row: Any, dz: Array, x: Array, mean: Mean | None, share: Array) -> Array:
    """Return p + beta c share; p has the digits of dz."""
    plane = _Plane(row, x, mean)
    p, beta = plane.remove(dz)
    p, more = plane.remove(p)
    return p + plane.c * ((beta + more) * share)


def _with_more_digits(row: Any, dz: Array, rest: Array, x: Array, mean: Mean | None, share: Array, steps: int) -> Array:
    """Return p + beta c share, with p found from exact parts: dz + rest - beta c - a constant, where beta c is exact.

    The number beta is rounded to half of its digits for that. What is left is smaller, and loses the rest of beta the
    same way, until it is small enough for the plain way. One step is for arrays of low precision: beta x is exact.
    """
    plane = _Plane(row, x, mean)
    parts: tuple[Array, ...] = (x,)
    if steps > 1:
        c, low = (x, 0 * x) if mean is None else _difference(x, mean)
        parts = *halves(c), low
    p, beta = dz, 0.0
    for _ in range(steps):
        step, _ = halves(plane.beta(p))
        constant = plane.constant(p) - (0.0 if steps > 1 or mean is None else step * mean.high)
        p, rest = accurate_sum(p, 0 * p - constant, *(-step * part for part in parts), rest)
        beta = beta + step
    for _ in range(2):
        p, more = plane.remove(p)
        beta = beta + more
    return p + plane.c * (beta * share)


def _difference(x: Array, mean: Mean) -> tuple[Array, Array]:
    """Return x - mean(x) rounded, and what rounding took: all digits of c where x is far from zero."""
    c, first = two_sum(x, -mean.high)
    c, second = two_sum(c, -mean.low)
    return c, first + second
