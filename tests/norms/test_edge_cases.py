"""Inputs that are odd, and fit: kinds of arrays, no rows, rows of one number, mixed dtypes, NaN and infinity."""

import warnings

import numpy as np
import pytest

from npnorm import norms
from npnorm.tree import leaves
from tests.check import BFLOAT16, check_protocol, close, run, same_bits
from tests.norms.bad_input.table import NORMS, array, attempt
from tests.norms.catalogue import CATALOGUE, EACH, each


class Subclass(np.ndarray):
    pass


def on_disk(x, path):
    file = np.memmap(path, x.dtype, "w+", shape=x.shape)
    file[...] = x
    file.flush()
    return np.memmap(path, x.dtype, "r", shape=x.shape)


@EACH
@pytest.mark.parametrize("kind", ["a file on disk", "a subclass", "one number, broadcast"])
def test_other_kinds_of_numpy_arrays_give_the_same_values(entry, kind, tmp_path):
    params, x, dy = entry.problem(1)
    if kind == "one number, broadcast":
        came = np.broadcast_to(x[:1], x.shape), np.broadcast_to(dy[:1], dy.shape)
        x, dy = (np.ascontiguousarray(a) for a in came)
    elif kind == "a subclass":
        came = x.view(Subclass), dy.view(Subclass)
    else:
        came = on_disk(x, tmp_path / "x"), on_disk(dy, tmp_path / "dy")
    expected = run(entry.make(params), x, dy)
    for (name, a), (_, b) in zip(leaves(run(entry.make(params), *came)), leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name, strict=kind != "a subclass")


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("make", [np.matrix, lambda x: np.ma.masked_greater(x, 0.5)], ids=["matrix", "masked"])
def test_a_subclass_with_other_operators_is_refused_or_an_array(make):
    x = np.random.default_rng(4).standard_normal((5, 6))
    try:
        y, _ = norms.LayerNorm().forward(make(x))
    except TypeError as problem:
        assert str(problem).startswith("LayerNorm")  # noqa: PT017
    else:
        np.testing.assert_array_equal(np.ma.getdata(y), norms.LayerNorm().forward(x)[0])


REFUSE_BATCH_0 = ("BatchNorm", "BatchNorm of much space", "BatchNorm without space", "WeightNorm")  # see the table


@each([entry for entry in CATALOGUE if entry.name not in REFUSE_BATCH_0])
def test_a_batch_of_0_gives_gradients_of_0(entry):
    inputs = {"residual", "gate", "scale", "shift", "k"} - ({"shift"} if entry.name == "Derf" else set())
    shapes = {name: (0, *shape[1:]) if name in inputs else shape for name, shape in entry.params.items()}
    params, x, dy = entry._replace(params=shapes, x=(0, *entry.x[1:])).problem(2)
    came = run(entry.make(params), x, dy)
    assert came["y"].shape == dy.shape
    assert came["dx"].shape == x.shape
    for name, a in params.items():
        same_bits(came[name], np.zeros_like(a))


W1, B1, X1 = np.array([1.5]), np.array([-0.25]), np.array([[3.0], [-4.0], [0.0], [1e-3]])
RMS1 = np.sqrt(X1**2 + 0.3)
OF_ONE = {
    # the norm, y, and dy/dx
    "LayerNorm": (norms.LayerNorm(W1, B1), B1 + 0 * X1, 0 * X1),
    "GroupNorm": (norms.GroupNorm(1, W1, B1), B1 + 0 * X1, 0 * X1),
    "RMSNorm": (norms.RMSNorm(W1, B1, eps=0.3), X1 / RMS1 * W1 + B1, W1 * 0.3 / RMS1**3),
    "PartialRMSNorm": (norms.PartialRMSNorm(W1, B1, eps=0.3), X1 / RMS1 * W1 + B1, W1 * 0.3 / RMS1**3),
    "ScaleNorm": (norms.ScaleNorm(W1), np.sign(X1) * W1, [[0], [0], [W1[0] / 1e-5], [0]]),
    "L2Norm": (norms.L2Norm(), np.sign(X1), [[0], [0], [1e12], [0]]),
    "DyT": (norms.DyT(np.array(2.0), W1, B1), np.tanh(2 * X1) * W1 + B1, 2 * W1 / np.cosh(2 * X1) ** 2),
}


@pytest.mark.parametrize("name", OF_ONE)
def test_a_row_of_one_number(name):
    norm, y, slope = OF_ONE[name]
    dy = np.array([[2.0], [0.5], [-1.0], [3.0]])
    came = run(norm, X1, dy)
    close(came["y"], y, 1e-15)
    close(came["dx"], dy * slope, 1e-15)
    if "weight" in came:
        close(came["weight"], [np.sum(dy * (y - norm.params.get("bias", 0)) / W1)], 1e-15)


@pytest.mark.parametrize("name", ["AddRMSNorm", "AdaptiveNorm", "GatedRMSNorm", "QKNorm", "WeightNorm", "Derf"])
def test_a_row_of_one_number_in_the_other_norms(name):
    norm = NORMS[name]

    def one(shapes):
        return {n: array((*shape[:-1], 1) if shape[-1] == 6 else shape) for n, shape in shapes.items()}

    y, (dx, _) = attempt(name, **one(norm.params), **one(norm.inputs), **one(norm.gradients))
    for a in (*(y if isinstance(y, tuple) else (y,)), *(dx if isinstance(dx, tuple) else (dx,))):
        assert np.all(np.isfinite(a))
    if name == "AdaptiveNorm":
        np.testing.assert_array_equal(y[..., 0], np.broadcast_to(array((3, 1)), (3, 4)))  # the shift
        np.testing.assert_array_equal(dx[0], np.zeros((3, 4, 1)))
    if name == "WeightNorm":
        np.testing.assert_array_equal(y[:, 0], array((4,)))  # the lengths
        np.testing.assert_array_equal(dx, np.zeros((4, 1)))


@EACH
@pytest.mark.parametrize(
    ("narrow", "wide"), [("float16", "float32"), (BFLOAT16, "float32"), ("float32", "float64")], ids=str
)
def test_parameters_may_be_wider_than_x(entry, narrow, wide):
    params, x, dy = entry.problem(3)
    like_x = {"residual", "k"}  # one of two inputs that must have one dtype, or whose outputs are compared at once
    params = {name: a.astype(narrow if name in like_x else wide) for name, a in params.items()}
    x, dy = x.astype(narrow), dy.astype(narrow)
    came = run(entry.make(params), x, dy)
    assert came["y"].dtype == came["dx"].dtype == np.dtype(narrow)
    assert {name: came[name].dtype for name in params} == {name: a.dtype for name, a in params.items()}
    in_float64 = {name: a.astype("float64") for name, a in params.items()}
    expected = run(entry.make(in_float64), x.astype("float64"), dy.astype("float64"))
    units = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 1e-12}
    rounds_twice = entry.name.startswith(("AddRMSNorm", "CastRMSNorm"))  # h, and z
    for (_, a), (_, b) in zip(leaves(came), leaves(expected), strict=True):
        unit = 1.01 * units[a.dtype.name]
        close(a.astype("float64"), b, 4 * units[np.dtype(narrow).name] if rounds_twice else unit)


FIVE = {
    "LayerNorm": lambda w: norms.LayerNorm(w, w),
    "RMSNorm": lambda w: norms.RMSNorm(w, w),
    "PartialRMSNorm": lambda w: norms.PartialRMSNorm(w, w, p=0.5),
    "L2Norm": lambda w: norms.L2Norm(),
    "GroupNorm": lambda w: norms.GroupNorm(2, np.ones(6, w.dtype), np.ones(6, w.dtype)),
}


@pytest.mark.parametrize("name", FIVE)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", BFLOAT16], ids=str)
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_or_infinity_stays_in_its_row(name, dtype, where, bad):
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((2, 3, 6, 8))
    if dtype in ("float64", "float32"):  # some of the rows must be scaled, and some not
        x[1] *= 1e-30 if dtype == "float32" else 1e-250
        x[2, 3:] *= 1e30 if dtype == "float32" else 1e250
    x, dy, norm = x.astype(dtype), dy.astype(dtype), FIVE[name](rng.standard_normal(8).astype(dtype))
    expected = run(norm, x, dy)
    arrays = {"x": x.copy(), "dy": dy.copy()}
    arrays[where][0, 1, 2] = bad
    came = run(norm, **arrays)
    clean = np.ones((3, 6), bool)
    clean[0, : 3 if name == "GroupNorm" else 2] = False
    if name != "GroupNorm":
        clean[0, 0] = True
    for part in ("y", "dx"):
        same_bits(came[part][clean], expected[part][clean])
        hit = not (part == "y" and where == "dy")
        assert np.isfinite(came[part][~clean].astype("float64")).all() != hit


# by name, which ml_dtypes has made known to NumPy
HUGE = {"float64": 1e307, "float32": 1e37, "float16": 1e4, "bfloat16": 1e37}
SCALES = {"zeros": [0], "huge and tiny": [1, -1], "not finite": [np.nan, 1, np.inf]}


@EACH
@pytest.mark.parametrize("dtype", HUGE)
@pytest.mark.parametrize("what", SCALES)
def test_the_floating_point_settings_of_the_caller_do_not_matter(entry, dtype, what):
    rng = np.random.default_rng(6)
    params, x = entry.draw(rng, dtype)
    huge = HUGE[dtype]
    scale = [huge**sign for sign in SCALES[what]] if what == "huge and tiny" else SCALES[what]
    with np.errstate(all="ignore"):
        params = {name: (a * scale[-1]).astype(dtype) for name, a in params.items()}
        x = (x * np.resize(scale, x.shape[::-1]).T).astype(dtype)
        dy = (entry.make(params).forward(x)[0] * 0 + 3 * huge).astype(dtype)  # the sum over rows overflows
        expected = run(entry.make(params), x, dy)
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        same_bits(run(entry.make(params), x, dy), expected)
    assert np.geterr() == dict.fromkeys(("divide", "over", "invalid"), "warn") | {"under": "ignore"}


@EACH
def test_inputs_are_never_written_to(entry):
    params, x, _ = entry.problem(7)
    check_protocol(entry.make, params, np.asfortranarray(x), np.random.default_rng(8))


def test_what_is_saved_decides_where_settings_differ():
    x = np.random.default_rng(9).standard_normal((4, 6))
    half = norms.PartialRMSNorm(p=0.5)
    gate_first = norms.GatedRMSNorm(norm_before_gate=False)
    _, saved = half.forward(x)
    same_bits(norms.PartialRMSNorm(p=0.25).backward(x, saved)[0], half.backward(x, saved)[0])
    _, saved = gate_first.forward(x, x)
    same_bits(norms.GatedRMSNorm().backward(x, saved)[0][0], gate_first.backward(x, saved)[0][0])
