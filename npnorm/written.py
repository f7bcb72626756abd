"""A formula written down for the fast ways, and what a row must keep to, so that they are exact enough."""

from collections.abc import Callable
from typing import Any, NamedTuple

from npnorm.terms import Factor, Tape, Terms

SHORT = 8
"""The fewest features for which the fast way pays: of a shorter row, a mean takes most digits."""

LANE = 16
"""The shortest last axis of channels for which it pays."""

NARROW = ("float16", "bfloat16", "float32")
"""The dtypes whose squares float64 holds, with digits to spare."""


class Limits(NamedTuple):
    """What a row must keep to, so that the fast way is exact enough."""

    mean: float  # the largest mean, in units of the row's spread
    folded: float  # the same where factors fold, and var is mean(x^2) - mean(x)^2
    size: float  # rstd between 2^-size and 2^size
    tiny: float  # the smallest largest |x| of a row that is lost beside eps; 0 is no harm
    square: float  # |dz|^2 between 2^-square and 2^square; 0 is no harm
    left: float  # the least share of |dz|^2 that is left in dx
    weight: float  # the largest |w|


LIMITS = {
    "float32": Limits(4.0, folded=2.0, size=50, tiny=2.0**-100, square=100, left=2.0**-2, weight=2.0**20),
    "float64": Limits(2.0**12, folded=2.0**8, size=450, tiny=0.0, square=900, left=2.0**-20, weight=2.0**300),
}
"""By the working precision."""


def limits_of(kernel: str, compute: str) -> Limits:
    """Return the limits of rows for what axes are called, and a working precision.

    Examples
    --------
    >>> limits_of("Features", "float32").mean, limits_of("Batch", "float32").mean
    (4.0, 2.0)
    """
    limits = LIMITS[compute]
    return limits if kernel == "Features" else limits._replace(mean=limits.folded)


def suits(kernel: str, shape: tuple[int, ...], params: dict[str, Any]) -> bool:
    """Return whether rows of this shape are long enough for the fast ways, and the parameters as long as they.

    Examples
    --------
    >>> suits("Features", (8,), {}), suits("Features", (7,), {}), suits("Batch", (4, 16), {})
    (True, False, True)
    """
    if kernel == "Features":
        return shape[0] >= SHORT and all(a.size == shape[0] for a in params.values())
    return shape[-1] >= LANE


class Recorded(NamedTuple):
    """A formula on a tape, and what it gives."""

    tape: Tape
    params: tuple[str, ...]  # the parameters that it reads
    numbers: tuple[Factor, ...]  # the numbers for each row that it is given: s0, s1, ...
    result: Terms  # y or dx
    statistics: tuple[Factor, ...]  # forward
    grads: dict[str, Any]  # backward: Terms, still to be summed, or a Factor


def record(
    kernel: str,
    formula: Callable[..., Any],
    arrays: tuple[str, ...],
    shape: tuple[int, ...],
    params: tuple[str, ...],
    count: int,
    eps: float,
) -> Recorded:
    """Return the formula as a tape.

    Parameters
    ----------
    kernel : str
        What the axes are called.
    arrays : tuple of str
        "x" forward; "dy", "x" and perhaps "plus" backward.
    shape : tuple of int
        Of a row.
    params : tuple of str
        Some of "weight" and "bias".
    count : int
        How many numbers for each row it is given, after the parameters.
    eps : float

    Raises
    ------
    TypeError, AttributeError
        If the formula has an operation that `npnorm.terms` does not have.
    """
    tape = Tape(shape, folds=kernel != "Features")
    used = tuple(name for name in params if name == "weight" or "dy" not in arrays)
    given = {name: tape.given(name, "row" if kernel == "Batch" else "column") for name in used}
    numbers = tuple(tape.given(f"s{i}", "row") for i in range(count))
    x, w, b = tape.array("x"), given.get("weight"), given.get("bias")
    if "dy" not in arrays:
        y, statistics = formula(x, w, b, *numbers, eps)
        return Recorded(tape, used, numbers, y, statistics, {})
    dx, by_row = formula(tape.array("dy"), x, w, *numbers, eps)
    dx = dx + tape.array("plus") if "plus" in arrays else dx
    return Recorded(tape, used, numbers, dx, (), {name: by_row[name] for name in params})
