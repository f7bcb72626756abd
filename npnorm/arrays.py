"""The array module behind an array: NumPy, CuPy, or one of the array API standard whose arrays can be written to.

The layers use operators, and functions of the array API standard that NumPy and CuPy share. This is the only file
that names CuPy, and it does not load it: a CuPy array cannot exist unless CuPy is already loaded.
"""

import functools
import importlib
import sys
from typing import Any, Protocol

import numpy as np

from npnorm import cuda_casts


class Array(Protocol):
    """An array of any module that `array_module` knows: what type checkers ask of what comes in."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""

    @property
    def dtype(self) -> Any:
        """The type of the elements, of the array's own module."""

    @property
    def ndim(self) -> int:
        """How many axes it has."""

    @property
    def size(self) -> Any:
        """How many elements it has."""

    @property
    def device(self) -> Any:
        """Where it lies."""

    def __getitem__(self, key: Any, /) -> Any: ...
    def __setitem__(self, key: Any, value: Any, /) -> None: ...
    def __add__(self, other: Any, /) -> Any: ...
    def __radd__(self, other: Any, /) -> Any: ...
    def __sub__(self, other: Any, /) -> Any: ...
    def __rsub__(self, other: Any, /) -> Any: ...
    def __mul__(self, other: Any, /) -> Any: ...
    def __rmul__(self, other: Any, /) -> Any: ...
    def __truediv__(self, other: Any, /) -> Any: ...
    def __rtruediv__(self, other: Any, /) -> Any: ...
    def __pow__(self, other: Any, /) -> Any: ...
    def __rpow__(self, other: Any, /) -> Any: ...
    def __matmul__(self, other: Any, /) -> Any: ...
    def __and__(self, other: Any, /) -> Any: ...
    def __or__(self, other: Any, /) -> Any: ...
    def __lt__(self, other: Any, /) -> Any: ...
    def __le__(self, other: Any, /) -> Any: ...
    def __gt__(self, other: Any, /) -> Any: ...
    def __ge__(self, other: Any, /) -> Any: ...
    def __neg__(self) -> Any: ...
    def __abs__(self) -> Any: ...
    def __invert__(self) -> Any: ...
    def __float__(self) -> float: ...
    def __bool__(self) -> bool: ...


PIECE = 8192
"""Elements of a dot product for which BLAS does not start threads."""


def array_module(x: Array) -> Any:
    """Return the module whose functions work on `x`.

    Examples
    --------
    >>> array_module(np.ones(3)) is np
    True
    """
    if type(x) is np.ndarray or (isinstance(x, (np.ndarray, np.generic)) and not is_masked(x)):
        return np
    cupy: Any = sys.modules.get("cupy")
    if cupy is not None and isinstance(x, cupy.ndarray):
        return cupy
    if hasattr(x, "__array_namespace__") and not is_masked(x):
        return x.__array_namespace__()
    raise TypeError(
        f"npnorm works on arrays of NumPy, CuPy or the array API standard; got {with_article(x)}. "
        f"{turn_into_array('x', x)}"
    )


def is_masked(x: Any) -> bool:
    """Return whether `x` is a masked array of NumPy, which cannot exist unless numpy.ma is already loaded."""
    ma: Any = sys.modules.get("numpy.ma")
    return ma is not None and isinstance(x, ma.MaskedArray)


def turn_into_array(name: str, x: Any) -> str:
    """Return what to do about a value, called `name`, that is not an array, for a message."""
    if is_masked(x):
        return f"Its mask would be ignored. Replace what is masked first, for example by {name}.filled(0)."
    is_torch = type(x).__module__.partition(".")[0] == "torch" and hasattr(x, "numpy")
    return (
        f"Turn it into an array first, for example by {f'{name}.numpy(force=True)' if is_torch else 'numpy.asarray'}."
    )


def with_article(value: Any) -> str:
    """Return the name of the type of `value` with its article, for a message.

    Examples
    --------
    >>> with_article(3), with_article([3])
    ('an int', 'a list')
    """
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIO' else 'a'} {name}"


def is_cuda(xp: Any) -> bool:
    """Return whether the module compiles CUDA, and launches it on its arrays: CuPy, unless it is built for ROCm."""
    return xp.__name__ == "cupy" and not xp.cuda.runtime.is_hip


def to_numpy(x: Any) -> np.ndarray:
    """Return the values of `x` as a NumPy array, from whatever device they are on."""
    xp = array_module(x)
    if xp is np:
        return np.asarray(x)
    if xp.__name__ == "cupy":
        return xp.asnumpy(x)  # waits for the device's stream
    return np.from_dlpack(x)


def from_numpy(values: np.ndarray, like: Array) -> Any:
    """Return the NumPy array `values` as an array of the module, and on the device, of `like`."""
    xp = array_module(like)
    if xp is np:
        return values
    if xp.__name__ == "cupy":
        with like.device:
            return xp.asarray(values)
    return xp.asarray(values, device=like.device)


def empty_on(device: str) -> Any:
    """Return an array without elements on "cpu" or "gpu", for `from_numpy` to follow.

    Raises
    ------
    ImportError, OSError
        If there is no CuPy, or no GPU.
    """
    if device == "cpu":
        return np.zeros(0)
    try:
        cupy = importlib.import_module("cupy")
    except ImportError as problem:
        raise ImportError(f"there is no CuPy ({problem}). Install it: pip install 'npnorm[gpu]'.") from None
    if not cupy.cuda.is_available():
        raise OSError("CuPy finds no GPU.")
    return cupy.zeros(0)


def contiguous(x: Array, dtype: Any = None) -> Any:
    """Return `x` in C order and aligned, so that a sum over its last axis adds in the same order for any layout."""
    xp = array_module(x)
    if xp is np:
        return np.require(np.asarray(x), dtype, ["C_CONTIGUOUS", "ALIGNED"])  # of a subclass the plain array
    x = x if dtype is None else _cast(x, dtype)
    return xp.ascontiguousarray(x) if hasattr(xp, "ascontiguousarray") else x


def dtype_name(x: Array) -> str:
    """Return the name of the dtype of `x`, the same in every module.

    Examples
    --------
    >>> dtype_name(np.ones(3, dtype=">f4"))
    'float32'
    """
    return _name(x.dtype) if isinstance(x.dtype, np.dtype) else str(x.dtype).rpartition(".")[2]


@functools.cache
def _name(dtype: np.dtype) -> str:
    return dtype.name  # which takes 1.5 us


def widest(x: Array) -> str:
    """Return the name of the widest dtype of the kind of `x`: float64, or complex128."""
    return "complex128" if dtype_name(x) == "complex128" else "float64"


def describe(x: Array) -> str:
    """Return shape and dtype of `x` for a message.

    Examples
    --------
    >>> describe(np.ones((2, 3)))
    '(2, 3) float64'
    """
    array_module(x)  # raises, if x is not an array
    return f"{tuple(x.shape)} {dtype_name(x)}"


def round_to(x: Any, dtype: Any) -> Any:
    """Return `x` rounded once to `dtype`, to nearest.

    NumPy and CuPy round float64 to bfloat16 by way of float32, which is twice. Rounding to odd on the way (the last bit
    remembers that something was cut off) makes the second rounding the only one that counts.
    """
    xp = array_module(x)
    if xp is np and x.dtype == np.float64 and np.dtype(dtype).name == "bfloat16":
        with np.errstate(all="ignore"):
            single = x.astype(np.float32)
        bits = single.view(np.uint32)  # shares memory with `single`
        bits -= np.abs(single) > np.abs(x)
        bits |= single != x
        return single.astype(dtype)
    with np.errstate(all="ignore"):
        return _cast(x, dtype)


def _cast(x: Array, dtype: Any) -> Any:
    """Return `x` in another dtype; on a GPU by conversions that keep subnormal numbers, and round once."""
    xp = array_module(x)
    if is_cuda(xp):
        target = np.dtype(dtype)
        if (dtype_name(x), target.name) in cuda_casts.CASTS:
            return cuda_casts.cast(xp, x, dtype_name(x), target, target.name)
    return xp.astype(x, dtype, copy=False)


def sqrt(x: Array) -> Any:
    """Return the square root, element by element."""
    return array_module(x).sqrt(x)


def exp(x: Array) -> Any:
    """Return the exponential, element by element."""
    return array_module(x).exp(x)


def log(x: Array) -> Any:
    """Return the natural logarithm, element by element."""
    return array_module(x).log(x)


def tanh(x: Array) -> Any:
    """Return the hyperbolic tangent, element by element."""
    return array_module(x).tanh(x)


def sigmoid(x: Array) -> Any:
    """Return 1 / (1 + exp(-x)), element by element, without overflow."""
    xp = array_module(x)
    e = exp(xp.where(x > 0, -x, x))
    return xp.where(x > 0, 1 / (1 + e), e / (1 + e))


def erf(x: Array) -> Any:
    """Return the error function, element by element; on the host by SciPy, which is loaded here only."""
    xp = array_module(x)
    try:
        from scipy.special import erf as on_host

        if xp.__name__ == "cupy":
            from cupyx.scipy.special import erf as on_device

            return on_device(x)
    except ImportError as problem:
        raise ImportError(
            f"The error function needs SciPy, which could not be loaded ({problem}). Install it: pip install scipy."
        ) from problem
    return from_numpy(on_host(to_numpy(x)), x)


def dot(x: Any, y: Any) -> Any:
    """Return the sum of products over the last axis.

    NumPy hands it to BLAS, in pieces that are too short for its threads; its last bits depend on the CPU.
    """
    xp = array_module(x)
    if xp is not np:
        return xp.sum(x * y, axis=-1)
    if x.shape[-1] <= PIECE:
        return np.vecdot(x, y)
    cuts = range(0, x.shape[-1], PIECE)
    return sum(np.vecdot(x[..., i : i + PIECE], y[..., i : i + PIECE]) for i in cuts)


def largest(x: Any) -> Any:
    """Return the largest magnitude of each row of (rows, ...), of shape (rows, 1, ...).

    Examples
    --------
    >>> largest(np.array([[1.0, -3.0], [0.0, 2.0]]))
    array([[3.],
           [2.]])
    """
    return array_module(x).max(abs(x), axis=tuple(range(1, x.ndim)), keepdims=True)


def transpose(x: Array) -> Any:
    """Return `x` with its last two axes exchanged."""
    return array_module(x).matrix_transpose(x)
