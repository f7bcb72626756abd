"""The levels at which a block of rows is evaluated: fast first, and the rows that lost digits again, with more of them.

    fast     over `npnorm.engine.terms`, in float32 or float64, as `compute` says
    far      the same in float64, for a mean that is far from zero in units of the spread
    exact    `npnorm.engine.exact`

A mean is subtracted once at the first level, or folded into the numbers for rows where a layout allows that, so that
x - mean(x) is never formed. At the second one it is subtracted twice: what rounding left of it is the mean of
x - mean(x). `npnorm.engine.guards` says after each level which rows go on to the next.
"""

from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import contiguous, round_to
from npnorm.engine.cancellation import dx_where_it_cancels, is_constant
from npnorm.engine.exact import Exact, flatten, map_statistics
from npnorm.engine.guards import LIMITS, Guards
from npnorm.engine.terms import Block, BlockRow, Terms
from npnorm.threads import scratch

SMALL = 1 << 14
"""The elements of a block up to which new memory costs less than to look for what a thread keeps."""

AGAIN = 1 << 18
"""The elements of rows that are evaluated again at a time."""

DX_AGAIN = 1 << 17
"""The same for dx alone, with some 6 arrays of float64 at a time. Of smaller ones, threads wait for each other."""

EXACTLY_AGAIN = 1 << 16
"""The same for the exact evaluation, which has some 15 arrays of this size at a time."""

Some = Any
"""Some of the rows: a slice, or an array of numbers of rows."""


class Level(NamedTuple):
    """A way to evaluate a block."""

    work: str
    centring: str  # "folded", "once" or "twice"
    guards: Guards


class Given(NamedTuple):
    """What the backward pass of a block of rows is given, and where it writes dx."""

    dy: Any
    x: Any
    plus: Any  # what is added to dx before it is rounded, or None
    params: list[Any]  # that the formula reads
    statistics: tuple[Any, ...]
    dx: Any
    there: list[bool]  # which of the formula's parameters the norm has

    def of(self, rows: Some, in_float64: bool = True) -> "Given":
        """Return the same of some of the rows; their dx is new memory, if they are not neighbours."""
        dy, x, plus, params, statistics, dx, there = self
        params = of_rows(params, rows)
        return Given(
            dy[rows],
            x[rows],
            None if plus is None else plus[rows],
            in_dtype(params, np.float64) if in_float64 else params,
            map_statistics(lambda a: a[rows], statistics),
            _result(dx, rows),
            there,
        )

    def has_constant_dz(self) -> np.ndarray:
        """Return in which rows all elements of dy and of the weight are equal, of shape (rows,)."""
        return is_constant(self.dy) & is_constant(self.params[0])


class Levels:
    """Evaluates a formula over blocks of rows of NumPy arrays of low precision.

    Parameters
    ----------
    exact : Exact
        The last level; it has layout, formula and eps.
    compute : "float64" or "float32"
        The working precision of the first level.
    """

    def __init__(self, exact: Exact, compute: str) -> None:
        self.exact, self.compute = exact, compute
        self.layout, self.formula, self.eps = exact.layout, exact.formula, exact.eps
        ways = (compute, "folded" if self.layout.per_channel else "once"), ("float64", "twice")
        self.levels = [Level(work, centring, Guards(work, centring, self.eps)) for work, centring in ways]

    def forward(
        self,
        x: np.ndarray,
        params: list[Any],
        constants: Sequence[np.ndarray],
        y: np.ndarray | None,
        at: int = 0,
    ) -> tuple[Any, ...]:
        """Write y of a block of rows, if it is wanted, beginning at a level; return the statistics."""
        if at == len(self.levels):
            values, statistics, _ = self.exact.forward([contiguous(x, np.float64)], [*params, *constants], True)
            if y is not None:
                y[...] = round_to(values, y.dtype)
            return statistics
        work, centring, guards = self.levels[at]
        with _memory(x) as memory:
            block = Block(self.layout, x.shape, y, work, memory.empty, False, centring)
            row = BlockRow(self.layout, self.eps, block)
            values, statistics = self.formula.forward(row, block.array(x, "x"), *params, *constants)
            if y is not None:
                block.write(values)
        if not statistics:
            return ()
        lost = guards.lost_forward(x, statistics[-1], row.centred)
        if lost is None:
            return statistics
        statistics = map_statistics(lambda a: a.astype(np.float64), statistics)
        for rows in self._pieces(lost, x, self._size(at + 1)):
            y_again = _result(y, rows)
            again = self.forward(
                x[rows], in_dtype(of_rows(params, rows), np.float64), of_rows(constants, rows), y_again, at + 1
            )
            _write(y, rows, y_again)
            for a, b in zip(flatten(statistics), flatten(again), strict=True):
                a[rows] = b
        return statistics

    def backward(self, given: Given, at: int = 0) -> list[np.ndarray]:
        """Write dx of a block of rows, beginning at a level; return the block's sums for the parameters."""
        if at == len(self.levels):
            return self._exact_backward(given)
        work, centring, guards = self.levels[at]
        dy, x, plus, params, statistics, dx, there = given
        with _memory(x) as memory:
            block = Block(self.layout, x.shape, dx, work, memory.empty, True, centring)
            row, numbers = BlockRow(self.layout, self.eps, block), statistics
            if statistics[-1].dtype != block.numbers:
                numbers = map_statistics(lambda a: a.astype(block.numbers), statistics)
            result, *grads = self.formula.backward(row, block.array(dy, "dy"), block.array(x, "x"), *params, *numbers)
            if plus is not None:
                result = result + block.array(plus, "plus")
            sums = [self._sum(block, d) for d in compress(grads, there)]
            square = block.write(result, row.cancelling and row.cancelling.dz)
        squares = row.cancelling and (square, row.cancelling.left)
        lost = guards.lost_backward(dy, x, numbers[-1], row.means, squares)
        if lost is None:
            return sums
        if lost.dx is not None:
            self._dx_again(lost.dx, given, row, at + 1)
        if lost.rows is not None:
            sums = self._sums_of_others(lost.rows, sums, given, at)
            self._again(lost.rows, given, sums, at + 1, work == "float32" and squares is not None)
        return sums

    def _exact_backward(self, given: Given) -> list[np.ndarray]:
        dy, x, plus, params, statistics, dx, there = given
        (d,), sums = self.exact.backward([contiguous(a, np.float64) for a in (dy, x)], params, statistics, None, True)
        dx[...] = round_to(d if plus is None else d + contiguous(plus, np.float64), dx.dtype)
        return list(compress(sums, there))

    def _dx_again(self, lost: np.ndarray, given: Given, row: BlockRow, at: int) -> None:
        """Write dx of rows in which it cancels. What their gradients add to those of the parameters is right."""
        if row.means:
            constant = lost & given.has_constant_dz()
            for rows in self._pieces(constant, given.x, AGAIN):  # nothing is left of dz
                given.dx[rows] = 0 if given.plus is None else given.plus[rows]
            lost = lost & ~constant
        narrow = self.levels[at - 1].work == "float32"
        share = row.cancelling.share  # type: ignore[union-attr]
        if narrow:  # of dz along z, eps may leave enough for float64
            enough = lost & (share(self.eps, given.statistics[-1]) >= LIMITS["float64"].left).reshape(-1)
            self._again(enough, given._replace(there=[False] * len(given.there)), [], at, True)
            lost = lost & ~enough
        whole = self.exact.row(low_precision=True)
        for rows in self._pieces(lost, given.x, DX_AGAIN):
            dy, x, plus, params, statistics, dx, _ = given.of(rows)
            dy, x = (contiguous(a, np.float64) for a in (dy, x))
            statistics = self.statistics(x) if narrow else statistics
            d = dx_where_it_cancels(whole, dy, x, params[0], statistics, share(self.eps, statistics[-1]))
            given.dx[rows] = round_to(d if plus is None else d + contiguous(plus, np.float64), dx.dtype)

    def _sums_of_others(self, lost: np.ndarray, sums: list[np.ndarray], given: Given, at: int) -> list[np.ndarray]:
        """Return a block's sums without the rows that lost digits."""
        if not self.layout.adds:
            return [a.astype(np.float64) for a in sums]  # rows have sums of their own
        if lost.all() or not sums:
            return [np.zeros_like(a) for a in sums]
        return self.backward(given._replace(plus=None).of(np.flatnonzero(~lost), in_float64=False), at)

    def _again(
        self, lost: np.ndarray, given: Given, sums: list[np.ndarray], at: int, from_new_statistics: bool
    ) -> None:
        """Write dx of the rows that lost digits, at a level; add their part to the sums."""
        for rows in self._pieces(lost, given.x, self._size(at)):
            of_lost = given.of(rows)
            if from_new_statistics:
                of_lost = of_lost._replace(statistics=self.statistics(of_lost.x))
            own = self.backward(of_lost, at)
            _write(given.dx, rows, of_lost.dx)
            for i, a in enumerate(own):
                if self.layout.adds:
                    sums[i] = sums[i] + a
                else:
                    sums[i][rows] = np.reshape(a, sums[i][rows].shape)

    def statistics(self, x: np.ndarray) -> tuple[Any, ...]:
        """Return the statistics of rows of x in float64.

        Where dx cancels, rstd must be that of the z which cancels, to all digits of float64.
        """
        return self.forward(x, self.formula.without_params(np), (), None, len(self.levels) - 1)

    def _sum(self, block: Block, d: Any) -> np.ndarray:
        """Return the part of a gradient that a block has."""
        if not isinstance(d, Terms):
            return self.layout.sum_over_rows(d)
        return block.sum_of_channels(d) if block.per_channel else block.sum_of_columns(d)

    def _size(self, level: int) -> int:
        """Return how many elements are evaluated again at a time, at a level."""
        return AGAIN if level < len(self.levels) else EXACTLY_AGAIN

    @staticmethod
    def _pieces(lost: np.ndarray, x: np.ndarray, size: int) -> Iterator[Some]:
        """Yield the rows that lost digits, so many elements at a time; neighbours as a slice, which copies nothing."""
        rows = np.flatnonzero(lost)
        step = max(1, size // max(1, x[0].size))
        for i in range(0, len(rows), step):
            some = rows[i : i + step]
            first, last = int(some[0]), int(some[-1])
            yield slice(first, last + 1) if last - first + 1 == len(some) else some


def of_rows(params: Any, rows: Some) -> list[Any]:
    """Return parameters as some of the rows meet them; those that all rows share as they are."""
    key = (rows, ...) if isinstance(rows, slice) else rows
    return [a[key] if getattr(a, "ndim", 0) > 1 else a for a in params]


def in_dtype(params: list[Any], dtype: Any) -> list[Any]:
    """Return parameters in a working precision; what stands for one that the norm does not have as it is."""
    return [contiguous(a, dtype) if getattr(a, "ndim", 0) else a for a in params]


def _result(out: Any, rows: Some) -> Any:
    """Return memory for some rows of the result, if it is wanted: these rows themselves, if they are neighbours."""
    if out is None:
        return None
    return out[rows] if isinstance(rows, slice) else np.empty((len(rows), *out.shape[1:]), out.dtype)


def _write(out: Any, rows: Some, result: Any) -> None:
    """Write what `_result` gave memory for, unless this is part of `out`."""
    if result is not None and not isinstance(rows, slice):
        out[rows] = result


class _New:
    """New memory each time; it stands for `npnorm.threads.scratch` where arrays are small."""

    def __enter__(self) -> "_New":
        return self

    def __exit__(self, *error: Any) -> None:
        pass

    @staticmethod
    def empty(name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return an array to be written to."""
        return np.empty(shape, dtype)


NEW = _New()


def _memory(x: np.ndarray) -> Any:
    """Return the memory for arrays of a block, to be borrowed."""
    return NEW if x.size <= SMALL else scratch()
