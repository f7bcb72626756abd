"""Rows of arrays that are not NumPy's: in float32 on plain arrays, or by kernels; rows that lost digits by `Exact`.

Other modules have no memory to lend, and run what they are given at once. So the page's formula is called with plain
arrays, all rows together. For arrays of CuPy `npnorm.compiled` has kernels, which are written from the same formula.
Where it has none, and where they do not work, this file does without them.
"""

from collections.abc import Callable
from itertools import compress
from typing import Any

from npnorm.arrays import Array, array_module, contiguous, is_cuda, round_to
from npnorm.engine.exact import Exact, flatten, map_statistics
from npnorm.engine.guards import Guards
from npnorm.engine.levels import Given, Level, in_dtype, of_rows
from npnorm.engine.row import Row
from npnorm.engine.statistics import Mean
from npnorm.engine.terms import NotLinear


class OtherModules:
    """Evaluates a formula over all rows of arrays of low precision; has the names of `npnorm.engine.levels.Levels`.

    Parameters
    ----------
    exact : Exact
        Evaluates the rows that lost digits.
    levels : list of Level
        Those of NumPy.
    """

    def __init__(self, exact: Exact, levels: list[Level]) -> None:
        self.exact, self.levels = exact, levels
        self.layout, self.formula, self.eps = exact.layout, exact.formula, exact.eps

    def takes(self, xp: Any, level: int) -> bool:
        """Return whether a level can be had for arrays of a module; otherwise `Exact` is all that there is."""
        return self.levels[level].work == "float32" or is_cuda(xp)

    def forward(
        self, x: Array, params: list[Any], constants: tuple[Array, ...], y: Array, at: int = 0
    ) -> tuple[Any, ...]:
        """Write y; return the statistics."""
        xp, level = array_module(x), self.levels[at]
        found = self._kernels("forward", xp, level, x, params, constants, y)
        if found is None and level.work == "float32":
            found = self._plain_forward(x, params, constants, y)
        if found is None:
            values, statistics = self._exact_forward(x, params, constants)
            y[...] = round_to(values, y.dtype)
            return statistics
        statistics, lost = found
        if lost is None:
            return statistics
        values, own = self._exact_forward(x[lost], of_rows(params, lost), of_rows(constants, lost))
        y[lost] = round_to(values, y.dtype)
        statistics = map_statistics(lambda a: xp.astype(a, xp.float64), statistics)
        for a, b in zip(flatten(statistics), flatten(own), strict=True):
            a[lost] = b
        return statistics

    def backward(self, given: Given, at: int = 0) -> list[Array]:
        """Write dx; return the sums for the parameters."""
        dy, x, plus, params, statistics, dx, there = given
        arrays, xp, level = (dy, x, plus), array_module(dx), self.levels[at]
        found = self._kernels("backward", xp, level, arrays, params, statistics, dx, there)
        if found is None and level.work == "float32":
            found = self._plain_backward(arrays, params, statistics, dx, there)
        if found is None:
            values, sums = self._exact_backward(arrays, params, statistics, there)
            dx[...] = round_to(values, dx.dtype)
            return sums
        sums, lost, cancels = found
        if lost is None:
            return sums
        dy, x, plus = (None if a is None else a[lost] for a in arrays)
        own_params, statistics = of_rows(params, lost), map_statistics(lambda a: a[lost], statistics)
        if cancels and level.work == "float32":  # then rstd must be that of z to all digits
            statistics = self._exact_forward(x, self.formula.without_params(xp), ())[1]
        values, own = self._exact_backward((dy, x, plus), own_params, statistics, there)
        dx[lost] = round_to(values, dx.dtype)
        for i, a in enumerate(own):
            if self.layout.adds:
                sums[i] = sums[i] + a
            else:
                sums[i][lost] = a
        return sums

    # Exactly.

    def _exact_forward(self, x: Any, params: list[Any], constants: Any) -> tuple[Array, tuple[Any, ...]]:
        float64 = array_module(x).float64
        given = [*in_dtype(params, float64), *constants]
        values, statistics, _ = self.exact.forward([contiguous(x, float64)], given, True, {"x": x})
        return values, statistics

    def _exact_backward(
        self,
        arrays: tuple[Any, ...],
        params: list[Any],
        statistics: tuple[Any, ...],
        there: list[bool],
    ) -> tuple[Any, list[Any]]:
        """Return dx in float64, and the sums for the parameters."""
        float64 = array_module(arrays[0]).float64
        dy, x, *plus = (contiguous(a, float64) for a in arrays if a is not None)
        given = map_statistics(lambda a: array_module(a).astype(a, float64), statistics)
        came = dict(zip(("dy", "x"), arrays, strict=False))
        (d,), sums = self.exact.backward([dy, x], in_dtype(params, float64), given, None, True, came)
        return (d + plus[0] if plus else d), list(compress(sums, there))

    # By kernels.

    def _kernels(self, direction: str, xp: Any, level: Level, *given: Any) -> Any:
        """Return what the kernels of a module give; None if there are none, or they do not work."""
        if not is_cuda(xp):
            return None
        from npnorm.compiled import device  # here, so that nobody else loads what writes and compiles

        evaluate: Callable[..., Any] = getattr(device, direction)
        return evaluate(self.exact, level, *given)

    # In float32, on plain arrays.

    def _plain_forward(
        self, x: Array, params: list[Any], constants: tuple[Array, ...], y: Array
    ) -> tuple[tuple[Any, ...], Array | None]:
        """Write y; return the statistics, and the rows that lost digits."""
        xp, row = array_module(x), _Noted(self.layout, self.eps)
        values, statistics = self.formula.forward(
            row, contiguous(x, xp.float32), *in_dtype(params, xp.float32), *constants
        )
        y[...] = round_to(values, y.dtype)
        if not statistics:
            return statistics, None
        return statistics, self._guards.lost_forward(x, statistics[-1], row.centred)

    def _plain_backward(
        self,
        arrays: tuple[Array, Array, Array | None],
        params: list[Any],
        statistics: tuple[Any, ...],
        dx: Array,
        there: list[bool],
    ) -> tuple[list[Array], Array | None, bool]:
        """Write dx; return the sums over the rows that lost no digits, the others, and whether their dx may cancel."""
        xp, row = array_module(dx), _Noted(self.layout, self.eps)
        dy, x, *plus = (contiguous(a, xp.float32) for a in arrays if a is not None)
        numbers = map_statistics(lambda a: xp.astype(a, xp.float32), statistics)
        d, *grads = self.formula.backward(row, dy, x, *in_dtype(params, xp.float32), *numbers)
        dx[...] = round_to(d + plus[0] if plus else d, dx.dtype)
        lost, sums = self._guards.lost_backward(arrays[0], arrays[1], numbers[-1], row.means, row.squares), []
        rows = None if lost is None else lost.dx if lost.rows is None else lost.rows
        if lost is not None and lost.rows is not None and lost.dx is not None:
            rows = lost.rows | lost.dx
        for a in compress(grads, there):
            a = xp.astype(a, xp.float64)
            if rows is not None and self.layout.adds:
                a = xp.where(xp.reshape(rows, (-1, 1)), xp.zeros_like(a), a)
            sums.append(self.layout.sum_over_rows(a))
        return sums, rows, row.squares is not None

    @property
    def _guards(self) -> Guards:
        return Guards("float32", "once", self.eps)


class _Noted(Row):
    """Rows of plain arrays, which keep note of what `npnorm.engine.guards` looks at, and leave dx as it is."""

    def __init__(self, layout: Any, eps: float) -> None:
        super().__init__(layout, eps)
        self.means: list[Array] = []
        self.squares: tuple[Array, Array] | None = None

    def subtract(self, x: Array, mean: Mean) -> Array:
        self.means.append(mean.high)
        return super().subtract(x, mean)

    def rounded(self, a: Array, dtype: str | None = None) -> Array:
        raise NotLinear("the formula rounds an array")

    def dx(
        self, dx: Array, dy: Array, x: Array, w: Array, statistics: tuple[Any, ...], share: Callable[..., Array]
    ) -> Array:
        dz = dy * w
        square = self.local_sum(dz * dz)
        self.squares = square, self.local_sum(dz * (dx / statistics[-1])) - square
        return dx
