"""A traced formula as C: expressions of numbers, and what is done with each element of a row. No target is named here.

A row is read in passes. What is summed over a row is sorted into levels: a level needs only numbers that the levels
before it gave. Each level is one pass, in which several sums are found; then comes the pass that writes.

    LayerNorm    forward: sum x | sum c^2 | y            backward: sum dz, dz c, dz^2 | dx

A target says how the elements of a row are looped over, and how its sums are brought together: `npnorm.compiled.cuda`.
Arrays that the formula forms, such as c = x - mean, are computed where they are needed, and not stored.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from npnorm.compiled.trace import Number, Symbol, Traced
from npnorm.engine.exact import flatten
from npnorm.engine.guards import Guards
from npnorm.engine.terms import Term, Terms

TYPES = {"float64": "double", "float32": "float", "float16": "unsigned short", "bfloat16": "unsigned short"}
"""How elements are held in C; those of 16 bits as their bits."""

SIGNS = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}

FUNCTIONS = {
    "negative": "-({})",
    "absolute": "fabs{f}({})",
    "sqrt": "sqrt{f}({})",
    "minimum": "fmin{f}({}, {})",
}
"""{f} is f in float32."""


class NotWritten(Exception):
    """The formula was traced, and has something that is not written as C."""


class Kind(NamedTuple):
    """What code is written for."""

    axes: str  # "Features", "Channels" or "Batch"
    shape: tuple[int, ...]  # of a row
    dtype: str  # of the elements of x, dy and y
    work: str  # the working precision
    folds: bool  # whether x - mean(x) is never formed
    arrays: tuple[str, ...]  # "x"; or "dy", "x", and perhaps "plus"
    params: tuple[str, ...]  # those that are read
    width: int = 1  # how many neighbours are read at once

    @property
    def precise(self) -> str:
        """The precision of numbers: where they fold, mean(x^2) - mean(x)^2 takes digits."""
        return self.work if self.axes == "Features" else "float64"


class Total(NamedTuple):
    """What is summed over a row: a product of numbers that vary along the row, and of arrays."""

    numbers: tuple[Number, ...]
    arrays: tuple[Symbol, ...]


class Pass:
    """A pass over a row, as lines.

    Attributes
    ----------
    arrays, params : dict
        The names of what is read.
    outer : list of str
        What is computed once for several elements: for each channel.
    inner : list of str
        What is computed for each element.
    """

    def __init__(self, writer: "Writer") -> None:
        self.writer = writer
        self.arrays: dict[str, None] = {}
        self.params: dict[str, None] = {}
        self.outer: list[str] = []
        self.inner: list[str] = []
        self.names: dict[Any, str] = {}

    def value(self, number: Any) -> str:
        """Write a number; return its name."""
        if not _varies_along_row(number):
            return self.writer.value(number)
        if number not in self.names:
            self.names[number] = self._value(number)
        return self.names[number]

    def _value(self, number: Number) -> str:
        if number.op == "given":
            self.params[number.operands[0]] = None
            return f"{number.operands[0]}_"
        if number.op == "sum of channel":
            return self.sum_of_channel(number)
        expression = self.writer.expression(number.op, [self.value(o) for o in number.operands])
        name = f"f{len(self.names)}"
        lines = self.inner if self.writer.kind.axes == "Features" else self.outer
        lines.append(f"const number {name} = {expression};")
        return name

    def sum_of_channel(self, number: Number) -> str:
        """Write a sum over a channel, which is known only after the pass that sums."""
        raise NotWritten("a sum over a channel within a row")

    def factor(self, number: Any) -> str:
        """Write a factor of an element; return it in working precision."""
        kind = self.writer.kind
        if not isinstance(number, Number):
            return literal(number, kind.work)
        return self.value(number) if kind.precise == kind.work else f"(work){self.value(number)}"

    def array(self, symbol: Symbol) -> str:
        """Write an element of an array; return its name."""
        name = f"{symbol.name}_"
        if symbol.formed is None:
            self.arrays[symbol.name] = None
        elif symbol not in self.names:
            a, number = symbol.formed
            self.inner.append(f"const work {name} = {self.array(a)} + {self.factor(number)};")
            self.names[symbol] = name
        return name

    def product(self, factors: Iterable[str]) -> str:
        """Return a product."""
        return " * ".join(factors) or literal(1, self.writer.kind.work)

    def total(self, total: Total) -> str:
        """Return what is summed for one element."""
        return self.product((*map(self.array, total.arrays), *map(self.factor, total.numbers)))

    def terms(self, terms: Terms) -> str:
        """Return a sum of products: arrays first, numbers last.

        Forward an array takes the row's factor before the column's: x rstd is in range where x w need not be. Backward
        dy w comes first.
        """
        found = []
        for term in sorted(terms.terms, key=lambda term: term[2] is None):
            row, column = term[:2]
            numbers = (column, row) if self.writer.column_first else (row, column)
            factors = [self.factor(number) for number in numbers if number is not None]
            found.append(self.product((*map(self.array, arrays_of(term)), *factors)))
        return " + ".join(found)


class Writer:
    """Writes the evaluation of one row, each number once. A target has the loops, and brings sums together.

    Attributes
    ----------
    lines : list of str
    values : dict
        The numbers of the row that are written, and their names.
    totals : dict
        The sums that are known, and their names.
    channels : dict
        Which arrays' products are summed over each channel, and the number of the sum.
    """

    def __init__(self, traced: Traced, kind: Kind, column_first: bool) -> None:
        self.traced, self.kind, self.column_first = traced, kind, column_first
        self.guards = Guards(kind.work, "folded" if kind.folds else "once", 1.0)  # eps is an argument of the code
        self.lines: list[str] = []
        self.values: dict[Number, str] = {}
        self.totals: dict[Total, str] = {}
        self.channels: dict[tuple[Symbol, ...], int] = {}
        self._fars: list[Number] = []
        self._squares: list[Number] = []

    def loop(self, walk: Pass, body: list[str], out: str = "") -> None:
        """Write a loop over the elements of a row, in which `body` comes last; `out` is what an element becomes."""
        raise NotImplementedError

    def loop_over_channels(self, walk: Pass, body: list[str], sums: list[int]) -> None:
        """Write the same channel by channel; what `body` adds to c0, c1, ... is kept for each of them."""
        raise NotImplementedError

    def join(self, names: list[str], level: int) -> None:
        """Write how the sums `a{name}` that a loop found become the numbers `name`."""
        raise NotImplementedError

    def join_any(self, names: list[str]) -> None:
        """Write how flags that a loop found for some elements become those of the row."""
        raise NotImplementedError

    # The numbers of a row.

    def value(self, number: Any) -> str:
        """Write a number of the row; return its name."""
        if not isinstance(number, Number):
            return literal(number, self.kind.precise)
        if number.op == "given":
            return f"{number.operands[0]}_"
        if number not in self.values:
            expression = self._sum(number) if number.op == "sum" else None
            expression = expression or self.expression(number.op, [self.value(o) for o in number.operands])
            self.values[number] = name = f"v{len(self.values)}"
            self.lines.append(f"const number {name} = {expression};")
        return self.values[number]

    def expression(self, op: str, operands: list[str]) -> str:
        """Return an operation on numbers as C has it."""
        if op in SIGNS:
            return f"({operands[0]} {SIGNS[op]} {operands[1]})"
        if op not in FUNCTIONS:
            raise NotWritten(f"the operation {op}")
        return FUNCTIONS[op].format(*operands, f="f" if self.kind.precise == "float32" else "")

    def _sum(self, number: Number) -> str:
        found = []
        for term in number.operands[0].terms:
            numbers, total = split(term)
            found.append(" * ".join((self._total(total), *map(self.value, numbers))))
        return " + ".join(found)

    def _total(self, total: Total) -> str:
        if total == Total((), ()):
            return literal(math.prod(self.kind.shape), self.kind.precise)
        if total not in self.totals:
            raise NotWritten("a sum over a row where it is not known")
        return self.totals[total]

    # Passes over the row.

    def sum(self, results: Iterable[Any]) -> None:
        """Write the passes that give all sums that the results need, level by level."""
        levels: dict[int, tuple[dict[Total, None], dict[tuple[Symbol, ...], None]]] = {}
        for number in numbers_in(results):
            for term in number.operands[0].terms if number.op in ("sum", "sum of channel") else ():
                total = split(term)[1] if number.op == "sum" else Total((), arrays_of(term))
                if total != Total((), ()):
                    totals, channels = levels.setdefault(_level_of(total), ({}, {}))
                    if number.op == "sum":
                        totals[total] = None
                    else:
                        channels[total.arrays] = None
        for level, (totals, channels) in sorted(levels.items()):
            self._sum_level(level, totals, channels)

    def _sum_level(self, level: int, totals: Iterable[Total], channels: Iterable[tuple[Symbol, ...]]) -> None:
        walk, body, names, of_channels = Pass(self), [], [], []
        for total in totals:
            names.append(f"n{len(self.totals)}")
            self.totals[total] = names[-1]
            body.append(f"a{names[-1]} += {walk.total(total)};")
        for arrays in channels:
            of_channels.append(len(self.channels))
            self.channels[arrays] = of_channels[-1]
            body.append(f"c{of_channels[-1]} += {walk.product(map(walk.array, arrays))};")
        self.lines += [f"work a{name} = 0;" for name in names]
        if of_channels:
            self.loop_over_channels(walk, body, of_channels)
        else:
            self.loop(walk, body)
        self.join(names, level)

    def write(self, result: Terms) -> None:
        """Write the pass that writes y or dx."""
        walk = Pass(self)
        self.loop(walk, [], walk.terms(result))

    # Which rows lost digits: the predicate of `npnorm.engine.guards`.

    def guarded(self) -> list[Number]:
        """Return the numbers that the guards look at."""
        row, trace = self.traced.row, self.traced.trace
        self._fars = [self.guards.far_of_saved(mean, self.rstd, row.eps) for mean in row.means]
        if row.centred is not None:
            self._fars = [self.guards.far(row.centred.mean.high, row.centred.var)]
        if row.cancelling is not None:
            self._squares = [trace.sum_of_rows(row.cancelling.dz * row.cancelling.dz), row.cancelling.left]
        return [*self._fars, *self._squares]

    @property
    def rstd(self) -> Any:
        """The reciprocal of the spread."""
        numbers = flatten(self.traced.statistics) or self.traced.numbers
        return numbers[-1]

    def test_forward(self) -> None:
        """Write the test of mean and spread."""
        guards = self.guards
        self._test_range()
        centred = self.traced.row.centred
        if centred is not None:
            constant = f" || {self.value(centred.var)} == 0" if guards.constant else ""
            self._test(f"{self.value(self._fars[0])} <= 0{constant}")

    def test_backward(self) -> None:
        """Write the test of mean and spread, and of |dz|^2: in range and not nearly cancelled, or 0."""
        guards = self.guards
        self._test_range()
        for i, (far, mean) in enumerate(zip(self._fars, self.traced.row.means, strict=True)):
            self.lines.append(f"int far{i} = !({self.value(far)} <= 0);")
            if guards.constant:
                walk = Pass(self)
                differs = {"differs": f"{walk.array(Symbol('x'))} != {self.value(mean)}"}
                self.branch(f"far{i}", walk, differs, f"far{i} = differs;")
            self.lines.append(f"bad |= far{i};")
        if not self._squares:
            return
        square, left = map(self.value, self._squares)
        low, high = map(self._number, guards.square)
        least = self.value(guards.least_left(self.traced.row.means, self.rstd))
        walk = Pass(self)
        self.lines.append("int zero = 0;")
        self.branch(f"{square} == 0", walk, {"some": f"nonzero({walk.array(Symbol('dy'))})"}, "zero = !some;")
        kept = f"{square} > {low} && {square} < {high} && {square} + {left} > {least} * {square}"
        self._test(f"zero || ({kept})")

    def _test_range(self) -> None:
        """Write the test of rstd, and of numbers that are subnormal beside eps."""
        guards, rstd = self.guards, self.value(self.rstd)
        self._test(f"{rstd} > {self._number(guards.low)} && {rstd} < {self._number(guards.high)}")
        if guards.limits.tiny:
            walk = Pass(self)
            x = walk.array(Symbol("x"))
            tiny = f"{self.expression('absolute', [x])} > {self._number(guards.limits.tiny)}"
            found = {"some": f"nonzero({x})", "large": tiny}
            self.branch(f"{rstd} >= (number)beside_eps", walk, found, "bad |= some && !large;")

    def _test(self, condition: str) -> None:
        self.lines.append(f"bad |= !({condition});")

    def _number(self, number: float) -> str:
        return literal(number, self.kind.precise)

    def branch(self, condition: str, walk: Pass, found: dict[str, str], then: str) -> None:
        """Write a pass that few rows need: whether some element has a property."""
        before, self.lines = self.lines, [f"int {name} = 0;" for name in found]
        self.loop(walk, [f"{name} |= {test};" for name, test in found.items()])
        self.join_any(list(found))
        self.lines = [*before, *block(f"if ({condition})", [*self.lines, then])]


def literal(number: float, dtype: str) -> str:
    """Return a number as C has it.

    Examples
    --------
    >>> literal(0.5, "float64"), literal(-1, "float32")
    ('0.5', '-1.0f')
    """
    with np.errstate(over="ignore"):
        value = float(np.dtype(dtype).type(number))
    if not math.isfinite(value):
        raise NotWritten(f"the number {number} in {dtype}")
    return f"{value!r}f" if dtype == "float32" else repr(value)


def block(head: str, lines: list[str]) -> list[str]:
    """Return lines in braces.

    Examples
    --------
    >>> block("if (a)", ["b = 0;"])
    ['if (a) {', '    b = 0;', '}']
    """
    return [f"{head} {{", *(f"    {line}" for line in lines), "}"]


def arrays_of(term: Term) -> tuple[Symbol, ...]:
    """Return the arrays of a product, by name."""
    return tuple(sorted((a for a in term[2:] if a is not None), key=lambda a: a.name))


def split(term: Term) -> tuple[list[Any], Total]:
    """Return a term of a sum over a row as numbers of the row, and what is summed."""
    numbers = [*_factors(term[0]), *_factors(term[1])]
    within = tuple(number for number in numbers if _varies_along_row(number))
    return [number for number in numbers if not _varies_along_row(number)], Total(within, arrays_of(term))


def _factors(number: Any) -> list[Any]:
    """Return the factors of a product of numbers that vary along the row and of others."""
    if number is None:
        return []
    if not _varies_along_row(number) or number.op not in ("multiply", "negative"):
        return [number]
    found = [factor for o in number.operands for factor in _factors(o)]
    return [*found, -1.0] if number.op == "negative" else found


def _varies_along_row(number: Any) -> bool:
    return isinstance(number, Number) and number.varies in ("column", "channel")


def numbers_in(results: Iterable[Any]) -> Iterator[Number]:
    """Yield all numbers that results are made of, each once."""
    seen: set[int] = set()
    waiting = list(results)[::-1]
    while waiting:
        now = waiting.pop()
        if id(now) in seen:
            continue
        seen.add(id(now))
        if isinstance(now, Number):
            yield now
        waiting += _parts(now)[::-1]


def _parts(whole: Any) -> list[Any]:
    """Return what a number, an array or a sum of products is made of."""
    if isinstance(whole, Number):
        return list(whole.operands)
    if isinstance(whole, Symbol):
        return list(whole.formed or ())
    return [part for term in whole.terms for part in term] if isinstance(whole, Terms) else []


def _level_of(total: Total) -> int:
    """Return in which pass a total is summed: after those that give the numbers it is made of."""
    return 1 + max((_level(part) for part in (*total.numbers, *total.arrays)), default=0)


def _level(part: Any) -> int:
    if isinstance(part, Number) and part.op == "sum":
        splits = [split(term) for term in part.operands[0].terms]
        return max(max(_level_of(total), *map(_level, numbers), 0) for numbers, total in splits)
    return max((_level(p) for p in _parts(part)), default=0)
