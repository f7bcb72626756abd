"""The levels at which a block of rows is evaluated: fast first, and the rows that lost digits again, with more of them.

    float32, float64   over `npnorm.engine.terms`, as `compute` says; where numbers fold, x - mean(x) is never formed
    float64            the same, with x - mean(x) formed: for a mean that is far from zero in units of the spread
    exact              `npnorm.engine.exact`

`npnorm.engine.guards` says after each level which rows go on to the next.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import contiguous, round_to
from npnorm.engine.cancellation import dx_where_it_cancels
from npnorm.engine.exact import Exact, change, flatten
from npnorm.engine.guards import Guards
from npnorm.engine.row import Absent
from npnorm.engine.terms import Block, BlockRow, Terms
from npnorm.threads import scratch

SMALL = 1 << 14
"""The elements of a block up to which new memory costs less than to look for what a thread keeps."""

PIECE = 1 << 18
"""The elements of rows that are evaluated again at a time."""

EXACT_PIECE = 1 << 16
"""The same for the exact evaluation, which has some 15 arrays of this size at a time."""

Rows = Any
"""A slice, or an array of numbers of rows."""


class Level(NamedTuple):
    """A way to evaluate a block."""

    work: str
    folds: bool  # whether x - mean(x) is never formed
    guards: Guards


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
        ways = [("float64", False)]
        if compute == "float32" or self.layout.per_channel:
            ways.insert(0, (compute, self.layout.per_channel))
        self.levels = [Level(work, folds, Guards(work, folds, self.eps)) for work, folds in ways]

    def forward(
        self,
        x: np.ndarray,
        params: list[Any],
        constants: Sequence[np.ndarray],
        y: np.ndarray,
        at: int = 0,
    ) -> tuple[Any, ...]:
        """Write y of a block of rows, beginning at a level; return the statistics."""
        if at == len(self.levels):
            values, statistics, _ = self.exact.forward([contiguous(x, np.float64)], [*params, *constants], True)
            y[...] = round_to(values, y.dtype)
            return statistics
        work, folds, guards = self.levels[at]
        with _memory(x) as memory:
            block = Block(self.layout, y, work, memory.empty, False, folds)
            row = BlockRow(self.layout, self.eps, block)
            values, statistics = self.formula.forward(row, block.array(x, "x"), *params, *constants)
            block.write(values)
        if not statistics:
            return ()
        lost = guards.lost_forward(x, statistics[-1], row.centred)
        if lost is None:
            return statistics
        statistics = change(lambda a: a.astype(np.float64), statistics)
        for rows in self._pieces(lost, x, at + 1):
            y_again = _result(y, rows)
            again = self.forward(x[rows], in_float64(of_rows(params, rows)), of_rows(constants, rows), y_again, at + 1)
            y[rows] = y_again
            for a, b in zip(flatten(statistics), flatten(again), strict=True):
                a[rows] = b
        return statistics

    def backward(
        self,
        arrays: tuple[np.ndarray, np.ndarray, np.ndarray | None],
        params: list[Any],
        statistics: tuple[Any, ...],
        dx: np.ndarray,
        there: list[bool],
        at: int = 0,
    ) -> list[np.ndarray]:
        """Write dx of a block of rows, beginning at a level; return the block's sums for the parameters.

        Parameters
        ----------
        arrays : dy, x, and what is added to dx before it is rounded, or None
        there : list of bool
            Which of the formula's parameters the norm has.
        """
        dy, x, plus = arrays
        if at == len(self.levels):
            (d,), sums = self.exact.backward(
                [contiguous(a, np.float64) for a in (dy, x)], params, statistics, None, True
            )
            dx[...] = round_to(d if plus is None else d + contiguous(plus, np.float64), dx.dtype)
            return [a for a, has in zip(sums, there, strict=True) if has]
        work, folds, guards = self.levels[at]
        with _memory(x) as memory:
            block = Block(self.layout, dx, work, memory.empty, True, folds)
            row, numbers = BlockRow(self.layout, self.eps, block), statistics
            if statistics[-1].dtype != block.numbers:
                numbers = change(lambda a: a.astype(block.numbers), statistics)
            result, *grads = self.formula.backward(row, block.array(dy, "dy"), block.array(x, "x"), *params, *numbers)
            if plus is not None:
                result = result + block.array(plus, "plus")
            sums = [self._sum(block, d) for d, has in zip(grads, there, strict=True) if has]
            square = block.write(result, row.cancelling and row.cancelling.dz)
        squares = row.cancelling and (square, row.cancelling.left)
        lost = guards.lost_backward(dy, x, numbers[-1], row.means, squares)
        if lost is None:
            return sums
        if lost.dx is not None:
            share = row.cancelling.share  # type: ignore[union-attr]
            self._dx_again(lost.dx, arrays, params, statistics, share, dx, work)
        if lost.all is not None:
            again = self.levels[at].work == "float32" and squares is not None
            sums = self._all_again(lost.all, sums, arrays, params, statistics, dx, there, at, again)
        return sums

    def _dx_again(
        self,
        lost: np.ndarray,
        arrays: tuple[np.ndarray, np.ndarray, np.ndarray | None],
        params: list[Any],
        statistics: tuple[Any, ...],
        share: Callable[..., Any],
        dx: np.ndarray,
        work: str,
    ) -> None:
        """Write dx of rows in which it cancels. What their gradients add to those of the parameters is right."""
        row = self.exact.row(low_precision=True)
        for rows in self._pieces(lost, arrays[1], len(self.levels)):
            dy, x, *plus = (contiguous(a[rows], np.float64) for a in arrays if a is not None)
            w, given = in_float64(of_rows(params, rows))[0], _some(statistics, rows)
            given = self.statistics(arrays[1][rows]) if work == "float32" else given
            d = dx_where_it_cancels(row, dy, x, w, given, share(self.eps, given[-1]))
            dx[rows] = round_to(d + plus[0] if plus else d, dx.dtype)

    def _all_again(
        self,
        lost: np.ndarray,
        sums: list[np.ndarray],
        arrays: tuple[np.ndarray, np.ndarray, np.ndarray | None],
        params: list[Any],
        statistics: tuple[Any, ...],
        dx: np.ndarray,
        there: list[bool],
        at: int,
        statistics_again: bool,
    ) -> list[np.ndarray]:
        """Write dx of the rows that lost digits; return the block's sums with their part."""
        dy, x, plus = arrays
        if not self.layout.adds:
            sums = [a.astype(np.float64) for a in sums]
        elif lost.all():
            sums = [np.zeros_like(a) for a in sums]
        else:  # the sums of the other rows
            kept = np.flatnonzero(~lost)
            given = _some(statistics, kept)
            of_kept = dy[kept], x[kept], None
            sums = self.backward(of_kept, of_rows(params, kept), given, np.empty_like(dx[kept]), there, at)
        for rows in self._pieces(lost, x, at + 1):
            given = self.statistics(x[rows]) if statistics_again else _some(statistics, rows)
            again = _result(dx, rows)
            of_lost = dy[rows], x[rows], None if plus is None else plus[rows]
            own = self.backward(of_lost, in_float64(of_rows(params, rows)), given, again, there, at + 1)
            dx[rows] = again
            for i, a in enumerate(own):
                if self.layout.adds:
                    sums[i] = sums[i] + a
                else:
                    sums[i][rows] = np.reshape(a, sums[i][rows].shape)
        return sums

    def statistics(self, x: np.ndarray) -> tuple[Any, ...]:
        """Return the statistics of rows of x in float64.

        Where dx cancels, rstd must be that of the z which cancels, to all digits of float64.
        """
        params = self.formula.without_params(np)
        return self.forward(x, params, (), np.empty(x.shape, x.dtype), len(self.levels) - 1)

    def _sum(self, block: Block, d: Any) -> np.ndarray:
        """Return the part of a gradient that a block has."""
        if not isinstance(d, Terms):
            return self.layout.sum_over_rows(d)
        return block.sum_of_channels(d) if block.per_channel else block.sum_of_columns(d)

    def _pieces(self, lost: np.ndarray, x: np.ndarray, level: int) -> Iterator[Rows]:
        """Yield the rows that lost digits, few at a time; neighbours as a slice, which copies nothing."""
        rows = np.flatnonzero(lost)
        step = max(1, (PIECE if level < len(self.levels) else EXACT_PIECE) // max(1, x[0].size))
        for i in range(0, len(rows), step):
            some = rows[i : i + step]
            first, last = int(some[0]), int(some[-1])
            yield slice(first, last + 1) if last - first + 1 == len(some) else some


def of_rows(params: Any, rows: Rows) -> list[Any]:
    """Return parameters as some of the rows meet them; those that all rows share as they are."""
    key = (rows, ...) if isinstance(rows, slice) else rows
    return [a[key] if getattr(a, "ndim", 0) > 1 else a for a in params]


def _some(statistics: tuple[Any, ...], rows: Rows) -> tuple[Any, ...]:
    """Return the statistics of some of the rows."""
    return change(lambda a: a[rows], statistics)


def in_float64(params: list[Any]) -> list[Any]:
    """Return parameters in float64."""
    return [a if isinstance(a, Absent) else a.astype(np.float64, copy=False) for a in params]


def _result(out: np.ndarray, rows: Rows) -> np.ndarray:
    """Return memory for some rows of the result: these rows themselves, if they are neighbours."""
    return out[rows] if isinstance(rows, slice) else np.empty((len(rows), *out.shape[1:]), out.dtype)


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
