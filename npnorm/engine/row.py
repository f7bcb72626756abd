"""Rows as a formula sees them: their means over all ranks that hold a part of them, and eps.

`Row` is what a formula is called with, beside plain arrays of shape (rows, ...). It has the means, on one rank or many;
`npnorm.engine.terms` has the same names for a block of rows whose products are not formed until they are needed. What a
norm does not have is `NO_WEIGHT` or `NO_BIAS`.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, dtype_name, is_cuda, round_to
from npnorm.checks import message_label
from npnorm.engine.cancellation import dx_without_cancellation
from npnorm.engine.guards import LOW_PRECISION
from npnorm.engine.layout import Layout
from npnorm.engine.statistics import FORMS, Centred, Mean, local, subtract


class Row:
    """The rows of plain arrays.

    Parameters
    ----------
    layout : Layout
        What a row is, and the ranks over which it is split.
    eps : float, or array of one number for each row
        What the norm adds to its mean square.
    form : "two-pass", "packed" or "gathered"
        How the ranks find mean and variance.
    low_precision : bool
        Whether the arrays hold numbers of 32 bits or fewer, so that their products are exact in float64.
    given : dict
        The arrays as they were before they were brought to working precision: messages between ranks tell their dtypes.
    """

    def __init__(
        self,
        layout: Layout,
        eps: Any,
        form: str = "two-pass",
        low_precision: bool = False,
        given: dict[str, Array] | None = None,
    ) -> None:
        self.layout, self.eps, self.form, self.low_precision, self.given = layout, eps, form, low_precision, given or {}
        self.factors: tuple[Array, ...] = ()
        self.centred: Centred | None = None

    def sum(self, *arrays: Array) -> Any:
        """Return the sum of each whole row, of shape (rows, 1, ...); several arrays share one message."""
        layout, first = self.layout, arrays[0]
        if layout.local:
            return self.local_sum(first) if len(arrays) == 1 else tuple(self.local_sum(a) for a in arrays)
        messages = (layout.to_message(self.local_sum(a)) for a in arrays)
        sums = layout.group.sum(*messages, label=self.label(first))
        return layout.from_message(sums) if len(arrays) == 1 else tuple(layout.from_message(a) for a in sums)

    def label(self, rows: Array) -> str:
        """Return what a message between ranks is about."""
        return message_label(self.layout.label(rows), **self.given)

    def mean(self, *arrays: Array) -> Any:
        """Return the mean of each whole row, of shape (rows, 1, ...); several arrays share one message."""
        n, sums = self.layout.size(arrays[0]), self.sum(*arrays)
        return sums / n if len(arrays) == 1 else tuple(total / n for total in sums)

    def centre(self, x: Array) -> tuple[Array, Mean, Array]:
        """Return c = x - mean(x), mean(x), and mean(c^2)."""
        self.centred = (local if self.layout.local else FORMS[self.form])(self, x)
        return self.centred.c, self.centred.mean, self.centred.var

    @property
    def n(self) -> Any:
        """How many elements each row has, over all ranks, once it is centred: ranks may hold different numbers."""
        if self.centred is None:
            raise RuntimeError("the rows are not centred yet")
        return array_module(self.centred.var).zeros_like(abs(self.centred.var)) + self.centred.n

    def subtract(self, x: Array, mean: Mean) -> Array:
        """Return x - mean(x), for the mean that `centre` found."""
        return subtract(x, mean)

    def difference(self, x: Array, mean: Array) -> Array:
        """Return x - mean, for a mean that need not be that of x."""
        return x - mean

    def measured(self, x: Array) -> Array:
        """Return x with zeros for what the norm does not measure."""
        return self.layout.measured(x)

    @property
    def k(self) -> int:
        """How many elements of a row the norm measures."""
        return self.layout.k

    def without_weight(self, x: Array) -> Any:
        """Return what a formula takes in place of a weight, beside x: times it, an array is itself."""
        return absent(array_module(x), weight=True)

    def without_bias(self, x: Array) -> Any:
        """Return what a formula takes in place of a bias, beside x: plus it, an array is itself."""
        return absent(array_module(x), weight=False)

    def local_sum(self, a: Array) -> Array:
        """Return the sum over this rank's part of each row, of shape (rows, 1, ...)."""
        if type(a) is np.ndarray and a.ndim == 2:
            return np.add.reduce(a, axis=-1, keepdims=True)
        xp, count = array_module(a), a.shape[0]
        flat = xp.reshape(a, (count, self.layout.local_size(a)))
        return xp.reshape(xp.sum(flat, axis=-1), (count, *[1] * (a.ndim - 1)))

    def rounded(self, a: Array, dtype: str | None = None) -> Array:
        """Return `a` rounded to the dtype in which x came, or to another; as it is, if x came in float64."""
        x = self.given.get("x")
        if x is None or dtype_name(x) not in LOW_PRECISION or dtype_name(a) != "float64":
            return a
        xp = array_module(a)
        return round_to(round_to(a, x.dtype if dtype is None else getattr(xp, dtype)), a.dtype)

    def for_products(self, *factors: Array) -> "Row":
        """Return these rows for a backward formula whose dx is multiplied by each of the factors.

        Beside a large factor a small element of dx is as large as the others, and must have its digits.
        """
        row = copy.copy(self)
        row.factors = factors
        return row

    def dx(
        self, dx: Array, dy: Array, x: Array, w: Array, statistics: tuple[Any, ...], share: Callable[..., Array]
    ) -> Array:
        """Return dx, found by another way in the rows where it cancels; on a group as it is: it would cost messages."""
        if not self.layout.local:
            return dx
        return dx_without_cancellation(self, dx, dy, x, w, statistics, share(self.eps, statistics[-1]))


class Absent(float):
    """A weight or a bias that a norm does not have: times it, or plus it, an array is itself.

    As a number it is 1 or -0. Array modules that know nothing but arrays and numbers are given that, by `absent`.
    """

    __array_ufunc__ = None  # NumPy and CuPy leave the operators to this class
    ndim, shape = 0, ()

    def __mul__(self, other: Any) -> Any:
        return other

    __rmul__ = __add__ = __radd__ = __mul__

    def __reduce__(self) -> str:
        return "NO_WEIGHT" if self else "NO_BIAS"  # there is one of each, also after pickle and copy


NO_WEIGHT: Any = Absent(1.0)
"""What a formula gets for a weight that the norm does not have."""

NO_BIAS: Any = Absent(-0.0)
"""What a formula gets for a bias that the norm does not have."""


def absent(xp: Any, weight: bool) -> Any:
    """Return what stands for a weight or a bias that a norm does not have, beside arrays of a module."""
    if xp is np or is_cuda(xp):
        return NO_WEIGHT if weight else NO_BIAS
    return 1.0 if weight else -0.0


def accurate_where_dx_cancels(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Find dx by another way in rows where it is a small difference of large terms: see docs/precision.md.

    The formula backward(row, dy, x, w, *statistics) -> dx, ... must be dx = rstd (dz - mean(dz) - z mean(dz z)), with
    dz = dy w and rstd its last statistic; or the same without the mean of dz, if none of the statistics is a `Mean`.
    """
    return _accurate(backward, lambda eps, rstd: eps * rstd * rstd)


def accurate_where_dx_cancels_without_eps(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Find dx by another way, as `accurate_where_dx_cancels`, for a norm whose z has exactly the wanted length."""
    return _accurate(backward, lambda eps, rstd: 0 * rstd)


def _accurate(backward: Callable[..., Any], share: Callable[..., Array]) -> Callable[..., Any]:
    """Return the formula with a dx that has all digits; `share(eps, rstd)` is 1 - mean(z^2)."""

    @functools.wraps(backward)
    def accurate(row: Row, dy: Array, x: Array, w: Array, *statistics: Any) -> Any:
        dx, *grads = backward(row, dy, x, w, *statistics)
        return row.dx(dx, dy, x, w, statistics, share), *grads

    return accurate
