"""The exact evaluation of a formula: float64 arrays, rows scaled where their squares leave the range, one rounding.

* float64 holds the square of any float32, so that over the whole range of float32, float16 and bfloat16 the error is
  that of one rounding, beside the largest number of the row.
* A norm does not see the scale of a row: z(x, eps) = z(x / 2^k, eps / 4^k). Rows whose squares leave the range are
  handed to the formula divided by a power of two, which is exact; so are rows of dy, in which backward is linear.
* Sums are pairwise, and cancellation is undone where it is found (`npnorm.engine.cancellation`).

Complex numbers are evaluated in complex128, for the complex step: it differentiates the very code that runs.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from npnorm.arrays import Array, array_module, dtype_name, largest
from npnorm.engine.layout import Layout
from npnorm.engine.row import Absent, Row, absent
from npnorm.engine.statistics import Mean

SAFE = 450
"""Numbers between 2^-SAFE and 2^SAFE, and sums of their squares, are in range."""

LEAST = 24
"""A row divided by 2^LEAST can be summed without overflow."""

END = 2040.0
"""Exponents are clipped to this: dividing a float64 by 2^2040 already gives 0, by 2^-2040 infinity."""


class Formula(NamedTuple):
    """A norm's mathematics, as its page has it.

    `forward(row, x, *others, *params) -> y, statistics`, rstd last among the statistics, or none where the scale of x
    is seen. `backward(row, dy, x, *others, *read, *statistics) -> dx, *dothers, *dparams`, where dparams are still to
    be summed over the rows. What `absent` gives stands for a parameter that the norm does not have.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    saved: Any  # a NamedTuple: x, *others, *statistics, exponent
    params: tuple[str, ...] = ("weight", "bias")
    read: tuple[str, ...] = ("weight",)  # the parameters that backward is given; z is multiplied by them
    measured: Callable[..., Any] | None = None  # (row, x, *others): what the norm measures, if it is not x

    def without(self, name: str, xp: Any) -> Any:
        """Return what stands for a parameter that the norm does not have, beside arrays of a module."""
        return absent(xp, weight=name in self.read)

    def without_params(self, xp: Any) -> list[Any]:
        """Return what stands for all parameters."""
        return [self.without(name, xp) for name in self.params]


def flatten(statistics: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the statistics as arrays: a `Mean` is two."""
    return tuple(part for s in statistics for part in (s if isinstance(s, Mean) else (s,)))


def map_statistics(f: Callable[..., Any], *of: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return statistics with `f` applied to each array, or to the matching arrays of several."""
    return tuple(Mean(*map(f, *s)) if isinstance(s[0], Mean) else f(*s) for s in zip(*of, strict=True))


class Exact:
    """Evaluates a formula over a block of rows of float64 or complex128 arrays.

    Parameters
    ----------
    layout : Layout
    formula : Formula
    eps : float
    form : str
        How the ranks find mean and variance.
    """

    def __init__(self, layout: Layout, formula: Formula, eps: float, form: str) -> None:
        self.layout, self.formula, self.eps, self.form = layout, formula, eps, form

    def row(
        self, exponent: Array | None = None, low_precision: bool = False, given: dict[str, Array] | None = None
    ) -> Row:
        """Return the rows as a formula sees them, which were divided by 2^exponent."""
        eps: Any = self.eps
        if exponent is not None:
            eps = scale_down(scale_down(array_module(exponent).full_like(exponent, self.eps), exponent), exponent)
        low_precision = low_precision and self.formula.measured is None  # what is measured may be wider than x
        return Row(self.layout, eps, self.form, low_precision, given)

    def forward(
        self,
        arrays: list[Array],
        params: list[Any],
        low_precision: bool = False,
        given: dict[str, Array] | None = None,
    ) -> tuple[Array, tuple[Any, ...], Array | None]:
        """Return y, the statistics, and the exponents of two by which the rows were divided, None if none was.

        arrays : x, and what else the formula takes. With `low_precision` no square of x leaves the range.
        """
        x, *others = arrays
        row = self.row(None, low_precision, given)
        y, statistics = self.formula.forward(row, x, *others, *params)
        exponent: Any = None
        if not statistics or (low_precision and self.formula.measured is None):
            return y, statistics, None
        measured = self.formula.measured(row, x, *others) if self.formula.measured else row.measured(x)
        for rule in (self._out_of_range, self._constant):
            found = rule(row, measured, statistics[-1], exponent)
            if found is None:
                break
            exponent = found
            y, statistics = self.formula.forward(
                self.row(exponent, given=given), scale_down(x, exponent), *others, *params
            )
        return y, statistics, exponent

    def backward(
        self,
        arrays: list[Array],
        params: list[Any],
        statistics: tuple[Any, ...],
        exponent: Array | None,
        low_precision: bool = False,
        given: dict[str, Array] | None = None,
    ) -> tuple[list[Any], list[Any]]:
        """Return dx and the gradients of the other arrays; and those of the parameters, summed over the rows.

        arrays : dy, x, and what else the formula takes.
        """
        dy, x, *others = arrays
        q = None if low_precision else self._dy_out_of_range(dy, params)
        row, dy, scaled = self.row(exponent, low_precision, given), scale_down(dy, q), scale_down(x, exponent)
        dx, *rest = self.formula.backward(row, dy, scaled, *others, *params, *statistics)
        gradients, dparams = rest[: len(others)], rest[len(others) :]
        powers: list[Any] = [q] * len(dparams)
        if exponent is not None:
            dparams, powers = self._of_subnormal_z(row, dy, scaled, others, params, statistics, dparams, q)
        dx = scale_down(dx, exponent if q is None else -q if exponent is None else exponent - q)
        sums = [self._sum(d, power) for d, power in zip(dparams, powers, strict=True)]
        return [dx, *(scale_up(d, q) for d in gradients)], sums

    def _sum(self, d: Array, power: Array | None) -> Array:
        """Return the block's part of a gradient, the sums of d 2^power, for the power of each row.

        Numbers that may be subnormal are multiplied after the sum, as far as rows share a power, and rounded once.
        """
        if power is None:
            return self.layout.sum_over_rows(d)
        if not self.layout.per_channel:
            xp = array_module(power)
            shared = xp.max(xp.where(power < 0, power, 0 * power))
            return scale_up(self.layout.sum_over_rows(scale_up(d, power - shared)), shared)
        total = self.layout.sum_over_rows(d)
        return scale_up(total, array_module(power).reshape(power, (-1, *[1] * (total.ndim - 1))))

    def _of_subnormal_z(
        self,
        row: Row,
        dy: Array,
        x: Array,
        others: list[Array],
        params: list[Any],
        statistics: tuple[Any, ...],
        dparams: list[Array],
        q: Array | None,
    ) -> tuple[list[Array], list[Array | None]]:
        """Return gradients of parameters with all digits, though z of rows that are tiny beside eps has few.

        These gradients are linear in z, and so in x and its mean, with rstd as it is. With each comes the exponent of
        two of which it is still to be multiplied by the power; q is that of dy.
        """
        as_they_are: tuple[list[Array], list[Array | None]] = dparams, [q] * len(dparams)
        if not self.layout.local:
            return as_they_are
        xp, top = array_module(x), _largest(row, x)
        size = top * statistics[-1]
        tiny = (size > 0) & (size < 2.0**-SAFE)
        if not bool(xp.any(tiny)):
            return as_they_are
        j = xp.floor(xp.log2(xp.where(tiny, size, xp.ones_like(size))))
        j = xp.where(top == 0, xp.min(j), j)  # rows of zeros share the power of the others
        raised = tuple(
            Mean(scale_down(s.high, j), scale_down(s.low, j)) if isinstance(s, Mean) else s for s in statistics
        )
        _, *rest = self.formula.backward(row, dy, scale_down(x, j), *others, *params, *raised)
        linear_in_z = [name in self.formula.read for name in self.formula.params]
        found = zip(linear_in_z, dparams, rest[len(others) :], strict=True)
        both = j if q is None else j + q
        return [b if linear else a for linear, a, b in found], [both if linear else q for linear in linear_in_z]

    def _out_of_range(self, row: Row, x: Array, rstd: Array, _: None) -> Array | None:
        """Return the exponent for each row, or None if all are in range: the same on every rank, as rstd is."""
        xp, size = array_module(x), abs(rstd)
        out = _outside(size)
        if self.layout.local:  # on a group a row of zeros would cost a message
            out |= size * size * self.eps > 1 - 2.0 ** -(SAFE // 10)  # x is small beside eps, maybe subnormal
        if not self._any(out):
            return None
        top = _largest(row, x)
        usable = _outside(top) & (top > 0) & (top < math.inf)
        if not self._any(usable):
            return None
        exponent = xp.floor(xp.log2(xp.where(usable, top, xp.ones_like(top))))
        if self.eps > 0:  # eps / 4^exponent should not overflow
            least = math.floor(math.log2(self.eps) / 2) - SAFE
            small = (exponent != 0) & (exponent < least)
            exponent = xp.where(small, xp.full_like(exponent, float(least)), exponent)
        return exponent

    def _constant(self, row: Row, x: Array, rstd: Array, exponent: Array) -> Array | None:
        """Return other exponents where rstd is infinite.

        A constant row, divided by 2^k, has variance 0, and eps / 4^k may have underflowed to 0 as well. It is divided
        by less.
        """
        xp = array_module(x)
        constant = (abs(rstd) == math.inf) & (self.eps > 0)
        return xp.where(constant, xp.full_like(exponent, LEAST), exponent) if self._any(constant) else None

    def _dy_out_of_range(self, dy: Array, params: list[Any]) -> Array | None:
        """Return the exponent for each row of dy, so that dy w is in range, or None if all are.

        On a group None: it would be a message each time.
        """
        if not self.layout.local or dtype_name(dy) != "float64":
            return None
        xp, top = array_module(dy), _largest(self.row(), dy)
        w = params[0] if params else None
        of_w = xp.max(abs(w)) if w is not None and not isinstance(w, (Absent, float)) and w.size else xp.ones_like(top)
        usable = (top > 0) & (top < math.inf) & (of_w > 0) & (of_w < math.inf)
        usable = usable & (_outside(top) | _outside(of_w) | _outside(top * of_w))
        if not bool(xp.any(usable)):
            return None
        one = xp.ones_like(top)
        return xp.floor(xp.log2(xp.where(usable, top, one))) + xp.floor(xp.log2(xp.where(usable, of_w, one)))

    def _any(self, flags: Array) -> bool:
        """Return whether a flag of some row is set, on any rank whose rows differ from this one's."""
        xp, layout = array_module(flags), self.layout
        if layout.local or not layout.rows_differ:
            return bool(xp.any(flags))
        return bool(layout.group.max(xp.astype(xp.any(flags), xp.float64), label=layout.layer) > 0)


def _largest(row: Row, rows: Array) -> Array:
    """Return the largest magnitude of each row, over all ranks, of shape (rows, 1, ...)."""
    layout = row.layout
    top = largest(rows) if layout.local_size(rows) else abs(row.local_sum(rows))  # of nothing 0
    if layout.local:
        return top
    return layout.from_message(layout.group.max(layout.to_message(top), label=layout.layer))


def scale_down(x: Array, k: Array | None) -> Array:
    """Return x / 2^k, in two steps, since 2^k itself may be out of range."""
    if k is None:
        return x
    xp = array_module(k)
    k = xp.where(k > END, xp.full_like(k, END), xp.where(k < -END, xp.full_like(k, -END), k))
    half = xp.floor(k / 2)
    return x * 2.0**-half * 2.0 ** (half - k)


def scale_up(x: Array, k: Array | None) -> Array:
    """Return x 2^k."""
    return x if k is None else scale_down(x, -k)


def _outside(size: Array) -> Array:
    """Return where `size` is not between 2^-SAFE and 2^SAFE; a NaN is outside."""
    return ~((size > 2.0**-SAFE) & (size < 2.0**SAFE))
