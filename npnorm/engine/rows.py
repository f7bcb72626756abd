"""`Rows`: the one object that a norm talks to. It has the norm's formula evaluated on every row of an array.

One flow, for each block of rows that fits the cache:

    bring the arrays to working precision; call the page's formula; look which rows lost digits, and evaluate these
    again; round once; sum the gradients

`npnorm.engine.levels` does this for blocks of NumPy arrays of 32 bits or fewer. What it does not know (float64 and
complex arrays, rows that are split over ranks, formulas that are not linear) is evaluated exactly at once, by
`npnorm.engine.exact`. Blocks are shared by threads. A row's bits depend on the row alone; a gradient is the sum of
the blocks' sums, in their order, and the blocks depend on the shape alone.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, contiguous, dtype_name, round_to
from npnorm.engine.arguments import (
    Known,
    can_write_to,
    check_dtypes,
    check_out,
    check_statistics,
    is_like,
    is_strided,
)
from npnorm.engine.exact import Exact, Formula, flatten, map_statistics
from npnorm.engine.guards import LIMITS, LOW_PRECISION, SHORT_FLOAT32, is_supported
from npnorm.engine.layout import Layout
from npnorm.engine.levels import Given, Levels, of_rows
from npnorm.engine.other_modules import OtherModules
from npnorm.engine.terms import NotLinear
from npnorm.group import Group, errors_on_all_ranks
from npnorm.threads import get_threads, parallel_for

BLOCK = 1 << 21
"""Bytes of one operand in a block, in working precision: twice a core's L2 cache.

Of 0.5 to 8 MiB, 2 and 4 are best on a Zen 4 (L2 1 MiB, L3 32 MiB, one thread): with 1 MiB GroupNorm takes 1.1 of the
time, with 0.5 MiB 1.3, with 8 MiB a backward pass in float64 1.3. The smaller one leaves more to share between threads.
"""

EXACT_BLOCK = 1 << 19
"""The same for the exact evaluation, which has some 15 arrays of this size at a time."""

TASKS = 32
"""In how many parts, at most, the blocks are handed out to threads; each keeps a sum for each parameter."""

SHARED = 1 << 20
"""Elements of x from which threads pay: handing a task over costs about 50 us."""


class Gradients:
    """Sums for the parameters, block by block, in their order."""

    def __init__(self, adds: bool) -> None:
        self.adds = adds
        self.parts: list[list[Array]] = []

    def add(self, sums: list[Array]) -> None:
        """Take in one more block's sums."""
        if self.adds and self.parts:
            self.parts = [[a + b for a, b in zip(self.parts[0], sums, strict=True)]]
        else:
            self.parts.append(sums)

    def totals(self) -> list[Array]:
        """Return one array for each parameter."""
        columns = zip(*self.parts, strict=True)
        return [a[0] if len(a) == 1 else array_module(a[0]).concat(list(a)) for a in columns]


class Rows:
    """The rows of arrays, and how a formula over them is evaluated.

    Parameters
    ----------
    layout : Layout
        What a row is, and the ranks over which it is split.
    formula : Formula
    eps : float
        What the norm adds to its mean square.
    compute : "float64", "float32" or None
        The working precision; None is float64.
    form : "two-pass", "packed" or "gathered"
        How the ranks find mean and variance.
    offset : float
        Added to the weight, in float32 for a weight of 32 bits or fewer.
    group : Group or None
        The ranks on which an error is raised; None: those of the layout.
    """

    def __init__(
        self,
        layout: Layout,
        formula: Formula,
        eps: float,
        compute: str | None = None,
        *,
        form: str = "two-pass",
        offset: float = 0,
        group: Group | None = None,
    ) -> None:
        self.layout, self.formula, self.offset, self.group = layout, formula, offset, group or layout.group
        with errors_on_all_ranks(self.group):
            if compute is not None and compute not in ("float64", "float32"):
                raise ValueError(f"{layout.layer}: compute is {compute!r}. Choose None, 'float64' or 'float32'.")
        self.compute = compute or "float64"
        self.exact = Exact(layout, formula, float(eps), form)
        self.levels = Levels(self.exact, self.compute)
        self.other_modules = OtherModules(self.exact, self.levels.levels)
        self._linear = layout.vectorized and formula.measured is None
        self._known = Known()

    # The two calls.

    def forward(
        self,
        x: Any,
        params: dict[str, Any],
        *others: Array,
        constants: tuple[Array, ...] = (),
        out: Any = None,
        check: Callable[..., None] = lambda **arrays: None,
    ) -> tuple[Any, tuple[Any, ...], Any]:
        """Evaluate the forward formula on all rows.

        Parameters
        ----------
        x, others : arrays of one shape
            x is the one whose scale the norm does not see.
        params : dict
            Those of the formula's parameters that the norm has.
        constants : tuple of arrays
            One number for each row, in float64, which the formula takes last.
        out : array of the shape and dtype of x, or None
            Where y is written to.
        check : callable
            `check(x=x)` raises where x does not suit the norm; left out where arrays like x have passed it.

        Returns
        -------
        y : array of the shape and dtype of x
        statistics : tuple of arrays, one number for each row; of the scaled rows
        exponent : array, or None
            The exponent of two for each row: it was divided by 2^exponent. None if no row needed it.
        """
        known = None if others or constants else self._known.find("x", x, params)
        if known is not None and (out is None or can_write_to(out, x, *params.values())):
            shape, level, buffer = known
            y = np.empty(shape, x.dtype) if out is None else out.reshape(shape)
            with np.errstate(all="ignore"):
                if buffer:
                    np.setbufsize(buffer)
                w = self._params(params, self.formula.params, level)
                statistics = self.levels.forward(x.reshape(shape), w, (), y, level)
            return (y.reshape(x.shape) if out is None else out), statistics, None
        check(x=x)
        with errors_on_all_ranks(self.group):
            check_dtypes(self.layout.layer, self.compute, x, *others, *params.values())
            check_out(self.layout.layer, out, x, *others, *params.values())
        rows = [self.layout.to_rows(a) for a in (x, *others)]
        y = array_module(x).empty_like(rows[0]) if out is None or not is_strided(out) else self.layout.to_rows(out)
        with np.errstate(all="ignore"):
            if _buffer(rows[0]):
                np.setbufsize(_buffer(rows[0]))
            found, level = self._at_level(
                self._level(rows[0], params, others), self._forward, rows, params, constants, y
            )
        statistics, exponent = _joined(found)
        if not others and not constants:
            self._remember("x", level, x, rows[0], params)
        return self._result(y, x, out), statistics, exponent

    def backward(
        self,
        dy: Any,
        x: Any,
        params: dict[str, Any],
        statistics: tuple[Any, ...],
        exponent: Array | None,
        *others: Array,
        plus: Array | None = None,
        rounded: bool = True,
        out: Any = None,
        check: Callable[..., None] = lambda **arrays: None,
    ) -> tuple[Any, dict[str, Any]]:
        """Evaluate the backward formula, which is linear in dy, on all rows.

        With `others` it returns a tuple: dx, and a gradient for each of them. `plus`, of the shape of x, is added to dx
        before it is rounded. Without `rounded` the gradients of the parameters are left in working precision, so that
        ranks can add theirs.

        Returns
        -------
        dx : array of the shape and dtype of x, or a tuple: one such for x and for each of `others`
        grads : dict
            For each name in `params` the sum of its gradient over the rows, rounded to the dtype of the parameter.
        """
        known = self._known.find("dy", x, params) if exponent is None and plus is None and not others else None
        if known is not None and is_like(dy, x, statistics, known[0][0]):
            found: Any = self._small_backward(known, dy, x, params, statistics, rounded, out)
            if found is not None:
                return found
        check(dy=dy, x=x)
        more = others if plus is None else (plus, *others)
        with errors_on_all_ranks(self.group):
            check_dtypes(self.layout.layer, self.compute, x, dy, *others, *params.values())
            check_out(self.layout.layer, out, x, dy, *more, *params.values())
        rows = [self.layout.to_rows(a) for a in (dy, x, *others)]
        rows_plus = None if plus is None else self.layout.to_rows(plus)
        with errors_on_all_ranks(self.group):
            check_statistics(self.layout.layer, flatten(statistics), rows[0].shape[0])
        into = out is not None and is_strided(out)
        outs = [self.layout.to_rows(out) if into and a is rows[1] else array_module(x).empty_like(a) for a in rows[1:]]
        with np.errstate(all="ignore"):
            if _buffer(rows[1]):
                np.setbufsize(_buffer(rows[1]))
            level = self._level(rows[1], params, others, dy, *(() if plus is None else (plus,)))
            level = None if exponent is not None else level
            given = rows, rows_plus, params, statistics, exponent, outs
            sums, level = self._at_level(level, self._backward, *given)
            grads = self._grads(sums.totals(), params, rounded)
            if grads is None:
                grads = self._grads_in_range(rows, params, statistics, exponent, rounded)
        if plus is None and not others:
            self._remember("dy", level, x, rows[1], params)
        found = tuple(self._result(a, x, out if i == 0 else None) for i, a in enumerate(outs))
        return (found if others else found[0]), grads

    def _small_backward(
        self,
        known: Any,
        dy: np.ndarray,
        x: np.ndarray,
        params: dict[str, Array],
        statistics: tuple[Any, ...],
        rounded: bool,
        out: Any,
    ) -> tuple[Any, dict[str, Any]] | None:
        """Return what backward does, for arrays that passed all checks; None where something else needs a check."""
        if out is not None and not can_write_to(out, x, dy, *params.values()):
            return None
        shape, level, buffer = known
        dx = np.empty(shape, x.dtype) if out is None else out.reshape(shape)
        with np.errstate(all="ignore"):
            if buffer:
                np.setbufsize(buffer)
            w = self._params(params, self.formula.read, level)
            if not self._weight_is_in_range(w, level):
                return None
            of_rows = Given(dy.reshape(shape), x.reshape(shape), None, w, statistics, dx, self._there(params))
            sums = self.levels.backward(of_rows, level)
            grads = self._grads(sums, params, rounded)
        return None if grads is None else ((dx.reshape(x.shape) if out is None else out), grads)

    # All rows, block by block.

    def _at_level(self, level: int | None, evaluate: Callable[..., Any], *given: Any) -> tuple[Any, int | None]:
        """Return what `evaluate` does at this level, or exactly if the formula is not linear; and the level."""
        try:
            return evaluate(level, *given), level
        except NotLinear:
            self._linear = False
            return evaluate(None, *given), None

    def _forward(
        self, level: int | None, rows: list[Array], params: dict[str, Array], constants: tuple[Array, ...], y: Array
    ) -> list[tuple[tuple[Any, ...], Array | None]]:
        """Write y; return statistics and exponent of each block."""
        dtype = _widest(*rows, *params.values())
        own = self._params_of_rows(params, self.formula.params, level, rows[0], dtype)
        blocks, _ = self._blocks(rows[0], level)
        levels = self.levels if array_module(y) is np else self.other_modules
        found: list[Any] = [None] * len(blocks)

        def evaluate(i: int) -> None:
            s = blocks[i]
            arrays, given = [a[s, ...] for a in rows], tuple(a[s, ...] for a in constants)
            if level is not None:
                found[i] = levels.forward(arrays[0], own(s), given, y[s, ...], level), None
                return
            arrays = [contiguous(a, getattr(array_module(a), dtype)) for a in arrays]
            low_precision = dtype_name(y) in LOW_PRECISION
            values, *found[i] = self.exact.forward(arrays, [*own(s), *given], low_precision, {"x": rows[0]})
            y[s, ...] = round_to(values, y.dtype)

        parallel_for(evaluate, len(blocks), _threads_for(rows[0]))
        return found

    def _backward(
        self,
        level: int | None,
        rows: list[Array],
        plus: Array | None,
        params: dict[str, Array],
        statistics: tuple[Any, ...],
        exponent: Array | None,
        outs: list[Array],
    ) -> Gradients:
        """Write dx, and the gradients of the other arrays; return the sums for the parameters."""
        dtype = _widest(*rows, *params.values())
        own = self._params_of_rows(params, self.formula.read, level, rows[0], dtype)
        if level is not None and not self._weight_is_in_range(own(slice(None)), level):
            return self._backward(None, rows, plus, params, statistics, exponent, outs)
        there = self._there(params)
        _, tasks = self._blocks(rows[1], level)
        levels = self.levels if array_module(rows[0]) is np else self.other_modules
        found = [Gradients(self.layout.adds) for _ in tasks]

        def evaluate(s: slice) -> list[Any]:
            arrays, of_plus = [a[s, ...] for a in rows], None if plus is None else plus[s, ...]
            given = map_statistics(lambda a: a[s, ...], statistics)
            if level is not None:
                dy, x = arrays
                return levels.backward(Given(dy, x, of_plus, own(s), given, outs[0][s, ...], there), level)
            xp, k = array_module(rows[0]), None if exponent is None else exponent[s, ...]
            arrays = [contiguous(a, getattr(xp, dtype)) for a in arrays]
            d, sums = self.exact.backward(
                arrays, own(s), given, k, dtype_name(outs[0]) in LOW_PRECISION, {"dy": rows[0], "x": rows[1]}
            )
            if of_plus is not None:
                d[0] = d[0] + contiguous(of_plus, getattr(xp, dtype))
            for out, a in zip(outs, d, strict=True):
                out[s, ...] = round_to(a, out.dtype)
            return list(itertools.compress(sums, there))

        def run(i: int) -> None:
            for s in tasks[i]:
                found[i].add(evaluate(s))

        parallel_for(run, len(tasks), _threads_for(rows[1]))
        total = Gradients(self.layout.adds)
        for of_task in found:
            for sums in of_task.parts:
                total.add(sums)
        return total

    def _blocks(self, rows: Array, level: int | None) -> tuple[list[slice], list[list[slice]]]:
        """Return the blocks of rows, and the same in tasks for threads; they depend on the shape alone."""
        count, width = rows.shape[0], max(1, self.layout.local_size(rows))
        starts = [0, count]
        if array_module(rows) is np and self.layout.local and count:
            size = EXACT_BLOCK // 8 if level is None else BLOCK // np.dtype(self.levels.levels[level].work).itemsize
            starts = self.layout.starts(count, size // width)
        blocks = [slice(start, stop) for start, stop in itertools.pairwise(starts)]
        each = -(-len(blocks) // TASKS)
        return blocks, [blocks[i : i + each] for i in range(0, len(blocks), each)]

    # What the evaluation is given.

    def level(self, x: Array, params: dict[str, Array], *like: Array) -> int | None:
        """Return the level at which the evaluation of x and arrays like it begins; None for the exact one."""
        return self._level(self.layout.to_rows(x), params, (), *like)

    def _level(self, rows: Array, params: dict[str, Array], others: tuple[Array, ...], *like: Array) -> int | None:
        if others or not self._linear or rows.size == 0:
            return None
        if not is_supported(self.layout, rows.shape[1:], dtype_name(rows), tuple(params.values())):
            return None
        if any(dtype_name(a) != dtype_name(rows) for a in like):
            return None
        short = rows.shape[-1] < SHORT_FLOAT32 and not self.layout.per_channel
        level, xp = int(short and self.compute == "float32"), array_module(rows)
        return level if xp is np or self.other_modules.takes(xp, level) else None

    def _params_of_rows(
        self, params: dict[str, Array], names: tuple[str, ...], level: int | None, rows: Array, dtype: str
    ) -> Callable[[slice], list[Any]]:
        """Return a function that gives the parameters which some of the rows meet, in working precision."""
        xp, count = array_module(rows), rows.shape[0]
        if self.layout.is_flat or self.layout.per_channel:  # all of them are few
            whole = self._params(params, names, level, 0, count, dtype, xp)
            return lambda s: of_rows(whole, s)
        return lambda s: self._params(params, names, level, s.start, s.stop, dtype, xp)

    def _params(
        self,
        params: dict[str, Array],
        names: tuple[str, ...],
        level: int | None,
        start: int = 0,
        stop: int = 0,
        dtype: str = "float64",
        xp: Any = np,
    ) -> list[Any]:
        """Return parameters in working precision, so that they meet the rows; `Absent` for those that are not there."""
        if level is not None and not self.layout.per_channel:
            dtype = self.levels.levels[level].work
        found: list[Any] = []
        for name in names:
            param = params.get(name)
            if param is None:
                found.append(self.formula.without(name, xp))
                continue
            if self.offset and name == "weight":
                param = self.with_offset(param)
            if type(param) is np.ndarray and param.ndim == 1 and self.layout.is_flat:  # small calls come here
                found.append(param if param.dtype == dtype else param.astype(dtype))
                continue
            param = self.layout.param_to_rows(contiguous(param), start, stop)
            found.append(contiguous(param, getattr(array_module(param), dtype)))
        return found

    def with_offset(self, weight: Array) -> Array:
        """Return offset + weight, in float32 for a weight of 32 bits or fewer."""
        xp = array_module(weight)
        if dtype_name(weight) not in LOW_PRECISION:
            return self.offset + weight
        return round_to(self.offset + round_to(weight, xp.float64), xp.float32)

    def _weight_is_in_range(self, params: list[Any], level: int) -> bool:
        w: Any = params[0] if params else None
        if not getattr(w, "ndim", 0):  # there is none
            return True
        limit = LIMITS[self.levels.levels[level].work].weight ** 2
        if type(w) is np.ndarray:
            w = w.reshape(-1)
            return bool(w.dot(w) < limit)
        return bool(array_module(w).sum(w * w) < limit)

    def _there(self, params: dict[str, Array]) -> list[bool]:
        """Return which of the formula's parameters the norm has."""
        return [name in params for name in self.formula.params]

    # What comes out.

    def _grads(
        self, sums: list[Any], params: dict[str, Any], rounded: bool, power: float = 1.0
    ) -> dict[str, Any] | None:
        """Return the gradients of the parameters, times a power of two; None if the range may have been left."""
        grads = {}
        for name, total in zip([name for name in self.formula.params if name in params], sums, strict=True):
            param = params[name]
            d = total if total.shape == param.shape else self.layout.to_param(total, param)
            if self.layout.local and power == 1.0 and not _is_finite(d):
                return None
            d = d if power == 1.0 else d * power
            if rounded and d.dtype != param.dtype:
                single = type(d) is np.ndarray and param.dtype == np.float32
                d = d.astype(param.dtype) if single else round_to(d, param.dtype)
            grads[name] = d
        return grads

    def _grads_in_range(
        self,
        rows: list[Array],
        params: dict[str, Array],
        statistics: tuple[Any, ...],
        exponent: Array | None,
        rounded: bool,
    ) -> dict[str, Array]:
        """Return the gradients of dy / 2^64, times 2^64: their sums left the range, and they need not."""
        xp = array_module(rows[0])
        dy = contiguous(rows[0], xp.float64) * 2.0**-64
        outs = [xp.empty_like(a) for a in rows[1:]]
        sums = self._backward(None, [dy, *rows[1:]], None, params, statistics, exponent, outs)
        return self._grads(sums.totals(), params, rounded, 2.0**64)  # type: ignore[return-value]

    def _result(self, rows: Array, x: Array, out: Array | None) -> Array:
        if out is None:
            return self.layout.from_rows(rows, x)
        if not is_strided(out):
            out[...] = self.layout.from_rows(rows, x)
        return out

    def forget(self) -> None:
        """Forget which arrays have passed all checks."""
        self._known = Known()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": Known()}  # it holds the very arrays of the parameters

    def _remember(self, which: str, level: int | None, x: Array, rows: Array, params: dict[str, Array]) -> None:
        """Note that arrays like these passed all checks, if they make a single block."""
        if level is None or not self.layout.adds or type(x) is not np.ndarray:
            return
        if rows.size * np.dtype(self.levels.levels[level].work).itemsize <= BLOCK:
            self._known.add(which, x, params, (rows.shape, level, _buffer(rows)))


def _buffer(rows: Array) -> int:
    """Return the best length of NumPy's ufunc buffer for rows; 0: as it is.

    NumPy (up to 2.4 at least) copies a broadcast operand into its buffer of 8192 elements again and again; a buffer of
    one row spares that. LayerNorm of (4096, 1024) float32 takes 0.8 of the time, with the same bits.
    """
    width = rows.shape[-1]
    return width // 16 * 16 if 512 <= width < 8192 and rows.size > 1 << 16 else 0


def _threads_for(rows: Array) -> int:
    """Return how many threads share the blocks of rows."""
    return get_threads() if math.prod(rows.shape) >= SHARED else 1


def _widest(*arrays: Array) -> str:
    """Return the working dtype of the exact evaluation: complex128 for the complex step."""
    return "complex128" if any(dtype_name(a) == "complex128" for a in arrays) else "float64"


def _joined(found: list[tuple[tuple[Any, ...], Array | None]]) -> tuple[tuple[Any, ...], Array | None]:
    """Return the statistics of all blocks, and their exponents, 0 where a block needed none; None if none did."""
    if len(found) == 1 or not found[0][0]:
        return found[0]
    statistics = [s for s, _ in found]
    xp = array_module(statistics[0][-1])
    joined = map_statistics(lambda *a: xp.concat(a), *statistics)
    if all(k is None for _, k in found):
        return joined, None
    return joined, xp.concat([xp.zeros_like(abs(s[-1])) if k is None else k for s, k in found])


def _is_finite(a: Array) -> bool:
    if type(a) is np.ndarray and a.ndim == 1:
        return bool(a.dot(a) < math.inf) or bool(np.isfinite(a).all())
    xp = array_module(a)
    return bool(xp.all(xp.isfinite(a)))
