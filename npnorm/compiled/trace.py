"""The formula of a page, traced: it is called with symbols, and leaves what is to be computed.

The arrays are `npnorm.engine.terms.Terms`, sums of products, as on NumPy; but the numbers in them, which NumPy computes
at once, are `Number`s here: an operation and its operands. A trace computes nothing, and knows no language.

    Features    a number is for all, for each row, or for each column (w, b)
    Channels    a number is for all, for each row, or for each channel of each row (w, b)
    Batch       a number is for all, or for each row: a row is a channel
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from npnorm.engine.exact import Formula, flatten
from npnorm.engine.layout import Layout
from npnorm.engine.row import Absent
from npnorm.engine.statistics import Mean
from npnorm.engine.terms import BlockRow, NotLinear, Terms

VARIES = ("all", "row", "column", "channel")
"""What numbers vary with; of two operands, the later one counts."""


class Number:
    """A number that is still to be computed: an operation, and its operands.

    Attributes
    ----------
    op : str
        "given", "sum" (over a row), "sum of channel", or arithmetic.
    operands : tuple
        Numbers, Python's or of this class; the name of a given one; the terms of a sum.
    varies : str
        One of `VARIES`.
    """

    __array_ufunc__ = None  # NumPy's arrays leave the operators to this class

    def __init__(self, trace: "Trace", op: str, operands: tuple[Any, ...], varies: str) -> None:
        self.trace, self.op, self.operands, self.varies = trace, op, operands, varies

    def __add__(self, other: Any) -> Any:
        return self._with("add", self, other)

    def __sub__(self, other: Any) -> Any:
        return self._with("subtract", self, other)

    def __mul__(self, other: Any) -> Any:
        return self._with("multiply", self, other)

    def __truediv__(self, other: Any) -> Any:
        return self._with("divide", self, other)

    def __radd__(self, other: Any) -> Any:
        return self._with("add", other, self)

    def __rsub__(self, other: Any) -> Any:
        return self._with("subtract", other, self)

    def __rmul__(self, other: Any) -> Any:
        return self._with("multiply", other, self)

    def __rtruediv__(self, other: Any) -> Any:
        return self._with("divide", other, self)

    def __neg__(self) -> "Number":
        return self.trace.number("negative", self)

    def __abs__(self) -> "Number":
        return self.trace.number("absolute", self)

    def _refuse(self, *_: Any) -> Any:
        raise NotLinear("the formula has an operation on numbers that a trace does not have")

    __pow__ = __rpow__ = __getitem__ = __bool__ = __float__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return Functions()

    def _with(self, op: str, a: Any, b: Any) -> Any:
        other = b if a is self else a
        return NotImplemented if isinstance(other, (Terms, Absent)) else self.trace.number(op, a, b)


class Functions:
    """The functions that a formula calls on numbers; `npnorm.arrays.array_module` finds them."""

    __name__ = "npnorm.compiled.trace"

    def sqrt(self, a: Number) -> Number:
        """Return the square root."""
        return a.trace.number("sqrt", a)

    def minimum(self, a: Number, b: Any) -> Number:
        """Return the smaller one of two numbers."""
        return a.trace.number("minimum", a, b)

    def __getattr__(self, name: str) -> Any:
        raise NotLinear(f"the formula has the function {name} of numbers")


class Symbol:
    """An array of the shape of a block: given, or formed of one and numbers.

    Attributes
    ----------
    name : str
    formed : tuple or None
        A symbol, and the number that is added to it.
    """

    def __init__(self, name: str, formed: tuple["Symbol", Number] | None = None) -> None:
        self.name, self.formed = name, formed


class Trace:
    """What a formula is to compute; to `Terms` and `BlockRow` it is what a block is.

    Parameters
    ----------
    layout : Layout
    shape : tuple of int
        Of a row.
    folds : bool
        As `npnorm.engine.terms.Block` has it.
    """

    def __init__(self, layout: Layout, shape: tuple[int, ...], folds: bool) -> None:
        self.per_channel, self.folds, self.shape = layout.per_channel, folds, (0, *shape)
        self.twice = False  # of rows whose mean is that far from zero, kernels leave the care to others
        self._formed = 0
        self._numbers: dict[tuple[Any, ...], Number] = {}

    def array(self, name: str) -> Terms:
        """Return an array that the formula is given."""
        return self._terms(Symbol(name))

    def given(self, name: str, varies: str) -> Number:
        """Return numbers that the formula is given."""
        return self.number("given", name, varies=varies)

    def number(self, op: str, *operands: Any, varies: str = "") -> Number:
        """Return a number; the same one for the same operation on the same operands."""
        for o in operands:
            if not isinstance(o, (Number, Terms, str, float, int)):
                raise NotLinear(f"the formula has an operation of a number and a {type(o).__name__}")
        key = (op, *(repr(o) if isinstance(o, (str, float, int)) else id(o) for o in operands))
        if key not in self._numbers:
            found = {o.varies for o in operands if isinstance(o, Number)}
            if found >= {"row", "column"}:
                raise NotLinear("the formula has a number for each row and each column")
            self._numbers[key] = Number(self, op, operands, varies or max(found, key=VARIES.index))
        return self._numbers[key]

    # What `Terms` and `BlockRow` ask of a block.

    def is_column(self, a: Any) -> bool:
        """Return whether `a` is one number for each column, which is kept apart from those for rows."""
        if not isinstance(a, (Number, float, int)):
            raise NotLinear(f"the formula has an operation of an array and a {type(a).__name__}")
        return isinstance(a, Number) and a.varies == "column"

    def constant(self, a: Any) -> tuple[Any, ...]:
        """Return numbers as a term."""
        return (None, a, None, None) if self.is_column(a) else (a, None, None, None)

    def sum_of_rows(self, terms: Terms) -> Number:
        """Return the sum of each row."""
        return self.number("sum", terms, varies="row")

    def sum_of_channels(self, terms: Terms) -> Number:
        """Return the sum over the space for each channel of each row."""
        return self.number("sum of channel", terms, varies="channel")

    def form(self, x: Terms, number: Any) -> Terms:
        """Return an array plus numbers as one array."""
        ((_, _, a, _),) = x.terms
        self._formed += 1
        return self._terms(Symbol(f"c{self._formed}", (a, number)))

    def _terms(self, symbol: Symbol) -> Terms:
        return Terms(self, ((None, None, symbol, None),))  # type: ignore[arg-type]


class TracedRow(BlockRow):
    """The rows of a trace: as `npnorm.engine.row.Row`, with symbols."""

    def __init__(self, layout: Layout, trace: Trace) -> None:
        super().__init__(layout, trace.given("eps", "all"), trace)  # type: ignore[arg-type]

    @property
    def n(self) -> float:
        """How many elements each row has."""
        return float(self.size)


class Traced(NamedTuple):
    """A formula that was traced, and what it gives."""

    trace: Trace
    row: TracedRow
    numbers: tuple[Number, ...]  # the numbers for each row that it is given: s0, s1, ...
    result: Terms  # y or dx
    statistics: tuple[Any, ...]  # forward
    grads: dict[str, Any]  # backward, by parameter: terms, still to be summed over the rows, or a number


def trace_forward(
    formula: Formula, layout: Layout, shape: tuple[int, ...], folds: bool, params: tuple[str, ...], constants: int
) -> Traced:
    """Return what the forward formula is to compute.

    Parameters
    ----------
    shape : tuple of int
        Of a row.
    folds : bool
        Whether x - mean(x) is never formed, if the product of a row's and a channel's number is small.
    params : tuple of str
        Those of the formula's parameters that the norm has.
    constants : int
        How many numbers for each row the formula takes last.

    Raises
    ------
    NotLinear
        If the formula has an operation that is no sum of products.
    """
    trace = Trace(layout, shape, folds)
    row = TracedRow(layout, trace)
    numbers = tuple(trace.given(f"s{i}", "row") for i in range(constants))
    given = _params(trace, layout, formula, formula.params, params)
    y, statistics = formula.forward(row, trace.array("x"), *given, *numbers)
    return Traced(trace, row, numbers, y, statistics, {})


def trace_backward(
    formula: Formula,
    layout: Layout,
    shape: tuple[int, ...],
    folds: bool,
    params: tuple[str, ...],
    means: tuple[bool, ...],
    plus: bool,
) -> Traced:
    """Return what the backward formula is to compute; see `trace_forward`.

    Parameters
    ----------
    means : tuple of bool
        For each of the statistics whether it is a `Mean`.
    plus : bool
        Whether an array is added to dx.
    """
    trace = Trace(layout, shape, folds)
    row = TracedRow(layout, trace)
    statistics = tuple(_statistics(trace, means))
    given = _params(trace, layout, formula, formula.read, params)
    dx, *grads = formula.backward(row, trace.array("dy"), trace.array("x"), *given, *statistics)
    dx = dx + trace.array("plus") if plus else dx
    found = {name: a for name, a in zip(formula.params, grads, strict=True) if name in params}
    return Traced(trace, row, flatten(statistics), dx, (), found)


def _params(
    trace: Trace, layout: Layout, formula: Formula, names: tuple[str, ...], params: tuple[str, ...]
) -> list[Any]:
    varies = "column" if not layout.per_channel else "row" if layout.row_is_channel else "channel"
    return [trace.given(name, varies) if name in params else formula.without(name, np) for name in names]


def _statistics(trace: Trace, means: tuple[bool, ...]) -> Iterator[Any]:
    count = 0
    for is_mean in means:
        if is_mean:
            yield Mean(trace.given(f"s{count}", "row"), trace.given(f"s{count + 1}", "row"))
        else:
            yield trace.given(f"s{count}", "row")
        count += 2 if is_mean else 1
