"""A tape as NumPy calls: the source of a function over one block of rows, each array written in place.

The levers, each measured on blocks that stay in cache (float32, microseconds for 256 KiB, one core of a Zen 4):

    vecdot          a sum of squares or products without the product in memory: 4, where multiply and add.reduce take 18
                    a sum is a product with ones: 4, where add.reduce takes 12
    einsum          a sum over columns, 'i,ij->j': 8, where add.reduce takes 8 to 10; a single product takes 4, but BLAS
                    would start threads, which fight with ours
    in place        y *= r: 5 to 7, where z = y * r takes 8 to 10: no other memory is touched
    scratch         memory that a thread keeps: new memory costs a page fault for each 4 KiB
    ufunc buffer    of the length of a row, see `npnorm.careful`: halves y * r and y * w
    folding         where w is a number for each channel, z w + b is x A + B: two passes. The few numbers A and B are
                    kept in float64, since mean(x^2) - mean(x)^2 takes digits

Sums run over pieces of at most 8192 elements, for which BLAS starts no threads. They depend on the row alone, so that a
row has the same bits wherever it stands and whatever thread computes it.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import PIECE, round_to
from npnorm.terms import Factor, Tape, Term, Terms
from npnorm.threads import _kept

STRIP = 128
"""Rows, at most, that are added in working precision; the sums of strips are added in float64."""


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the sum of products over a long last axis, piece by piece; the pieces are added in float64."""
    cuts = range(0, a.shape[-1], PIECE)
    total = sum(np.vecdot(a[..., i : i + PIECE], b[..., i : i + PIECE]).astype(np.float64) for i in cuts)
    return total.astype(a.dtype)


def columns(a: np.ndarray, row: np.ndarray | None = None) -> np.ndarray:
    """Return the sum over the rows of a block, each times its number, strip by strip.

    Strips of short rows are products with BLAS, which starts no threads for 8192 elements, in half the time.
    """
    row = np.ones(len(a), a.dtype) if row is None else row
    by_blas = a.shape[1] <= PIECE // 64
    strip = min(STRIP, PIECE // a.shape[1]) if by_blas else STRIP
    if len(a) <= strip:
        return np.einsum("i,ij->j", row, a)
    whole = len(a) // strip * strip
    strips, numbers = a[:whole].reshape(-1, strip, a.shape[1]), row[:whole].reshape(-1, strip)
    sums = np.matmul(numbers[:, None, :], strips)[:, 0] if by_blas else np.einsum("si,sij->sj", numbers, strips)
    total = np.add.reduce(sums, axis=0, dtype=np.float64)
    return total if whole == len(a) else total + np.einsum("i,ij->j", row[whole:], a[whole:])


NAMES: dict[str, Any] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "negative": np.negative,
    "absolute": np.absolute,
    "sqrt": np.sqrt,
    "zeros_like": np.zeros_like,
    "copyto": np.copyto,
    "vecdot": np.vecdot,
    "reduce": np.add.reduce,
    "dot": dot,
    "columns": columns,
    "float64": lambda a: a.astype(np.float64, copy=False),
    "float32": lambda a: a.astype(np.float32),
    "to_float32": lambda a: a.astype(np.float32).astype(a.dtype),
    "scratch": _kept,
    "round_to": round_to,
}
"""What the source of a kernel calls."""


class Sums(NamedTuple):
    """How sums over rows, and numbers for each row, are written for one kind of axes."""

    spread: str  # brings numbers to an array of the block
    row: str  # brings the sums over the last axis to numbers for each row


SUMS = {
    "Features": Sums("{}[:, None]", "{}"),
    "Channels": Sums("{}[..., None]", "reduce({}, axis=1, keepdims=True)"),
    "Batch": Sums("{}[:, None, None]", "reduce({}, axis=1)"),
}


class Kind(NamedTuple):
    """What a kernel is written for."""

    axes: str  # "Features", "Channels" or "Batch"
    arrays: tuple[str, ...]  # the names of the arrays that it reads
    numbers: tuple[str, ...]  # and of the numbers for each row or column
    work: str  # the working precision
    casts: bool  # whether the arrays have another


class Kernel(NamedTuple):
    """A function over a block, and its source."""

    run: Callable[..., tuple[Any, ...]]
    once: Callable[..., tuple[Any, ...]]  # the same for a small array: it keeps no memory
    source: str


def forward(tape: Tape, kind: Kind, y: Terms, statistics: tuple[Factor, ...]) -> Kernel:
    """Return `run(*arrays, *numbers, y) -> statistics, means`: it writes y."""
    means = [tape.times(mean, statistics[-1]) for mean in tape.means]
    writer = _Writer(tape, kind, (y, *statistics, *means), column_first=False)
    returned = f"({writer.row(statistics)}), ({writer.row(means)})"
    writer.write(y, "y")
    return writer.kernel("y", returned)


def backward(tape: Tape, kind: Kind, dx: Terms, grads: dict[str, Terms | Factor]) -> Kernel:
    """Return `run(*arrays, *numbers, dx) -> gradients, squares, left`: it writes dx.

    The gradients are the sums over the rows of the block. Of |dz|^2 = squares, squares + left is not cancelled.
    """
    lefts = [left for _, left in tape.cancelling]
    writer = _Writer(tape, kind, (dx, *grads.values(), *lefts), column_first=True)
    sums = [writer.columns(grad) if isinstance(grad, Terms) else writer.value(grad) for grad in grads.values()]
    lost = writer.row(lefts)
    squares: list[str] = []
    by_column = [dz for dz, _ in tape.cancelling if any(term.column for term in dz.terms)]
    if not by_column:
        squares = [writer.value((dz * dz).sum_over_row()) for dz, _ in tape.cancelling]
    writer.write(dx, "dx", squares if by_column else None)
    return writer.kernel("dx", f"({', '.join([*sums, ''])}), ({', '.join([*squares, ''])}), ({lost})")


class _Writer:
    """Writes a tape as lines of Python; each value once.

    Forward an array takes the row's factor before the column's: x rstd is in range where x w need not be. Backward dy w
    comes first, whose square is wanted.
    """

    def __init__(self, tape: Tape, kind: Kind, results: tuple[Any, ...], column_first: bool) -> None:
        self.tape, self.kind, self.results, self.column_first = tape, kind, results, column_first
        self.sums = SUMS[kind.axes]
        self.narrow = tape.folds and kind.work == "float32"
        self.vecdot = "vecdot" if tape.shape[-1] <= PIECE else "dot"
        self.lines: list[str] = []
        self.numbers: dict[str, np.ndarray] = {}
        self.values: dict[Any, str] = {}
        self.arrays = {name: name for name in kind.arrays}
        self.owned: set[str] = set()  # variables of arrays that may be written to
        for name in kind.arrays if kind.casts else ():
            self.arrays[name] = self._buffer(f"{name}_")
            self.lines.append(f"copyto({name}_, {name})")

    def kernel(self, out: str, returned: str) -> Kernel:
        """Return the function of what was written."""
        lines = [*self.lines, f"return {returned}"]
        parameters = ", ".join((*self.kind.arrays, *self.kind.numbers, out))
        numbers = "".join(f"# {name} = {float(value)!r}\n" for name, value in self.numbers.items())
        source = numbers + "\n    ".join((f"def run({parameters}):", *lines)) + "\n"
        names = NAMES | self.numbers | {"ones": np.ones(self.tape.shape[-1], self.kind.work)}
        code = compile(source, "<npnorm.kernels>", "exec")
        exec(code, in_blocks := dict(names))
        exec(code, at_once := names | {"scratch": lambda _, shape, dtype: np.empty(shape, dtype)})
        return Kernel(in_blocks["run"], at_once["run"], source)

    def write(self, terms: Terms, out: str, squares: list[str] | None = None) -> None:
        """Write the result."""
        leading = self._leading(terms)
        variable = self._array(leading.base[0])
        into = variable if variable in self.owned else out
        self._form(terms, into, leading, squares)
        if self.kind.casts:
            exact = f"round_to({into}, {out}.dtype)" if self.kind.work == "float64" else into
            self.lines.append(f"copyto({out}, {exact}, casting='unsafe')")

    def row(self, factors: Iterable[Factor | None]) -> str:
        """Write factors; return their variables as the inside of a tuple."""
        return "".join(f"{self.value(factor)}, " for factor in factors)

    def columns(self, terms: Terms) -> str:
        """Write the sum over the rows of a block, for each feature; where factors fold, over the last axis."""
        if self.tape.folds:
            return self.value(terms.sum_over_lane())
        found = []
        for term in terms.terms:
            array = self._product(term.base)
            total = f"columns({array})" if term.row is None else f"columns({array}, {self.value(term.row)})"
            found.append(total if term.column is None else f"{total} * {self.value(term.column)}")
        return self._new(" + ".join(found))

    def value(self, factor: Factor | None) -> str:
        """Write a factor; return its variable, or the number."""
        if factor is None:
            return self._number(1.0)
        if factor not in self.values:
            self.values[factor] = self._value(factor)
        return self.values[factor]

    def _value(self, factor: Factor) -> str:
        if factor.op == "given":
            return factor.operands[0]
        if factor.op == "number":
            return self._number(factor.operands[0])
        if factor.op in ("row", "lane"):
            return self._sum(factor.operands[0], factor.op)
        operands = (self.value(o) if isinstance(o, Factor) else self._number(o) for o in factor.operands)
        return self._new(f"{factor.op}({', '.join(operands)})")

    def _number(self, number: float) -> str:
        """Return the variable of a number: as an array without axes, which NumPy takes in half the time."""
        known = (name for name, value in self.numbers.items() if float(value) == float(value.dtype.type(number)))
        name = next(known, f"k{len(self.numbers)}")
        self.numbers[name] = np.array(number, "float64" if self.tape.folds else self.kind.work)
        return name

    def _sum(self, terms: Terms, over: str) -> str:
        """Write the sum of terms over each row, or over the last axis."""
        totals = []
        for term in terms.terms:
            total = self._total(term)
            totals.append(total if term.row is None else self._new(f"multiply({total}, {self.value(term.row)})"))
        total = totals[0]
        for other in totals[1:]:
            total = self._new(f"add({total}, {other})")
        return self._new(self.sums.row.format(total)) if over == "row" and self.kind.axes == "Channels" else total

    def _total(self, term: Term) -> str:
        """Write the sum of column x array over the last axis; of a batch, over the whole row."""
        key = (term.column, term.base)
        if key not in self.values:
            self.values[key] = self._new(self._total_line(*key))
        return self.values[key]

    def _total_line(self, column: Factor | None, base: tuple[str, ...]) -> str:
        if not base:
            return self._number(float(self.tape.shape[-1])) if column is None else f"reduce({self.value(column)})"
        if column is not None:
            return f"{self.vecdot}({self._product(base)}, {self.value(column)})"
        other = "ones" if len(base) == 1 else self._array(base[1])
        order = ", order='C'" if self.kind.axes == "Batch" and self.vecdot == "vecdot" else ""
        total = f"{self.vecdot}({self._array(base[0])}, {other}{order})"
        total = f"float64({total})" if self.tape.folds else total
        return self.sums.row.format(total) if self.kind.axes == "Batch" else total

    def _array(self, name: str) -> str:
        """Return the variable of an array; what the formula formed is written where it is met first."""
        if name not in self.arrays:
            terms = self.tape.arrays[name]
            leading = self._leading(terms)
            variable = self._array(leading.base[0])
            last = self._mentions(leading.base[0], self.results) == self._mentions(leading.base[0], (terms,))
            if variable in self.owned and last:
                into = variable
            elif any(isinstance(r, Terms) and self._leading(r).base == (name,) for r in self.results):
                into = "y"
            else:
                into = self._buffer(f"{name}_")
            self._form(terms, into, leading)
            self.arrays[name] = into
            self.owned.add(into)
        return self.arrays[name]

    def _product(self, base: tuple[str, ...]) -> str:
        """Return the variable of an array, or of the product of two."""
        if len(base) == 1:
            return self._array(base[0])
        if base not in self.values:
            a, b = (self._array(name) for name in base)
            taken = self.kind.casts or "dx" in self.values.values()
            self.values[base] = into = self._buffer(f"{a}{b}_") if taken else "dx"
            self.lines.append(f"multiply({a}, {b}, out={into})")
        return self.values[base]

    def _leading(self, terms: Terms) -> Term:
        """Return the term that is written first: one with a column, which takes the row's factor after it."""
        return max((t for t in terms.terms if t.base), key=lambda t: t.column is not None)

    def _form(self, terms: Terms, out: str, leading: Term, squares: list[str] | None = None) -> None:
        """Write the sum of terms into an array, term by term; note the squares of column x array of the first."""
        for term in terms.terms:  # numbers before arrays, which are written over
            for factor in (term.row, term.column):
                self.value(factor.operands[0] if factor is not None and factor.op == "negative" else factor)
        constants = [f for t in terms.terms if not t.base for f in (t.row, t.column) if f is not None]
        for term in (leading, *(t for t in terms.terms if t is not leading and t.base)):
            array = self._array(term.base[0])
            into = out if term is leading else array if array in self.owned else ""
            factors = (term.column, term.row) if self.column_first else (term.row, term.column)
            for factor in (f for f in factors if f is not None):
                into = into or self._buffer("t_")
                self.lines.append(f"multiply({array}, {self._spread(factor)}, out={into})")
                array = into
                if squares is not None and factor is leading.column:
                    squares.append(self._new(f"{self.vecdot}({into}, {into})"))
            if term is not leading:
                self.lines.append(f"add({out}, {array}, out={out})")
            elif array != out and constants:
                self._add(array, constants.pop(0), out)
            elif array != out:
                self.lines.append(f"copyto({out}, {array})")
        for factor in constants:
            self._add(out, factor, out)

    def _add(self, array: str, factor: Factor, out: str) -> None:
        """Write the sum of an array and numbers."""
        op, number = ("subtract", factor.operands[0]) if factor.op == "negative" else ("add", factor)
        self.lines.append(f"{op}({array}, {self._spread(number)}, out={out})")

    def _spread(self, factor: Factor) -> str:
        """Return a factor so that it meets an array."""
        value = f"float32({self.value(factor)})" if self.narrow else self.value(factor)
        own = factor.kind == "row" or (factor.kind == "column" and self.tape.folds)
        return self.sums.spread.format(value) if own else value

    def _buffer(self, variable: str) -> str:
        if variable not in self.owned:
            self.owned.add(variable)
            self.lines.append(f"{variable} = scratch('{variable}', {self.kind.arrays[0]}.shape, '{self.kind.work}')")
        return variable

    def _new(self, line: str) -> str:
        variable = f"v{len(self.lines)}"
        self.lines.append(f"{variable} = {line}")
        return variable

    def _mentions(self, name: str, results: tuple[Any, ...]) -> set[int]:
        """Return which sums of terms, among those that results need, have the array."""
        found: set[int] = set()
        seen: set[int] = set()
        waiting = list(results)
        while waiting:
            now = waiting.pop()
            if id(now) in seen:
                continue
            seen.add(id(now))
            if isinstance(now, Factor):
                waiting += now.operands
            elif isinstance(now, Terms):
                for term in now.terms:
                    waiting += [term.row, term.column, *(self.tape.arrays.get(n) for n in term.base)]
                    if name in term.base:
                        found.add(id(now))
        return found
