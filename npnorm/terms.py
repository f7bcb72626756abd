"""A formula over rows, written down instead of computed: sums of terms row x column x array.

Every norm that has a mean is linear in its arrays, with one factor for each row (such as rstd) and one for each column
(such as w). `Terms` is such a sum; the page's own formula, called with `Terms` for its arrays and `Factor`s for its
numbers, leaves on a `Tape` what is to be computed:

    rows       sums over each row of  column x array            mean(x), mean(dz z)
    factors    arithmetic on the numbers of rows and columns    rstd = 1 / sqrt(var + eps)
    arrays     sum of  row x column x array                     y, dx
    columns    sums over the rows of  row x array               dw, db

`npnorm.kernels` turns a tape into NumPy calls over a block that stays in cache. Nothing here computes.

    Features        row (rows, 1), column (features,): their product is as large as x, and both are kept apart
    Channels, Batch row (rows, 1, 1), column (rows, channels, 1): their product is small, and is formed first ("folds")
"""

from typing import Any, NamedTuple, Union

Number = Union["Factor", float, int]


class Unwritten(TypeError):
    """The formula has an operation that is no sum of terms; it is computed in another way."""


class Factor:
    """A number for each row, or each column, or one for all, still to be computed: an operation and its operands."""

    def __init__(self, tape: "Tape", op: str, operands: tuple[Any, ...], kind: str) -> None:
        self.tape, self.op, self.operands, self.kind = tape, op, operands, kind

    def __add__(self, other: Any) -> Any:
        return self._with("add", other)

    def __sub__(self, other: Any) -> Any:
        return -other + self if isinstance(other, Terms) else self._with("subtract", other)

    def __mul__(self, other: Any) -> Any:
        return self._with("multiply", other)

    def __truediv__(self, other: Any) -> Any:
        return self._with("divide", other)

    def __radd__(self, other: float) -> "Factor":
        return self.tape.factor("add", other, self)

    def __rsub__(self, other: float) -> "Factor":
        return self.tape.factor("subtract", other, self)

    def __rmul__(self, other: float) -> "Factor":
        return self.tape.factor("multiply", other, self)

    def __rtruediv__(self, other: float) -> "Factor":
        return self.tape.factor("divide", other, self)

    def __neg__(self) -> "Factor":
        return self.tape.factor("negative", self)

    def __abs__(self) -> "Factor":
        return self.tape.factor("absolute", self)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return Functions

    def to_float32(self) -> "Factor":
        """Return the factor rounded to float32."""
        return self.tape.factor("to_float32", self)

    def _with(self, op: str, other: Any) -> Any:
        if isinstance(other, Terms):
            return NotImplemented
        return self.tape.factor(op, self, other)


class Functions:
    """The functions that a formula calls on what is written down; `npnorm.arrays.array_module` finds them."""

    __name__ = "npnorm.terms"

    @staticmethod
    def sqrt(a: Factor) -> Factor:
        """Return the square root."""
        return a.tape.factor("sqrt", a)

    @staticmethod
    def zeros_like(a: Factor) -> Factor:
        """Return zeros."""
        return a.tape.factor("zeros_like", a)


class Term(NamedTuple):
    """row x column x base; a factor that is not there is 1."""

    row: Factor | None
    column: Factor | None
    base: tuple[str, ...]  # names of arrays: none (the constant 1), one, or two that are multiplied


class Terms:
    """A sum of terms; of the shape of a block of rows."""

    def __init__(self, tape: "Tape", terms: tuple[Term, ...]) -> None:
        self.tape, self.terms = tape, terms

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a block: the number of its rows is not known, and 0."""
        return (0, *self.tape.shape)

    @property
    def ndim(self) -> int:
        """The axes of a block."""
        return len(self.shape)

    def __add__(self, other: Any) -> "Terms":
        if not isinstance(other, Terms):
            other = Terms(self.tape, (Term(None, None, ()),)) * other
        terms = list(self.terms)
        for term in other.terms:
            same = [i for i, t in enumerate(terms) if t.base == term.base and t.column is term.column]
            if same:
                row = self.tape.plus(terms[same[0]].row, term.row)
                terms[same[0]] = Term(row, term.column, term.base)
            else:
                terms.append(term)
        return Terms(self.tape, tuple(terms))

    __radd__ = __add__

    def __neg__(self) -> "Terms":
        return self * -1.0

    def __sub__(self, other: Any) -> "Terms":
        return self + (-other)

    def __rsub__(self, other: Any) -> "Terms":
        return -self + other

    def __mul__(self, other: Any) -> "Terms":
        if isinstance(other, Terms):
            return Terms(self.tape, tuple(self.tape.product(a, b) for a in self.terms for b in other.terms))
        return Terms(self.tape, tuple(self.tape.scaled(term, other) for term in self.terms))

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Terms":
        return self * (1 / other)

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return Functions

    def sum_over_row(self) -> Factor:
        """Return the sum over each row."""
        return self.tape.factor("row", self, kind="row")

    def sum_over_lane(self) -> Factor:
        """Return the sum over the last axis: for each channel of each row."""
        return self.tape.factor("lane", self, kind="column")

    def less(self, whole: "Terms") -> "Terms":
        """Return these terms without those of `whole`."""
        return Terms(self.tape, tuple(term for term in self.terms if term not in whole.terms))

    def formed(self) -> "Terms":
        """Return these terms as one array: computed once, and exact where its parts would cancel."""
        return self.tape.formed(self)


class Tape:
    """What a formula is to compute.

    Parameters
    ----------
    shape : tuple of int
        Of a row.
    folds : bool
        Whether the product of a row's factor and a column's is small beside the row.
    """

    def __init__(self, shape: tuple[int, ...], folds: bool) -> None:
        self.shape, self.folds = shape, folds
        self.arrays: dict[str, Terms] = {}  # formed, in their order
        self.means: list[Factor] = []  # whose size, in units of the row's spread, says how much cancels
        self.cancelling: list[tuple[Terms, Factor]] = []  # dz, and what a gradient takes away from its square
        self._factors: dict[tuple[Any, ...], Factor] = {}

    def array(self, name: str) -> Terms:
        """Return an array that the formula is given."""
        return Terms(self, (Term(None, None, (name,)),))

    def given(self, name: str, kind: str) -> Factor:
        """Return numbers that the formula is given; kind: "row" or "column"."""
        return self.factor("given", name, kind=kind)

    def factor(self, op: str, *operands: Any, kind: str | None = None) -> Factor:
        """Return a factor; the same one for the same operation on the same operands."""
        key = (op, *(o if isinstance(o, (str, float, int)) else id(o) for o in operands))
        if key not in self._factors:
            kinds = {o.kind for o in operands if isinstance(o, Factor)}
            if kind is None and kinds >= {"row", "column"} and not self.folds:
                raise Unwritten("the sum of a number for each row and one for each column")
            kind = kind or ("column" if "column" in kinds else "row" if kinds else "all")
            self._factors[key] = Factor(self, op, operands, kind)
        return self._factors[key]

    def times(self, a: Factor | None, b: Factor | None) -> Factor | None:
        """Return a b, where None is 1."""
        return a if b is None else b if a is None else self.factor("multiply", a, b)

    def plus(self, a: Factor | None, b: Factor | None) -> Factor:
        """Return a + b, where None is 1."""
        return self.factor("add", 1.0 if a is None else a, 1.0 if b is None else b)

    def scaled(self, term: Term, other: Number) -> Term:
        """Return a term times a factor or a number."""
        if not isinstance(other, (Factor, float, int)):
            raise Unwritten(f"a product with a {type(other).__name__}")
        if not isinstance(other, Factor):
            other = self.factor("number", float(other))
        if other.kind == "column" and not self.folds:
            return term._replace(column=self.times(term.column, other))
        return term._replace(row=self.times(term.row, other))

    def product(self, a: Term, b: Term) -> Term:
        """Return the product of two terms."""
        if len(a.base) + len(b.base) > 2:
            raise Unwritten("a product of three arrays")
        base = tuple(sorted((*a.base, *b.base)))
        return Term(self.times(a.row, b.row), self.times(a.column, b.column), base)

    def formed(self, terms: Terms) -> Terms:
        """Return the terms as an array with a name."""
        name = f"c{len(self.arrays)}"
        self.arrays[name] = terms
        return self.array(name)


def is_written(x: Any) -> bool:
    """Return whether `x` is written down, and not computed."""
    return isinstance(x, (Terms, Factor))
