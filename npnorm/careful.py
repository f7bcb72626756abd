"""The careful evaluation of a row formula, right over the whole range of the dtype. No mathematics of norms.

A norm's page gives a formula over rows; what a row is, is said by its axes (`npnorm.axes`). `Careful` calls the formula
with float64 arrays, and rounds once:

* float64 holds the square of any float32, so that float32, float16 and bfloat16 come out correctly rounded over their
  whole range.
* A norm does not see the scale of a row: z(x, eps) = z(x / 2^k, eps / 4^k). Rows whose squares leave the range are
  handed to the formula divided by a power of two, which is exact; so are rows of dy, in which backward is linear.
* Sums are pairwise, and cancellation is undone where it is found (`npnorm.norms.statistics`).

Alone, the formula runs on one block of rows after the other. On a group it runs on all its rows at once, so that a
statistic is one message; on a GPU too, where every block would be a launch. Most rows need none of this care:
`npnorm.blocked` has the fast way, and hands over the rows that do.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, contiguous, dtype_name, round_to
from npnorm.axes import Axes
from npnorm.group import Group, Solo, errors_on_all_ranks
from npnorm.threads import get_threads, parallel_for

BLOCK = 1 << 20
"""Bytes of one operand in a block, in working precision: about a core's L2 cache."""

SAFE = 450
"""Numbers between 2^-SAFE and 2^SAFE, and sums of their squares, are in range."""

LEAST = 24
"""A row divided by 2^LEAST can be summed without overflow."""

SHARED = 1 << 20
"""Elements of x from which threads pay: handing a task over costs about 50 us."""

END = 2040.0
"""What is divided by 2^END, or 2^-END, is 0, or infinite."""


class Careful:
    """Evaluates formulas over the rows of arrays in float64; in complex128 where that comes, for the complex step.

    Parameters
    ----------
    axes : Axes
        What a row is, and the ranks over which it is split.
    eps : float
        What the norm adds to its mean square; it is scaled as the rows are.
    group : Group or None
        The ranks on which an error is raised; None: those of the axes.
    """

    def __init__(self, axes: Axes, eps: float, group: Group) -> None:
        self.axes, self.eps, self.group = axes, eps, group

    def forward(
        self,
        formula: Callable[..., Any],
        x: Array,
        params: dict[str, Array],
        *others: Array,
        constants: tuple[Array, ...] = (),
    ) -> tuple[Array, tuple[Array, ...], Array | None]:
        """Return y, statistics and scale of all rows, as `npnorm.blocked.Rows.forward` has them."""
        xp, work = array_module(x), self.working(x, *others, *params.values())
        rows = [self.axes.rows(a) for a in (x, *others)]
        out, blocks = xp.empty_like(rows[0]), list(self._blocks(rows[0]))
        found: list[Any] = [None] * len(blocks)

        def evaluate(i: int) -> None:
            s = blocks[i]
            arrays = [contiguous(a[s, ...], work) for a in rows]
            given = *self.params(params, s, work), *(a[s, ...] for a in constants)
            y, *found[i] = self.forward_rows(formula, arrays, given, self._wide(x))
            out[s, ...] = round_to(y, x.dtype)

        with evaluation(width(rows[0])):
            parallel_for(evaluate, len(blocks), threads_for(rows[0]))
            statistics = [statistic for statistic, _ in found]
            joined = tuple(xp.concat(a) for a in zip(*statistics, strict=True))
            return self.axes.restore(out, x), joined, _join([k for _, k in found], statistics)

    def forward_rows(
        self, formula: Callable[..., Any], arrays: list[Array], given: tuple[Any, ...], wide: bool
    ) -> tuple[Array, tuple[Array, ...], Array | None]:
        """Evaluate the formula on a block of rows in working precision; `wide`: their squares can leave its range."""
        x, *others = arrays
        y, statistic = formula(x, *others, *given, self.eps)
        k = None
        for rule in (self._out_of_range, self._constant) if statistic and wide else ():
            found = rule(self.axes.measured(x, *others), statistic[-1], k)
            if found is None:
                break
            k = found
            y, statistic = formula(_divide(x, k), *others, *given, self._scaled_eps(k))
        return y, statistic, k

    def backward(
        self,
        formula: Callable[..., Any],
        dy: Array,
        x: Array,
        params: dict[str, Array],
        statistics: tuple[Array, ...],
        scale: Array | None,
        *others: Array,
        plus: Array | None = None,
    ) -> tuple[Any, dict[str, Array]]:
        """Return dx and the gradients of all rows, as `npnorm.blocked.Rows.backward` has them."""
        xp, work = array_module(x), self.working(x, dy, *params.values())
        rows_dy, *rows = (self.axes.rows(a) for a in (dy, x, *others))
        rows_plus = None if plus is None else self.axes.rows(plus)
        wide = any(self._wide(a) for a in (dy, *params.values()))
        outs = [xp.empty_like(a) for a in rows]
        blocks = list(self._blocks(rows[0]))
        found: list[Any] = [None] * len(blocks)

        def evaluate(i: int) -> None:
            s = blocks[i]
            arrays = [contiguous(a[s, ...], work) for a in (rows_dy, *rows)]
            w, _, *more = self.params(params, s, work)
            given = w, *more, *(a[s, ...] for a in statistics)
            k = None if scale is None else scale[s, ...]
            d, found[i] = self.backward_rows(formula, arrays, given, k, wide, params)
            if rows_plus is not None:
                d = d[0] + contiguous(rows_plus[s, ...], work), *d[1:]
            for out, a in zip(outs, d, strict=True):
                out[s, ...] = round_to(a, out.dtype)

        with evaluation(width(rows[0])):
            parallel_for(evaluate, len(blocks), threads_for(rows[0]))
            grads = {}
            for name, param in params.items():
                sums: list[Array] = []
                for of_block in found:
                    sums = self.axes.join(sums, of_block[name])
                grads[name] = round_to(self.axes.gradient(sums, param), param.dtype)
        restored = tuple(self.axes.restore(out, x) for out in outs)
        return (restored if others else restored[0]), grads

    def backward_rows(
        self,
        formula: Callable[..., Any],
        arrays: list[Array],
        given: tuple[Any, ...],
        scale: Array | None,
        wide: bool,
        names: Iterable[str],
    ) -> tuple[tuple[Array, ...], dict[str, Array]]:
        """Evaluate the formula on a block of rows: dx, ..., and gradients by name, summed over the rows."""
        dy, x, *others = arrays
        k, w = scale, given[0]
        q = self._dy_out_of_range(dy, w) if wide else None
        d, by_row = formula(_divide(dy, q), _divide(x, k), *others, *given, self._scaled_eps(k))
        dx, *others_d = d if others else (d,)
        dx = _divide(dx, k if q is None else -q if k is None else k - q)
        sums = {name: self.axes.over_rows(_multiply(by_row[name], q)) for name in names}
        return (dx, *(_multiply(a, q) for a in others_d)), sums

    def params(self, params: dict[str, Array], s: slice, work: Any) -> Iterator[Array | None]:
        """Yield w, b and what else there is, so that they meet a block of rows; None for what is not there."""
        for name in dict.fromkeys(("weight", "bias", *params)):
            yield contiguous(self.axes.spread(contiguous(params[name]), s), work) if name in params else None

    def working(self, x: Array, *others: Array) -> Any:
        """Return the working dtype: complex128 for the complex step, which differentiates the very code that runs."""
        names = {dtype_name(a) for a in (x, *others)}
        with errors_on_all_ranks(self.group):
            if "complex128" in names and dtype_name(x) != "complex128":
                raise TypeError(
                    f"{self.axes.layer}: a parameter or dy is complex128 and x {dtype_name(x)}; imaginary parts would "
                    "be lost. complex128 is for the complex step; x must have it, too."
                )
        return getattr(array_module(x), "complex128" if "complex128" in names else "float64")

    def _wide(self, x: Array) -> bool:
        """Return whether squares of x can leave the range of the working precision."""
        return self.axes.extends or dtype_name(x) in ("float64", "complex128")

    def _blocks(self, rows: Array) -> Iterator[slice]:
        count = rows.shape[0]
        one_by_one = isinstance(self.axes.group, Solo) and array_module(rows) is np
        periods = BLOCK // (8 * max(1, width(rows)) * self.axes.period)
        step = max(1, periods) * self.axes.period if one_by_one else max(1, count)
        for start in range(0, max(1, count), step):  # without rows, one empty block
            yield slice(start, min(start + step, count))

    def _scaled_eps(self, k: Array | None) -> Any:
        return self.eps if k is None else _divide(_divide(array_module(k).full_like(k, self.eps), k), k)

    def _out_of_range(self, x: Array, rstd: Array, _: None) -> Array | None:
        """Return the exponent for each row, or None if all are in range: the same on every rank, as rstd is."""
        xp, safe = array_module(x), SAFE
        size = abs(rstd)
        out = _outside(size, safe)
        if isinstance(self.axes.group, Solo):  # on a group a row of zeros would cost a message
            out |= size * size * self.eps > 1 - 2.0 ** -(safe // 10)  # x is small beside eps, maybe subnormal
        if not self.axes.any(out):
            return None
        k = _exponents(self.axes, x, safe)
        if k is not None and self.eps > 0:  # eps / 4^k should not overflow
            least = math.floor(math.log2(self.eps) / 2) - safe
            k = xp.where((k != 0) & (k < least), xp.full_like(k, float(least)), k)
        return k

    def _constant(self, x: Array, rstd: Array, k: Array) -> Array | None:
        """Return other exponents where rstd is infinite: of a constant row 0 is left, and eps / 4^k has vanished."""
        xp = array_module(x)
        constant = (abs(rstd) == math.inf) & (self.eps > 0)
        return xp.where(constant, xp.full_like(k, LEAST), k) if self.axes.any(constant) else None

    def _dy_out_of_range(self, dy: Array, w: Array | None) -> Array | None:
        """Return the exponent for each row of dy, so that dy w is in range, or None if all are.

        On a group None: it would be a message each time.
        """
        if not isinstance(self.axes.group, Solo):
            return None
        xp, safe = array_module(dy), SAFE
        largest = self.axes.largest(dy)
        of_w = xp.max(abs(w)) if w is not None and w.size else xp.ones_like(largest)
        usable = (largest > 0) & (largest < math.inf) & (of_w > 0) & (of_w < math.inf)
        usable = usable & (_outside(largest, safe) | _outside(of_w, safe) | _outside(largest * of_w, safe))
        if not bool(xp.any(usable)):
            return None
        one = xp.ones_like(largest)
        return xp.floor(xp.log2(xp.where(usable, largest, one))) + xp.floor(xp.log2(xp.where(usable, of_w, one)))


@contextmanager
def evaluation(width: int) -> Iterator[None]:
    """Silence floating-point warnings, and set NumPy's ufunc buffer, for this context only; the width is a row's."""
    with np.errstate(all="ignore"):
        if buffer_size(width):
            np.setbufsize(buffer_size(width))
        yield


def buffer_size(width: int) -> int:
    """Return the best length of NumPy's ufunc buffer for rows; 0: as it is.

    NumPy (up to 2.4 at least) copies a broadcast operand into its buffer of 8192 elements again and again; a buffer of
    one row spares that. LayerNorm of (4096, 1024) float32 takes 0.8 of the time, with the same bits.
    """
    return width // 16 * 16 if 512 <= width < 8192 else 0


def threads_for(rows: Array) -> int:
    """Return how many threads share the blocks of rows."""
    return get_threads() if width(rows) * rows.shape[0] >= SHARED else 1


def width(rows: Array) -> int:
    """Return the elements of a row."""
    return math.prod(rows.shape[1:])


def _divide(x: Array, k: Array | None) -> Array:
    """Return x / 2^k, in two steps, since 2^k itself may be out of range."""
    if k is None:
        return x
    xp = array_module(k)
    k = xp.where(k > END, xp.full_like(k, END), xp.where(k < -END, xp.full_like(k, -END), k))
    half = xp.floor(k / 2)
    return x * 2.0**-half * 2.0 ** (half - k)


def _multiply(x: Array, k: Array | None) -> Array:
    return x if k is None else _divide(x, -k)


def _outside(size: Array, safe: int) -> Array:
    """Return where `size` is not between 2^-safe and 2^safe; a NaN is outside."""
    return ~((size > 2.0**-safe) & (size < 2.0**safe))


def _exponents(axes: Axes, x: Array, safe: int) -> Array | None:
    """Return the exponent of two for each row whose largest element is outside the safe range, 0 for the others.

    None if there are only others; zeros, infinities and NaNs are among them.
    """
    xp, largest = array_module(x), axes.largest(x)
    usable = _outside(largest, safe) & (largest > 0) & (largest < math.inf)
    if not axes.any(usable):
        return None
    return xp.floor(xp.log2(xp.where(usable, largest, xp.ones_like(largest))))


def _join(scales: list[Array | None], statistics: list[tuple[Array, ...]]) -> Array | None:
    """Return the blocks' exponents as one array, 0 where a block needed none; None if none did."""
    if all(k is None for k in scales):
        return None
    xp = array_module(statistics[0][-1])
    return xp.concat([xp.zeros_like(abs(st[-1])) if k is None else k for k, st in zip(scales, statistics, strict=True)])
