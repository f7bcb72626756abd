"""Expressions and passes, of which no target is needed; whole kernels are in `tests.compiled.test_cuda`."""

import numpy as np
import pytest

from npnorm.compiled.c import Kind, NotWritten, Pass, Total, Writer, block, literal, numbers_in, split
from npnorm.compiled.trace import trace_backward, trace_forward
from npnorm.engine import Channels, Features
from npnorm.engine.exact import Formula
from npnorm.group import SOLO
from npnorm.norms import layer_norm

FORMULA = Formula(layer_norm.forward, layer_norm.backward, None)
BOTH = ("weight", "bias")
FEATURES, CHANNELS = Features("", SOLO), Channels("", SOLO, 1)


class Loops(Writer):
    """A target that notes the passes of a row."""

    def __init__(self, *given):
        super().__init__(*given)
        self.passes = []

    def loop(self, walk, body, out=""):
        self.passes.append(([*walk.arrays], [*walk.params], [*walk.inner], [*body], out))

    def loop_over_channels(self, walk, body, sums):
        self.loop(walk, body)
        self.passes.append(sums)

    def join(self, names, level):
        self.lines.append(f"join {level} {' '.join(names)}")

    def join_any(self, names):
        self.lines.append(f"any {' '.join(names)}")


def kind(axes, shape, arrays, work="float64", folds=False):
    return Kind(axes, shape, "float32", work, folds, arrays, BOTH)


def forward(work="float64"):
    traced = trace_forward(FORMULA, FEATURES, (40,), False, BOTH, 0)
    return Loops(traced, kind("Features", (40,), ("x",), work), False)


@pytest.mark.parametrize("number", [0.1, -1, 1e-45, 2.0**100, np.float64(3), np.float32(0.1)])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_literal_is_the_number(number, dtype):
    text = literal(number, dtype)
    assert text.endswith("f") == (dtype == "float32")
    assert np.dtype(dtype).type(text.removesuffix("f")) == np.dtype(dtype).type(number)


@pytest.mark.parametrize(("number", "dtype"), [(1e39, "float32"), (np.inf, "float64"), (np.nan, "float64")])
def test_what_has_no_literal_is_not_written(number, dtype):
    with pytest.raises(NotWritten, match="the number"):
        literal(number, dtype)


def test_a_level_needs_what_those_before_it_gave():
    writer = forward()
    traced = writer.traced
    writer.sum((traced.result, *writer.guarded()))
    writer.write(traced.result)
    first, second, last = writer.passes
    assert first == (["x"], [], [], ["an0 += x_;"], "")
    assert second[0] == ["x"]
    assert second[3] == ["an1 += c1_ * c1_;"]
    assert last[1] == ["weight", "bias"]
    assert [line for line in writer.lines if line.startswith("join")] == ["join 1 n0", "join 2 n1"]


def test_backward_needs_one_level():
    traced = trace_backward(FORMULA, FEATURES, (40,), False, BOTH, (True, False), plus=True)
    writer = Loops(traced, kind("Features", (40,), ("dy", "x", "plus")), True)
    writer.sum((traced.result, *writer.guarded()))
    writer.write(traced.result)
    (_, params, _, sums, _), (arrays, *_, out) = writer.passes
    assert len(sums) == 3  # of dz, of dz c, and of dz^2
    assert params == ["weight"]
    assert set(arrays) == {"dy", "x", "plus"}
    assert out.index("weight_") < out.index("s2_")  # dy w first


def test_a_number_is_written_once():
    writer = forward()
    traced = writer.traced
    writer.sum((traced.result,))
    rstd = traced.statistics[-1]
    before = len(writer.lines)
    assert writer.value(rstd) == writer.value(rstd)
    written = writer.lines[before:]
    assert len(written) == len(set(written)) == len({line.split("=")[0] for line in written})


def test_what_is_not_known_yet_is_not_written():
    writer = forward()
    with pytest.raises(NotWritten, match="where it is not known"):
        writer.value(writer.traced.statistics[-1])


def test_an_unknown_operation_is_not_written():
    writer = forward()
    trace = writer.traced.trace
    with pytest.raises(NotWritten, match="the operation cube"):
        writer.value(trace.number("cube", trace.given("s0", "row")))


def test_a_sum_over_a_channel_is_not_known_within_the_row():
    traced = trace_backward(FORMULA, CHANNELS, (3, 40), True, BOTH, (True, False), plus=False)
    writer = Loops(traced, kind("Channels", (3, 40), ("dy", "x"), folds=True), True)
    with pytest.raises(NotWritten, match="within a row"):
        Pass(writer).value(traced.trace.sum_of_channels(traced.result))


def test_numbers_of_the_row_leave_the_sum():
    traced = trace_backward(FORMULA, CHANNELS, (3, 40), True, BOTH, (True, False), plus=False)
    trace = traced.trace
    r, w, x = trace.given("s0", "row"), trace.given("weight", "channel"), trace.array("x")
    ((numbers, total),) = [split(term) for term in (x * x * (-(r * w) * 2.0)).terms]
    assert [n if isinstance(n, float) else n.operands for n in numbers] == [("s0",), -1.0, 2.0]
    assert total == Total((w,), (x.terms[0][2], x.terms[0][2]))
    ((numbers, total),) = [split(term) for term in (x * (r + w)).terms]
    assert (numbers, len(total.numbers)) == ([], 1)


def test_every_number_is_found_once():
    traced = forward().traced
    found = list(numbers_in((traced.result, *traced.statistics[0], traced.statistics[1])))
    assert len(found) == len(set(found))
    assert {"sum", "given", "sqrt", "divide"} <= {number.op for number in found}


def test_the_types_of_functions_follow_the_precision():
    assert forward().expression("sqrt", ["a"]) == "sqrt(a)"
    assert forward("float32").expression("absolute", ["a"]) == "fabsf(a)"


@pytest.mark.parametrize("method", ["loop", "loop_over_channels", "join", "join_any"])
def test_a_target_has_the_loops(method):
    writer = Writer(forward().traced, kind("Features", (40,), ("x",)), False)
    arguments = {"loop": (None, []), "loop_over_channels": (None, [], []), "join": ([], 1), "join_any": ([],)}
    with pytest.raises(NotImplementedError):
        getattr(writer, method)(*arguments[method])


def test_lines_in_braces_are_indented():
    assert block("while (1)", block("if (a)", ["b = 0;"])) == [
        "while (1) {",
        "    if (a) {",
        "        b = 0;",
        "    }",
        "}",
    ]
