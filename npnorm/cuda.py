"""A tape as CUDA: one kernel, a block of threads for each row.

The threads of a block stride over their row. What the tape sums over a row is sorted into levels: a level needs only
numbers that the levels before it gave. Each level is one pass over the row, in which a thread keeps a partial sum for
each total, and one exchange between the threads, after which all of them know the totals. Then comes the pass that
writes. The row is read again for each pass: from a cache, where it fits. Arrays that the formula forms, such as
c = x - mean, are computed where they are needed, and not stored.

    row        LayerNorm forward: sum x | sum c^2 | y            backward: sum dz, dz c, dz^2 | dx
    columns    gradients of features: a thread for some columns and a chunk of rows, partial sums in double
    total      the partial sums over the chunks, in their order, rounded to the dtype of the parameter

Sums over the space of a channel, of which the gradients of channels are made, are taken by warps in the row kernel. No
sum depends on the order in which threads happen to run.

The kernels test the `Limits` of each row themselves, so that the host asks once: flags[row] is 1 for a row that needs
care, flags[rows] if there is one, flags[rows + 1] if the weight is too large, flags[rows + 2] if a gradient is not
finite. The source is C, but for what CUDA adds; no header is needed.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from npnorm.terms import Factor, Term, Terms, Unwritten
from npnorm.written import Limits, Recorded

EACH = 4
"""How many packs of a row a thread reads in one pass, where the row is not too long."""

WARP = 32
"""Threads that exchange numbers without waiting for others."""

COLUMNS = 128
"""Threads of a block of the column kernel."""

SLICES = 8
"""In how many parts the chunks are summed, for each column."""

TYPES = {"float64": "double", "float32": "float", "float16": "unsigned short", "bfloat16": "unsigned short"}
"""How elements are held in C; those of 16 bits as their bits."""

CONVERSIONS = {
    "float16": """\
#ifdef __CUDACC__
static __device__ float from_float16(unsigned short a) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(a));
    return f;
}
static __device__ unsigned short to_float16(double a) {
    unsigned short h;
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(h) : "d"(a));
    return h;
}
static __device__ unsigned short single_to_float16(float a) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(a));
    return h;
}
#endif
""",
    "bfloat16": """\
static __device__ float from_bfloat16(unsigned short a) { return __uint_as_float((unsigned)a << 16); }

static __device__ unsigned short single_to_bfloat16(float a) {
    const unsigned bits = __float_as_uint(a);
    return (unsigned short)(a != a ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* By way of float, whose last bit remembers that something was cut off: else it would be rounded twice. */
static __device__ unsigned short to_bfloat16(double a) {
    const float single = (float)a;
    unsigned bits = __float_as_uint(single);
    if (a != a) return 0x7fc0u;
    bits -= fabs((double)single) > fabs(a);
    bits |= (double)single != a;
    return single_to_bfloat16(__uint_as_float(bits));
}
""",
}
"""From elements of 16 bits to float, and back, rounded once."""

WARP_SUM = """
/* All threads of a warp get the same bits. */
static __device__ number warp_sum(number a) {
    int step;
    for (step = 16; step > 0; step >>= 1) a += __shfl_xor_sync(0xffffffffu, a, step);
    return a;
}
"""


class Kind(NamedTuple):
    """What kernels are written for."""

    axes: str  # "Features", "Channels" or "Batch"
    shape: tuple[int, ...]  # of a row
    period: int  # after how many rows the columns repeat
    arrays: dict[str, str]  # the dtypes of the arrays that are read, by name; x is among them
    params: dict[str, str]  # those of the parameters, also of those whose gradient alone is wanted
    work: str  # the working precision
    width: int  # how many neighbours a thread reads at once
    eps: float
    limits: Limits


class Source(NamedTuple):
    """The kernels of one direction.

    The arguments of `row`: the arrays, the parameters that it reads, the numbers for each row, what it writes, `given`
    numbers for each row if there are any, partial sums for channels if there are any, flags, the number of rows. Those
    of `columns`: the arrays, the numbers, flags, partial sums, the number of rows, the rows of a chunk. Those of
    `total`: partial sums, the gradients, flags, the number of chunks, that of columns, that of rows.
    """

    code: str
    threads: int  # of a row
    given: int  # numbers that it gives for each row: statistics forward, for gradients backward
    partials: int  # sums for channels, for each row
    packs: int  # of a row
    kernels: tuple[str, ...]


class Total(NamedTuple):
    """What is summed over a row: the product of columns and arrays, or a square."""

    columns: tuple[Factor, ...]
    base: tuple[str, ...]
    square: Terms | None = None


def packed(dtype: str, shape: tuple[int, ...]) -> int:
    """Return how many neighbours of a row a thread can read at once: 16 bytes, or one element.

    Examples
    --------
    >>> packed("float32", (1000,)), packed("float16", (1000,)), packed("float32", (64, 49))
    (4, 8, 1)
    """
    width = 4 if dtype == "float32" else 8
    return width if shape[-1] % width == 0 else 1


def forward(made: Recorded, kind: Kind) -> Source:
    """Return the source of `row`, which writes y and the statistics."""
    statistics = made.statistics
    means = [made.tape.times(mean, statistics[-1]) for mean in made.tape.means] if statistics else []
    writer = _Writer(made, kind, column_first=False)
    writer.sum((made.result, *statistics, *means), [])
    if statistics:
        writer.test_statistics(means, statistics[-1])
    writer.give(statistics)
    writer.write(made.result)
    return writer.source({})


def backward(made: Recorded, kind: Kind) -> Source:
    """Return the source of `row`, which writes dx; and of `columns` and `total`, for the gradients."""
    tape, grads = made.tape, made.grads
    if kind.axes == "Channels":
        grads = {name: a.sum_over_lane() if isinstance(a, Terms) else a for name, a in grads.items()}
    by_row = () if kind.axes == "Features" else tuple(grads.values())
    means = [tape.times(mean, made.numbers[-1]) for mean in tape.means]
    lefts = [left for _, left in tape.cancelling]
    squares = [Total((), (), dz) for dz, _ in tape.cancelling]
    writer = _Writer(made, kind, column_first=True)
    writer.sum((made.result, *by_row, *means, *lefts), squares)
    if made.numbers:
        writer.test_statistics(means, made.numbers[-1])
    for square, left in zip(squares, lefts, strict=True):
        writer.test_cancelling(square, left)
    writer.give(by_row)
    writer.write(made.result)
    more = {"columns": _columns(made, kind, grads)} if grads and kind.axes == "Features" else {}
    return writer.source(more | ({"total": _total(kind, tuple(grads))} if grads else {}))


class _Pass:
    """A pass over a row as lines: what is read once for a pack, and what is computed for each element of it."""

    def __init__(self, writer: "_Writer") -> None:
        self.writer = writer
        self.arrays: dict[str, None] = {}
        self.params: dict[str, None] = {}
        self.outer: list[str] = []
        self.inner: list[str] = []
        self.names: dict[Any, str] = {}

    def value(self, factor: Factor | None) -> str:
        """Write a factor; return its name."""
        if factor is None or factor.kind != "column":
            return self.writer.value(factor)
        if factor not in self.names:
            self.names[factor] = self._column(factor)
        return self.names[factor]

    def _column(self, factor: Factor) -> str:
        if factor.op == "given":
            self.params[factor.operands[0]] = None
            return f"{factor.operands[0]}_"
        if factor.op == "lane":
            return self.lane(factor)
        operands = [self.value(o) if isinstance(o, Factor) else self.writer.number(o) for o in factor.operands]
        name = f"f{len(self.names)}"
        lines = self.inner if self.writer.kind.axes == "Features" else self.outer
        lines.append(f"const number {name} = {self.writer.expression(factor.op, operands)};")
        return name

    def factor(self, factor: Factor | None) -> str:
        """Write a factor of an element; return it in working precision."""
        if factor is not None and factor.op == "number":
            return self.writer.number(factor.operands[0], self.writer.kind.work)
        value = self.value(factor)
        return value if self.writer.precise == self.writer.kind.work or factor is None else f"(work){value}"

    def lane(self, factor: Factor) -> str:
        """Write a sum over a channel; known only after the pass that sums."""
        raise Unwritten("a sum over a channel within a row")

    def array(self, name: str) -> str:
        """Write an element of an array; return its name."""
        if name in self.writer.kind.arrays:
            self.arrays[name] = None
            return f"{name}_"
        if name not in self.names:
            self.inner.append(f"const work {name}_ = {self.terms(self.writer.made.tape.arrays[name])};")
            self.names[name] = f"{name}_"
        return self.names[name]

    def product(self, factors: Iterable[str]) -> str:
        """Return a product."""
        return " * ".join(factor for factor in factors if factor != "1") or "(work)1"

    def total(self, total: Total) -> str:
        """Return what is summed for one element."""
        if total.square is not None:
            name = f"f{len(self.names)}"
            self.inner.append(f"const work {name} = {self.terms(total.square)};")
            self.names[total] = name
            return f"{name} * {name}"
        return self.product((*map(self.array, total.base), *map(self.factor, total.columns)))

    def terms(self, terms: Terms) -> str:
        """Return a sum of terms: arrays first, numbers last.

        Forward an array takes the row's factor before the column's: x rstd is in range where x w need not be. Backward
        dy w comes first.
        """
        found = []
        for term in sorted(terms.terms, key=lambda term: not term.base):
            factors = (term.column, term.row) if self.writer.column_first else (term.row, term.column)
            found.append(self.product((*map(self.array, term.base), *map(self.factor, factors))))
        return " + ".join(found)


class _Channel(_Pass):
    """What is computed once for each channel, after its sums are known."""

    def lane(self, factor: Factor) -> str:
        """Write a sum over a channel from those of its parts."""
        found = []
        for term in factor.operands[0].terms:
            found.append(self.product((self._lane_of(term.base), *map(self.value, (term.row, term.column)))))
        return f"({' + '.join(found)})"

    def _lane_of(self, base: tuple[str, ...]) -> str:
        if not base:
            return self.writer.number(self.writer.kind.shape[-1])
        if base not in self.names:
            name, parts = f"l{len(self.names)}", self.writer.parts
            at = f"(({self.writer.lanes[base]} * rows + row) * {self.writer.channels} + i) * {parts} + p"
            self.outer += [f"number {name} = 0;", f"for (int p = 0; p < {parts}; p++) {name} += partial[{at}];"]
            self.names[base] = name
        return self.names[base]


class _Writer:
    """Writes the row kernel, each value once."""

    def __init__(self, made: Recorded, kind: Kind, column_first: bool) -> None:
        self.made, self.kind, self.column_first = made, kind, column_first
        self.precise = _precise(kind)
        self.lines: list[str] = []
        self.values: dict[Factor, str] = {}
        self.totals: dict[Total, str] = {}
        self.lanes: dict[tuple[str, ...], int] = {}
        self.given = 0
        self.channels = math.prod(kind.shape[:-1])
        self.lane = kind.shape[-1] // kind.width  # packs of a channel
        self.packs = self.channels * self.lane
        self.threads = WARP
        while self.threads * EACH < self.packs and self.threads < 1024:
            self.threads *= 2
        self.warps, self.parts = self.threads // WARP, 1
        while 2 * self.parts * self.channels <= self.warps and WARP * self.parts < self.lane:
            self.parts *= 2

    # The numbers of a row.

    def number(self, number: float, dtype: str = "") -> str:
        """Return a number as C has it."""
        dtype = dtype or self.precise
        value = float(np.dtype(dtype).type(number))
        return f"{value!r}f" if dtype == "float32" else repr(value)

    def expression(self, op: str, operands: list[str]) -> str:
        """Return an operation as C has it."""
        a, *b = operands
        signs = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
        if op in signs:
            return f"({a} {signs[op]} {b[0]})"
        letter = "f" if self.precise == "float32" else ""
        others = {"negative": "-({})", "absolute": f"fabs{letter}({{}})", "sqrt": f"sqrt{letter}({{}})"}
        others |= {"zeros_like": "(number)0", "to_float32": "(number)(float){}"}
        if op not in others:
            raise Unwritten(f"the operation {op}")
        return others[op].format(a)

    def value(self, factor: Factor | None) -> str:
        """Write a number of the row; return its name."""
        if factor is None:
            return "1"
        if factor.op == "number":
            return self.number(factor.operands[0])
        if factor.op == "given":
            return f"{factor.operands[0]}_"
        if factor not in self.values:
            self.values[factor] = name = f"v{len(self.values)}"
            self.lines.append(f"const number {name} = {self._value(factor)};")
        return self.values[factor]

    def _value(self, factor: Factor) -> str:
        if factor.op != "row":
            operands = [self.value(o) if isinstance(o, Factor) else self.number(o) for o in factor.operands]
            return self.expression(factor.op, operands)
        found = []
        for term in factor.operands[0].terms:
            rows, total = _split(term)
            found.append(" * ".join((self._total_of(total), *map(self.value, rows))))
        return " + ".join(found)

    def _total_of(self, total: Total) -> str:
        if not total.columns and not total.base:
            return self.number(math.prod(self.kind.shape))
        if total not in self.totals:
            raise Unwritten("a sum over a row where it is not known")
        return self.totals[total]

    # Passes over the row.

    def sum(self, results: tuple[Any, ...], squares: list[Total]) -> None:
        """Write the passes that give all sums that the results need, level by level."""
        levels: dict[int, tuple[list[Total], list[tuple[str, ...]]]] = {}
        for total in dict.fromkeys((*squares, *self._needed(results))):
            levels.setdefault(self._level_of(total), ([], []))[0].append(total)
        for base in self._lanes_needed(results):
            levels.setdefault(self._level_of(Total((), base)), ([], []))[1].append(base)
        for level, (totals, lanes) in sorted(levels.items()):
            self._sum_level(level, totals, lanes)

    def _sum_level(self, level: int, totals: list[Total], lanes: list[tuple[str, ...]]) -> None:
        walk = _Pass(self)
        for total in totals:
            self.totals[total] = f"n{len(self.totals)}"
        for base in lanes:
            self.lanes[base] = len(self.lanes)
        names = [self.totals[total] for total in totals]
        body = [f"a{name} += {walk.total(total)};" for name, total in zip(names, totals, strict=True)]
        body += [f"l{self.lanes[base]} += {walk.product(map(walk.array, base))};" for base in lanes]
        self.lines += [f"work a{name} = 0;" for name in names]
        if lanes:
            self._through_channels(walk, body, [(f"l{self.lanes[base]}", self.lanes[base]) for base in lanes])
        else:
            self._through(walk, body)
        self.lines += [f"number {name} = warp_sum(a{name});" for name in names]
        if names and self.warps > 1:
            shared = f"sums{level}"
            self.lines.append(f"__shared__ number {shared}[{len(names)}][{self.warps}];")
            stores = " ".join(f"{shared}[{i}][t / {WARP}] = {name};" for i, name in enumerate(names))
            adds = " ".join(f"{name} += {shared}[{i}][i];" for i, name in enumerate(names))
            self.lines += [
                f"if (t % {WARP} == 0) {{ {stores} }}",
                "__syncthreads();",
                " ".join(f"{name} = 0;" for name in names),
                f"for (int i = 0; i < {self.warps}; i++) {{ {adds} }}",
            ]

    def _through(self, walk: _Pass, body: list[str], out: str = "", result: str = "") -> None:
        """Write a loop over the packs of the row; with `out`, what is written for each element."""
        at = f"row * {self.packs} + j"
        if self.kind.axes == "Batch":
            at = f"(j / {self.lane} * rows + row) * {self.lane} + j % {self.lane}"
        lines = [f"const long long at = {at};"]
        if self.kind.axes == "Channels" and walk.params:
            lines.append(self._column(f"j / {self.lane}"))
        lines += self._loads(walk)
        if out:
            lines.append(f"pack_{self._dtype} q;")
            body = [*body, f"q.v[k] = {_to(self._dtype, self.kind.work, result)};"]
        lines += self._each(walk, body)
        if out:
            lines.append(f"((pack_{self._dtype} *){out})[at] = q;")
        self.lines += [
            "#pragma unroll 4",
            *_block(f"for (int j = t; j < {self.packs}; j += {self.threads})", lines),
        ]

    def _through_channels(self, walk: _Pass, body: list[str], lanes: list[tuple[str, int]]) -> None:
        """Write a loop over the channels, or parts of them, for each warp, and one over its packs within."""
        step = WARP * self.parts
        lines = [f"const long long at = row * {self.packs} + i / {self.parts} * {self.lane} + j;"]
        lines += [*self._loads(walk, params=False), *self._each(walk, body, outer=False)]
        outer = [self._column(f"i / {self.parts}"), *self._columns(walk), *walk.outer] if walk.params else walk.outer
        places = f"rows + row) * {self.channels * self.parts} + i"
        stores = " ".join(f"partial[({i} * {places}] = sum_{name};" for name, i in lanes)
        lines = [
            *outer,
            *(f"work {name} = 0;" for name, _ in lanes),
            "#pragma unroll 4",
            *_block(f"for (int j = i % {self.parts} * {WARP} + t % {WARP}; j < {self.lane}; j += {step})", lines),
            *(f"const number sum_{name} = warp_sum({name});" for name, _ in lanes),
            f"if (t % {WARP} == 0) {{ {stores} }}",
        ]
        head = f"for (int i = t / {WARP}; i < {self.channels * self.parts}; i += {self.warps})"
        self.lines += _block(head, lines)

    def _column(self, channel: str) -> str:
        return f"const long long column = row % {self.kind.period} * {self.channels} + {channel};"

    def _columns(self, walk: _Pass) -> list[str]:
        return [f"const work {n}_ = {_from(self.kind.params[n], f'{n}[column]')};" for n in walk.params]

    def _loads(self, walk: _Pass, params: bool = True) -> list[str]:
        """Return the lines that read a pack of each array, and of the parameters or their number for the channel."""
        lines = [
            f"const pack_{self.kind.arrays[n]} {n}_q = ((const pack_{self.kind.arrays[n]} *){n})[at];"
            for n in walk.arrays
        ]
        if self.kind.axes == "Features":
            dtypes = self.kind.params
            return lines + [f"const pack_{dtypes[n]} {n}_q = ((const pack_{dtypes[n]} *){n})[j];" for n in walk.params]
        return lines + self._columns(walk) if params else lines

    def _each(self, walk: _Pass, body: list[str], outer: bool = True) -> list[str]:
        """Return the loop over the elements of a pack."""
        dtypes = self.kind.arrays | (self.kind.params if self.kind.axes == "Features" else {})
        read = (*walk.arrays, *(walk.params if self.kind.axes == "Features" else ()))
        values = [f"const work {name}_ = {_from(dtypes[name], f'{name}_q.v[k]')};" for name in read]
        lines = [
            "#pragma unroll",
            *_block(f"for (int k = 0; k < {self.kind.width}; k++)", [*values, *walk.inner, *body]),
        ]
        return [*walk.outer, *lines] if outer else lines

    # What the formula's results need.

    def _needed(self, results: tuple[Any, ...]) -> Iterator[Total]:
        """Yield the totals that results need."""
        for factor in self._factors(results):
            for term in factor.operands[0].terms if factor.op == "row" else ():
                total = _split(term)[1]
                if total.columns or total.base:
                    yield total

    def _lanes_needed(self, results: tuple[Any, ...]) -> dict[tuple[str, ...], None]:
        lanes = (factor for factor in self._factors(results) if factor.op == "lane")
        return {term.base: None for factor in lanes for term in factor.operands[0].terms if term.base}

    def _factors(self, results: tuple[Any, ...]) -> Iterator[Factor]:
        """Yield all factors that results are made of."""
        seen: set[int] = set()
        waiting = list(reversed(results))
        while waiting:
            now = waiting.pop()
            if id(now) in seen:
                continue
            seen.add(id(now))
            if isinstance(now, Factor):
                yield now
                waiting += reversed(now.operands)
            elif isinstance(now, Terms):
                waiting += [part for term in now.terms for part in self._parts(term)]

    def _parts(self, term: Term) -> list[Any]:
        return [term.row, term.column, *(self.made.tape.arrays.get(name) for name in term.base)]

    def _level_of(self, total: Total) -> int:
        """Return in which pass a total is summed: after those that give the numbers it is made of."""
        parts: list[Any] = [*total.columns, total.square, *(self.made.tape.arrays.get(name) for name in total.base)]
        return 1 + max((self._level(part) for part in parts), default=0)

    def _level(self, part: Any) -> int:
        if isinstance(part, Terms):
            return max((self._level(p) for term in part.terms for p in self._parts(term)), default=0)
        if not isinstance(part, Factor):
            return 0
        if part.op != "row":
            return max((self._level(o) for o in part.operands), default=0)
        splits = [_split(term) for term in part.operands[0].terms]
        return max(max(self._level_of(total), *map(self._level, rows), 0) for rows, total in splits)

    # What a row must keep to, and what it gives.

    def test_statistics(self, means: list[Any], rstd: Factor) -> None:
        """Write the test of mean and spread."""
        limits, r = self.kind.limits, self.value(rstd)
        size = [self.number(2.0**k) for k in (-limits.size, limits.size)]
        self.lines.append(f"bad |= !({r} > {size[0]} && {r} < {size[1]});")
        for mean in means:
            size_of_mean = self.expression("absolute", [self.value(mean)])
            self.lines.append(f"bad |= !({size_of_mean} <= {self.number(limits.mean)});")
        if not limits.tiny or not self.kind.eps:
            return
        walk = _Pass(self)
        x = walk.array("x")
        self._branch(
            f"{r} * {r} * {self.number(self.kind.eps)} > {self.number(1 - 2.0**-20)}",
            walk,
            {"some": f"{x} != 0", "large": f"{self.expression('absolute', [x])} > {self.number(limits.tiny)}"},
            "bad |= some && !large;",
        )

    def test_cancelling(self, square: Total, left: Factor) -> None:
        """Write the test of |dz|^2: in range, or 0, and not nearly cancelled."""
        limits, s, rest = self.kind.limits, self.totals[square], self.value(left)
        size = [self.number(2.0**k) for k in (-limits.square, limits.square)]
        kept = f"{s} > {size[0]} && {s} < {size[1]} && {s} + {rest} > {self.number(limits.left)} * {s}"
        walk = _Pass(self)
        some = {"some": f"{walk.array('dy')} != 0"}
        self.lines.append(f"if ({s} != 0) bad |= !({kept});")
        self._branch(f"{s} == 0", walk, some, "bad |= some;")

    def _branch(self, condition: str, walk: _Pass, found: dict[str, str], then: str) -> None:
        """Write a pass that few rows need: whether some element has a property."""
        before, self.lines = self.lines, [f"int {name} = 0;" for name in found]
        self._through(walk, [f"{name} |= {test};" for name, test in found.items()])
        self.lines += [*(f"{name} = __syncthreads_or({name});" for name in found), then]
        self.lines = [*before, *_block(f"if ({condition})", self.lines)]

    def give(self, factors: tuple[Factor, ...]) -> None:
        """Write numbers for each row, or each channel of it, as double; and the flags."""
        if self.kind.axes == "Channels" and any(factor.kind == "column" for factor in factors):
            self._give_channels(factors)
            factors = ()
        self.given += len(factors)
        stores = [f"given[{i} * rows + row] = (double){self.value(factor)};" for i, factor in enumerate(factors)]
        self.lines += _block("if (t == 0)", [*stores, "if (bad) flags[row] = flags[rows] = 1;"])

    def _give_channels(self, factors: tuple[Factor, ...]) -> None:
        walk = _Channel(self)
        values = [walk.value(factor) for factor in factors]
        places = f"rows + row) * {self.channels} + i"
        stores = [f"given[({i} * {places}] = (double){value};" for i, value in enumerate(values)]
        lines = [*([self._column("i"), *self._columns(walk)] if walk.params else []), *walk.outer, *stores]
        self.given = self.channels * len(factors)
        head = f"for (int i = t; i < {self.channels}; i += {self.threads})"
        self.lines += ["__syncthreads();", *_block(head, lines)]

    def write(self, result: Terms) -> None:
        """Write the pass that writes y or dx."""
        walk = _Pass(self)
        self._through(walk, [], "out", walk.terms(result))

    @property
    def _dtype(self) -> str:
        return self.kind.arrays["x"]

    def source(self, more: dict[str, str]) -> Source:
        """Return the row kernel, and more of them by name."""
        kind, read = self.kind, self.made.params
        numbers = [factor.operands[0] for factor in self.made.numbers]
        parameters = [
            *_inputs(kind, numbers, read),
            f"{TYPES[self._dtype]} *__restrict__ out",
            *(["double *__restrict__ given"] if self.given else []),
            *(["number *__restrict__ partial"] if self.lanes else []),
            "unsigned char *flags",
            "long long rows",
        ]
        head = ["const long long row = blockIdx.x;", "const int t = threadIdx.x;", "int bad = 0;"]
        head += [f"const number {name}_ = (number){name}[row];" for name in numbers]
        if kind.axes == "Batch":
            head += [f"const number {name}_ = {_from(kind.params[name], f'{name}[row]')};" for name in read]
        if "weight" in read and "dy" in kind.arrays:
            count = {"Features": str(kind.shape[0]), "Batch": "rows"}.get(kind.axes, str(kind.period * self.channels))
            size = self.expression("absolute", [_from(kind.params["weight"], "weight[j]")])
            large = f"if (!({size} < {self.number(kind.limits.weight)})) flags[rows + 1] = 1;"
            head.append(f"if (row == 0) for (long long j = t; j < {count}; j += {self.threads}) {large}")
        row = _kernel("row", self.threads, parameters, [*head, *self.lines])
        code = "\n".join([_prelude(kind), row, *more.values(), _END])
        partials = len(self.lanes) * self.channels * self.parts
        return Source(code, self.threads, self.given, partials, self.packs, ("row", *more))


def _columns(made: Recorded, kind: Kind, grads: dict[str, Any]) -> str:
    """Return the kernel that sums over the rows of a chunk, without those that need care."""
    writer = _Writer(made, kind, column_first=True)
    walk = _Pass(writer)
    sums, width = [], kind.width
    for i, terms in enumerate(grads.values()):
        if not isinstance(terms, Terms):
            raise Unwritten("a gradient that is one number for all features")
        sums.append(f"a{i}[k] += good ? (double)({walk.terms(terms)}) : 0;")
    if walk.params:
        raise Unwritten("a gradient that depends on a parameter")
    numbers = [factor.operands[0] for factor in made.numbers]
    lines = [f"const long long at = row * {writer.packs} + j;", "const int good = !flags[row];"]
    lines += [f"const number {name}_ = (number){name}[row];" for name in numbers]
    lines += [*writer.lines, *writer._loads(walk), *writer._each(walk, sums)]
    places = f"gridDim.y + blockIdx.y) * {writer.packs} + j) * {width} + k"
    body = [
        f"const long long j = (long long)blockIdx.x * {COLUMNS} + threadIdx.x;",
        "const long long first = blockIdx.y * each, last = first + each < rows ? first + each : rows;",
        *(f"double a{i}[{width}] = {{0}};" for i in range(len(grads))),
        f"if (j >= {writer.packs}) return;",
        "#pragma unroll 4",
        *_block("for (long long row = first; row < last; row++)", lines),
        "#pragma unroll",
        *_block(
            f"for (int k = 0; k < {width}; k++)",
            [f"partial[(({i} * (long long){places}] = a{i}[k];" for i in range(len(grads))],
        ),
    ]
    parameters = [*_inputs(kind, numbers, ()), "const unsigned char *__restrict__ flags"]
    parameters += ["double *__restrict__ partial", "long long rows", "long long each"]
    return _kernel("columns", COLUMNS, parameters, body)


def _total(kind: Kind, names: tuple[str, ...]) -> str:
    """Return the kernel that sums over the chunks."""
    width = f"__shared__ double sums[{len(names)}][{SLICES}][{WARP}];"
    adds = [f"a{i} += partial[({i} * chunks + chunk) * columns + j];" for i in range(len(names))]
    ends = []
    for i, name in enumerate(names):
        ends.append(f"for (int s = 1; s < {SLICES}; s++) a{i} += sums[{i}][s][t];")
        ends.append(f"{name}[j] = {_to(kind.params[name], 'float64', f'a{i}')};")
        ends.append(f"if (!(a{i} - a{i} == 0)) flags[rows + 2] = 1;")
    body = [
        width,
        f"const int t = threadIdx.x % {WARP}, slice = threadIdx.x / {WARP};",
        f"const long long j = (long long)blockIdx.x * {WARP} + t;",
        *(f"double a{i} = 0;" for i in range(len(names))),
        *_block(f"if (j < columns) for (long long chunk = slice; chunk < chunks; chunk += {SLICES})", adds),
        *(f"sums[{i}][slice][t] = a{i};" for i in range(len(names))),
        "__syncthreads();",
        *_block("if (slice == 0 && j < columns)", ends),
    ]
    parameters = ["const double *__restrict__ partial"]
    parameters += [f"{TYPES[kind.params[name]]} *__restrict__ {name}" for name in names]
    parameters += ["unsigned char *flags", "long long chunks", "long long columns", "long long rows"]
    return _kernel("total", SLICES * WARP, parameters, body)


_END = """
#ifdef __cplusplus
}
#endif
"""


def _prelude(kind: Kind) -> str:
    """Return what the kernels need before them."""
    dtypes = dict.fromkeys((*kind.arrays.values(), *kind.params.values()))
    lines = ["#ifdef __cplusplus", 'extern "C" {', "#endif", f"typedef {TYPES[kind.work]} work;"]
    lines.append(f"typedef {TYPES[_precise(kind)]} number;")
    lines += [WARP_SUM, *(CONVERSIONS[dtype] for dtype in dtypes if dtype in CONVERSIONS)]
    for dtype in dtypes:
        size = {"float64": 8, "float32": 4}.get(dtype, 2)
        align = f"__align__({min(16, kind.width * size)}) "
        lines.append(f"typedef struct {align}{{ {TYPES[dtype]} v[{kind.width}]; }} pack_{dtype};")
    return "\n".join(lines)


def _precise(kind: Kind) -> str:
    """Return the precision of the numbers of a row: where factors fold, mean(x^2) - mean(x)^2 takes digits."""
    return kind.work if kind.axes == "Features" else "float64"


def _inputs(kind: Kind, numbers: list[str], params: tuple[str, ...]) -> list[str]:
    """Return the parameters of a kernel that it reads."""
    given = {**kind.arrays, **{name: kind.params[name] for name in params}, **dict.fromkeys(numbers, "float64")}
    return [f"const {TYPES[dtype]} *__restrict__ {name}" for name, dtype in given.items()]


def _kernel(name: str, threads: int, parameters: list[str], lines: list[str]) -> str:
    head = f"__global__ void __launch_bounds__({threads}) {name}({', '.join(parameters)})"
    return "\n" + "\n".join(_block(head, lines))


def _block(head: str, lines: list[str]) -> list[str]:
    return [f"{head} {{", *(f"    {line}" for line in lines), "}"]


def _from(dtype: str, element: str) -> str:
    """Return an element in working precision."""
    return f"(work){element}" if dtype in ("float32", "float64") else f"(work)from_{dtype}({element})"


def _to(dtype: str, work: str, value: str) -> str:
    """Return a number rounded once to the dtype of elements."""
    if dtype in ("float32", "float64"):
        return f"({TYPES[dtype]})({value})"
    return f"{'single_to' if work == 'float32' else 'to'}_{dtype}({value})"


def _split(term: Term) -> tuple[tuple[Factor, ...], Total]:
    """Return a term of a sum over a row as factors of the row, and what is summed."""
    factors = [*_factors_of(term.row), *_factors_of(term.column)]
    columns = tuple(factor for factor in factors if factor.kind == "column")
    return tuple(factor for factor in factors if factor.kind != "column"), Total(columns, term.base)


def _factors_of(factor: Factor | None) -> list[Factor]:
    """Return the factors of a product of numbers for columns and for rows."""
    if factor is None:
        return []
    if factor.kind != "column" or factor.op not in ("multiply", "negative"):
        return [factor]
    found = [f for o in factor.operands if isinstance(o, Factor) for f in _factors_of(o)]
    found += [factor.tape.factor("number", float(o)) for o in factor.operands if not isinstance(o, Factor)]
    return [*found, factor.tape.factor("number", -1.0)] if factor.op == "negative" else found
