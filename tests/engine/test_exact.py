"""The exact evaluation: float64 over its whole range."""

import itertools

import numpy as np
import pytest

from npnorm import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from npnorm.engine import explain
from npnorm.engine.exact import Exact
from npnorm.threads import set_threads
from tests.check import close, draw, exact_norm, run, same_bits

NORMS = pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])


@NORMS
def test_scaled_rows_give_the_same_bits_in_any_block(norm, monkeypatch):
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((7, 9)) * np.logspace(-300, 300, 7)[:, None], rng.standard_normal((7, 9))
    layer = norm(eps=1e-5)
    expected = run(layer, x, dy)
    monkeypatch.setattr("npnorm.engine.rows.EXACT_BLOCK", 2 * 8 * 9)
    same_bits(run(layer, x, dy), expected)


@NORMS
@pytest.mark.parametrize("power", [-900, -520, -451, -449, 449, 451, 520, 900])
def test_a_power_of_two_does_not_change_a_bit_without_eps(norm, power):
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((4, 7)), rng.standard_normal((4, 7))
    layer = norm(**draw(rng, weight=7, bias=7), eps=0)
    expected, came = run(layer, x, dy), run(layer, x * 2.0**power, dy)
    came["dx"] *= 2.0**power
    same_bits(came, expected)


SIZES = [1e-300, 1e-200, 1e-150, 1e-100, 1e-3, 1e100, 1e150, 1e200, 1e300]
SMALLEST = [(1e-310, 1e-280), (1e-160, 1e-310), (0.0, 1e-300)]  # eps beside numbers as small


@NORMS
@pytest.mark.parametrize(("size", "eps"), [*itertools.product(SIZES, [0.0, 1e-5, 1e-300]), *SMALLEST])
def test_the_whole_range_of_float64_is_right(norm, size, eps):
    rng = np.random.default_rng(6)
    x, dy, params = rng.standard_normal((3, 6)) * size, rng.standard_normal((3, 6)), draw(rng, weight=6, bias=6)
    came = run(norm(**params, eps=eps), x, dy)
    y, dx, dw, db = exact_norm(x, params["weight"], params["bias"], eps, dy, norm is LayerNorm)
    for a, b in zip(came.values(), (y, dx, dw, db), strict=True):
        close(a, b, 1e-14)


@NORMS
def test_the_ends_of_float64_are_right(norm):
    rng = np.random.default_rng(7)
    x = np.array([[5e-324, 1e-323, -2e-323], [1.7e308, -1.7e308, 1e308], [3e-310, 1e-309, 2e-308]])
    dy, params = rng.standard_normal((3, 3)), draw(rng, weight=3, bias=3)
    layer = norm(**params, eps=0)
    y, saved = layer.forward(x)
    expected, _, dw, _ = exact_norm(x, params["weight"], params["bias"], 0, dy, norm is LayerNorm)
    close(y, expected, 1e-14)
    close(layer.backward(dy, saved)[1]["weight"], dw, 1e-14)  # dx itself is out of range


@NORMS
def test_rows_of_every_size_stand_beside_each_other(norm):
    rng = np.random.default_rng(8)
    x = rng.standard_normal((9, 5)) * 10.0 ** np.arange(-280, 281, 70)[:, None]
    dy = rng.standard_normal((9, 5))
    layer = norm(eps=1e-5)
    together = run(layer, x, dy)
    for i in range(9):
        alone = run(layer, x[i : i + 1], dy[i : i + 1])
        same_bits({name: together[name][i : i + 1] for name in alone}, alone)


@NORMS
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 1e300])
def test_a_row_that_is_not_finite_leaves_the_others_alone(norm, bad, size):
    rng = np.random.default_rng(9)
    x, dy = rng.standard_normal((4, 5)) * size, rng.standard_normal((4, 5))
    layer = norm()
    expected = run(layer, x, dy)
    x[2, 1] = bad
    came = run(layer, x, dy)
    for name in ("y", "dx"):
        assert np.isnan(came[name][2]).any()
        same_bits(np.delete(came[name], 2, axis=0), np.delete(expected[name], 2, axis=0))


@NORMS
@pytest.mark.parametrize("block", [1, 3 * 8 * 67, 1 << 30])
def test_a_block_holds_as_many_rows_as_fit(norm, block, monkeypatch):
    monkeypatch.setattr("npnorm.engine.rows.EXACT_BLOCK", block)
    sizes, forward = [], Exact.forward

    def counting(self, arrays, *given):
        sizes.append(len(arrays[0]))
        return forward(self, arrays, *given)

    monkeypatch.setattr(Exact, "forward", counting)
    norm().forward(np.random.default_rng(20).standard_normal((10, 67)))
    assert sizes == {1: [1] * 10, 3 * 8 * 67: [3, 3, 3, 1], 1 << 30: [10]}[block]


LARGE = {
    "LayerNorm": (lambda p: LayerNorm(**p), (1100, 1000), 1000),
    "RMSNorm": (lambda p: RMSNorm(**p), (1100, 1000), 1000),
    "GroupNorm": (lambda p: GroupNorm(4, **p), (20, 8, 90, 90), 8),
    "BatchNorm": (lambda p: BatchNorm(**p), (20, 8, 90, 90), 8),
}


@pytest.mark.parametrize("name", LARGE)
def test_any_number_of_threads_gives_the_same_bits(name):
    rng = np.random.default_rng(21)
    make, shape, width = LARGE[name]
    layer = make(draw(rng, weight=width, bias=width))
    x, dy = rng.standard_normal((2, *shape))
    x[3] *= 1e300
    found = []
    try:
        for threads in (1, 3):
            set_threads(threads)
            found.append(run(layer, x, dy))
    finally:
        set_threads(None)
    same_bits(found[1], found[0])


@NORMS
def test_rows_too_short_for_the_levels_are_evaluated_exactly(norm):
    rng = np.random.default_rng(22)
    x, dy = rng.standard_normal((2, 6, 7)).astype("float32")  # rows of fewer than 8 features
    params = draw(rng, "float32", weight=7, bias=7)
    layer = norm(**params, compute="float32")
    expected = exact_norm(x, params["weight"], params["bias"], layer.eps, dy, norm is LayerNorm)
    came = run(layer, x, dy)
    assert explain(layer, x, dy) == {"forward": {"exact": 6}, "backward": {"exact": 6}}
    for a, b in zip(came.values(), expected, strict=True):
        same_bits(a, b.astype("float32"))


@pytest.mark.parametrize(
    "layer", [LayerNorm(np.ones(2)), RMSNorm(np.ones(2)), GroupNorm(1, np.ones(2)), BatchNorm(np.ones(2))], ids=repr
)
def test_sums_of_subnormal_numbers_are_rounded_once(layer):
    rng = np.random.default_rng(23)
    shape = (1, 2, 900) if isinstance(layer, GroupNorm) else (900, 2)
    x, dy = rng.integers(-9, 9, shape), rng.standard_normal(shape)
    came, scaled = (run(layer, x * 2.0**power, dy)["weight"] for power in (-1063, -500))
    np.testing.assert_allclose(came, 2.0**-563 * scaled, rtol=0, atol=2 * 5e-324)
