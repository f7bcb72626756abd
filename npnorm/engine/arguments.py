"""What a call is given: the checks of arrays, and which arrays have passed all of them before."""

from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, dtype_name, is_cuda, with_article

KNOWN = 64
"""How many shapes of arrays, at most, are remembered to have passed all checks."""


class Known:
    """Shapes and dtypes of NumPy arrays that have passed all checks, together with the very parameters.

    A small norm takes some microseconds, and to check its arrays takes more. Nothing of the values is remembered.
    """

    def __init__(self) -> None:
        self._found: dict[Any, tuple[dict[str, np.ndarray], Any]] = {}

    def __len__(self) -> int:
        return len(self._found)

    def find(self, which: str, x: Array, params: dict[str, Array]) -> Any:
        """Return what was noted of arrays like x with these parameters; None if nothing was. which : "x" or "dy"."""
        if type(x) is not np.ndarray:
            return None
        found = self._found.get((which, x.shape, x.dtype))
        if found is None or not is_plain(x) or len(params) != len(found[0]):
            return None
        for name, a in found[0].items():
            if params.get(name) is not a:
                return None
        return found[1]

    def add(self, which: str, x: np.ndarray, params: dict[str, Any], note: Any) -> None:
        """Note something of arrays like x."""
        if all(type(a) is np.ndarray and a.ndim == 1 for a in params.values()):
            if len(self._found) >= KNOWN:
                self._found.clear()
            self._found[which, x.shape, x.dtype] = dict(params), note


def is_plain(x: np.ndarray) -> bool:
    """Return whether x is in C order and aligned."""
    return x.flags.num & 0x101 == 0x101  # as flags.c_contiguous and flags.aligned, in a third of the time


def is_strided(x: Array) -> bool:
    """Return whether x is memory that a view of x can write to."""
    return isinstance(x, np.ndarray) or is_cuda(array_module(x))


def is_like(dy: Any, x: np.ndarray, statistics: tuple[Any, ...], rows: int) -> bool:
    """Return whether dy is as x, and the statistics are those of so many rows."""
    if type(dy) is not np.ndarray or dy.shape != x.shape or dy.dtype != x.dtype or not is_plain(dy):
        return False
    return type(statistics[-1]) is np.ndarray and len(statistics[-1]) == rows


def can_write_to(out: Array, *arrays: Any) -> bool:
    """Return whether a result like the first array can be written to `out` while the arrays are read."""
    x = arrays[0]
    if type(out) is not np.ndarray or out.shape != x.shape or out.dtype != x.dtype:
        return False
    return is_plain(out) and out.flags.writeable and not any(np.may_share_memory(out, a) for a in arrays)


def check_statistics(layer: str, statistics: tuple[Array, ...], rows: int) -> None:
    """Raise unless the statistics that were saved are those of so many rows."""
    if any(a.shape[0] != rows for a in statistics):
        raise ValueError(
            f"{layer}: this norm makes {rows} rows of x, and saved has statistics of {statistics[0].shape[0]}. "
            "Hand backward what this very norm saved."
        )


def check_dtypes(layer: str, compute: str, x: Array, *others: Array) -> None:
    """Raise if the working precision, or the dtype of x, would cut some array short."""
    names = {dtype_name(a) for a in (x, *others)}
    if compute == "float32" and "float64" in names:
        raise TypeError(f"{layer}: compute='float32' would cut float64 arrays short. Leave compute out for them.")
    if "complex128" in names and dtype_name(x) != "complex128":
        raise TypeError(
            f"{layer}: a parameter or dy is complex128 and x {dtype_name(x)}; imaginary parts would be lost. "
            "complex128 is for the complex step; x must have it, too."
        )


def check_out(layer: str, out: Any, x: Array, *others: Array) -> None:
    """Raise unless a result like x can be written to `out` while x and the others are read."""
    if out is None:
        return
    try:
        module = array_module(out)
    except TypeError:
        like = f"like x, {tuple(x.shape)} {dtype_name(x)}"
        got = f"got {with_article(out)}. Make it by numpy.empty_like(x)."
        raise TypeError(f"{layer}: out must be an array {like}; {got}") from None
    if module is not array_module(x) or tuple(out.shape) != tuple(x.shape) or out.dtype != x.dtype:
        raise ValueError(
            f"{layer}: out must be an array like x, {tuple(x.shape)} {dtype_name(x)}; got {tuple(out.shape)} "
            f"{dtype_name(out)}. Make it by numpy.empty_like(x)."
        )
    flags = ("c_contiguous", "writeable", "aligned")  # a GPU's arrays have the first only
    if is_strided(out) and not all(getattr(out.flags, flag, True) for flag in flags):
        raise ValueError(
            f"{layer}: out must be writable, aligned and in C order. Make it by numpy.empty(x.shape, x.dtype)."
        )
    if is_strided(out) and any(module.may_share_memory(out, a) for a in (x, *others)):
        raise ValueError(
            f"{layer}: out shares memory with an array that is read, and that backward may need. Take another."
        )
