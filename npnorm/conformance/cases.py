"""The hard cases: rows where norms go wrong, and plain ones.

Each case draws from its own generator, seeded by its place in the list, so that it is the same in every run.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_dtypes  # NumPy knows the name bfloat16 from here on
import numpy as np

Draw = Callable[[np.random.Generator], np.ndarray]


class Case(NamedTuple):
    """Rows to normalize, and the gradient that comes back.

    Parameters
    ----------
    name : str
    seed : int
    x, dy : arrays of shape (rows, n)
        In the dtype under study.
    eps : float
    with_bias : bool
        Only the plain cases have one: elsewhere it would hide the error of a small y.
    """

    name: str
    seed: int
    x: np.ndarray
    dy: np.ndarray
    eps: float
    with_bias: bool


class Sizes(NamedTuple):
    """How many rows of how many elements: `short` rows are those of 1 to 3 elements, `long` ones have a million."""

    rows: int = 16
    n: int = 1024
    wide: int = 8192
    constant: int = 1000
    short: int = 32
    long: int | None = 1_000_000


FULL = Sizes()
QUICK = FULL._replace(long=None)
SMALL = Sizes(rows=8, n=128, wide=256, constant=100, short=8, long=None)

OFFSETS = {"float32": (1e4, 1e7), "float16": (1e3,), "bfloat16": (1e2, 1e4), "float64": (1e4, 1e7, 1e12)}
TINY = {  # the size of x, and that of dy with eps = 0, where dx is about dy / x
    "float32": {1e-20: 1.0, 1e-38: 1e-8, 1e-43: 1e-13},
    "float16": {1e-3: 1.0, 2e-6: 2e-3},
    "bfloat16": {1e-20: 1.0, 1e-38: 1e-8},
    "float64": {1e-160: 1.0, 1e-307: 1e-7, 1e-320: 1e-20},
}
HUGE = {"float32": (1e19, 1e30), "float16": (300.0, 5000.0), "bfloat16": (1e19, 1e30), "float64": (1e154, 1e200, 1e306)}
OUTLIER = {"float32": 1e6, "float16": 3e4, "bfloat16": 1e6, "float64": 1e10}
GIANT = {"float32": 1e30, "bfloat16": 1e30, "float64": 1e200}
CONSTANTS = {
    "float32": (0, 1, 0.1, 1e7 / 3, 1e-20, 1e30, 1e4 / 3, 2.0**24 - 3),
    "float16": (0, 1, 0.1, 1e4 / 3, 1e-6, 6e4, 1e3 / 3, 2.0**11 - 1),
    "bfloat16": (0, 1, 0.1, 1e7 / 3, 1e-20, 1e30, 1e4 / 3, 2.0**8 - 1),
    "float64": (0, 1, 0.1, 1e15 / 3, 1e-200, 1e200, 1e4 / 3, 2.0**53 - 3),
}
NUDGED = (1, 2, 3, 6)  # the constants of which one element is moved by an ulp


def cases(dtype: str, sizes: Sizes = FULL) -> list[Case]:
    """Return the cases of a dtype: 25 of float32, 21 of float16, 23 of bfloat16, 27 of float64.

    Examples
    --------
    >>> [case.name for case in cases("float16", QUICK)][2:6]
    ['mean 1e3', 'tiny, 1e-3', 'tiny, 1e-3, eps = 0', 'tiny, 2e-6']
    """
    return [_case(seed, np.dtype(dtype), *recipe) for seed, recipe in enumerate(_recipes(dtype, sizes))]


def _case(seed: int, dtype: np.dtype, name: str, draw: Draw, eps: float = 1e-5, dy_size: float = 1.0) -> Case:
    rng = np.random.default_rng(seed)
    x = draw(rng).astype(dtype)
    dy = (rng.standard_normal(x.shape) * dy_size).astype(dtype)
    return Case(name, seed, x, dy, eps, with_bias="normal" in name)


def _recipes(dtype: str, sizes: Sizes) -> Iterator[tuple]:
    """Yield each case's name, how its x is drawn, and eps and the size of dy where they are not 1e-5 and 1."""
    info, shape = ml_dtypes.finfo(dtype), (sizes.rows, sizes.n)
    largest, larger_dy = 0.99 * float(info.max), 1e2 if dtype == "float16" else 1e3
    yield f"normal, n = {sizes.n}", normal((2 * sizes.rows, sizes.n))
    yield f"normal, n = {sizes.wide}", normal((sizes.rows // 2, sizes.wide))
    for mean in OFFSETS[dtype]:
        yield f"mean {_short(mean)}", normal(shape, size=4.0 if info.nmant <= 10 else 1.0, mean=mean)
    for size, dy_size in TINY[dtype].items():
        yield f"tiny, {_short(size)}", normal(shape, size)
        yield f"tiny, {_short(size)}, eps = 0", normal(shape, size), 0.0, dy_size
    for size in HUGE[dtype]:
        yield f"huge, {_short(size)}", normal(shape, size)
    yield "up to the largest", uniform(shape, -largest, largest), 1e-5, larger_dy
    yield "near the largest", uniform(shape, largest / 2, largest), 1e-5, larger_dy
    yield "one outlier", outlier(shape, OUTLIER[dtype])
    if dtype in GIANT:
        yield "one giant outlier", outlier(shape, GIANT[dtype])
    yield "of every size", of_every_size(shape, max(info.minexp, -1000), info.maxexp - 1)
    constants = np.repeat(np.array(CONSTANTS[dtype])[:, None], sizes.constant, axis=1)
    yield "constant", lambda _: constants
    yield "constant + 1 ulp", nudged(constants[NUDGED, :], np.dtype(dtype))
    yield "constant + 1 ulp, eps = 0", nudged(constants[NUDGED, :], np.dtype(dtype)), 0.0, 1e-3
    yield "n = 1", normal((sizes.short, 1), size=3.0)
    yield "n = 2", normal((sizes.short, 2))
    yield "n = 3", normal((sizes.short, 3))
    if sizes.long:
        yield f"normal, n = {_short(sizes.long)}", normal((2, sizes.long))
        yield f"mean 100, n = {_short(sizes.long)}", normal((2, sizes.long), mean=100.0)


def normal(shape: tuple, size: float = 1.0, mean: float = 0.0) -> Draw:
    """Draw normal numbers."""
    return lambda rng: mean + size * rng.standard_normal(shape)


def uniform(shape: tuple, low: float, high: float) -> Draw:
    """Draw uniform numbers; the interval may be wider than the range of float64."""
    return lambda rng: rng.uniform(low / 2, high / 2, shape) * 2


def outlier(shape: tuple, value: float) -> Draw:
    """Draw normal numbers, and set one of each row to `value`."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        x = rng.standard_normal(shape)
        x[np.arange(shape[0]), rng.integers(0, shape[1], shape[0])] = value
        return x

    return draw


def of_every_size(shape: tuple, low: int, high: int) -> Draw:
    """Draw numbers of either sign whose logarithms are uniform between those of 2^low and 2^high."""
    return lambda rng: np.exp2(rng.uniform(low, high, shape)) * rng.choice([-1, 1], shape)


def nudged(constants: np.ndarray, dtype: np.dtype) -> Draw:
    """Move one element of each constant row to the next larger number."""

    def draw(rng: np.random.Generator) -> np.ndarray:
        x = constants.astype(dtype)
        one = np.arange(len(x)), rng.integers(0, x.shape[1], len(x))
        x[one] = np.nextafter(x[one], dtype.type(np.inf))
        return x

    return draw


def _short(number: float) -> str:
    digits, exponent = f"{number:.0e}".split("e")
    return f"{digits}e{int(exponent)}"
