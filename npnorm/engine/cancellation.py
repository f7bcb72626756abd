"""dx where it cancels, and sums and products of floats without error.

T. J. Dekker, "A Floating-Point Technique for Extending the Available Precision", Numerische Mathematik 18, 1971, has
the product. Donald E. Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B, has the sum. Takeshi
Ogita, Siegfried M. Rump and Shin'ichi Oishi, "Accurate Sum and Dot Product", SIAM Journal on Scientific Computing 26,
2005, algorithm 4.4, has the sum of many.
"""

import math
from typing import Any

from npnorm.arrays import Array, array_module, dot, dtype_name, largest
from npnorm.engine.statistics import Mean, subtract

FIRST = {True: 2.0**-30, False: 0.25}
"""The least share of |dz|^2 in |dx / rstd|^2 for which the formula has enough digits; by low precision."""

ENOUGH = {0: 2.0**-42, 1: 2.0**-74}
"""The same, of arrays of low precision, for what lies along c and 1 to be removed with no exact step, and with one."""


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
    lost = _dot(row, dx, dx) * size < _dot(row, dz, dz) * FIRST[row.low_precision]
    for factor in row.factors:
        factor = factor / largest(factor)
        a, b = dx * factor, dz * factor
        lost = lost | (_dot(row, a, a) * size < _dot(row, b, b) * FIRST[row.low_precision])
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
    rest = 0.0 if row.low_precision or not getattr(w, "ndim", 0) else two_product(dy, w)[1]
    rows = xp.reshape(xp.ones_like(rstd, dtype=xp.bool), (-1,))
    if mean is not None:  # of a constant dz nothing is left
        rows = ~(is_constant(dz) & is_constant(rest))
    dx = dz if bool(xp.all(rows)) else xp.zeros_like(dz)
    for steps in (3,) if not row.low_precision else (1, 3) if mean is None else (0, 1, 3):
        if bool(xp.all(rows)):
            dx = _in_steps(steps, row, dz, rest, x, mean, share)
        elif bool(xp.any(rows)):
            of = _of(rows, dz.ndim)
            of_mean = None if mean is None else Mean(*map(of, mean))
            dx[rows] = _in_steps(steps, row, of(dz), of(rest), of(x), of_mean, of(share))
        if steps in ENOUGH:
            rows = rows & xp.reshape(_dot(row, dx, dx) <= _dot(row, dz, dz) * ENOUGH[steps], (-1,))
    dx *= rstd
    return dx


def _of(rows: Array, ndim: int) -> Any:
    """Return a function that takes these rows of an array; of a weight that all rows share, all of it."""
    return lambda a: a[rows] if getattr(a, "ndim", 0) == ndim else a


def _dot(row: Any, a: Array, b: Array) -> Array:
    """Return the sum of the products of each row."""
    flat = (a.shape[0], row.layout.local_size(a))
    xp = array_module(a)
    return xp.reshape(dot(xp.reshape(a, flat), xp.reshape(b, flat)), (a.shape[0], *[1] * (a.ndim - 1)))


def is_constant(a: Any) -> Any:
    """Return which rows have one number throughout, of shape (rows,); of numbers that all rows share, whether these do.

    Examples
    --------
    >>> import numpy as np
    >>> is_constant(np.array([[1.0, 1.0], [1.0, 2.0]])), is_constant(np.ones(2))
    (array([ True, False]), True)
    """
    xp: Any = array_module(a) if getattr(a, "ndim", 0) else None
    if xp is None:
        return True
    if a.ndim == 1:
        return bool(xp.all(a == a[0]))
    axes = tuple(range(1, a.ndim))
    return xp.max(a, axis=axes) == xp.min(a, axis=axes)


class _Plane:
    """The directions 1 and c that the norm takes out of dz; c alone for a norm that does not centre."""

    def __init__(self, row: Any, x: Array, mean: Mean | None) -> None:
        self.row, self.mean, self.c = row, mean, x if mean is None else subtract(x, mean)
        square = _dot(row, self.c, self.c)
        self.along = array_module(x).where(square > 0, 1 / square, 0 * square)  # a constant row has no direction

    def constant(self, p: Array) -> Any:
        """Return the constant in p."""
        return 0.0 if self.mean is None else self.row.local_sum(p) / self.row.layout.local_size(p)

    def beta(self, p: Array) -> Array:
        """Return how much of c is in p."""
        return _dot(self.row, p, self.c) * self.along

    def remove(self, p: Array, but: Any = 0.0) -> tuple[Array, Array]:
        """Return p without what lies in the plane, but for so much of c; and how much of c was in p."""
        beta = self.beta(p)
        left = self.c * (but - beta)
        left += p
        return left if self.mean is None else left - self.constant(p), beta


def _in_steps(steps: int, row: Any, dz: Array, rest: Any, x: Array, mean: Mean | None, share: Array) -> Array:
    """Return p + beta c share, where dz + rest is p + beta c + a constant; the more exact, the more steps.

    With no step, p has the digits that plain arithmetic leaves of dz.
    """
    plane = _Plane(row, x, mean)
    if steps == 1 and mean is None:
        beta, _ = halves(plane.beta(dz))
        p = dz - beta * x  # of low precision: the product is exact, and the difference is small
        more = plane.beta(p)
        return p + x * ((beta + more) * share - more)
    p, beta = _exact_steps(steps, plane, dz, rest, x) if steps else (dz, 0 * plane.along)
    p, more = plane.remove(p)
    return plane.remove(p, but=(beta + more) * share)[0]


def _exact_steps(steps: int, plane: _Plane, dz: Array, rest: Any, x: Array) -> tuple[Array, Array]:
    """Return dz + rest - beta c - a constant, rounded once, and beta.

    The number beta is rounded to half of its digits, so that beta c is exact, in parts. What is left is smaller, and
    loses the rest of beta the same way. One step is for arrays of low precision: beta x is exact.
    """
    mean, parts = plane.mean, [x]
    if steps > 1:
        c, low = (x, 0 * x) if mean is None else _difference(x, mean)
        parts = [*halves(c), low]
    p, beta = dz, 0 * plane.along
    for _ in range(steps):
        step, _ = halves(plane.beta(p))
        constant = plane.constant(p) - (0.0 if steps > 1 or mean is None else step * mean.high)
        p, rest = accurate_sum(p, 0 * p - constant, *(-step * part for part in parts), rest)
        beta = beta + step
    return p, beta


def _difference(x: Array, mean: Mean) -> tuple[Array, Array]:
    """Return x - mean(x) rounded, and what rounding took: all digits of c where x is far from zero."""
    c, first = two_sum(x, -mean.high)
    c, second = two_sum(c, -mean.low)
    return c, first + second
