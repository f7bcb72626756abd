"""The fast evaluation of a row formula on a GPU: what `npnorm.fast` is for NumPy, for CuPy arrays.

The formula is written down (`npnorm.terms`) and turned into CUDA (`npnorm.cuda`). Launched are, without care:

    forward     a fill of the flags, `row`
    backward    a fill of the flags, `row`, with parameters `total`, and for features `columns` before it

and then a few bytes are read, for which the host waits: whether some row needs care. Such rows are evaluated again by
`npnorm.careful`, on the device. All this depends on the row alone, and on the shape. So the bits of a row do not depend
on the rows beside it, and those of a gradient are the same in every run.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from npnorm import cuda
from npnorm.arrays import Array, array_module, contiguous, dtype_name, is_cuda, round_to, to_numpy
from npnorm.axes import Axes
from npnorm.careful import Careful
from npnorm.group import Solo
from npnorm.written import NARROW, Recorded, limits_of, record, suits

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


class Kernels(NamedTuple):
    """The compiled kernels of one direction."""

    source: cuda.Source
    functions: dict[str, Any]


class Written:
    """A formula as kernels, which are compiled when they are first launched."""

    def __init__(self, made: Recorded, kind: cuda.Kind) -> None:
        self.made, self.kind = made, kind
        self.widths = {cuda.packed(kind.arrays["x"], kind.shape), 1}
        self._kernels: dict[int, Kernels] = {}
        self.source(1)  # raises, if the formula cannot be written

    def source(self, width: int) -> cuda.Source:
        """Return the source for packs of that many elements."""
        write = cuda.backward if "dy" in self.kind.arrays else cuda.forward
        return write(self.made, self.kind._replace(width=width))

    def kernels(self, xp: Any, *arrays: Array) -> Kernels:
        """Return the kernels for arrays that lie where these do."""
        wide = all(a.data.ptr % ALIGNED == 0 for a in arrays)
        width = max(self.widths) if wide else 1
        if width not in self._kernels:
            source = self.source(width)
            module = xp.RawModule(code=source.code)
            self._kernels[width] = Kernels(source, {name: module.get_function(name) for name in source.kernels})
        return self._kernels[width]


class Device:
    """Evaluates formulas over the rows of arrays by CUDA kernels.

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
        self._written: dict[tuple[Any, ...], Written | None] = {}

    def written(
        self, formula: Callable[..., Any], arrays: dict[str, Array], params: dict[str, Array], numbers: int
    ) -> Written | None:
        """Return the formula as kernels, forward without and backward with a dy; None if only care will do.

        Parameters
        ----------
        arrays : dict
            "x" forward; "dy", "x" and perhaps "plus" backward.
        numbers : int
            How many numbers for each row it is given, after the parameters.
        """
        x = arrays["x"]
        known = self.axes.kernel and isinstance(self.axes.group, Solo) and set(params) <= {"weight", "bias"}
        if not known or not is_cuda(array_module(x)) or dtype_name(x) not in NARROW or not x.size:
            return None
        rows = self.axes.rows(x)
        shape = tuple(rows.shape[1:])
        if not suits(self.axes.kernel, shape, params) or max(rows.shape[0], math.prod(shape)) >= LARGEST:
            return None
        if any(a.dtype != x.dtype for a in arrays.values()):
            return None
        dtypes = {name: dtype_name(a) for name, a in (arrays | params).items()}
        code = getattr(formula, "func", formula).__code__
        key = (code, shape, tuple(dtypes.items()), numbers)
        if key not in self._written:
            self._written[key] = self._write(formula, tuple(arrays), dtypes, shape, tuple(params), numbers)
        return self._written[key]

    def _write(
        self,
        formula: Callable[..., Any],
        arrays: tuple[str, ...],
        dtypes: dict[str, str],
        shape: tuple[int, ...],
        params: tuple[str, ...],
        count: int,
    ) -> Written | None:
        kind = cuda.Kind(
            self.axes.kernel,
            shape,
            getattr(self.axes, "held_groups", 1),
            {name: dtypes[name] for name in arrays},
            {name: dtypes[name] for name in params},
            self.compute,
            1,
            self.eps,
            limits_of(self.axes.kernel, self.compute),
        )
        try:
            return Written(record(self.axes.kernel, formula, arrays, shape, params, count, self.eps), kind)
        except (TypeError, AttributeError):  # an operation that `npnorm.terms` or `npnorm.cuda` does not have
            return None

    def forward(
        self,
        written: Written,
        formula: Callable[..., Any],
        x: Array,
        params: dict[str, Array],
        constants: tuple[Array, ...],
        y: Array,
    ) -> tuple[tuple[Array, ...], Array | None]:
        """Write the rows of y; return the statistics, and the scale, as `Careful.forward` has them."""
        xp, rows = array_module(x), x.shape[0]
        with x.device:
            flags, given, _ = self._row(written, {"x": x}, params, constants, y)
            shape = (rows, *[1] * (x.ndim - 1))
            statistics = tuple(xp.reshape(given[i, ...], shape) for i in range(len(written.made.statistics)))
            careful, _ = self._seen(flags)
            if careful is not None:
                exact = [contiguous(x[careful], xp.float64)]
                own = *self._own(params, x, careful), *(a[careful] for a in constants)
                of_careful, of_rows, _ = self.careful.forward_rows(formula, exact, own, wide=False)
                y[careful] = round_to(of_careful, y.dtype)
                for a, b in zip(statistics, of_rows, strict=True):
                    a[careful] = b
        return statistics, None

    def backward(
        self,
        written: Written,
        formula: Callable[..., Any],
        arrays: dict[str, Array],
        params: dict[str, Array],
        statistics: tuple[Array, ...],
        dx: Array,
    ) -> dict[str, Array] | None:
        """Write the rows of dx; return the gradients, or None if a NaN or an infinity came into them."""
        x = arrays["x"]
        xp = array_module(x)
        with x.device:
            flags, sums, kernels = self._row(written, arrays, params, statistics, dx)
            grads = {name: xp.empty(a.shape, dtype=a.dtype) for name, a in params.items()}
            if grads:
                if self.axes.kernel == "Features":
                    sums = self._columns(kernels, arrays, statistics, flags, len(grads))
                elif self.axes.kernel == "Channels":
                    sums = xp.reshape(sums, (len(grads), -1, x.shape[1] * written.kind.period))
                else:
                    sums = xp.reshape(sums, (len(grads), 1, -1))
                self._total(kernels, sums, grads, flags)
            careful, infinite = self._seen(flags)
            if careful is not None:
                return self._with_care(formula, arrays, params, statistics, dx, careful, sums)
        return None if infinite else grads

    def empty(self, x: Array) -> Array:
        """Return new memory for an array like x, in C order."""
        with x.device:
            return array_module(x).empty(x.shape, dtype=x.dtype)

    def _row(
        self,
        written: Written,
        arrays: dict[str, Array],
        params: dict[str, Array],
        numbers: tuple[Array, ...],
        out: Array,
    ) -> tuple[Array, Array, Kernels]:
        """Launch the row kernel; return the flags, the numbers that it gives, and the kernels."""
        xp, rows = array_module(out), out.shape[0]
        flags = xp.zeros(rows + 3, dtype=xp.uint8)
        read = [contiguous(params[name]) for name in written.made.params]
        kernels = written.kernels(xp, *arrays.values(), *read, out)
        source = kernels.source
        given = xp.empty((source.given, rows), dtype=xp.float64)
        partial = xp.empty((source.partials, rows), dtype=xp.float64)
        by_row = [contiguous(a, xp.float64) for a in numbers]
        made = [a for a in (given, partial) if a.size]
        args = *arrays.values(), *read, *by_row, out, *made, flags, np.int64(rows)
        kernels.functions["row"]((rows,), (source.threads,), args)
        return flags, given, kernels

    def _columns(
        self, kernels: Kernels, arrays: dict[str, Array], numbers: tuple[Array, ...], flags: Array, count: int
    ) -> Array:
        """Launch the column kernel; return sums of shape (gradients, chunks, features)."""
        x = arrays["x"]
        xp, (rows, features) = array_module(x), x.shape
        across = -(-kernels.source.packs // cuda.COLUMNS)
        each = max(CHUNK, -(-rows // max(1, BLOCKS // across)), -(-rows // MOST))
        chunks = -(-rows // each)
        sums = xp.empty((count, chunks, features), dtype=xp.float64)
        by_row = [contiguous(a, xp.float64) for a in numbers]
        args = *arrays.values(), *by_row, flags, sums, np.int64(rows), np.int64(each)
        kernels.functions["columns"]((across, chunks), (cuda.COLUMNS,), args)
        return sums

    def _total(self, kernels: Kernels, sums: Array, grads: dict[str, Array], flags: Array) -> None:
        """Launch the kernel that writes the gradients."""
        chunks, columns = sums.shape[1:]
        args = sums, *grads.values(), flags, np.int64(chunks), np.int64(columns), np.int64(flags.size - 3)
        grid, threads = -(-columns // cuda.WARP), cuda.SLICES * cuda.WARP
        kernels.functions["total"]((grid,), (threads,), args)

    def _seen(self, flags: Array) -> tuple[Any, bool]:
        """Wait; return which rows need care, None if none does, and whether a gradient is not finite."""
        some, large, infinite = to_numpy(flags[-3:]).tolist()
        rows = flags[:-3].nonzero()[0] if some else None
        return (slice(None) if large else rows), bool(infinite)

    def _with_care(
        self,
        formula: Callable[..., Any],
        arrays: dict[str, Array],
        params: dict[str, Array],
        statistics: tuple[Array, ...],
        dx: Array,
        careful: Any,
        sums: Array,
    ) -> dict[str, Array] | None:
        """Write dx of the rows that need care; return the gradients with their part."""
        xp, rows = array_module(dx), dx.shape[0]
        weight = {name: a for name, a in params.items() if name == "weight"}
        dy, x, *plus = (contiguous(a[careful], xp.float64) for a in arrays.values())
        w, _ = self._own(weight, arrays["x"], careful)
        numbers = [xp.astype(a, xp.float64)[careful] for a in statistics]
        wide = dtype_name(params.get("weight", dy)) == "float64"
        (d,), own = self.careful.backward_rows(formula, [dy, x], (w, *numbers), None, wide, params)
        dx[careful] = round_to(d + plus[0] if plus else d, dx.dtype)
        grads = {}
        for i, (name, param) in enumerate(params.items()):
            of_all = sums[i, ...]
            if self.axes.kernel != "Features":  # numbers for each row
                by_row = xp.reshape(of_all, (rows, -1))
                by_row[careful] = xp.reshape(own[name], by_row[careful].shape)
                total = xp.sum(of_all, axis=0)
            else:
                total = own[name] if isinstance(careful, slice) else xp.sum(of_all, axis=0) + own[name]
            if not bool(xp.all(xp.isfinite(total))):
                return None
            grads[name] = round_to(xp.reshape(total, param.shape), param.dtype)
        return grads

    def _own(self, params: dict[str, Array], x: Array, careful: Any) -> tuple[Array | None, ...]:
        """Return w and b for the rows that need care, in float64."""
        whole = self.careful.params(params, slice(0, x.shape[0]), array_module(x).float64)
        return tuple(a if a is None or a.ndim < x.ndim else a[careful] for a in whole)
