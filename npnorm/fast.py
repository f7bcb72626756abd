"""The fast evaluation of a row formula: written down once, and run over blocks of rows that stay in cache, by threads.

The formula is written down (`npnorm.terms`) and turned into NumPy calls over a block (`npnorm.kernels`), for x of 32
bits or fewer: in float64, rounded once, which is correctly rounded; or in float32, which is within a few units in the
last place and takes half the time.

Some rows lose digits this way. Which, is seen in a few numbers for each row, its `Limits`; they are evaluated again by
`npnorm.careful`. That depends on the row alone. So the bits of a row do not depend on the rows beside it, on the
blocks, or on the number of threads; and the gradient of a parameter is a sum of the blocks' sums, in their order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npnorm import kernels
from npnorm.arrays import Array, array_module, contiguous, dtype_name, round_to
from npnorm.axes import Axes
from npnorm.careful import Careful, evaluation, threads_for, width
from npnorm.group import Solo
from npnorm.repeated import Repeated
from npnorm.threads import parallel_for
from npnorm.written import NARROW, Limits, limits_of, record, suits

BLOCK = 1 << 21
"""Bytes of one operand in a block, in working precision: twice a core's L2 cache.

Of 0.5 to 8 MiB, 2 and 4 are best on a Zen 4 (L2 1 MiB, L3 32 MiB, one thread): with 1 MiB GroupNorm takes 1.1 of the
time, with 0.5 MiB 1.3, with 8 MiB a backward pass in float64 1.3. The smaller one leaves more to share between threads.
"""

TASKS = 32
"""In how many parts, at most, the blocks are handed out to threads; each keeps a sum for each parameter."""


class Written(NamedTuple):
    """A formula as a kernel."""

    kernel: kernels.Kernel
    means: tuple[int, ...]  # backward: which of the statistics are means


class Fast:
    """Evaluates formulas over the rows of arrays by kernels.

    Parameters
    ----------
    axes : Axes
        What a row is.
    eps : float
    compute : "float64" or "float32"
        The working precision.
    careful : Careful
        Evaluates the rows that need care.
    """

    def __init__(self, axes: Axes, eps: float, compute: str, careful: Careful) -> None:
        self.axes, self.eps, self.compute, self.careful = axes, eps, compute, careful
        self.limits: Limits = limits_of(axes.kernel, compute)
        self.repeated = Repeated(eps, compute, self.limits)
        self._written: dict[tuple[Any, ...], Written | None] = {}

    def written(
        self, formula: Callable[..., Any], arrays: dict[str, Array], params: dict[str, Array], numbers: int
    ) -> Written | None:
        """Return the formula as a kernel, forward without and backward with a dy; None if only care will do.

        Parameters
        ----------
        arrays : dict
            "x" forward; "dy", "x" and perhaps "plus" backward.
        numbers : int
            How many numbers for each row it is given, after the parameters.
        """
        x = arrays["x"]
        known = self.axes.kernel and isinstance(self.axes.group, Solo) and set(params) <= {"weight", "bias"}
        if not known or array_module(x) is not np or dtype_name(x) not in NARROW or not x.size:
            return None
        shape = self.axes.rows(x).shape[1:]
        if not suits(self.axes.kernel, shape, params) or any(a.dtype != x.dtype for a in arrays.values()):
            return None
        w = params.get("weight")
        if "dy" in arrays and w is not None and not float(abs(w).max()) < self.limits.weight:
            return None
        key = (getattr(formula, "func", formula).__code__, tuple(arrays), x.dtype, shape, tuple(params))
        if key not in self._written:
            try:
                self._written[key] = self._write(formula, tuple(arrays), x.dtype, shape, tuple(params), numbers)
            except (TypeError, AttributeError):  # an operation that `npnorm.terms` does not have
                self._written[key] = None
        return self._written[key]

    def _write(
        self,
        formula: Callable[..., Any],
        arrays: tuple[str, ...],
        dtype: np.dtype,
        shape: tuple[int, ...],
        params: tuple[str, ...],
        count: int,
    ) -> Written:
        made = record(self.axes.kernel, formula, arrays, shape, params, count, self.eps)
        names = (*made.params, *(f"s{i}" for i in range(count)))
        casts = dtype != np.dtype(self.compute)  # another byte order, too, is cast
        kind = kernels.Kind(self.axes.kernel, arrays, names, self.compute, casts)
        if "dy" not in arrays:
            return Written(kernels.forward(made.tape, kind, made.result, made.statistics), ())
        kernel = kernels.backward(made.tape, kind, made.result, made.grads)
        return Written(kernel, tuple(made.numbers.index(mean) for mean in made.tape.means))

    def forward(
        self,
        written: Written,
        formula: Callable[..., Any],
        x: np.ndarray,
        params: dict[str, Array],
        constants: tuple[Array, ...],
        y: np.ndarray,
    ) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
        """Write the rows of y; return the statistics, and the scale, as `Careful.forward` has them."""
        tasks = _tasks(x, self.compute)
        found: list[Any] = [None] * len(tasks)

        def work(i: int) -> None:
            found[i] = _joined([written.kernel.run(x[s], *given(s), y[s]) for s in tasks[i]])

        with evaluation(x.shape[-1]):
            given = self._given(params, constants, len(x))
            parallel_for(work, len(tasks), threads_for(x))
            flat, means = _joined(found)
            statistics = tuple(np.reshape(a, (len(x), *[1] * (x.ndim - 1))) for a in flat)
            careful = ~self._good(x, means, flat[-1]) if flat else np.zeros(1, bool)
            if not careful.any():
                return statistics, None
            exact = [contiguous(x[careful], np.float64)]
            own = *self._own(params, x, careful), *(a[careful] for a in constants)
            of_careful, of_rows, _ = self.careful.forward_rows(formula, exact, own, wide=False)
            y[careful] = round_to(of_careful, y.dtype)
            statistics = tuple(a.astype(np.float64) for a in statistics)
            for a, b in zip(statistics, of_rows, strict=True):
                a[careful] = b
            return statistics, None

    def backward(
        self,
        written: Written,
        formula: Callable[..., Any],
        arrays: dict[str, np.ndarray],
        params: dict[str, Array],
        statistics: tuple[Array, ...],
        dx: np.ndarray,
    ) -> dict[str, Array] | None:
        """Write the rows of dx; return the gradients, or None if a NaN or an infinity came into them."""
        x, weight = arrays["x"], {name: a for name, a in params.items() if name == "weight"}
        tasks = _tasks(x, self.compute)
        found: list[Any] = [None] * len(tasks)

        def work(i: int) -> None:
            of_blocks = [written.kernel.run(*(a[s] for a in arrays.values()), *given(s), dx[s]) for s in tasks[i]]
            found[i] = self._sums([sums for sums, *_ in of_blocks]), _joined([rest for _, *rest in of_blocks])

        with evaluation(x.shape[-1]):
            given = self._given(weight, statistics, len(x))
            parallel_for(work, len(tasks), threads_for(x))
            flat = given(slice(0, len(x)))[len(weight) :]
            squares, lefts = _joined([rest for _, rest in found])
            good = (
                self._good(x, [flat[i] * flat[-1] for i in written.means], flat[-1]) if flat else np.ones(len(x), bool)
            )
            for square, left in zip(squares, lefts, strict=True):
                good &= self._kept(np.reshape(square, -1), np.reshape(left, -1), arrays["dy"])
            sums = [sums for sums, _ in found]
            if not good.all():
                sums = self._with_care(written, formula, arrays, params, statistics, dx, ~good, sums)
            grads = {}
            for name, total in zip(params, self._total(sums, params), strict=True):
                if not np.all(np.isfinite(total)):
                    return None
                grads[name] = round_to(np.reshape(total, params[name].shape), params[name].dtype)
        return grads

    def remember(self, which: str, written: Written, x: np.ndarray, rows: np.ndarray, params: dict[str, Array]) -> None:
        """Note that arrays like these have passed all checks, if they make a single block; which: "x" or "dy"."""
        if self.axes.kernel == "Features" and x.size * np.dtype(self.compute).itemsize <= BLOCK:
            self.repeated.remember(which, written.kernel, written.means, x, rows.shape, params)

    def _with_care(
        self,
        written: Written,
        formula: Callable[..., Any],
        arrays: dict[str, np.ndarray],
        params: dict[str, Array],
        statistics: tuple[Array, ...],
        dx: np.ndarray,
        careful: np.ndarray,
        sums: list[Any],
    ) -> list[Any]:
        """Write dx of the rows that need care; return the sums with their part."""
        weight = {name: a for name, a in params.items() if name == "weight"}
        dy, x, *plus = (contiguous(a[careful], np.float64) for a in arrays.values())
        w, _ = self._own(weight, x=arrays["x"], careful=careful)
        numbers = [np.asarray(a, np.float64)[careful] for a in statistics]
        wide = dtype_name(params.get("weight", dy)) == "float64"
        (d,), own = self.careful.backward_rows(formula, [dy, x], (w, *numbers), None, wide, params)
        dx[careful] = round_to(d + plus[0] if plus else d, dx.dtype)
        if self.axes.kernel != "Features":  # numbers for each row
            fixed = [np.array(a, np.float64) for a in _joined(sums)]
            for a, name in zip(fixed, params, strict=True):
                a[careful] = np.reshape(own[name], a[careful].shape)
            return [tuple(fixed)]
        tasks, given = _tasks(arrays["x"], self.compute), self._given(weight, statistics, len(dx))
        for i, task in enumerate(tasks):
            picks = [np.arange(s.start, s.stop)[~careful[s]] for s in task]
            if sum(map(len, picks)) < sum(s.stop - s.start for s in task):
                of_blocks = [
                    written.kernel.run(*(a[rows] for a in arrays.values()), *given(rows), np.empty_like(dx[rows]))
                    for rows in picks
                ]
                sums[i] = self._sums([of_block for of_block, *_ in of_blocks])
        return [*sums, tuple(np.asarray(own[name], np.float64) for name in params)]

    def _sums(self, parts: list[Any]) -> tuple[np.ndarray, ...]:
        """Return the sums of one task from those of its blocks, in their order."""
        if self.axes.kernel != "Features":  # numbers for each row
            return _joined(parts)
        return tuple(
            sum((a.astype(np.float64) for a in rest), first.astype(np.float64))
            for first, *rest in zip(*parts, strict=True)
        )

    def _total(self, sums: list[Any], params: dict[str, Array]) -> list[np.ndarray]:
        """Return the gradients in float64 from the sums of the tasks, in their order."""
        if self.axes.kernel == "Features":
            return [sum(rest, first) for first, *rest in zip(*sums, strict=True)]
        if self.axes.kernel == "Batch":
            return list(_joined(sums))
        held = [param.shape[0] for param in params.values()]
        return [
            np.add.reduce(np.reshape(a, (-1, c)), axis=0, dtype=np.float64)
            for a, c in zip(_joined(sums), held, strict=True)
        ]

    def _good(self, x: np.ndarray, means: Any, rstd: np.ndarray) -> np.ndarray:
        """Return which rows keep to the limits of mean and spread."""
        size = 2.0**self.limits.size
        good = (rstd > 1 / size) & (rstd < size)
        for mean in means:
            good &= abs(mean) <= self.limits.mean
        good = np.reshape(good, -1)
        if self.limits.tiny:
            lost = np.flatnonzero(np.reshape(rstd * rstd * self.eps > 1 - 2.0**-20, -1))
            largest = abs(x[lost]).max(axis=tuple(range(1, x.ndim)))
            good[lost] &= (largest == 0) | (largest > self.limits.tiny)
        return good

    def _kept(self, square: np.ndarray, left: np.ndarray, dy: np.ndarray) -> np.ndarray:
        """Return for which rows dz is in range, or 0, and does not nearly cancel."""
        size = 2.0**self.limits.square
        good = (square > 1 / size) & (square < size) & (square + left > self.limits.left * square)
        zero = np.flatnonzero(square == 0)
        good[zero] = ~np.any(dy[zero], axis=tuple(range(1, dy.ndim)))
        return good

    def _given(
        self, params: dict[str, Array], numbers: tuple[Array, ...], count: int
    ) -> Callable[[Any], tuple[np.ndarray, ...]]:
        """Return a function that gives parameters and numbers for some of `count` rows, in working precision."""
        dtype = self.compute if self.axes.kernel == "Features" else np.float64
        flat = [np.reshape(np.asarray(contiguous(a, dtype)), -1) for a in params.values()]
        by_row = [np.reshape(np.asarray(a, dtype), -1) for a in numbers]
        if self.axes.kernel == "Features":
            return lambda s: (*flat, *(a[s] for a in by_row))
        if self.axes.kernel == "Channels":
            flat = [self.axes.spread(a, slice(0, count))[..., 0] for a in flat]
            by_row = [a[:, None] for a in by_row]
        return lambda s: tuple(a[s] for a in (*flat, *by_row))

    def _own(self, params: dict[str, Array], x: np.ndarray, careful: np.ndarray) -> tuple[Array | None, ...]:
        """Return w and b for the rows that need care, in float64."""
        whole = self.careful.params(params, slice(0, len(x)), np.float64)
        return tuple(a if a is None or a.ndim < x.ndim else a[careful] for a in whole)


def _joined(parts: list[Any]) -> Any:
    """Return tuples of numbers for the rows of all blocks; tuples of such tuples, too."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], (tuple, list)):
        return tuple(_joined(list(a)) for a in zip(*parts, strict=True))
    return np.concatenate(parts)


def _tasks(rows: np.ndarray, dtype: str) -> list[list[slice]]:
    """Return the blocks of rows, task by task; they depend on the shape alone."""
    count = rows.shape[0]
    step = max(1, BLOCK // (np.dtype(dtype).itemsize * width(rows)))
    blocks = [slice(start, min(start + step, count)) for start in range(0, count, step)]
    each = -(-len(blocks) // TASKS)
    return [blocks[i : i + each] for i in range(0, len(blocks), each)]
