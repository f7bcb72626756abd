"""Kernels on arrays of CuPy: compiled, held against the exact evaluation at their first use, and launched.

    forward     a fill of the flags, `row`
    backward    a fill of the flags, `row`, and for features `columns`

and then a byte is read, for which the host waits: whether some row lost digits. `npnorm.engine.other_modules` evaluates
such rows again. What a kernel does depends on the row alone, and on the shape. So the bits of a row do not depend on
the rows beside it, and those of a gradient are the same in every run.

If a kernel cannot be compiled or launched here, or fails its check, there is one warning, and this process does without
kernels from then on.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, contiguous, dtype_name, to_numpy
from npnorm.compiled import check, cuda
from npnorm.compiled.c import Kind, NotWritten
from npnorm.compiled.trace import Traced, trace_backward, trace_forward
from npnorm.engine.exact import Exact, Formula, flatten
from npnorm.engine.layout import Batch, Channels, Features, Layout
from npnorm.engine.levels import Level
from npnorm.engine.row import Absent
from npnorm.engine.statistics import Mean
from npnorm.engine.terms import NotLinear
from npnorm.group import SOLO

KNOWN = 64
"""How many kernels, at most, are kept: those that were used last."""

CHUNK = 32
"""The fewest rows of a chunk, over which the column kernel sums."""

BLOCKS = 1024
"""How many blocks of threads the column kernel has, if there are rows enough."""

LARGEST = 1 << 31
"""Rows, and elements of a row, are fewer."""

MOST = 65535
"""Chunks, at most: so many blocks a grid may have along its second axis."""

ALIGNED = 16
"""Bytes that a thread reads at once."""

LAYOUTS: dict[str, Layout] = {
    "Features": Features("", SOLO),
    "Channels": Channels("", SOLO, 1),
    "Batch": Batch("", SOLO),
}
"""One layout of each kind: a kernel does not depend on more."""


class _Process:
    """What this process has learned."""

    uses_kernels = True


class Kernels:
    """The kernels of one direction, for packs of several elements and of one; compiled when they are first launched."""

    def __init__(self, traced: Traced, kind: Kind, write: Callable[[Traced, Kind], cuda.Source]) -> None:
        self.traced, self.kind = traced, kind
        self.widths = sorted({1, cuda.packed(kind.dtype, kind.shape)})
        self.sources = {width: write(traced, kind._replace(width=width)) for width in self.widths}
        self.checked: set[int] = set()
        self._functions: dict[int, dict[str, Any]] = {}

    def width(self, *arrays: Any) -> int:
        """Return the length of packs for arrays that lie where these do."""
        return self.widths[-1] if all(a.data.ptr % ALIGNED == 0 for a in arrays) else 1

    def functions(self, xp: Any, width: int) -> dict[str, Any]:
        """Return the compiled kernels, by name."""
        if width not in self._functions:
            source = self.sources[width]
            module = xp.RawModule(code=source.code)
            self._functions[width] = {name: module.get_function(name) for name in source.kernels}
        return self._functions[width]


def forward(
    exact: Exact, level: Level, x: Array, params: list[Any], constants: tuple[Array, ...], y: Array
) -> tuple[tuple[Any, ...], Array | None] | None:
    """Write y; return the statistics, and the rows that lost digits; None if there is no kernel."""
    given = tuple(a for a in params if not isinstance(a, Absent))
    names = tuple(name for name, a in zip(exact.formula.params, params, strict=True) if not isinstance(a, Absent))
    kernels = _kernels(exact.formula, _kind(exact.layout, level, ("x",), (x,), names), names, (), len(constants))
    if kernels is None or not _fits(x):
        return None

    def evaluate() -> tuple[tuple[Any, ...], Array | None]:
        call = functools.partial(_forward, kernels, exact, level)
        width = kernels.width(_in_memory(kernels, x), _in_memory(kernels, y), *given)
        if width not in kernels.checked:
            check.forward(functools.partial(call, width), exact, level, x, params, constants)
            kernels.checked.add(width)
        return call(width, x, params, constants, y)

    return _try(x, evaluate)


def backward(
    exact: Exact,
    level: Level,
    arrays: tuple[Array, Array, Array | None],
    params: list[Any],
    statistics: tuple[Any, ...],
    dx: Array,
    there: list[bool],
) -> tuple[list[Array], Array | None, bool] | None:
    """Write dx; return the sums over the rows that lost no digits, the others, and whether their dx may cancel.

    It returns None if there is no kernel.
    """
    some = tuple(a for a in arrays if a is not None)
    given = tuple(a for a in params if not isinstance(a, Absent))
    names = tuple(name for name, has in zip(exact.formula.params, there, strict=True) if has)
    read = tuple(name for name in exact.formula.read if name in names)
    kind = _kind(exact.layout, level, ("dy", "x", "plus")[: len(some)], some, read)
    kernels = _kernels(exact.formula, kind, names, tuple(isinstance(s, Mean) for s in statistics), 0)
    if kernels is None or not _fits(dx):
        return None

    guarded = kernels.traced.row.cancelling is not None

    def evaluate() -> tuple[list[Array], Array | None]:
        call = functools.partial(_backward, kernels, exact, level)
        width = kernels.width(*(_in_memory(kernels, a) for a in (*some, dx)), *given)
        if width not in kernels.checked:
            check.backward(functools.partial(call, width), exact, level, some, params, statistics, there, guarded)
            kernels.checked.add(width)
        return call(width, some, params, statistics, dx)

    found = _try(dx, evaluate)
    return None if found is None else (*found, guarded)


# Which kernels there are.


def _kind(
    layout: Layout, level: Level, names: tuple[str, ...], arrays: tuple[Array, ...], params: tuple[str, ...]
) -> Kind:
    axes = "Features" if not layout.per_channel else "Batch" if layout.row_is_channel else "Channels"
    shape = tuple(map(int, arrays[0].shape[1:]))
    return Kind(axes, shape, dtype_name(arrays[0]), level.work, level.centring == "folded", names, params)


@functools.lru_cache(maxsize=KNOWN)
def _kernels(
    formula: Formula, kind: Kind, names: tuple[str, ...], means: tuple[bool, ...], constants: int
) -> Kernels | None:
    """Return the kernels of a formula; None if it cannot be traced, or what was traced cannot be written."""
    layout, shape, folds = LAYOUTS[kind.axes], kind.shape, kind.folds
    try:
        if "dy" in kind.arrays:
            traced = trace_backward(formula, layout, shape, folds, names, means, "plus" in kind.arrays)
            return Kernels(traced, kind, cuda.write_backward)
        traced = trace_forward(formula, layout, shape, folds, names, constants)
        return Kernels(traced, kind, cuda.write_forward)
    except (NotLinear, NotWritten):
        return None


def _fits(x: Array) -> bool:
    return max(x.shape[0], math.prod(x.shape[1:])) < LARGEST


def _try(x: Array, evaluate: Callable[[], Any]) -> Any:
    """Return what `evaluate` does; None if kernels do not work here."""
    if not _Process.uses_kernels:
        return None
    xp = array_module(x)
    try:
        with x.device:
            return evaluate()
    except (RuntimeError, ImportError, OSError, xp.cuda.compiler.CompileException) as problem:
        _Process.uses_kernels = False
        warnings.warn(
            f"npnorm does without its CUDA kernels from now on: {type(problem).__name__}: {problem}. Results stay "
            "right, and are slower. Please report this message to npnorm, with the output of cupy.show_config().",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


# Launches.


def _forward(
    kernels: Kernels,
    exact: Exact,
    level: Level,
    width: int,
    x: Array,
    params: list[Any],
    constants: tuple[Array, ...],
    y: Array,
) -> tuple[tuple[Any, ...], Array | None]:
    xp, rows = array_module(x), x.shape[0]
    flags, given = _row(kernels, exact, level, width, (x,), params, constants, y)
    numbers = iter(given[i, ...] for i in range(given.shape[0]))
    shape = (rows, *[1] * (x.ndim - 1))

    def take() -> Array:
        return xp.reshape(next(numbers), shape)

    statistics = kernels.traced.statistics
    found = tuple(Mean(take(), take()) if isinstance(s, Mean) else take() for s in statistics)
    return found, _lost(flags)


def _backward(
    kernels: Kernels,
    exact: Exact,
    level: Level,
    width: int,
    arrays: tuple[Array, ...],
    params: list[Any],
    statistics: tuple[Any, ...],
    dx: Array,
) -> tuple[list[Array], Array | None]:
    xp, rows, kind, count = array_module(dx), dx.shape[0], kernels.kind, len(kernels.traced.grads)
    numbers = flatten(statistics)
    flags, given = _row(kernels, exact, level, width, arrays, params, numbers, dx)
    if not count:
        return [], _lost(flags)
    if kind.axes == "Features":
        given = xp.sum(_columns(kernels, exact, width, arrays, numbers, flags, count), axis=1)
    else:
        given = xp.reshape(given, (count, rows, -1) if kind.axes == "Channels" else (count, rows))
    return [given[i, ...] for i in range(count)], _lost(flags)


def _row(
    kernels: Kernels,
    exact: Exact,
    level: Level,
    width: int,
    arrays: tuple[Array, ...],
    params: list[Any],
    numbers: tuple[Array, ...],
    out: Array,
) -> tuple[Array, Array]:
    """Launch the row kernel; return the flags, and the numbers that it gives."""
    xp, rows, source = array_module(out), out.shape[0], kernels.sources[width]
    precise = getattr(xp, source.precise)
    flags = xp.zeros(rows + 1, dtype=xp.uint8)
    given = xp.empty((source.given, rows), dtype=precise)
    partial = xp.empty((source.partials, rows), dtype=precise)
    read = [contiguous(a, precise) for a in (*params, *numbers) if not isinstance(a, Absent)]
    memory = _in_memory(kernels, out)
    into = memory if memory.flags.c_contiguous else xp.empty(memory.shape, dtype=memory.dtype)
    args = (
        *(contiguous(_in_memory(kernels, a)) for a in arrays),
        *read,
        np.float64(exact.eps),
        np.float64(level.guards.beside_eps),
        into,
        *(a for a in (given, partial) if a.size),
        flags,
        np.int64(rows),
    )
    kernels.functions(xp, width)["row"]((rows,), (source.threads,), args)
    if into is not memory:
        memory[...] = into
    return flags, given


def _columns(
    kernels: Kernels,
    exact: Exact,
    width: int,
    arrays: tuple[Array, ...],
    numbers: tuple[Array, ...],
    flags: Array,
    count: int,
) -> Array:
    """Launch the column kernel; return sums of shape (gradients, chunks, features)."""
    xp, (rows, features), source = array_module(flags), arrays[0].shape, kernels.sources[width]
    across = -(-source.packs // cuda.COLUMNS)
    each = max(CHUNK, -(-rows // max(1, BLOCKS // across)), -(-rows // MOST))
    chunks = -(-rows // each)
    sums = xp.empty((count, chunks, features), dtype=xp.float64)
    by_row = [contiguous(a, getattr(xp, source.precise)) for a in numbers]
    args = *map(contiguous, arrays), *by_row, np.float64(exact.eps), flags, sums, np.int64(rows), np.int64(each)
    kernels.functions(xp, width)["columns"]((across, chunks), (cuda.COLUMNS,), args)
    return sums


def _in_memory(kernels: Kernels, a: Array) -> Any:
    """Return rows as they lie in memory: channels of a batch lie beside each other, sample by sample."""
    return array_module(a).moveaxis(a, 0, 1) if kernels.kind.axes == "Batch" else a


def _lost(flags: Array) -> Array | None:
    """Wait; return which rows lost digits, None if none did."""
    return flags[:-1] != 0 if to_numpy(flags[-1:])[0] else None
