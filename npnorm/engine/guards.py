"""Which rows lost digits in the fast evaluation, so that they are evaluated again: one predicate, and its limits.

A row is evaluated again if its mean is too far from zero in units of its spread, if rstd or |dz|^2 is near the end of
the range, if its numbers are subnormal beside eps, or if little is left of dz in dx. All of this depends on the row
alone.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module, contiguous, largest

LOW_PRECISION = ("float16", "bfloat16", "float32")
"""The dtypes whose squares float64 holds, with digits to spare."""

SHORT = 8
"""The fewest features of a row for the fast evaluation. Of a shorter row, its mean takes most digits."""

SHORT_FLOAT32 = 32
"""The fewest for float32. Of a shorter row, so many rows need float64 that float64 is faster from the start."""

SPACE = 16
"""The shortest last axis of channels for which the fast evaluation pays."""


NEXT = 5e-324
"""The number after 0: what is below it is 0 or negative."""


class Limits(NamedTuple):
    """What a row must keep to, so that the fast evaluation is exact enough."""

    mean: float  # the largest mean, in units of the spread
    folded_mean: float  # the same where var is mean(x^2) - mean(x)^2, and x - mean(x) is never formed
    constant: bool  # whether the mean of a constant row has no error
    digits: float  # by how much 1 - eps rstd^2 may be off
    size: int  # rstd must be between 2^-size and 2^size
    tiny: float  # below this all x of a row beside eps may be 0, but not smaller: x rstd and dy x lose digits
    square: int  # |dz|^2 must be 0, or between 2^-square and 2^square
    left: float  # the least sum of dz dx / rstd, in units of |dz|^2: what is left of dz in dx
    mean_left: float  # what a mean adds to that, by its square in units of the spread
    weight: float  # the largest |w|


LIMITS = {
    "float32": Limits(4.0, 2.0, False, 2.0**-16, 50, 2.0**-40, 100, 2.0**-2, 0.0, 2.0**20),
    "float64": Limits(2.0**8, 2.0**5, True, 2.0**-40, 450, 0.0, 900, 2.0**-18, 2.0**-18, 2.0**300),
}
"""By the working precision.

In float64 a mean of 2^8 spreads leaves 45 binary digits of c, and one of 2^5 leaves 43 of var; float32 has 24. So about
one number in a million is not rounded to the nearest. With dy = y, eps = 1e-5 and var = 1, dx is 1e-5 of dz, and two in
ten thousand are not; they are within 0.501 units.
"""


TWICE = 2.0**26
"""The largest mean, in units of the spread, where what rounding left of the mean is subtracted as well, in float64.

x - mean(x), of an x of 24 digits, has then lost nothing, and the mean of the difference is far below the spread.
"""


class Lost(NamedTuple):
    """Which rows lost digits backward, of shape (rows,); None if no row did."""

    rows: Any  # in all results
    dx: Any  # in dx alone, since little is left of dz


def is_supported(layout: Any, shape: tuple[int, ...], dtype: str, params: tuple[Array, ...]) -> bool:
    """Return whether rows of this shape and dtype are evaluated fast, and the parameters are as long as they."""
    if not layout.vectorized or not layout.local or dtype not in LOW_PRECISION:
        return False
    if layout.per_channel:
        return shape[-1] >= SPACE
    return shape[0] >= SHORT and all(a.size == shape[0] for a in params)


class Guards:
    """The predicate for one working precision.

    `npnorm.compiled.c` writes the same predicate for kernels: what changes here changes there.

    Parameters
    ----------
    work : "float32" or "float64"
    centring : "folded", "once" or "twice"
        What becomes of the mean: see `npnorm.engine.levels`.
    eps : float
    """

    def __init__(self, work: str, centring: str, eps: float) -> None:
        limits = LIMITS[work]
        self.limits, self.eps = limits, eps
        self.constant = limits.constant and centring != "folded"
        self.mean = {"folded": limits.folded_mean, "once": limits.mean, "twice": TWICE}[centring] ** 2
        self.mean_left = 0.0 if centring == "twice" else limits.mean_left
        self.most_left = limits.left + self.mean_left * self.mean  # of what `least_left` returns
        self.low, self.high = 2.0**-limits.size, 2.0**limits.size
        self.square = 2.0**-limits.square, 2.0**limits.square
        self.beside_eps = ((1 - 2.0**-20) / eps) ** 0.5 if limits.tiny and eps > 0 else math.inf
        # Half of the spread is sure below this rstd, and a mean below 0.7 of the limit is then near enough.
        self.sure, self.near = (0.5 / eps) ** 0.5 if eps > 0 else math.inf, 0.7 * self.mean**0.5

    def far(self, mean: Any, var: Any) -> Any:
        """Return what is positive if the mean is too far from zero, in units of the spread.

        It is without eps: c has the digits that x - mean(x) leaves. Arrays, or what a trace has for them.
        """
        return mean * mean - var * self.mean

    def far_of_saved(self, mean: Any, rstd: Any, eps: Any) -> Any:
        """Return the same from what is saved: var rstd^2 is 1 - eps rstd^2, less what that may be off by."""
        square = rstd * rstd
        spread = (1 - self.limits.digits) - eps * square
        return mean * mean * square - (spread + abs(spread)) * (self.mean / 2)

    def least_left(self, means: list[Any], rstd: Any) -> Any:
        """Return the least share of |dz|^2 that must be left in dx: more, if the mean took digits."""
        if not means or not self.mean_left:
            return self.limits.left
        far = sum(mean * mean for mean in means) * rstd * rstd
        far = array_module(rstd).minimum(far, self.mean)  # a constant row has any
        return self.limits.left + self.mean_left * far

    def lost_forward(self, x: Array, rstd: Array, centred: Any) -> Any:
        """Return which rows lost digits forward, of shape (rows,); None if no row did.

        centred : Centred or None
            The mean and variance of the rows, without eps.
        """
        far = None
        if centred is not None:
            far = self.far(centred.mean.high, centred.var)
        if all_between(rstd, self.low, min(self.high, self.beside_eps)):
            if far is None or all_between(far, -math.inf, NEXT):
                return None
        xp = array_module(rstd)
        lost = self._out_of_range(x, rstd)
        if far is not None:
            lost = lost | ~((far <= 0) | (centred.var == 0) if self.constant else far <= 0)
        return _rows(xp, lost)

    def lost_backward(
        self, dy: Array, x: Array, rstd: Array, means: list[Array], squares: tuple[Array, Array] | None
    ) -> Lost | None:
        """Return which rows lost digits backward; None if no row did.

        means : list of arrays
            What was subtracted from x.
        squares : pair of arrays, or None
            |dz|^2, and what dx takes away from it.
        """
        xp, high = array_module(rstd), min(self.high, self.beside_eps)
        good = all_between(rstd, self.low, min(high, self.sure) if means else high)
        for mean in means:  # a quick look
            good = good and all_between(mean * rstd, -self.near, self.near)
        if squares is not None:
            square, left = squares
            good = good and all_between(square, *self.square)
            good = good and all_between(left / square, self.most_left - 1.0, math.inf)
        if good:
            return None
        lost = self._out_of_range(x, rstd)
        for mean in means:
            too_far = ~(self.far_of_saved(mean, rstd, self.eps) <= 0)
            if self.constant and bool(xp.any(too_far)):
                axes = tuple(range(1, x.ndim))
                too_far = too_far & ~xp.all(contiguous(x, xp.float64) == mean, axis=axes, keepdims=True)
            lost = lost | too_far
        if squares is None:
            return Lost(_rows(xp, lost), None)
        zero = square == 0
        if bool(xp.any(zero)):
            zero = zero & (_largest(dy) == 0)
        lost = lost | ~((square > self.square[0]) & (square < self.square[1]) | zero)
        cancels = ~(square + left > self.least_left(means, rstd) * square) & ~lost & ~zero
        return Lost(_rows(xp, lost), _rows(xp, cancels))

    def _out_of_range(self, x: Array, rstd: Array) -> Array:
        """Return which rows have an rstd near the end of the range, or are subnormal beside eps."""
        lost = ~((rstd > self.low) & (rstd < self.high))
        if self.beside_eps == math.inf or not bool(array_module(rstd).any(rstd >= self.beside_eps)):
            return lost
        top = _largest(x)
        return lost | ((rstd >= self.beside_eps) & (top > 0) & (top <= self.limits.tiny))


def all_between(a: Array, low: float, high: float) -> bool:
    """Return whether all numbers are known to lie between two, and none is a NaN; another module is not asked.

    A GPU would have to be waited for each time; what `_rows` asks is enough.
    """
    if type(a) is not np.ndarray:
        return False
    if a.size <= 16:  # this takes a third of the time
        for value in a.ravel().tolist():
            if not low < value < high:
                return False
        return True
    return bool(((a > low) & (a < high)).all())


def _largest(x: Array) -> Array:
    """Return the largest magnitude of each row; in float64, since a GPU takes subnormal float32 for zeros."""
    xp = array_module(x)
    return largest(x if xp is np else contiguous(x, xp.float64))


def _rows(xp: Any, lost: Array) -> Any:
    lost = xp.reshape(lost, (-1,))
    return lost if bool(xp.any(lost)) else None
