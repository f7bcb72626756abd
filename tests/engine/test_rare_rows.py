"""Rows that are rare in tests and common in use: each of these once lost digits, time or memory."""

import signal
import time
import tracemalloc
from functools import partial

import numpy as np
import pytest

from npnorm import BatchNorm, GroupNorm, LayerNorm, PartialRMSNorm, RMSNorm
from npnorm.engine import explain
from npnorm.threads import set_threads
from tests.check import close, exact_norm, run, same_bits
from tests.engine.test_levels import units


@pytest.fixture(autouse=True)
def the_number_of_threads_stays():
    yield
    set_threads(None)


# A spread far below sqrt(eps), and a mean far beyond the spread, in float32.


def test_a_row_of_two_neighbouring_numbers_has_the_right_gradient_in_float32():
    x = np.full((1, 8), 1e-3, "float32")
    x[0, ::3] = np.nextafter(np.float32(1e-3), np.float32(1))
    w = np.array([1, 1.1, 0.9, 1, 1.2, 1, 0.8, 1], "float32")
    layer = LayerNorm(w, eps=1e-5, compute="float32")
    dx, _ = layer.backward(np.ones((1, 8), "float32"), layer.forward(x)[1])
    expected = exact_norm(x, w, np.zeros(8), 1e-5, np.ones((1, 8)), centred=True)[1]
    assert units(dx, expected).max() <= 4


@pytest.mark.parametrize("spread", [1e-4, 1e-5, 1e-6, 1e-9])
@pytest.mark.parametrize("kind", ["LayerNorm", "GroupNorm", "BatchNorm"])
def test_a_small_spread_far_from_zero_is_right_in_float32(spread, kind):
    rng = np.random.default_rng(1)
    noise = rng.standard_normal((6, 1024))
    x = (0.01 + spread * noise).astype("float32")
    dy = (noise + 0.1 * rng.standard_normal((6, 1024))).astype("float32")
    if kind == "LayerNorm":
        came = run(LayerNorm(eps=1e-5, compute="float32"), x, dy)
    elif kind == "GroupNorm":
        came = run(GroupNorm(1, eps=1e-5, compute="float32"), x[:, None], dy[:, None])
    else:
        came = run(BatchNorm(eps=1e-5, compute="float32"), x[None], dy[None])
    y, dx, _, _ = exact_norm(x, np.ones(1024), np.zeros(1024), 1e-5, dy, centred=True)
    assert units(came["y"].reshape(6, 1024), y).max() <= 4
    assert units(came["dx"].reshape(6, 1024), dx).max() <= 4


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_many_short_rows_are_right_in_float32(norm):
    rng = np.random.default_rng(2)
    x, dy = rng.standard_normal((2, 20_000, 9)).astype("float32")
    came = run(norm(compute="float32"), x, dy)
    y, dx, _, _ = (np.asarray(a) for a in textbook(x, dy, norm is LayerNorm))
    assert units(came["y"], y).max() <= 0.51
    assert units(came["dx"], dx).max() <= 0.51


def textbook(x, dy, centred):
    """Return y, dx, dw and db of longdouble arithmetic, for weights of 1."""
    x, dy, eps = x.astype("longdouble"), dy.astype("longdouble"), 1e-5 if centred else 1e-6

    def mean(a):
        return a.mean(axis=-1, keepdims=True)

    c = x - mean(x) if centred else x
    rstd = 1 / np.sqrt(mean(c * c) + eps)
    z = c * rstd
    dx = rstd * (dy - (mean(dy) if centred else 0) - z * mean(dy * z))
    return z, dx, (dy * z).sum(0), dy.sum(0)


# The ends of float64.


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("size", [1e100, 1e300])
def test_the_weight_gradient_of_subnormal_rows_has_all_digits(norm, size):
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((3, 6)) * 1e-320, rng.standard_normal((3, 6)) * size
    came = run(norm(np.ones(6), eps=1e-5), x, dy)
    expected = exact_norm(x, np.ones(6), np.zeros(6), 1e-5, dy, centred=norm is LayerNorm)[2]
    close(came["weight"], expected, 1e-14)


@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_a_gradient_whose_sum_leaves_the_range_on_the_way_is_right(norm):
    rng = np.random.default_rng(4)
    x = np.tile(rng.standard_normal(6), (4, 1))
    dy = np.array([1.5, 1.5, -1.5, -1.0])[:, None] * np.full(6, 1e308)
    came = run(norm(np.ones(6), np.zeros(6)), x, dy)
    close(came["bias"], np.full(6, 0.5e308), 1e-14)
    z = came["y"][0]
    np.testing.assert_allclose(came["weight"], z * 0.5e308, rtol=1e-13)


@pytest.mark.parametrize("orders", [(">f4", "<f4"), ("<f4", ">f4"), (">f4", ">f4")])
def test_x_and_dy_may_differ_in_byte_order(orders):
    x, dy = np.random.default_rng(5).standard_normal((2, 12, 40)).astype("float32")
    for compute in (None, "float32"):
        expected = run(LayerNorm(compute=compute), x, dy)
        came = run(LayerNorm(compute=compute), x.astype(orders[0]), dy.astype(orders[1]))
        same_bits({name: a.astype("float32") for name, a in came.items()}, expected)


# What everybody tries first: loss = y.sum(), loss = (y**2).sum() / 2.

MAKE = {
    "LayerNorm": (lambda **s: LayerNorm.init(512, **s), (2048, 512)),
    "RMSNorm": (lambda **s: RMSNorm.init(512, **s), (2048, 512)),
    "PartialRMSNorm": (lambda **s: PartialRMSNorm.init(512, p=1, **s), (2048, 512)),
    "GroupNorm": (lambda **s: GroupNorm.init(4, 16, **s), (16, 16, 64, 64)),
    "BatchNorm": (lambda **s: BatchNorm.init(16, **s), (16, 16, 64, 64)),
}
INPUTS = {
    "dy = ones": lambda x, y: (x, np.ones_like(x)),
    "dy = y": lambda x, y: (x, y),
    "a mean of 5": lambda x, y: (x + 5, y[::-1].copy()),
    "a mean of 1000": lambda x, y: (x + 1000, y[::-1].copy()),
    "constant": lambda x, y: (0 * x + np.float32(0.1), y),
}


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("what", INPUTS)
@pytest.mark.parametrize("compute", [None, "float32"])
def test_rows_that_lose_digits_take_little_memory(name, what, compute):
    make, shape = MAKE[name]
    layer, x = make(compute=compute), np.random.default_rng(6).standard_normal(shape, dtype="float32")
    x, dy = INPUTS[what](x, layer.forward(x)[0])
    out = np.empty_like(x)
    set_threads(2)
    _, saved = layer.forward(x, out=out)
    layer.backward(dy, saved, out=out)
    tracemalloc.start()
    _, saved = layer.forward(x, out=out)
    layer.backward(dy, saved, out=out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20


def test_dy_of_ones_gives_zeros():
    x = np.random.default_rng(7).standard_normal((5, 64)).astype("float32")
    for dtype in ("float32", "float64"):
        layer = LayerNorm.init(64, dtype)
        came = run(layer, x.astype(dtype), np.ones((5, 64), dtype))
        np.testing.assert_array_equal(came["dx"], np.zeros((5, 64)))


@pytest.mark.parametrize("compute", [None, "float32"])
@pytest.mark.parametrize("make", [LayerNorm, partial(GroupNorm, 2)], ids=["LayerNorm", "GroupNorm"])
def test_dy_of_ones_beside_a_weight_that_is_nearly_constant(make, compute):
    rng = np.random.default_rng(8)
    x = rng.standard_normal((5, 64, 16)[: 3 if make is not LayerNorm else 2]).astype("float32")
    w, b = (1 + 2.0**-14 * rng.standard_normal(64)).astype("float32"), np.zeros(64, "float32")
    came = run(make(weight=w, bias=b, compute=compute), x, np.ones_like(x))["dx"]
    exact = run(make(weight=w.astype("float64"), bias=b.astype("float64")), x.astype("float64"), np.ones(x.shape))["dx"]
    assert np.abs(exact).max() > 1e-6
    assert units(came.reshape(5, -1), exact.reshape(5, -1)).max() <= 0.51


@pytest.mark.parametrize(("dtype", "compute"), [("float32", None), ("float32", "float32"), ("float64", None)])
@pytest.mark.parametrize("dy", ["ones", "ordinary"])
def test_without_eps_a_constant_row_has_no_gradient(dtype, compute, dy):
    x = np.random.default_rng(9).standard_normal((5, 64)).astype(dtype)
    x[2] = 3
    dy = np.ones_like(x) if dy == "ones" else x
    layer = LayerNorm.init(64, dtype, eps=0, compute=compute)
    came = run(layer, x, dy)
    for key in ("y", "dx"):
        np.testing.assert_array_equal(np.isnan(came[key]).all(axis=1), np.arange(5) == 2)


def test_constant_rows_cost_no_further_evaluation():
    x, dy = np.full((5, 64), 0.1, "float32"), np.random.default_rng(8).standard_normal((5, 64)).astype("float32")
    assert explain(LayerNorm.init(64), x, dy) == {"forward": {"float64": 5}, "backward": {"float64": 5}}


# What lives on between calls.


def test_new_shapes_do_not_pile_up():
    layer, held = RMSNorm(), []
    tracemalloc.start()
    for first in (40, 240, 440):
        for n in range(first, first + 200):
            x = np.ones((2, n), "float32")
            run(layer, x, x)
        del x
        held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held[2] - held[1] < 10_000  # 50 bytes for each shape


def test_a_norm_that_runs_in_a_signal_handler_leaves_the_interrupted_one_alone():
    rng = np.random.default_rng(9)
    x, other = rng.standard_normal((2, 256, 512)).astype("float32")
    layer = LayerNorm.init(512)
    expected, calls = layer.forward(x)[0], []

    def handler(*_):
        calls.append(layer.forward(other)[0])

    before = signal.signal(signal.SIGALRM, handler)
    try:
        end = time.monotonic() + 20
        while len(calls) < 40 and time.monotonic() < end:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 2e-3))
            same_bits(layer.forward(x)[0], expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(calls) >= 40
