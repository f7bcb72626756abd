"""Rows on a device that is not the host: arrays of array-api-strict, on which every stray NumPy call raises."""

import array_api_strict
import numpy as np
import pytest

from npnorm import CastRMSNorm
from npnorm.arrays import to_numpy
from npnorm.engine.exact import Exact
from npnorm.engine.guards import LIMITS, Guards, Lost
from npnorm.engine.statistics import Mean
from npnorm.tree import map_tree
from tests.check import close, same_bits
from tests.engine.formulas import CASES, IMAGES, hard_rows, pairs, within

DEVICE = array_api_strict.Device("device1")
CASE = pytest.mark.parametrize("name", CASES)


def put(a):
    return array_api_strict.asarray(np.ascontiguousarray(a), device=DEVICE)


@pytest.fixture
def exact_rows(monkeypatch):
    """Return how many rows `Exact` was given, call by call."""
    found = []

    def spy(method):
        original = getattr(Exact, method)

        def call(self, arrays, *rest):
            found.append(arrays[0].shape[0])
            return original(self, arrays, *rest)

        monkeypatch.setattr(Exact, method, call)

    spy("forward")
    spy("backward")
    return found


@CASE
def test_float32_needs_no_float64_for_ordinary_rows(name, exact_rows):
    params, x, dy = CASES[name].draw()
    there = CASES[name].run(put, params, x, dy, "float32")
    assert not exact_rows
    within(there, CASES[name].run(np.asarray, params, x, dy))


@CASE
def test_float64_is_the_exact_way(name, exact_rows):
    params, x, dy = CASES[name].draw()
    there = CASES[name].run(put, params, x, dy)
    assert len(exact_rows) == 2
    here = CASES[name].run(np.asarray, params, x, dy)
    for key, a, b in pairs(there, here):
        close(a, b, 1e-6 if key in here["grads"] else 2.0**-24)


def hard(name, eps=1e-5):
    """Return a problem with rows that lose digits in float32; without those of zeros, if eps is 0."""
    params, x, dy = CASES[name].draw((9, 4, 5, 8) if name in IMAGES else None)
    dy = dy.copy()
    if name in IMAGES:
        channel = x.swapaxes(0, 1) if name.startswith("Batch") else x
        channel[2], channel[3] = channel[2] * 1e-42, channel[3] * 1e25
        channel[1] = 7 if eps else channel[1] + 100
        dy[0], dy[5] = 0, dy[5] * 1e-30
    else:
        x = hard_rows(x)
        x = x if eps else np.delete(x, (1, 8), axis=0)
        dy = dy[: len(x)]
        dy[0], dy[2], dy[5] = x[0] / (params["weight"] + CASES[name].offset), 0, dy[5] * 1e-30
    return params, x, dy


@pytest.mark.parametrize("name", [name for name in CASES if "inference" not in name])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_rows_that_lost_digits_are_evaluated_again(name, eps, exact_rows):
    problem = hard(name, eps)
    there = CASES[name].run(put, *problem, "float32", eps)
    assert exact_rows
    assert max(exact_rows) < 25  # of 9 to 36 rows
    within(there, CASES[name].run(np.asarray, *problem, eps=eps))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_they_are_those_that_numpy_evaluates_again(name, monkeypatch):
    found = []

    def spy(function):
        original = getattr(Guards, function)

        def call(self, *given):
            lost = original(self, *given)
            if self.limits is LIMITS["float32"]:
                arrays = {"all": lost.rows, "dx": lost.dx} if isinstance(lost, Lost) else {"all": lost}
                found.append({key: None if a is None else to_numpy(a) for key, a in arrays.items()})
            return lost

        monkeypatch.setattr(Guards, function, call)

    spy("lost_forward")
    spy("lost_backward")
    problem = hard(name)
    CASES[name].run(put, *problem, "float32")
    there = list(found)
    found.clear()
    CASES[name].run(np.asarray, *problem, "float32")
    assert len(there) == 2
    for came, expected in zip(there, found, strict=False):  # a third is of the rows that are left
        assert came.keys() == expected.keys()
        assert all(np.array_equal(came[key], expected[key]) for key in came)
        assert came["all"].any()


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"])
def test_their_statistics_have_the_digits(name):
    params, x, _ = hard(name)
    found = []
    for place, compute in ((put, "float32"), (np.asarray, "float64")):
        _, statistics, _ = CASES[name].rows(compute).forward(place(x), map_tree(place, params))
        found.append([to_numpy(s.high + s.low if isinstance(s, Mean) else s) for s in statistics])
    rstd = found[1][-1]
    for a, b in zip(*found, strict=True):
        assert a.dtype == "float64"
        assert np.all(abs(a - b) <= 1e-6 * (abs(b) + 1 / rstd))


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "BatchNorm"])
def test_a_row_does_not_depend_on_others(name):
    params, x, dy = CASES[name].draw()
    first = CASES[name].run(put, params, x, dy, "float32")
    axis = 1 if name == "BatchNorm" else 0
    of_other = np.take(x, 1, axis) * 0 + 5
    (x[:, 1] if axis else x[1])[...] = of_other
    again = CASES[name].run(put, params, x, dy, "float32")
    same_bits(*({key: np.delete(of[key], 1, axis) for key in ("y", "dx")} for of in (again, first)))


@CASE
def test_what_is_added_is_rounded_once(name):
    params, x, dy = CASES[name].draw()
    plus = dy[::-1] * 3
    x = x.copy()
    x[1] = 2
    there = CASES[name].run(put, params, x, dy, "float32", plus=plus)
    within(there, CASES[name].run(np.asarray, params, x, dy, plus=plus))


@CASE
@pytest.mark.parametrize("names", [(), ("weight",), ("bias",)], ids=["none", "weight", "bias"])
def test_without_some_parameters(name, names):
    names = ("weight",) if CASES[name].offset else names
    problem = CASES[name].draw(names=names)
    within(CASES[name].run(put, *problem, "float32"), CASES[name].run(np.asarray, *problem))


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "BatchNorm"])
def test_a_weight_beyond_the_limit_takes_float64(name, exact_rows):
    params, x, dy = CASES[name].draw()
    params["weight"] *= 1e25
    there = CASES[name].run(put, params, x, dy, "float32")
    assert len(exact_rows) == 1
    within(there, CASES[name].run(np.asarray, params, x, dy))


@pytest.mark.parametrize("place", [np.asarray, put], ids=["NumPy", "another module"])
def test_a_weight_beyond_the_limit_is_not_evaluated_in_float32(place, monkeypatch):
    seen, original = [], Exact.backward

    def call(self, arrays, *rest):
        seen.extend(str(a.dtype).rpartition(".")[2] for a in arrays)
        return original(self, arrays, *rest)

    monkeypatch.setattr(Exact, "backward", call)
    params, x, dy = CASES["LayerNorm"].draw()
    params["weight"][-1] = 1e25
    CASES["LayerNorm"].run(place, params, x, dy, "float32")
    assert set(seen) == {"float64"}


@pytest.mark.parametrize("cast", ["llama", "olmo2", "gemma"])
@pytest.mark.parametrize("compute", ["float64", "float32"])
def test_a_formula_that_rounds_rounds_here_too(cast, compute):
    params, x, dy = CASES["RMSNorm"].draw()
    found = []
    for place in (put, np.asarray):
        norm = CastRMSNorm(place(params["weight"]), cast=cast, compute=compute)
        y, saved = norm.forward(place(x))
        dx, grads = norm.backward(place(dy), saved)
        found.append(map_tree(to_numpy, {"y": y, "dx": dx, "grads": grads}))
    same_bits(*found)


def test_short_rows_take_float64(exact_rows):
    params, x, dy = CASES["LayerNorm"].draw((5, 16))
    CASES["LayerNorm"].run(put, params, x, dy, "float32")
    assert exact_rows == [5, 5]


def test_what_is_not_finite_stays_in_its_row():
    params, x, dy = CASES["LayerNorm"].draw()
    x[1, 2], dy[3, 4] = np.nan, np.inf
    there, here = (CASES["LayerNorm"].run(place, params, x, dy, "float32") for place in (put, np.asarray))
    for _, a, b in pairs(there, here):
        np.testing.assert_allclose(a, b, 3e-5, 1e-5)


def test_the_spies_see_the_rows(exact_rows):
    params, x, dy = CASES["LayerNorm"].draw()
    CASES["LayerNorm"].run(put, params, hard_rows(x), dy, "float32")
    assert exact_rows[0] == 5  # 3e4 from zero, 1e30, 1e-30, 1e-40, constant; zeros are no harm beside eps


@pytest.mark.parametrize("place", [np.asarray, put], ids=["NumPy", "another module"])
def test_the_constants_of_an_inference_stay_where_digits_are_lost(place):
    case = CASES["BatchNorm in inference"]
    params, x, dy = case.draw()
    rows, constants = case.rows("float32"), (np.zeros((4, 1, 1)), np.full((4, 1, 1), 2.0**60))  # beyond float32's limit
    x, given, arrays = x * np.float32(2.0**-60), tuple(map(place, constants)), map_tree(place, params)
    dx, grads = rows.backward(place(dy), place(x), arrays, given, None)
    within(
        {"y": np.zeros((1, 1), "float32"), "dx": to_numpy(dx), "grads": map_tree(to_numpy, grads)},
        {
            "y": np.zeros((1, 1), "float32"),
            "dx": dy * params["weight"][:, None, None] * np.float32(2.0**60),
            "grads": {
                "weight": (dy.astype("float64") * x * 2.0**60).sum(axis=(0, 2, 3)).astype("float32"),
                "bias": dy.astype("float64").sum(axis=(0, 2, 3)).astype("float32"),
            },
        },
    )
