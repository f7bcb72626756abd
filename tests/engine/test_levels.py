"""Levels of evaluation: as exact as they say, the same bits however they are run, and more digits where needed."""

import tracemalloc

import numpy as np
import pytest

from npnorm import AddRMSNorm, BatchNorm, GroupNorm, LayerNorm, RMSNorm
from npnorm.engine import Features, Formula, Rows, explain
from npnorm.engine.exact import flatten
from npnorm.engine.guards import SHORT, SHORT_FLOAT32, SPACE
from npnorm.group import SOLO
from npnorm.threads import set_threads
from tests.check import close, draw, run, same_bits

MAKE = {
    "LayerNorm": lambda p, **s: LayerNorm(**p, **s),
    "RMSNorm": lambda p, **s: RMSNorm(**p, **s),
    "GroupNorm": lambda p, **s: GroupNorm(2, **p, **s),
    "BatchNorm": lambda p, **s: BatchNorm(**p, **s),
}
SHAPES = {"LayerNorm": (12, 40), "RMSNorm": (12, 40), "GroupNorm": (6, 8, 20), "BatchNorm": (6, 12, 20)}
LARGE = {  # enough for several threads; rows that do not begin at multiples of a vector
    "LayerNorm": (1101, 1001),
    "RMSNorm": (1101, 1001),
    "GroupNorm": (16, 8, 93, 91),
    "BatchNorm": (16, 8, 93, 91),
}
EACH = pytest.mark.parametrize("name", MAKE)
COMPUTE = pytest.mark.parametrize("compute", ["float32", "float64"])


@pytest.fixture(autouse=True)
def the_number_of_threads_stays():
    yield
    set_threads(None)


def problem(name, seed, shape=None, dtype="float32"):
    """Return parameters, x and dy."""
    rng, shape = np.random.default_rng(seed), shape or SHAPES[name]
    x, dy = draw(rng, dtype, x=shape, dy=shape).values()
    return draw(rng, dtype, weight=shape[1], bias=shape[1]), x, dy


def exact(name, params, x, dy, **settings):
    """Return everything that comes out in float64 to the end."""
    layer = MAKE[name]({key: a.astype("float64") for key, a in params.items()}, **settings)
    with np.errstate(all="ignore"):
        return run(layer, x.astype("float64"), dy.astype("float64"))


def numbers(saved):
    """Return the statistics that were saved, as a tree of arrays."""
    return {f"{i}": a for i, a in enumerate(flatten(saved[1:-1]))}


def rows_of(name, a):
    """Return an array as rows, without moving it in memory."""
    if name == "BatchNorm":
        return np.moveaxis(a, 1, 0)
    return a.reshape(-1, 4, *a.shape[2:]) if name == "GroupNorm" else a


def units(actual, expected):
    """Return by how many units in the last place of its largest number each row is off; NaNs must be in one place."""
    with np.errstate(all="ignore"):
        rounded = expected.astype("float32")
        same = (actual == rounded) | (np.isnan(actual) & np.isnan(rounded))
        rest = tuple(range(1, actual.ndim))
        finite = np.where(np.isfinite(rounded), np.abs(rounded), 0)
        unit = np.spacing(finite.max(axis=rest, keepdims=True))
        return np.where(same, 0.0, np.abs(actual - expected) / unit).max(axis=rest)


def check(name, came, expected, of_row, of_gradient=8):
    """Raise unless y and dx are near row by row, and each gradient as a whole."""
    for key, a in came.items():
        if key in ("y", "dx"):
            off = units(rows_of(name, a), rows_of(name, expected[key]))
            assert np.all(off <= of_row), (key, off)
        else:
            off = units(a[None], expected[key][None])
            assert np.all(off <= of_gradient), (key, off)


def levels(name, params, x, dy, **settings):
    """Return how many rows are evaluated at each level beyond the first, forward and backward."""
    found = explain(MAKE[name](params, **settings), x, dy)
    return {way: {level: rows for level, rows in list(found[way].items())[1:]} for way in found}


NONE = {"forward": {}, "backward": {}}


# How exact.


@EACH
@pytest.mark.parametrize("eps", [0.0, 1e-5, 0.3])
@pytest.mark.parametrize("seed", range(5))
def test_ordinary_rows_in_float32_are_within_4_units(name, eps, seed):
    params, x, dy = problem(name, seed)
    expected = exact(name, params, x, dy, eps=eps)
    came = run(MAKE[name](params, eps=eps, compute="float32"), x, dy)
    assert levels(name, params, x, dy, eps=eps, compute="float32") == NONE
    check(name, came, expected, 4)


@EACH
@pytest.mark.parametrize("seed", range(3))
def test_ordinary_rows_in_float64_are_correctly_rounded(name, seed):
    params, x, dy = problem(name, seed)
    expected = exact(name, params, x, dy)
    came = run(MAKE[name](params), x, dy)
    assert levels(name, params, x, dy) == NONE
    same_bits({k: came[k] for k in ("y", "dx")}, {k: expected[k].astype("float32") for k in ("y", "dx")})
    check(name, came, expected, 0.5, 0.51)


@EACH
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**-20, 1e-3, 1e3, 2.0**20, 2.0**45])
def test_the_size_of_rows_does_not_matter(name, scale):
    params, x, dy = problem(name, 6)
    x = (x * scale).astype("float32")
    came = run(MAKE[name](params, eps=1e-12, compute="float32"), x, dy)
    check(name, came, exact(name, params, x, dy, eps=1e-12), 4)


@EACH
@pytest.mark.parametrize("mean", [0.5, 1.0, 2.0, 3.0, 3.9, 4.1, 6.0])
def test_the_mean_of_rows_does_not_matter(name, mean):
    params, x, dy = problem(name, 7)
    x = x + np.float32(mean)
    came = run(MAKE[name](params, compute="float32"), x, dy)
    check(name, came, exact(name, params, x, dy), 4)


@EACH
@pytest.mark.parametrize("mean", [20, 40, 200, 400, 3000])
def test_a_mean_that_takes_digits_is_not_evaluated_fast(name, mean):
    params, x, dy = problem(name, 8)
    x = x + np.float32(mean)
    limit = {"RMSNorm": np.inf, "LayerNorm": 256}.get(name, 32)
    expected = {"float64, mean twice": len(rows_of(name, x))} if mean > limit else {}
    assert levels(name, params, x, dy) == {"forward": expected, "backward": expected}


@EACH
@COMPUTE
@pytest.mark.parametrize("mean", [300, 1e4, 1e6, 1e7])
def test_a_mean_far_from_zero_leaves_all_digits(name, compute, mean):
    params, x, dy = problem(name, 12)
    x = x + np.float32(mean)
    unit = 4 if (name, compute) == ("RMSNorm", "float32") else 0.51  # RMSNorm needs no mean
    check(name, run(MAKE[name](params, compute=compute), x, dy), exact(name, params, x, dy), unit)


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "BatchNorm"])
@COMPUTE
def test_a_mean_that_is_small_beside_eps_may_be_far_in_spreads(name, compute):
    params, x, dy = problem(name, 13)
    x = x * np.float32(1e-4) + np.float32(0.1)  # 1000 spreads, and a tenth of sqrt(eps)
    came = run(MAKE[name](params, compute=compute, eps=1.0), x, dy)
    check(name, came, exact(name, params, x, dy, eps=1.0), 0.51, 1)
    rows = len(rows_of(name, x))
    found = levels(name, params, x, dy, compute=compute, eps=1.0)
    assert found == {way: {"float64, mean twice": rows} for way in ("forward", "backward")}


@EACH
@pytest.mark.parametrize("along", [1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("mean", [0, 15, 30, 100, 250, 1e3, 1e5])
def test_a_mean_and_a_dx_that_cancels_do_not_add_up(name, mean, along):
    params, x, _ = problem(name, 9)
    x, params = x + np.float32(mean), {key: np.ones_like(a) for key, a in params.items()}
    eps = along * (1 if name != "RMSNorm" else 1 + mean**2)  # the share of z that is left in dx
    dy = MAKE[name]({}, eps=eps).forward(x)[0]
    came = run(MAKE[name](params, eps=eps), x, dy)
    check(name, {"dx": came["dx"]}, exact(name, params, x, dy, eps=eps), 0.505)


@EACH
@pytest.mark.parametrize("size", [1e-22, 1e18], ids=["tiny", "huge"])
def test_a_dx_that_cancels_is_right_for_a_dy_of_any_size(name, size):
    """The whole row is evaluated again, since |dz|^2 leaves the range of float32: with statistics of all digits."""
    _, x, _ = problem(name, 6)
    channels = SHAPES[name][1]
    params = {"weight": np.ones(channels, "float32"), "bias": np.zeros(channels, "float32")}
    y, _ = MAKE[name](params, compute="float32").forward(x)
    dy = y * np.float32(size)
    came = run(MAKE[name](params, compute="float32"), x, dy)
    check(name, {"dx": came["dx"]}, exact(name, params, x, dy), 4)


@EACH
@pytest.mark.parametrize(("x_size", "dy_size", "w_size", "eps"), [(3e-30, 3e-15, 1, 1e-28), (1e-29, 1, 1e4, 1e29)])
def test_products_of_small_numbers_keep_their_digits_beside_eps(name, x_size, dy_size, w_size, eps):
    params, x, dy = problem(name, 10)
    x, dy = x * np.float32(x_size), dy * np.float32(dy_size)
    params = {"weight": params["weight"] * np.float32(w_size), "bias": 0 * params["bias"]}
    expected = exact(name, params, x, dy, eps=eps)
    check(name, run(MAKE[name](params, eps=eps, compute="float32"), x, dy), expected, 4)


def test_constant_rows_are_evaluated_fast():
    params, x, dy = problem("LayerNorm", 11)
    assert levels("LayerNorm", params, np.full_like(x, 3), dy) == NONE


WIDTHS = [*range(1, 21), *range(8191, 8201)]


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@COMPUTE
def test_any_width_is_right(name, compute):
    for width in WIDTHS:
        params, x, dy = problem(name, width, (3, width))
        layer = MAKE[name](params, compute=compute)
        check(name, run(layer, x, dy), exact(name, params, x, dy), 4 if compute == "float32" else 0.51)
        count = explain(layer, x, dy)["forward"]
        wide = "float64" if compute == "float64" else "float64, mean twice"
        first = "exact" if width < SHORT else wide if width < SHORT_FLOAT32 else compute
        assert count[first] == 3


@pytest.mark.parametrize("name", ["GroupNorm", "BatchNorm"])
@COMPUTE
@pytest.mark.parametrize("lane", [1, 2, SPACE - 1, SPACE, SPACE + 1, 8191, 8193])
def test_any_lane_is_right(name, compute, lane):
    params, x, dy = problem(name, lane, (3, 8, lane))
    layer = MAKE[name](params, compute=compute)
    check(name, run(layer, x, dy), exact(name, params, x, dy), 4 if compute == "float32" else 0.51, 16)
    rows = len(rows_of(name, x))
    assert explain(layer, x, dy)["forward"] == {f"{compute}, mean folded" if lane >= SPACE else "exact": rows}


@EACH
@COMPUTE
@pytest.mark.parametrize("count", [0, 1])
def test_one_row_or_none(name, compute, count):
    shape = {2: (count, 40), 3: (count, 8, 20)}[len(SHAPES[name])]
    params, x, dy = problem(name, 8, shape)
    if name == "BatchNorm" and not count:
        with pytest.raises(ValueError, match="Its variance says nothing"):
            MAKE[name](params, compute=compute).forward(x)
        return
    came = run(MAKE[name](params, compute=compute), x, dy)
    assert (came["y"].shape, came["dx"].shape) == (shape, shape)
    check(name, came, exact(name, params, x, dy), 4) if count else same_bits(
        came["weight"], np.zeros(shape[1], "float32")
    )


# Which rows need care.

SPECIAL_X = {
    "ordinary": lambda r: r,
    "huge": lambda r: r * 1e30,
    "the largest": lambda r: np.sign(r) * 3.4e38,
    "tiny": lambda r: r * 1e-30,
    "subnormal": lambda r: r * 1e-41,
    "the smallest": lambda r: np.sign(r) * 1e-45,
    "a mean of 10": lambda r: r + 10,
    "a mean of 1e4": lambda r: r + 1e4,
    "a mean of 1e7": lambda r: r + 1e7,
    "a huge mean": lambda r: r + 1e30,
    "constant": lambda r: 0 * r + 3.7,
    "zero": lambda r: 0 * r,
    "one number": lambda r: np.where(r == r.max(), 1e3, 0),
}
SPECIAL_DY = {
    "ordinary": lambda r, z: r,
    "z": lambda r, z: z,
    "nearly z": lambda r, z: z + 1e-3 * r,
    "zero": lambda r, z: 0 * r,
    "huge": lambda r, z: r * 1e30,
    "tiny": lambda r, z: r * 1e-30,
    "subnormal": lambda r, z: r * 1e-41,
}


def with_special_row(name, seed, of_x, of_dy):
    """Return parameters, x and dy, whose row 3 is special; and where a gradient does not see it."""
    params, x, dy = problem(name, seed)
    with np.errstate(all="ignore"):
        row, row_dy = rows_of(name, x)[3], rows_of(name, dy)[3]
        row[...] = of_x(row.astype("float64"))
        bare, own = MAKE[name]({}), x.astype("float64")
        z = rows_of(name, bare.forward(own)[0])[3]
        w = params["weight"]
        w = w[3] if name == "BatchNorm" else w[4:, None] if name == "GroupNorm" else w
        row_dy[...] = of_dy(row_dy.astype("float64"), z / w)
    return params, x, dy


@EACH
@pytest.mark.parametrize("of_dy", SPECIAL_DY)
@pytest.mark.parametrize("of_x", SPECIAL_X)
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_a_row_that_needs_care_is_right(name, of_x, of_dy, eps):
    params, x, dy = with_special_row(name, 9, SPECIAL_X[of_x], SPECIAL_DY[of_dy])
    rows = "y", "dx"
    expected = exact(name, params, x, dy, eps=eps)
    for compute, unit in (("float32", 4), ("float64", 0.51)):
        came = run(MAKE[name](params, eps=eps, compute=compute), x, dy)
        if (of_dy, eps) == ("z", 0.0):  # of z itself nothing is left, only of what rounding made of it
            del came["dx"]
        check(name, {k: came[k] for k in rows if k in came}, expected, unit)
        wide = np.abs(expected["weight"]).max()
        if of_dy not in ("huge", "z", "nearly z") and 0 < wide < 3e38:
            check(name, {k: came[k] for k in params}, expected, 0, 8)


BAD = {
    "NaN": lambda r: np.where(r == r.max(), np.nan, r),
    "inf": lambda r: np.where(r == r.max(), np.inf, r),
    "-inf everywhere": lambda r: 0 * r - np.inf,
}


@EACH
@COMPUTE
@pytest.mark.parametrize("special", [name for name in SPECIAL_X if name != "ordinary"] + list(BAD))
def test_the_rows_beside_a_special_row_keep_their_bits(name, compute, special):
    params, x, dy = problem(name, 10)
    layer = MAKE[name](params, compute=compute)
    plain = run(layer, x, dy)
    _, x, dy = with_special_row(name, 10, (SPECIAL_X | BAD)[special], SPECIAL_DY["ordinary"])
    came = run(layer, x, dy)
    for key in ("y", "dx"):
        a, b = (np.delete(rows_of(name, tree[key]), 3, axis=0) for tree in (came, plain))
        same_bits(a, b)


@EACH
@COMPUTE
@pytest.mark.parametrize("special", BAD)
def test_rows_that_are_not_finite_come_out_as_in_float64(name, compute, special):
    params, x, dy = with_special_row(name, 11, BAD[special], SPECIAL_DY["ordinary"])
    came = run(MAKE[name](params, compute=compute), x, dy)
    check(name, came, exact(name, params, x, dy), 4)
    assert np.isnan(rows_of(name, came["y"])[3]).any()


@EACH
@COMPUTE
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_dy_that_is_not_finite_stays_in_its_row(name, compute, bad):
    params, x, dy = problem(name, 12)
    rows_of(name, dy)[3, ..., 5] = bad
    came = run(MAKE[name](params, compute=compute), x, dy)
    check(name, came, exact(name, params, x, dy), 4)
    assert not np.isfinite(rows_of(name, came["dx"])[3]).any()


@EACH
def test_only_rows_that_lost_digits_are_evaluated_again(name):
    params, x, dy = with_special_row(name, 13, SPECIAL_X["a mean of 1e4"], SPECIAL_DY["ordinary"])
    if name == "RMSNorm":
        x[3] = 1e-41
    found = levels(name, params, x, dy, compute="float32")
    assert found == {way: {"float64, mean twice": 1} for way in found}


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "BatchNorm"])
def test_a_row_that_is_all_but_constant_is_evaluated_exactly(name):
    params, x, dy = problem(name, 14, {"LayerNorm": (6, 2048)}.get(name, (6, 8, 512)))
    row = rows_of(name, x)[3]
    row[...] = 2.0**24
    row[..., -1:][:1] += 2  # the next float32: the mean is 2^28 spreads or so
    expected = {"float64, mean twice": 1, "exact": 1}
    assert levels(name, params, x, dy) == {"forward": expected, "backward": expected}
    check(name, run(MAKE[name](params), x, dy), exact(name, params, x, dy), 0.51)


@EACH
@COMPUTE
def test_rows_whose_dx_cancels_keep_their_other_results(name, compute):
    params, x, dy = with_special_row(name, 9, SPECIAL_X["ordinary"], SPECIAL_DY["z"])
    settings = {"compute": compute, "eps": 1e-9}
    assert levels(name, params, x, dy, **settings) == {"forward": {}, "backward": {"dx again": 1}}
    check(name, run(MAKE[name](params, **settings), x, dy), exact(name, params, x, dy, eps=1e-9), 4)


# The same bits, however it is run.


def alone(name, params, a, i):
    """Return the i-th row, sample or channel of an array, and the parameters that it meets."""
    if name == "BatchNorm":
        return {key: p[i : i + 1] for key, p in params.items()}, np.ascontiguousarray(a[:, i : i + 1])
    return params, a[i : i + 1]


@EACH
@COMPUTE
def test_a_row_has_the_same_bits_alone_and_among_others(name, compute):
    params, x, dy = problem(name, 14, LARGE[name])
    set_threads(2)
    together = run(MAKE[name](params, compute=compute), x, dy)
    for i in (0, 1, 2, 5):
        own, x_i = alone(name, params, x, i)
        _, dy_i = alone(name, params, dy, i)
        layer = MAKE[name](own, compute=compute)
        for _ in range(2):  # the second time in the way of small arrays
            came = run(layer, x_i, dy_i)
            for key in ("y", "dx"):
                same_bits(came[key], alone(name, params, together[key], i)[1])


@EACH
@COMPUTE
@pytest.mark.parametrize("block", [1, 12_345, 1 << 17, 1 << 40])
def test_blocks_of_any_size_and_any_threads_give_the_same_bits(name, compute, block, monkeypatch):
    params, x, dy = problem(name, 15, LARGE[name])
    rows_of(name, x)[3] *= np.float32(1e30)  # a row that needs care
    layer = MAKE[name](params, compute=compute)
    set_threads(1)
    expected = run(layer, x, dy)
    monkeypatch.setattr("npnorm.engine.rows.BLOCK", block)
    found = []
    for threads in (1, 2):
        set_threads(threads)
        found.append(run(layer, x, dy))
    same_bits(found[1], found[0])  # the gradients, too
    for key in ("y", "dx"):
        same_bits(found[0][key], expected[key])
    for key in params:
        close(found[0][key], expected[key], 2e-5 if compute == "float32" else 1e-7)


@EACH
@COMPUTE
@pytest.mark.parametrize("special", ["a mean of 1e4", "ordinary"])
def test_any_number_of_threads_gives_the_same_gradients(name, compute, special):
    params, x, dy = problem(name, 16, LARGE[name])
    row = rows_of(name, x)[5]
    row[...] = SPECIAL_X[special](row)
    layer, found = MAKE[name](params, compute=compute), []
    for threads in (1, 2, 3):
        set_threads(threads)
        found.append(run(layer, x, dy))
    same_bits(found[1], found[0])
    same_bits(found[2], found[0])


@pytest.mark.parametrize("groups", [1, 2, 3, 6])
@pytest.mark.parametrize("rows", [1, 2, 4, 5])
def test_blocks_may_begin_within_a_sample(groups, rows, monkeypatch):
    rng = np.random.default_rng(17)
    x, dy = rng.standard_normal((2, 7, 6, 20)).astype("float32")
    w, b = rng.standard_normal((2, 6)).astype("float32")
    for compute in ("float32", "float64"):
        layer = GroupNorm(groups, w, b, compute=compute)
        expected = run(layer, x, dy)
        monkeypatch.setattr("npnorm.engine.rows.BLOCK", rows * 20 * (6 // groups) * int(compute[-2:]) // 8)
        same_bits(run(layer, x, dy), expected)
        monkeypatch.undo()


# The short way for small arrays.


def outcome(call):
    """Return what comes out of a call, or its error."""
    try:
        return {"came": call()}
    except (TypeError, ValueError) as problem:
        return f"{type(problem).__name__}: {problem}"


def same_outcome(a, b):
    if isinstance(a, str) or isinstance(b, str):
        assert a == b
    else:
        same_bits(a, b)


def checked(layer, x, dy):
    """Return in which passes the arrays are checked: in none the short way, which knows arrays like them."""
    passes = []
    _, *saved = layer.rows.forward(x, layer.params, check=lambda **_: passes.append("forward"))
    layer.rows.backward(dy, x, layer.params, *saved, check=lambda **_: passes.append("backward"))
    return passes


FEATURES = pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])


@FEATURES
@COMPUTE
@pytest.mark.parametrize("shape", [(12, 40), (40,), (2, 3, 40), (16, 1024), (2, 10, 1024)])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("names", [("weight", "bias"), ("weight",), ()], ids=len)
def test_small_arrays_take_the_short_way_with_the_same_bits(name, compute, shape, dtype, names):
    rng = np.random.default_rng(18)
    x, dy = rng.standard_normal((2, *shape)).astype(dtype)
    layer = MAKE[name]({n: rng.standard_normal(shape[-1]).astype(dtype) for n in names}, compute=compute)
    assert checked(layer, x, dy) == ["forward", "backward"]
    assert checked(layer, x, dy) == []
    expected = run(MAKE[name](layer.params, compute=compute), x, dy)
    same_bits(run(layer, x, dy), expected)
    y, dx = np.full_like(x, np.nan), np.full_like(x, np.nan)
    came, saved = layer.forward(x, out=y)
    assert came is y
    came, grads = layer.backward(dy, saved, out=dx)
    assert came is dx
    same_bits({"y": y, "dx": dx, **grads}, expected)


@FEATURES
def test_what_is_saved_the_short_way_is_what_is_saved_the_long_way(name):
    params, x, _ = problem(name, 19)
    layer = MAKE[name](params, compute="float32")
    (_, first), (_, second) = layer.forward(x), layer.forward(x)
    assert second.x is x
    assert first.exponent is second.exponent is None
    same_bits(numbers(second), numbers(first))


@FEATURES
def test_arrays_of_several_blocks_do_not_take_the_short_way(name, monkeypatch):
    monkeypatch.setattr("npnorm.engine.rows.BLOCK", 8 * 39 * 40)
    layer, x = MAKE[name]({}), np.random.default_rng(18).standard_normal((40, 40)).astype("float32")
    for _ in range(2):
        assert checked(layer, x, x) == ["forward", "backward"]


@FEATURES
@COMPUTE
@pytest.mark.parametrize("of_dy", SPECIAL_DY)
@pytest.mark.parametrize("of_x", [*SPECIAL_X, *BAD])
def test_rows_that_need_care_get_it_the_short_way_too(name, compute, of_x, of_dy):
    params, x, dy = problem(name, 20)
    layer = MAKE[name](params, compute=compute)
    run(layer, x, dy)
    _, x, dy = with_special_row(name, 20, (SPECIAL_X | BAD)[of_x], SPECIAL_DY[of_dy])
    same_bits(run(layer, x, dy), run(MAKE[name](params, compute=compute), x, dy))


OTHERS = {
    # what comes after an ordinary call: layer, x, dy
    "the same again": lambda layer, x, dy: (x, dy),
    "another x of this shape": lambda layer, x, dy: (x[::-1].copy(), dy),
    "x column by column": lambda layer, x, dy: (np.asfortranarray(x), dy),
    "dy column by column": lambda layer, x, dy: (x, np.asfortranarray(dy)),
    "every second column": lambda layer, x, dy: (np.repeat(x, 2, axis=1)[:, ::2], np.repeat(dy, 2, axis=1)[:, ::2]),
    "x not aligned": lambda layer, x, dy: (np.ndarray(x.shape, x.dtype, b"\0" + x.tobytes(), offset=1), dy),
    "dy not aligned": lambda layer, x, dy: (x, np.ndarray(x.shape, x.dtype, b"\0" + dy.tobytes(), offset=1)),
    "big-endian x": lambda layer, x, dy: (x.astype(">f4"), dy),
    "big-endian dy": lambda layer, x, dy: (x, dy.astype(">f4")),
    "float16 x": lambda layer, x, dy: (x.astype("float16"), dy),
    "float16 dy": lambda layer, x, dy: (x, dy.astype("float16")),
    "float64 x": lambda layer, x, dy: (x.astype("float64"), dy),
    "float64 dy": lambda layer, x, dy: (x, dy.astype("float64")),
    "integers for dy": lambda layer, x, dy: (x, dy.astype("int32")),
    "integers for x": lambda layer, x, dy: (x.view("int32"), dy),
    "another width": lambda layer, x, dy: (x[:, :39].copy(), dy),
    "another width of dy": lambda layer, x, dy: (x, dy[:, :39].copy()),
    "fewer rows of dy": lambda layer, x, dy: (x, dy[:5].copy()),
    "one row of dy": lambda layer, x, dy: (x, dy[:1]),
    "fewer rows": lambda layer, x, dy: (x[:5], dy[:5]),
    "dy of another form": lambda layer, x, dy: (x, dy.reshape(3, 4, 40)),
    "another form": lambda layer, x, dy: (x.reshape(3, 4, 40), dy.reshape(3, 4, 40)),
    "a list for x": lambda layer, x, dy: (x.tolist(), dy),
    "a list for dy": lambda layer, x, dy: (x, dy.tolist()),
    "None for dy": lambda layer, x, dy: (x, None),
    "a masked dy": lambda layer, x, dy: (x, np.ma.masked_array(dy)),
}


@FEATURES
@COMPUTE
@pytest.mark.parametrize("what", OTHERS)
def test_what_differs_from_a_small_call_before_is_seen(name, compute, what):
    params, x, dy = problem(name, 21)
    layer = MAKE[name](params, compute=compute)
    for _ in range(2):
        run(layer, x, dy)
    x, dy = OTHERS[what](layer, x, dy)
    same_outcome(outcome(lambda: run(layer, x, dy)), outcome(lambda: run(MAKE[name](params, compute=compute), x, dy)))


PARAMETERS = {
    "another weight": lambda p: p.__setitem__("weight", p["weight"] + 1),
    "another bias": lambda p: p.__setitem__("bias", p["bias"] + 1),
    "a wider weight": lambda p: p.__setitem__("weight", p["weight"].astype("float64")),
    "a weight of another width": lambda p: p.__setitem__("weight", p["weight"][:39]),
    "a weight in place": lambda p: p["weight"].__imul__(2),
    "a bias in place": lambda p: p["bias"].__iadd__(1),
    "a weight of zeros": lambda p: p["weight"].fill(0),
    "a weight without its bias": lambda p: p.pop("bias"),
    "a bias without its weight": lambda p: p.pop("weight"),
}


@FEATURES
@COMPUTE
@pytest.mark.parametrize("what", PARAMETERS)
def test_parameters_that_change_between_calls_are_seen(name, compute, what):
    params, x, dy = problem(name, 22)
    layer = MAKE[name](params, compute=compute)
    for _ in range(2):
        before = run(layer, x, dy)
    PARAMETERS[what](layer.params)
    fresh = MAKE[name](params, compute=compute)
    fresh.params = layer.params
    came = outcome(lambda: run(layer, x, dy))
    same_outcome(came, outcome(lambda: run(fresh, x, dy)))
    assert isinstance(came, str) or any(not np.array_equal(came["came"].get(k), a) for k, a in before.items())


@FEATURES
def test_a_parameter_that_is_added_between_calls_is_seen(name):
    params, x, dy = problem(name, 23)
    layer = MAKE[name]({"weight": params["weight"]})
    for _ in range(2):
        run(layer, x, dy)
    layer.params["bias"] = params["bias"]
    same_outcome(outcome(lambda: run(layer, x, dy)), outcome(lambda: run(MAKE[name](params), x, dy)))


@FEATURES
def test_the_same_arrays_under_another_name_are_refused_the_short_way_too(name):
    params, x, dy = problem(name, 24)
    layer = MAKE[name](params)
    for _ in range(2):
        run(layer, x, dy)
    _, saved = layer.forward(x)
    layer.params = {f"{name}s": a for name, a in layer.params.items()}
    for call in (lambda: layer.forward(x), lambda: layer.backward(dy, saved)):
        with pytest.raises(ValueError, match=r"params has '\w+s', which means nothing\. It takes "):
            call()


@FEATURES
@COMPUTE
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30, 1e-40])
def test_a_weight_out_of_range_is_seen_the_short_way_too(name, compute, value):
    params, x, dy = problem(name, 24)
    layer = MAKE[name](params, compute=compute)
    for _ in range(2):
        run(layer, x, dy)
    params["weight"][3] = value
    came, expected = run(layer, x, dy), exact(name, params, x, dy)
    check(name, came, expected, 4)


@FEATURES
@COMPUTE
def test_what_another_norm_saved_is_refused_or_used_the_short_way_too(name, compute):
    params, x, dy = problem(name, 25)
    layer = MAKE[name](params, compute=compute)
    for _ in range(2):
        run(layer, x, dy)
    other = MAKE[name](params, eps=0.5, compute=compute)
    _, saved = other.forward(x)
    same_bits(layer.backward(dy, saved)[0], MAKE[name](params, compute=compute).backward(dy, saved)[0])
    _, fewer = layer.forward(x[:5])
    mixed = fewer._replace(x=x)
    with pytest.raises(ValueError, match=r"makes 12 rows of x, and saved has statistics of 5\."):
        layer.backward(dy, mixed)
    with pytest.raises(TypeError, match="backward"):
        layer.backward(dy, (x,))


@COMPUTE
def test_a_residual_is_added_before_rounding(compute):
    rng = np.random.default_rng(26)
    w = rng.standard_normal(40).astype("float32")
    x, residual, dy, dh = rng.standard_normal((4, 12, 40)).astype("float32")
    dy[3] = 0
    layer, wide = AddRMSNorm(w, compute=compute), AddRMSNorm(w.astype("float64"))
    for _ in range(2):
        (_, h), saved = layer.forward(x, residual)
        (dx, dresidual), grads = layer.backward(dy, dh, saved)
    _, wide_saved = wide.forward(h.astype("float64"), np.zeros((12, 40)))
    (expected, _), of_w = wide.backward(dy.astype("float64"), dh.astype("float64"), wide_saved)
    check("RMSNorm", {"dx": dx, **grads}, {"dx": expected, **of_w}, 4 if compute == "float32" else 0.51)
    same_bits(dresidual, dx)
    same_bits(dx[3], dh[3])
    assert not np.shares_memory(dx, dresidual)


@COMPUTE
def test_a_residual_is_added_to_rows_that_need_care(compute):
    rng = np.random.default_rng(27)
    w = rng.standard_normal(40).astype("float32")
    h, dy, dh = rng.standard_normal((3, 12, 40)).astype("float32")
    h[3] *= np.float32(1e-41)
    h[5] *= np.float32(1e36)
    layer, wide = AddRMSNorm(w, compute=compute), AddRMSNorm(w.astype("float64"))
    _, saved = layer.forward(h, np.zeros_like(h))
    _, wide_saved = wide.forward(h.astype("float64"), np.zeros(h.shape))
    (dx, _), _ = layer.backward(dy, dh, saved)
    (expected, _), _ = wide.backward(dy.astype("float64"), dh.astype("float64"), wide_saved)
    check("RMSNorm", {"dx": dx}, {"dx": expected}, 4 if compute == "float32" else 0.51)


# Results written to out.


@EACH
@COMPUTE
@pytest.mark.parametrize("large", [False, True])
def test_what_is_written_to_out_has_the_same_bits(name, compute, large):
    params, x, dy = problem(name, 28, LARGE[name] if large else None)
    rows_of(name, x)[3] *= np.float32(1e30)
    layer = MAKE[name](params, compute=compute)
    expected, of_saved = run(layer, x, dy), layer.forward(x)[1]
    y, dx = np.full_like(x, np.nan), np.full_like(x, np.nan)
    came, saved = layer.forward(x, out=y)
    assert came is y
    same_bits(numbers(saved), numbers(of_saved))
    came, grads = layer.backward(dy, saved, out=dx)
    assert came is dx
    same_bits({"y": y, "dx": dx, **grads}, expected)


@EACH
def test_an_out_that_is_not_aligned_is_written_to_or_refused(name):
    params, x, dy = problem(name, 29)
    layer = MAKE[name](params, compute="float32")
    expected, saved = run(layer, x, dy), layer.forward(x)[1]
    out = np.ndarray(x.shape, x.dtype, bytearray(1 + x.nbytes), offset=1)
    for key, call in (("y", lambda: layer.forward(x, out=out)), ("dx", lambda: layer.backward(dy, saved, out=out))):
        try:
            came, _ = call()
        except ValueError:
            continue
        np.testing.assert_array_equal(came, expected[key])


@FEATURES
def test_an_out_that_is_read_is_refused_the_short_way_too(name):
    params, x, dy = problem(name, 32)
    layer = MAKE[name](params)
    for _ in range(2):
        _, saved = layer.forward(x)
        layer.backward(dy, saved)
    whole = np.zeros((13, 40), "float32")
    whole[:12] = x
    for bad in (x, dy, x[:5], x.astype("float64"), np.asfortranarray(x)):
        with pytest.raises(ValueError, match=r"out must be|out shares"):
            layer.backward(dy, saved, out=bad)
        if bad is not dy:
            with pytest.raises(ValueError, match=r"out must be|out shares"):
                layer.forward(x, out=bad)
    with pytest.raises(ValueError, match="out shares memory"):
        layer.forward(whole[:12], out=whole[1:])


@FEATURES
def test_an_out_in_the_memory_of_a_parameter_is_refused(name):
    params, x, dy = problem(name, 30)
    layer = MAKE[name](params)
    _, saved = layer.forward(x[:1])
    before = {key: a.copy() for key, a in params.items()}
    for a in params.values():
        with pytest.raises(ValueError, match="out shares memory"):
            layer.forward(x[:1], out=a[None])
        with pytest.raises(ValueError, match="out shares memory"):
            layer.backward(dy[:1], saved, out=a[None])
    same_bits(params, before)


@pytest.mark.parametrize(("compute", "forward", "backward"), [("float32", 0.02, 0.15), ("float64", 0.1, 0.2)])
def test_with_out_hardly_any_memory_is_taken(compute, forward, backward):
    rng = np.random.default_rng(31)
    x, dy = (rng.standard_normal((4096, 1024), dtype="float32") for _ in range(2))
    layer, out = LayerNorm.init(1024, compute=compute), np.empty_like(x)
    _, saved = layer.forward(x, out=out)
    layer.backward(dy, saved, out=out)

    def peak(call):
        tracemalloc.start()
        try:
            call()
            return tracemalloc.get_traced_memory()[1] / x.nbytes
        finally:
            tracemalloc.stop()

    set_threads(1)  # a thread that comes late makes scratch of its own
    layer.backward(dy, layer.forward(x, out=out)[1], out=out)
    assert peak(lambda: layer.forward(x, out=out)) < forward
    assert peak(lambda: layer.backward(dy, saved, out=out)) < backward


@pytest.mark.parametrize("mean", [0, 1e6])
def test_statistics_are_the_same_of_rows_in_float64(mean):
    x = np.random.default_rng(32).standard_normal((5, 1000)).astype("float32") + np.float32(mean)
    levels = LayerNorm(compute="float32").rows.levels
    narrow, wide = (flatten(levels.statistics(a)) for a in (x, x.astype("float64")))
    for a, b in zip(narrow, wide, strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("mean", [2, 1e5])
def test_a_formula_may_use_x_after_it_was_centred(mean):
    def forward(row, x, w, b):
        c, mean, var = row.centre(x)
        return c * 3 + x * w + b, (mean, 1 / np.sqrt(var + row.eps))

    def backward(row, dy, x, w, mean, rstd):
        c = row.subtract(x, mean)
        return c * row.mean(dy * x), dy, dy

    x, dy = np.random.default_rng(33).standard_normal((2, 12, 40)).astype("float32")
    x += np.float32(mean)
    rows = Rows(Features("a norm", SOLO), Formula(forward, backward, None), 1e-5)
    y, statistics, exponent = rows.forward(x, {})
    assert statistics[0].low.any() == (mean == 1e5)  # the mean was subtracted twice
    dx, _ = rows.backward(dy, x, {}, statistics, exponent)
    own = x.astype("float64")
    c = own - own.mean(axis=1, keepdims=True)
    close(y, 3 * c + own, 1e-7)
    close(dx, c * (dy * own).mean(axis=1, keepdims=True), 1e-7)
