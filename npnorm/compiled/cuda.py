"""A traced formula as CUDA: one kernel for each direction, a block of threads for each row.

The threads of a block stride over their row. In each pass a thread keeps a partial sum for each total; one exchange
between the threads follows, after which all of them know the totals. The row is read again for each pass: from a cache,
where it fits.

    row        y and the statistics, or dx; and which rows lost digits
    columns    gradients of features: a thread for some columns and a chunk of rows, partial sums in double

Sums over the space of a channel, of which the gradients of channels are made, are taken by warps in the row kernel. No
sum depends on the order in which threads happen to run.

flags[row] is 1 for a row that lost digits, and flags[rows] if there is one; `columns` leaves such rows out. The source
is C, but for what CUDA adds; no header is needed.
"""

import math
from typing import Any, NamedTuple

from npnorm.compiled.c import TYPES, Kind, NotWritten, Pass, Writer, block
from npnorm.compiled.trace import Number, Symbol, Traced
from npnorm.cuda_casts import CONVERSIONS
from npnorm.engine.exact import flatten
from npnorm.engine.terms import Terms

EACH = 4
"""How many packs of a row a thread reads in one pass, where the row is not too long."""

WARP = 32
"""Threads that exchange numbers without waiting for others."""

COLUMNS = 128
"""Threads of a block of the column kernel."""

SIZES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element."""

WARP_SUM = """
/* All threads of a warp get the same bits. */
static __device__ number warp_sum(number a) {
    int step;
    for (step = 16; step > 0; step >>= 1) a += __shfl_xor_sync(0xffffffffu, a, step);
    return a;
}
"""

NONZERO = {
    "float64": "a != 0",
    "float32": "(__float_as_uint(a) << 1) != 0u",  # a comparison would take subnormal numbers for zeros
}


class Source(NamedTuple):
    """The kernels of one direction.

    The arguments of `row`: the arrays, the parameters that it reads, the numbers for each row, eps, the rstd from which
    on x may be lost beside eps, what it writes, `given` if it gives numbers for each row, `partial` if it sums over
    channels, flags, the number of rows. Those of `columns`: the arrays, the numbers, eps, flags, partial sums, the
    number of rows, the rows of a chunk.
    """

    code: str
    threads: int  # of a row
    given: int  # numbers that it gives for each row: statistics forward, for gradients backward
    partials: int  # sums for channels, for each row
    packs: int  # of a row
    precise: str  # the dtype of numbers
    kernels: tuple[str, ...]


def packed(dtype: str, shape: tuple[int, ...]) -> int:
    """Return how many neighbours of a row a thread can read at once: 16 bytes, or one element.

    Examples
    --------
    >>> packed("float32", (1000,)), packed("float16", (1000,)), packed("float32", (64, 49))
    (4, 8, 1)
    """
    width = 16 // SIZES[dtype]
    return width if shape[-1] % width == 0 else 1


def write_forward(traced: Traced, kind: Kind) -> Source:
    """Return the source of `row`, which writes y and the statistics."""
    statistics = flatten(traced.statistics)
    writer = RowWriter(traced, kind, column_first=False)
    guarded = writer.guarded() if statistics else []
    writer.sum((traced.result, *statistics, *guarded))
    if statistics:
        writer.test_forward()
    writer.give(statistics)
    writer.write(traced.result)
    return writer.source()


def write_backward(traced: Traced, kind: Kind) -> Source:
    """Return the source of `row`, which writes dx, and of `columns`, for the gradients of features."""
    trace, grads = traced.trace, tuple(traced.grads.values())
    if kind.axes == "Channels":
        grads = tuple(trace.sum_of_channels(a) if isinstance(a, Terms) else a for a in grads)
    if kind.axes == "Batch":
        grads = tuple(trace.sum_of_rows(a) if isinstance(a, Terms) else a for a in grads)
    by_row = () if kind.axes == "Features" else grads
    writer = RowWriter(traced, kind, column_first=True)
    writer.sum((traced.result, *by_row, *writer.guarded()))
    writer.test_backward()
    writer.give(by_row)
    writer.write(traced.result)
    return writer.source({"columns": _columns(traced, kind)} if grads and kind.axes == "Features" else {})


class RowWriter(Writer):
    """Writes the row kernel."""

    def __init__(self, traced: Traced, kind: Kind, column_first: bool) -> None:
        super().__init__(traced, kind, column_first)
        self.given = 0
        self.held = math.prod(kind.shape[:-1])  # channels of a group, or samples of a batch
        self.lane = kind.shape[-1] // kind.width  # packs of a channel
        self.packs = self.held * self.lane
        self.threads = WARP
        while self.threads * EACH < self.packs and self.threads < 1024:
            self.threads *= 2
        self.warps, self.parts = self.threads // WARP, 1
        while 2 * self.parts * self.held <= self.warps and WARP * self.parts < self.lane:
            self.parts *= 2

    # Loops, and what the threads found in them.

    def loop(self, walk: Pass, body: list[str], out: str = "") -> None:
        """Write a loop over the packs of the row."""
        at = f"row * {self.packs} + j"
        if self.kind.axes == "Batch":
            at = f"(j / {self.lane} * rows + row) * {self.lane} + j % {self.lane}"
        lines = [f"const long long at = {at};"]
        if self.kind.axes == "Channels":
            lines += self._params_of_channel(walk, f"j / {self.lane}")
        lines += self._loads(walk)
        if out:
            lines.append("pack q;")
            body = [*body, f"q.v[k] = store({out});"]
        lines += [*walk.outer, *self._each(walk, body)]
        lines += ["((pack *)out)[at] = q;"] if out else []
        self.lines += ["#pragma unroll 4"]
        self.lines += block(f"for (int j = t; j < {self.packs}; j += {self.threads})", lines)

    def loop_over_channels(self, walk: Pass, body: list[str], sums: list[int]) -> None:
        """Write a loop over the channels, or parts of them, for each warp, and one over its packs within."""
        step = WARP * self.parts
        lines = [f"const long long at = row * {self.packs} + i / {self.parts} * {self.lane} + j;"]
        lines += [*self._loads(walk), *self._each(walk, body)]
        places = f"rows + row) * {self.held * self.parts} + i"
        stores = " ".join(f"partial[({i} * {places}] = sum_c{i};" for i in sums)
        lines = [
            *self._params_of_channel(walk, f"i / {self.parts}"),
            *walk.outer,
            *(f"work c{i} = 0;" for i in sums),
            "#pragma unroll 4",
            *block(f"for (int j = i % {self.parts} * {WARP} + t % {WARP}; j < {self.lane}; j += {step})", lines),
            *(f"const number sum_c{i} = warp_sum(c{i});" for i in sums),
            f"if (t % {WARP} == 0) {{ {stores} }}",
        ]
        self.lines += block(f"for (int i = t / {WARP}; i < {self.held * self.parts}; i += {self.warps})", lines)

    def join(self, names: list[str], level: int) -> None:
        """Write the sum over the threads, which all of them get."""
        self.lines += [f"number {name} = warp_sum(a{name});" for name in names]
        if not names or self.warps == 1:
            return
        shared = f"sums{level}"
        stores = " ".join(f"{shared}[{i}][t / {WARP}] = {name};" for i, name in enumerate(names))
        adds = " ".join(f"{name} += {shared}[{i}][i];" for i, name in enumerate(names))
        self.lines += [
            f"__shared__ number {shared}[{len(names)}][{self.warps}];",
            f"if (t % {WARP} == 0) {{ {stores} }}",
            "__syncthreads();",
            " ".join(f"{name} = 0;" for name in names),
            f"for (int i = 0; i < {self.warps}; i++) {{ {adds} }}",
        ]

    def join_any(self, names: list[str]) -> None:
        """Write whether any thread found a flag."""
        self.lines += [f"{name} = __syncthreads_or({name});" for name in names]

    def _params_of_channel(self, walk: Pass, channel: str) -> list[str]:
        at = f"[row * {self.held} + {channel}]"
        return [f"const number {name}_ = {name}{at};" for name in walk.params]

    def _loads(self, walk: Pass) -> list[str]:
        """Return the lines that read a pack of each array, and of the parameters of features."""
        lines = [f"const pack {name}_q = ((const pack *){name})[at];" for name in walk.arrays]
        params = walk.params if self.kind.axes == "Features" else ()
        return lines + [f"const pack_number {name}_q = ((const pack_number *){name})[j];" for name in params]

    def _each(self, walk: Pass, body: list[str]) -> list[str]:
        """Return the loop over the elements of a pack."""
        params = walk.params if self.kind.axes == "Features" else ()
        lines = [f"const work {name}_ = load({name}_q.v[k]);" for name in walk.arrays]
        lines += [f"const number {name}_ = {name}_q.v[k];" for name in params]
        return ["#pragma unroll", *block(f"for (int k = 0; k < {self.kind.width}; k++)", [*lines, *walk.inner, *body])]

    # What the kernel gives, and the kernel itself.

    def give(self, numbers: tuple[Any, ...]) -> None:
        """Write numbers for each row, or each channel of it; and the flags."""
        if self.kind.axes == "Channels" and numbers and "dy" in self.kind.arrays:
            self._give_channels(numbers)
            numbers = ()
        self.given += len(numbers)
        stores = [f"given[{i} * rows + row] = {self.value(number)};" for i, number in enumerate(numbers)]
        self.lines += block("if (t == 0)", [*stores, "if (bad) flags[row] = flags[rows] = 1;"])

    def _give_channels(self, numbers: tuple[Any, ...]) -> None:
        walk = _Channel(self)
        values = [walk.value(number) for number in numbers]
        places = f"rows + row) * {self.held} + i"
        stores = [f"given[({i} * {places}] = {value};" for i, value in enumerate(values)]
        lines = [*self._params_of_channel(walk, "i"), *walk.outer, *stores]
        self.given = self.held * len(numbers)
        self.lines += ["__syncthreads();", *block(f"for (int i = t; i < {self.held}; i += {self.threads})", lines)]

    def source(self, more: dict[str, str] | None = None) -> Source:
        """Return the row kernel, and more of them by name."""
        kind, more = self.kind, more or {}
        parameters = [
            *_inputs(self.traced, kind, kind.params),
            "double beside_eps",
            "element *__restrict__ out",
            *(["number *__restrict__ given"] if self.given else []),
            *(["number *__restrict__ partial"] if self.channels else []),
            "unsigned char *flags",
            "long long rows",
        ]
        head = ["const long long row = blockIdx.x;", "const int t = threadIdx.x;", "int bad = 0;"]
        head += _numbers(self.traced)
        head += [f"const number {name}_ = {name}[row];" for name in kind.params if kind.axes == "Batch"]
        row = _kernel("row", self.threads, parameters, [*head, *self.lines])
        code = "\n".join([_prelude(kind), row, *more.values(), _END])
        partials = len(self.channels) * self.held * self.parts
        return Source(code, self.threads, self.given, partials, self.packs, kind.precise, ("row", *more))


class _Channel(Pass):
    """What is computed once for each channel, after its sums are known."""

    writer: RowWriter

    def sum_of_channel(self, number: Number) -> str:
        """Write a sum over a channel from those of its parts."""
        found = []
        for term in number.operands[0].terms:
            numbers = [self.value(a) for a in term[:2] if a is not None]
            found.append(" * ".join((self._sum_of(tuple(a for a in term[2:] if a is not None)), *numbers)))
        return f"({' + '.join(found)})"

    def _sum_of(self, arrays: tuple[Symbol, ...]) -> str:
        writer = self.writer
        if not arrays:
            return f"(number){writer.kind.shape[-1]}"
        key = tuple(sorted(arrays, key=lambda a: a.name))
        if key not in self.names:
            name, parts = f"l{len(self.names)}", writer.parts
            at = f"(({writer.channels[key]} * rows + row) * {writer.held} + i) * {parts} + p"
            self.outer += [f"number {name} = 0;", f"for (int p = 0; p < {parts}; p++) {name} += partial[{at}];"]
            self.names[key] = name
        return self.names[key]


def _columns(traced: Traced, kind: Kind) -> str:
    """Return the kernel that sums over the rows of a chunk, without those that lost digits."""
    writer = RowWriter(traced, kind, column_first=True)
    walk = Pass(writer)
    sums, width = [], kind.width
    for i, terms in enumerate(traced.grads.values()):
        if not isinstance(terms, Terms):
            raise NotWritten("a gradient that is one number for all features")
        sums.append(f"a{i}[k] += good ? (double)({walk.terms(terms)}) : 0;")
    if walk.params:
        raise NotWritten("a gradient that depends on a parameter")
    lines = [f"const long long at = row * {writer.packs} + j;", "const int good = !flags[row];"]
    lines += [*_numbers(traced), *writer.lines, *writer._loads(walk), *writer._each(walk, sums)]
    places = f"gridDim.y + blockIdx.y) * {writer.packs} + j) * {width} + k"
    count = len(traced.grads)
    body = [
        f"const long long j = (long long)blockIdx.x * {COLUMNS} + threadIdx.x;",
        "const long long first = blockIdx.y * each, last = first + each < rows ? first + each : rows;",
        *(f"double a{i}[{width}] = {{0}};" for i in range(count)),
        f"if (j >= {writer.packs}) return;",
        "#pragma unroll 4",
        *block("for (long long row = first; row < last; row++)", lines),
        "#pragma unroll",
        *block(
            f"for (int k = 0; k < {width}; k++)",
            [f"partial[(({i} * (long long){places}] = a{i}[k];" for i in range(count)],
        ),
    ]
    parameters = [*_inputs(traced, kind, ()), "const unsigned char *__restrict__ flags"]
    parameters += ["double *__restrict__ partial", "long long rows", "long long each"]
    return _kernel("columns", COLUMNS, parameters, body)


_END = """
#ifdef __cplusplus
}
#endif
"""


def _prelude(kind: Kind) -> str:
    """Return what the kernels need before them."""
    single = {"float64": "a", "float32": "a"}.get(kind.dtype, f"{kind.dtype}_to_float(a)")
    wide, from_work = (f"float_to_double({single})", "double") if kind.work == "float64" else (single, "float")
    to = {"float64": "double", "float32": "float"}.get(kind.dtype, kind.dtype)
    narrow = "a" if to == from_work else f"{from_work}_to_{to}(a)"
    return "\n".join(
        [
            *("#ifdef __cplusplus", 'extern "C" {', "#endif", CONVERSIONS),
            f"typedef {TYPES[kind.dtype]} element;",
            f"typedef {TYPES[kind.work]} work;",
            f"typedef {TYPES[kind.precise]} number;",
            _pack("pack", "element", kind.width, SIZES[kind.dtype]),
            _pack("pack_number", "number", kind.width, SIZES[kind.precise]),
            f"static __device__ work load(element a) {{ return {wide}; }}",
            f"static __device__ element store(work a) {{ return {narrow}; }}",
            f"static __device__ int nonzero(work a) {{ return {NONZERO[kind.work]}; }}",
            WARP_SUM,
        ]
    )


def _pack(name: str, element: str, width: int, size: int) -> str:
    return f"typedef struct __align__({min(16, width * size)}) {{ {element} v[{width}]; }} {name};"


def _inputs(traced: Traced, kind: Kind, params: tuple[str, ...]) -> list[str]:
    """Return the parameters of a kernel that it reads."""
    found = [f"const element *__restrict__ {name}" for name in kind.arrays]
    found += [f"const number *__restrict__ {name}" for name in (*params, *(s.operands[0] for s in traced.numbers))]
    return [*found, "double eps"]


def _numbers(traced: Traced) -> list[str]:
    """Return the lines that read the numbers of a row."""
    names = [s.operands[0] for s in traced.numbers]
    return ["const number eps_ = (number)eps;", *(f"const number {name}_ = {name}[row];" for name in names)]


def _kernel(name: str, threads: int, parameters: list[str], lines: list[str]) -> str:
    head = f"__global__ void __launch_bounds__({threads}) {name}({', '.join(parameters)})"
    return "\n" + "\n".join(block(head, lines))
