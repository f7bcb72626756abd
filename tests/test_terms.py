import operator
from functools import partial

import numpy as np
import pytest

from npnorm import norms
from npnorm.arrays import array_module
from npnorm.axes import Channels, Features
from npnorm.group import SOLO
from npnorm.norms import layer_norm, rms_norm
from npnorm.norms.weight import Gain
from npnorm.terms import Factor, Tape, Terms, Unwritten, is_written
from tests.check import close

ROWS, WIDTH = 5, 7
SHAPES = {
    # x, a number for each row, a number for each column
    False: ((ROWS, WIDTH), (ROWS, 1), (WIDTH,)),
    True: ((ROWS, 3, WIDTH), (ROWS, 1, 1), (ROWS, 3, 1)),
}
FOLDS = pytest.mark.parametrize("folds", [False, True], ids=["features", "folding"])


def evaluated(value, given):
    """Return what is written down as numbers: the definition of a Factor and of Terms, term by term."""
    if isinstance(value, Terms):
        total = 0.0
        for row, column, base in value.terms:
            term = np.ones_like(given["x"])
            for factor in (row, column):
                term = term * (1.0 if factor is None else evaluated(factor, given))
            for name in base:
                arrays = value.tape.arrays
                term = term * (evaluated(arrays[name], given) if name in arrays else given[name])
            total = total + term
        return total
    if not isinstance(value, Factor):
        return value
    if value.op == "given":
        return given[value.operands[0]]
    operands = [evaluated(operand, given) for operand in value.operands]
    if value.op == "number":
        return operands[0]
    if value.op == "row":
        return operands[0].sum(axis=tuple(range(1, operands[0].ndim)), keepdims=True)
    if value.op == "lane":
        return operands[0].sum(axis=-1, keepdims=True)
    if value.op == "to_float32":
        return operands[0].astype("float32").astype("float64")
    return getattr(np, value.op)(*operands)


def both(folds):
    """Return a tape's x, y, r (rows) and w (columns), and random numbers for them."""
    rng = np.random.default_rng(1)
    of_x, of_row, of_column = SHAPES[folds]
    given = {"x": of_x, "y": of_x, "r": of_row, "w": of_column}
    tape = Tape(of_x[1:], folds)
    terms = tape.array("x"), tape.array("y"), tape.given("r", "row"), tape.given("w", "column")
    return terms, {name: rng.standard_normal(shape) + 2 for name, shape in given.items()}


def over_row(a):
    return a.sum_over_row() if is_written(a) else a.sum(axis=tuple(range(1, a.ndim)), keepdims=True)


def root(a):
    return array_module(a).sqrt(a)


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
    "sum(x)": lambda x, y, r, w: over_row(x),
    "sum(x r w)": lambda x, y, r, w: over_row(x * r * w),
    "sum(x y)": lambda x, y, r, w: over_row(x * y),
    "x - sum(x) / 7": lambda x, y, r, w: x - over_row(x) / 7,
    "sum((x - r)^2)": lambda x, y, r, w: over_row((x - r) * (x - r)),
    "1 / sqrt(sum(x^2) + 1)": lambda x, y, r, w: x * (1 / root(over_row(x * x) + 1)),
    "y w - x sum(x y w)": lambda x, y, r, w: y * w - x * over_row(x * (y * w)),
    "(2 - r) (r - 1) / r": lambda x, y, r, w: x * ((2 - r) * (r - 1) / r),
    "|r| - (-r) 1": lambda x, y, r, w: x + (abs(r) - -r * 1.0),
    "3 / w - w": lambda x, y, r, w: x * (3 / w - w),
}


@FOLDS
@pytest.mark.parametrize("name", FORMULAS)
def test_what_is_written_down_is_what_numpy_computes(name, folds):
    terms, given = both(folds)
    came = evaluated(FORMULAS[name](*terms), given)
    expected = FORMULAS[name](*given.values())
    close(came * np.ones_like(expected), expected * np.ones_like(came), 1e-13 if "- x" not in name else 1e-12)


@FOLDS
def test_an_array_that_is_formed_has_a_name(folds):
    (x, y, r, w), given = both(folds)
    c = (x - r).formed()
    assert len(c.terms) == 1
    assert list(x.tape.arrays) == [c.terms[0].base[0]]
    close(evaluated(c * c * w + y, given), (given["x"] - given["r"]) ** 2 * given["w"] + given["y"])
    assert (x * y).formed().terms[0].base != c.terms[0].base


@FOLDS
def test_terms_without_those_of_others(folds):
    (x, y, r, w), given = both(folds)
    whole = y * w
    close(evaluated((whole - x * r).less(whole), given), -given["x"] * given["r"])


def test_a_sum_over_the_last_axis_is_a_number_for_each_channel():
    (x, y, _, w), given = both(folds=True)
    total = (x * y * w).sum_over_lane()
    assert total.kind == "column"
    close(evaluated(total, given), (given["x"] * given["y"] * given["w"]).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("folds", [False, True])
def test_factors_know_what_they_vary_with(folds):
    (x, _, r, w), _ = both(folds)
    assert [f.kind for f in (r, w, r + 1, 2 * w, -r, over_row(x * w))] == ["row", "column", "row", "column"] + [
        "row"
    ] * 2
    if folds:
        assert (r * w).kind == "column"


def test_a_product_that_folds_is_one_factor():
    (x, _, r, w), _ = both(folds=True)
    (term,) = (x * r * w).terms
    assert term.column is None
    (x, _, r, w), _ = both(folds=False)
    (term,) = (x * r * w).terms
    assert (term.row, term.column) == (r, w)


def test_the_same_operation_is_written_once():
    (x, _, r, w), _ = both(folds=False)
    assert r * 2 is r * 2
    assert r * 2 is not r * 3
    assert r - 2 is not 2 - r
    assert (x * r).terms == (x * r).terms
    assert len((x * w + x * w).terms) == 1
    assert len((x * w + x).terms) == 2


UNWRITTEN = {
    "a product of three arrays": lambda x, y, r, w: x * y * x,
    "a square times an array": lambda x, y, r, w: (x + y) * (x + y) * y,
    "the function exp": lambda x, y, r, w: array_module(x).exp(x),
    "the function where": lambda x, y, r, w: array_module(r).where(r, r, r),
    "a product with a str": lambda x, y, r, w: x * "2",
    "a product with a ndarray": lambda x, y, r, w: x.__mul__(np.ones(3)),
    "a sum with a list": lambda x, y, r, w: operator.add(x, [1.0]),
}


@FOLDS
@pytest.mark.parametrize("what", UNWRITTEN)
def test_what_is_no_sum_of_terms_is_not_written(what, folds):
    terms, _ = both(folds)
    with pytest.raises((Unwritten, AttributeError)):
        UNWRITTEN[what](*terms)


@pytest.mark.parametrize("meet", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_a_number_for_each_row_and_column_is_written_only_where_it_is_small(meet):
    (_, _, r, w), _ = both(folds=False)
    with pytest.raises(Unwritten, match="for each row and one for each column"):
        meet(r, w)
    (x, _, r, w), given = both(folds=True)
    close(evaluated(x * meet(r, w), given), given["x"] * meet(given["r"], given["w"]))


def test_an_operation_on_arrays_is_not_taken_for_a_number():
    (x, _, r, _), _ = both(folds=False)
    for act in (lambda: abs(x), lambda: x**2, lambda: 1 / x, lambda: x[0], lambda: x > 0, lambda: r > 0, lambda: r[0]):
        with pytest.raises(TypeError):
            act()


def test_only_what_is_written_down_is_written():
    (x, _, r, _), given = both(folds=False)
    assert is_written(x)
    assert is_written(r)
    assert not is_written(given["x"])
    assert not is_written(2.0)


def test_terms_have_the_shape_of_a_block():
    tape = Tape((3, 7), folds=True)
    assert tape.array("x").shape == (0, 3, 7)
    assert tape.array("x").ndim == 3


def pages(kind):
    """Return the forward and the backward formula of a page, and whether factors fold."""
    features, channels = Features("norm", SOLO), Channels("norm", SOLO, 2)
    gain = Gain("RMSNorm", np.ones(WIDTH, "float32"), 1.0 if "offset" in kind else 0.0, None, SOLO)
    found = {
        "LayerNorm": (
            partial(layer_norm.normalize, features, "two-pass"),
            partial(layer_norm.normalize_backward, features),
            False,
        ),
        "RMSNorm": (
            partial(rms_norm.normalize, features, gain, np.ones(1, "float32")),
            partial(rms_norm.normalize_backward, features, gain, np.ones(1, "float32")),
            False,
        ),
        "GroupNorm": (
            partial(layer_norm.normalize, channels, "two-pass"),
            partial(layer_norm.normalize_backward, channels),
            True,
        ),
    }
    found["RMSNorm with offset"] = found["RMSNorm"]
    return found[kind]


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "RMSNorm with offset", "GroupNorm"])
@pytest.mark.parametrize(("has_w", "has_b"), [(True, True), (True, False), (False, False)])
def test_the_page_written_down_is_the_page_computed(kind, has_w, has_b):
    forward, backward, folds = pages(kind)
    rng = np.random.default_rng(2)
    of_x, _, of_column = SHAPES[folds]
    given = {name: rng.standard_normal(of_x) for name in ("x", "dy")}
    given |= {name: rng.standard_normal(of_column) for name in ("w", "b")}
    w, b = (given["w"] if has_w else None), (given["b"] if has_b else None)
    y, statistics = forward(given["x"], w, b, 0.3)
    tape = Tape(of_x[1:], folds)
    w_written = tape.given("w", "column") if has_w else None
    written_y, written = forward(tape.array("x"), w_written, tape.given("b", "column") if has_b else None, 0.3)
    close(evaluated(written_y, given), y, 1e-13)
    for came, expected in zip(written, statistics, strict=True):
        assert np.abs(evaluated(came, given) - expected).max() < 1e-14  # the rest of the mean is 0, or nearly
    given |= {f"s{i}": a for i, a in enumerate(statistics)}
    dx, grads = backward(given["dy"], given["x"], w, *statistics, 0.3)
    tape = Tape(of_x[1:], folds)
    w_written = tape.given("w", "column") if has_w else None
    numbers = [tape.given(f"s{i}", "row") for i in range(len(statistics))]
    written_dx, written_grads = backward(tape.array("dy"), tape.array("x"), w_written, *numbers, 0.3)
    close(evaluated(written_dx, given), dx, 1e-13)
    for name in grads:
        came, expected = evaluated(written_grads[name], given), grads[name]
        if came.shape != expected.shape:  # numbers for each channel: the sum over the space is still to come
            came = came.sum(axis=-1, keepdims=True) if came.size > expected.size else came
        close(came, expected, 1e-13)
    dz = given["dy"] * (given["w"] + (1 if "offset" in kind else 0) if has_w else 1)
    ((whole, left),) = tape.cancelling
    close(evaluated(whole, given), dz, 1e-7)
    rstd = statistics[-1]
    axes = tuple(range(1, dx.ndim))
    squares = (dz * dz).sum(axis=axes, keepdims=True)
    kept = (dx / rstd * dz).sum(axis=axes, keepdims=True)  # of |dz|^2, what does not cancel
    close(squares + evaluated(left, given), kept, 1e-6)


WRITTEN = {
    "LayerNorm": (lambda p, **s: norms.LayerNorm(**p, **s), (6, 40), 40),
    "LayerNorm over two axes": (
        lambda p, **s: norms.LayerNorm(**{n: a.reshape(4, 10) for n, a in p.items()}, **s),
        (2, 3, 4, 10),
        40,
    ),
    "RMSNorm": (lambda p, **s: norms.RMSNorm(**p, **s), (2, 3, 40), 40),
    "RMSNorm with offset": (lambda p, **s: norms.RMSNorm(p["weight"], offset=1, **s), (6, 40), 40),
    "PartialRMSNorm of all": (lambda p, **s: norms.PartialRMSNorm(**p, p=1, **s), (6, 40), 40),
    "GroupNorm": (lambda p, **s: norms.GroupNorm(3, **p, **s), (4, 6, 5, 8), 6),
    "InstanceNorm": (lambda p, **s: norms.InstanceNorm(**p, **s), (4, 6, 40), 6),
    "BatchNorm": (lambda p, **s: norms.BatchNorm(**p, **s), (4, 6, 40), 6),
}


class CareTaken(Exception):
    pass


@pytest.fixture
def no_care(monkeypatch):
    def fail(*_, **__):
        raise CareTaken

    for name in ("forward", "forward_rows", "backward", "backward_rows"):
        monkeypatch.setattr(f"npnorm.careful.Careful.{name}", fail)


def affine(rng, n, dtype="float32"):
    return {name: rng.uniform(0.5, 1.5, n).astype(dtype) for name in ("weight", "bias")}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_these_norms_are_written_down(name, compute, dtype, no_care):
    rng = np.random.default_rng(3)
    make, shape, width = WRITTEN[name]
    layer = make(affine(rng, width, dtype), compute=compute)
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    assert all(np.all(np.isfinite(a)) for a in (y, dx, *grads.values()))


@pytest.mark.parametrize("kind", [norms.LayerNorm, norms.RMSNorm, norms.BatchNorm, norms.InstanceNorm])
@pytest.mark.parametrize("names", [(), ("weight",), ("bias",)], ids=["neither", "weight", "bias"])
def test_norms_without_weight_or_bias_are_written_down(kind, names, no_care):
    rng = np.random.default_rng(4)
    shape = (4, 40) if kind in (norms.LayerNorm, norms.RMSNorm) else (4, 6, 40)
    params = affine(rng, shape[1])
    layer = kind(**{name: params[name] for name in names}, compute="float32")
    x, dy = rng.standard_normal((2, *shape)).astype("float32")
    dx, grads = layer.backward(dy, layer.forward(x)[1])
    assert set(grads) == set(names)
    assert np.all(np.isfinite(dx))


def test_the_sum_of_a_residual_is_written_down(no_care):
    rng = np.random.default_rng(5)
    layer = norms.AddRMSNorm(**affine(rng, 40), compute="float32")
    x, residual, dy, dh = rng.standard_normal((4, 6, 40)).astype("float32")
    _, saved = layer.forward(x, residual)
    (dx, _), _ = layer.backward(dy, dh, saved)
    assert np.all(np.isfinite(dx))


def test_inference_is_written_down(no_care):
    rng = np.random.default_rng(6)
    layer = norms.BatchNorm(**affine(rng, 6), compute="float32")
    x, dy = rng.standard_normal((2, 4, 6, 40)).astype("float32")
    y, saved = layer.inference(x)
    layer.backward(dy, saved)
    w, b = (layer.params[name][:, None] for name in ("weight", "bias"))
    close(y, x / np.sqrt(1 + 1e-5) * w + b, 1e-6)


def test_the_alarm_itself_goes_off(no_care):
    layer = norms.LayerNorm.init(40)
    with pytest.raises(CareTaken):
        layer.forward(np.ones((2, 40)))
    with pytest.raises(CareTaken):
        norms.RMSNorm.init(40, cast="llama").forward(np.ones((2, 40), "float32"))
