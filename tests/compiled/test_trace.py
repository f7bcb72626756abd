"""Traces, evaluated by NumPy: the definition of each symbol, held against the same formula on arrays."""

import operator

import numpy as np
import pytest

from npnorm.arrays import array_module
from npnorm.compiled.trace import Number, Symbol, Trace, TracedRow, trace_backward, trace_forward
from npnorm.engine import Batch, Channels, Features, Row
from npnorm.engine.exact import flatten
from npnorm.engine.row import NO_BIAS, NO_WEIGHT
from npnorm.engine.statistics import Mean
from npnorm.engine.terms import NotLinear, Terms
from npnorm.group import SOLO
from tests.check import close
from tests.engine.formulas import CASES

ROWS, WIDTH = 5, 7
LAYOUTS = {
    # x, a number for each row, one for each column or channel
    "Features": (Features("", SOLO), (ROWS, WIDTH), (ROWS, 1), (WIDTH,), "column"),
    "Channels": (Channels("", SOLO, 1), (ROWS, 3, WIDTH), (ROWS, 1, 1), (ROWS, 3, 1), "channel"),
    "Batch": (Batch("", SOLO), (ROWS, 3, WIDTH), (ROWS, 1, 1), (ROWS, 1, 1), "row"),
}
LAYOUT = pytest.mark.parametrize("axes", LAYOUTS)


def evaluated(symbol, given):
    """Return what is traced as numbers."""
    if isinstance(symbol, Terms):
        total = 0.0
        for term in symbol.terms:
            product = np.ones_like(given["x"])
            for part in term:
                product = product * (1.0 if part is None else evaluated(part, given))
            total = total + product
        return total
    if isinstance(symbol, Symbol):
        if symbol.formed is None:
            return given[symbol.name]
        a, number = symbol.formed
        return evaluated(a, given) + evaluated(number, given)
    if not isinstance(symbol, Number):
        return symbol
    if symbol.op == "given":
        return given[symbol.operands[0]]
    operands = [evaluated(operand, given) for operand in symbol.operands]
    if symbol.op == "sum":
        return over_row(*operands)
    if symbol.op == "sum of channel":
        return operands[0].sum(axis=-1, keepdims=True)
    return getattr(np, symbol.op)(*operands)


def over_row(a):
    if isinstance(a, Terms):
        return a.block.sum_of_rows(a)
    return a.sum(axis=tuple(range(1, a.ndim)), keepdims=True)


def root(a):
    return array_module(a).sqrt(a)


def both(axes):
    """Return a trace's x, y, r (rows) and w (columns or channels), and random numbers for them."""
    layout, of_x, of_row, of_column, varies = LAYOUTS[axes]
    trace = Trace(layout, of_x[1:], layout.per_channel)
    rng = np.random.default_rng(1)
    given = {"x": of_x, "y": of_x, "r": of_row, "w": of_column}
    symbols = trace.array("x"), trace.array("y"), trace.given("r", "row"), trace.given("w", varies)
    return symbols, {name: rng.standard_normal(shape) + 2 for name, shape in given.items()}


FORMULAS = {
    "x + y": lambda x, y, r, w: x + y,
    "x + x": lambda x, y, r, w: x + x,
    "x - y": lambda x, y, r, w: x - y,
    "x - x": lambda x, y, r, w: x - x,
    "-x": lambda x, y, r, w: -x,
    "x + 2": lambda x, y, r, w: x + 2,
    "2 - x": lambda x, y, r, w: 2 - x,
    "x - r": lambda x, y, r, w: x - r,
    "r - x": lambda x, y, r, w: r - x,
    "r + x": lambda x, y, r, w: r + x,
    "x + w": lambda x, y, r, w: x + w,
    "w - x": lambda x, y, r, w: w - x,
    "x r": lambda x, y, r, w: x * r,
    "r x": lambda x, y, r, w: r * x,
    "x w": lambda x, y, r, w: x * w,
    "w x r 3": lambda x, y, r, w: w * x * r * 3,
    "x r w w": lambda x, y, r, w: x * r * w * w,
    "x / r": lambda x, y, r, w: x / r,
    "x / w": lambda x, y, r, w: x / w,
    "x / 3": lambda x, y, r, w: x / 3,
    "x y": lambda x, y, r, w: x * y,
    "x r * y w": lambda x, y, r, w: (x * r) * (y * w),
    "(x - r) (y + w)": lambda x, y, r, w: (x - r) * (y + w),
    "(x - r) w - x w": lambda x, y, r, w: (x - r) * w - x * w,
    "(x - r) (x - r)": lambda x, y, r, w: (x - r) * (x - r),
    "(x + 1) (1 + y) r": lambda x, y, r, w: (x + 1) * (1 + y) * r,
    "x without w or b": lambda x, y, r, w: x * NO_WEIGHT * r + NO_BIAS,
    "sum(x)": lambda x, y, r, w: over_row(x),
    "sum(x r w)": lambda x, y, r, w: over_row(x * r * w),
    "sum(x y)": lambda x, y, r, w: over_row(x * y),
    "x - sum(x) / 7": lambda x, y, r, w: x - over_row(x) / 7,
    "sum((x - r)^2)": lambda x, y, r, w: over_row((x - r) * (x - r)),
    "1 / sqrt(sum(x^2) + 1)": lambda x, y, r, w: x * (1 / root(over_row(x * x) + 1)),
    "y w - x sum(x y w)": lambda x, y, r, w: y * w - x * over_row(x * (y * w)),
    "(2 - r) (r - 1) / r": lambda x, y, r, w: x * ((2 - r) * (r - 1) / r),
    "|r| - (-r) 1": lambda x, y, r, w: x + (abs(r) - -r * 1.0),
    "the smaller one of r and 2": lambda x, y, r, w: x * array_module(r).minimum(r * r, 2.0),
    "3 / w - w": lambda x, y, r, w: x * (3 / w - w),
}


@LAYOUT
@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_traced_is_what_numpy_computes(name, axes):
    symbols, given = both(axes)
    came = evaluated(FORMULAS[name](*symbols), given)
    expected = FORMULAS[name](*given.values())
    close(came * np.ones_like(expected), expected * np.ones_like(came), 1e-13 if "- x" not in name else 1e-12)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("names", [("weight", "bias"), ("weight",), ()], ids=["both", "weight", "none"])
@pytest.mark.parametrize("folds", [False, True])
def test_a_page_traced_is_the_page_computed(name, names, folds):
    formula, layout, per_channel = CASES[name].formula, CASES[name].layout, CASES[name].layout.per_channel
    folds, eps, rng = folds and per_channel, 0.3, np.random.default_rng(2)
    axes = "Features" if not per_channel else "Batch" if layout.row_is_channel else "Channels"
    _, of_x, of_row, of_column, _ = LAYOUTS[axes]
    given = {key: rng.standard_normal(of_x) for key in ("x", "dy", "plus")} | {"eps": eps}
    given |= {key: rng.standard_normal(of_column) for key in ("weight", "bias")}
    constants = [rng.uniform(0.5, 1, of_row) for _ in range(2 if CASES[name].constants else 0)]
    given |= {f"s{i}": a for i, a in enumerate(constants)}
    w = given["weight"] if "weight" in names else NO_WEIGHT
    b = given["bias"] if "bias" in names else NO_BIAS
    row = Row(layout, eps)
    y, statistics = formula.forward(row, given["x"], w, b, *constants)
    traced = trace_forward(formula, layout, of_x[1:], folds, names, len(constants))
    close(evaluated(traced.result, given), y, 1e-13)
    for came, expected in zip(flatten(traced.statistics), flatten(statistics), strict=True):
        assert np.abs(evaluated(came, given) - expected).max() < 1e-13  # the rest of the mean is 0, or nearly
    if statistics:
        assert (traced.row.centred is None) == (row.centred is None)
    else:
        statistics = constants
    given |= {f"s{i}": a for i, a in enumerate(flatten(statistics))}
    dx, *grads = formula.backward(Row(layout, eps, low_precision=True), given["dy"], given["x"], w, *statistics)
    means = tuple(isinstance(s, Mean) for s in statistics)
    traced = trace_backward(formula, layout, of_x[1:], folds, names, means, plus=True)
    close(evaluated(traced.result, given), dx + given["plus"], 1e-13)
    assert [number.operands[0] for number in traced.numbers] == [f"s{i}" for i in range(len(flatten(statistics)))]
    assert tuple(traced.grads) == names
    for key, expected in zip(("weight", "bias"), grads, strict=True):
        if key in names:
            close(evaluated(traced.grads[key], given), expected, 1e-13)
    if traced.row.cancelling is None:
        return
    dz = given["dy"] * w
    close(evaluated(traced.row.cancelling.dz, given), dz)
    kept = (dx / statistics[-1] * dz).sum(axis=tuple(range(1, dx.ndim)), keepdims=True)
    close(over_row(dz * dz) + evaluated(traced.row.cancelling.left, given), kept, 1e-12)


@LAYOUT
def test_an_array_that_is_formed_has_a_name(axes):
    (x, y, r, w), given = both(axes)
    trace = x.block
    c, d = trace.form(x, -r), trace.form(y, r)
    assert len(c.terms) == 1
    close(evaluated(c * c * w + d, given), (given["x"] - given["r"]) ** 2 * given["w"] + given["y"] + given["r"])
    assert c.terms[0][2].name != d.terms[0][2].name


def test_a_row_has_the_names_of_the_others():
    layout = Features("", SOLO)
    row = TracedRow(layout, Trace(layout, (40,), False))
    assert row.n == 40.0
    assert row.eps.varies == "all"


def test_a_sum_over_the_last_axis_is_a_number_for_each_channel():
    (x, y, _, w), given = both("Channels")
    total = x.block.sum_of_channels(x * y * w)
    assert total.varies == "channel"
    close(evaluated(total, given), (given["x"] * given["y"] * given["w"]).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize(("axes", "own"), [("Features", "column"), ("Channels", "channel"), ("Batch", "row")])
def test_numbers_know_what_they_vary_with(axes, own):
    (x, _, r, w), _ = both(axes)
    found = [a.varies for a in (r, w, r + 1, 2 * w, -r, over_row(x * w), 3 * x.block.given("eps", "all"))]
    assert found == ["row", own, "row", own, "row", "row", "all"]
    if axes != "Features":
        assert (r * w).varies == own


def test_only_features_keep_rows_and_columns_apart():
    for axes, expected in (("Channels", None), ("Batch", None)):
        (x, _, r, w), _ = both(axes)
        ((_, column, *_),) = (x * r * w).terms
        assert column is expected
    (x, _, r, w), _ = both("Features")
    assert (x * r * w).terms[0][:2] == (r, w)


def test_the_same_operation_is_one_number():
    (x, _, r, w), _ = both("Features")
    assert r * 2 is r * 2
    assert r * 2 is not r * 3
    assert r - 2 is not 2 - r
    assert r + 0.0 is not r + -0.0
    assert (x * r).terms == (x * r).terms
    assert len((x * w + x * w).terms) == 1
    assert len((x * w + x).terms) == 2


REFUSED = {
    "a product of three arrays": lambda x, y, r, w: x * y * x,
    "a square times an array": lambda x, y, r, w: (x + y) * (x + y) * y,
    "a function of an array": lambda x, y, r, w: array_module(x).exp(x),
    "a NumPy function of an array": lambda x, y, r, w: np.tanh(x),
    "a power of an array": lambda x, y, r, w: x**2,
    "the magnitude of an array": lambda x, y, r, w: abs(x),
    "a part of an array": lambda x, y, r, w: x[0],
    "a method of an array": lambda x, y, r, w: x.mean(-1),
    "a quotient of arrays": lambda x, y, r, w: 1 / x,
    "a comparison of arrays": lambda x, y, r, w: x > y,
    "a function of a number": lambda x, y, r, w: array_module(r).exp(r),
    "a function that NumPy does not have either": lambda x, y, r, w: array_module(r).sqroot(r),
    "an array times a str": lambda x, y, r, w: x * "2",
    "an array times an array of NumPy": lambda x, y, r, w: x * np.ones(3),
    "a number times an array of NumPy": lambda x, y, r, w: r * np.ones(3),
    "an array of NumPy times a number": lambda x, y, r, w: np.ones(3) * r,
    "a number and a list": lambda x, y, r, w: operator.add(r, [1.0]),
    "a power of a number": lambda x, y, r, w: r**2,
    "a part of a number": lambda x, y, r, w: r[0],
    "a comparison": lambda x, y, r, w: r > 0,
    "a branch on a number": lambda x, y, r, w: x if r else y,
    "a number as Python's": lambda x, y, r, w: float(r),
}


@LAYOUT
@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_sum_of_products_is_refused(what, axes):
    with pytest.raises(NotLinear):
        REFUSED[what](*both(axes)[0])


@pytest.mark.parametrize("meet", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_a_number_for_each_row_and_column_is_refused_where_it_would_be_large(meet):
    (_, _, r, w), _ = both("Features")
    with pytest.raises(NotLinear, match="for each row and each column"):
        meet(r, w)
    (x, _, r, w), given = both("Channels")
    close(evaluated(x * meet(r, w), given), given["x"] * meet(given["r"], given["w"]))


def test_a_typo_in_a_formula_is_no_refusal():
    with pytest.raises(AttributeError):
        both("Features")[0][2].sqrt()
