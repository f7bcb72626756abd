"""How a row formula is driven: fast where that is exact enough, with care where not. No mathematics of norms.

A norm's page gives a formula over rows; what a row is, is said by its axes (`npnorm.axes`). `Rows` has it evaluated by
`npnorm.fast`, in cache-sized blocks of rows and by several threads; on a GPU by `npnorm.device`; or, where these do not
know the formula or the arrays, by `npnorm.careful`: arrays of float64, rows that are split over a group, other array
modules, complex numbers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, dtype_name, is_cuda
from npnorm.axes import Axes
from npnorm.careful import Careful
from npnorm.device import Device
from npnorm.fast import Fast
from npnorm.group import Group, errors_on_all_ranks


class Rows:
    """The rows of arrays, and how formulas over them are evaluated.

    Parameters
    ----------
    axes : Axes
        What a row is, and the ranks over which it is split.
    eps : float
        What the norm adds to its mean square.
    compute : "float64", "float32" or None
        The working precision of the fast way; None is float64. The careful way is always in float64.
    group : Group or None
        The ranks on which an error is raised; None: those of the axes.
    """

    def __init__(self, axes: Axes, eps: float, compute: str | None = None, group: Group | None = None) -> None:
        self.axes = axes
        self.group = group or axes.group
        self.eps = float(eps)  # a Python number takes the precision of the array that it meets
        with errors_on_all_ranks(self.group):
            if compute not in (None, "float64", "float32"):
                raise ValueError(f"{axes.layer}: compute is {compute!r}. Choose None, 'float64' or 'float32'.")
        self.compute = compute or "float64"
        self.careful = Careful(axes, self.eps, self.group)
        self.fast = Fast(axes, self.eps, self.compute, self.careful)
        self.device = Device(axes, self.eps, self.compute, self.careful)

    def forward(
        self,
        formula: Callable[..., Any],
        x: Array,
        params: dict[str, Array],
        *others: Array,
        constants: tuple[Array, ...] = (),
        out: Array | None = None,
        check: Callable[..., None] = lambda **arrays: None,
    ) -> tuple[Array, tuple[Array, ...], Array | None]:
        """Evaluate `formula(x, *others, w, b, *more, *constants, eps) -> y, statistics` on all rows.

        Parameters
        ----------
        formula : callable
            w and b are None where the norm has none; statistics are a tuple of one number for each row, rstd last. An
            empty tuple says that the scale of x is seen: nothing is scaled.
        x, others : arrays of one shape
            x is the one whose scale the norm does not see.
        params : dict
            May hold "weight", "bias", and more, which come after these two.
        constants : tuple of arrays
            One number for each row, in float64.
        out : array of the shape and dtype of x, or None
            Where y is written to.
        check : callable
            `check(x=x)` raises where x does not suit the norm; left out where arrays like x have passed it.

        Returns
        -------
        y : array of the shape and dtype of x
        statistics : tuple of arrays, one number for each row; of the scaled rows
        scale : array, or None
            The exponent of two for each row: it was divided by 2^scale. None if no row needed it.
        """
        if not others and not constants:
            known = self.fast.repeated.forward(x, params, out)
            if known is not None:
                return known
        check(x=x)
        self._check_dtypes(x, *others, *params.values())
        self._check_out(out, x, *others, *params.values())
        way = self._way(x)
        written = None if others else way.written(formula, {"x": x}, params, len(constants))
        if written is None:
            y, statistics, scale = self.careful.forward(formula, x, params, *others, constants=constants)
            return _into(out, y), statistics, scale
        rows = self.axes.rows(x)
        out = self.device.empty(x) if out is None and way is self.device else out
        y = np.empty_like(rows) if out is None else self.axes.rows(out)
        statistics, scale = way.forward(written, formula, rows, params, constants, y)
        if not constants and way is self.fast:
            self.fast.remember("x", written, x, rows, params)
        return (self.axes.restore(y, x) if out is None else out), statistics, scale

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
        out: Array | None = None,
        check: Callable[..., None] = lambda **arrays: None,
    ) -> tuple[Any, dict[str, Array]]:
        """Evaluate `formula(dy, x, *others, w, *more, *statistics, eps) -> dx, {name: gradient by row}` on all rows.

        The formula is linear in dy. With `others` it returns a tuple: dx, and a gradient for each of them. `plus`, of
        the shape of x, is added to dx before it is rounded.

        Returns
        -------
        dx : array of the shape and dtype of x, or a tuple: one such for x and for each of `others`
        grads : dict
            For each name in `params` the sum of its gradient over the rows, in the dtype of the parameter.
        """
        if scale is None and plus is None and not others:
            known = self.fast.repeated.backward(dy, x, params, statistics, out)
            if known is not None:
                return known
        check(dy=dy, x=x)
        self._check_dtypes(x, dy, *others)  # the parameters: forward; here they may be widened
        arrays = {"dy": dy, "x": x} | ({} if plus is None else {"plus": plus})
        self._check_out(out, x, *arrays.values(), *others, *params.values())
        rows = {name: self.axes.rows(a) for name, a in arrays.items()}
        with errors_on_all_ranks(self.group):
            if any(a.shape[0] != rows["dy"].shape[0] for a in statistics):
                raise ValueError(
                    f"{self.axes.layer}: this norm makes {rows['dy'].shape[0]} rows of x, and saved has statistics of "
                    f"{statistics[0].shape[0]}. Hand backward what this very norm saved."
                )
        written, way = None, self._way(x)
        if scale is None and not others:
            written = way.written(formula, arrays, params, len(statistics))
        if written is None:
            dx, grads = self.careful.backward(formula, dy, x, params, statistics, scale, *others, plus=plus)
            return _into(out, dx), grads
        out = self.device.empty(x) if out is None and way is self.device else out
        rows_dx = np.empty_like(rows["x"]) if out is None else self.axes.rows(out)
        found = way.backward(written, formula, rows, params, statistics, rows_dx)
        if plus is None and way is self.fast:
            self.fast.remember("dy", written, x, rows["x"], params)
        if found is None:  # the rows of dx do not depend on this: each was evaluated as it needs
            _, found = self.careful.backward(formula, dy, x, params, statistics, scale)
        return (self.axes.restore(rows_dx, x) if out is None else out), found

    def widened(self, param: Array) -> Array:
        """Return `param` in float64, so that backward leaves its gradient unrounded; complex numbers as they are."""
        xp = array_module(param)
        return param if dtype_name(param) == "complex128" else xp.astype(param, xp.float64, copy=False)

    def _way(self, x: Array) -> Any:
        """Return what evaluates formulas where no care is needed."""
        return self.device if is_cuda(array_module(x)) else self.fast

    def _check_dtypes(self, *arrays: Array) -> None:
        with errors_on_all_ranks(self.group):
            if self.compute == "float32" and "float64" in {dtype_name(a) for a in arrays}:
                raise TypeError(
                    f"{self.axes.layer}: compute='float32' would cut float64 arrays short. Leave compute out for them."
                )

    def _check_out(self, out: Array | None, x: Array, *others: Array) -> None:
        """Raise unless a result like x can be written to `out` while x and the others are read."""
        if out is None:
            return
        layer = self.axes.layer
        with errors_on_all_ranks(self.group):
            if array_module(out) is not array_module(x) or tuple(out.shape) != tuple(x.shape) or out.dtype != x.dtype:
                raise ValueError(
                    f"{layer}: out must be an array like x, {tuple(x.shape)} {dtype_name(x)}; got {tuple(out.shape)} "
                    f"{dtype_name(out)}. Make it by numpy.empty_like(x)."
                )
            plain = isinstance(out, np.ndarray) or is_cuda(array_module(out))
            flags = ("c_contiguous", "writeable", "aligned")  # a GPU's arrays have the first only
            if plain and not all(getattr(out.flags, flag, True) for flag in flags):
                raise ValueError(
                    f"{layer}: out must be writable, aligned and in C order. Make it by numpy.empty(x.shape, x.dtype)."
                )
            if plain and any(array_module(out).may_share_memory(out, a) for a in (x, *others)):
                raise ValueError(
                    f"{layer}: out shares memory with an array that is read, and that backward may need. Take another."
                )


def _into(out: Array | None, y: Array) -> Array:
    """Return y, written to `out` if there is one."""
    if out is None:
        return y
    out[...] = y
    return out
