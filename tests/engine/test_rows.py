import tracemalloc

import numpy as np
import pytest

from npnorm import LayerNorm, RMSNorm
from npnorm.engine import Features, Formula, Rows
from npnorm.group import SOLO
from npnorm.norms import rms_norm
from tests.check import close, draw, exact_norm, run, same_bits

NORMS = pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])

LAYOUTS = {
    "column by column": lambda x: np.asfortranarray(x),
    "every second of a larger array": lambda x: np.repeat(np.repeat(x, 2, axis=0), 2, axis=-1)[::2, ..., ::2],
    "last feature first in memory": lambda x: x[..., ::-1].copy()[..., ::-1],
    "last row first in memory": lambda x: x[::-1].copy()[::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
}


@NORMS
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("block", [1, 3 * 8 * 67, 1 << 30])
def test_blocks_of_any_size_give_the_same_bits(norm, dtype, block, monkeypatch):
    rng = np.random.default_rng(1)
    x, dy = (rng.standard_normal((5, 8, 67)).astype(dtype) for _ in range(2))
    x[0] *= 1e-3
    layer = norm(**draw(rng, dtype, weight=67, bias=67))
    expected = run(layer, x, dy)
    monkeypatch.setattr("npnorm.engine.rows.BLOCK", block)
    monkeypatch.setattr("npnorm.engine.rows.EXACT_BLOCK", block)
    came = run(layer, x, dy)
    for name in ("y", "dx"):
        same_bits(came[name], expected[name])
    for name in layer.params:  # a sum over the rows, whose order follows the blocks
        close(came[name], expected[name], 1e-14 if dtype == "float64" else 1e-7)


@NORMS
def test_blocks_keep_the_working_memory_small(norm, monkeypatch):
    monkeypatch.setattr("npnorm.engine.rows.BLOCK", 1 << 15)
    rng = np.random.default_rng(16)
    x, layer = rng.standard_normal((1000, 256)).astype("float32"), norm(**draw(rng, "float32", weight=256, bias=256))
    tracemalloc.start()
    run(layer, x, x)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * x.nbytes  # y and dx, and little else; in float64 x alone would be as much


@NORMS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("shape", [(5, 70), (4, 3, 70)])
def test_any_memory_layout_gives_the_same_bits(norm, layout, dtype, shape):
    rng = np.random.default_rng(3)
    x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    params = draw(rng, dtype, weight=70, bias=70)
    other_x, other_dy = LAYOUTS[layout](x), LAYOUTS[layout](dy)
    other_params = {name: a[::-1].copy()[::-1] for name, a in params.items()}
    came = run(norm(**other_params), other_x, other_dy)
    assert came["y"].dtype == came["dx"].dtype == other_x.dtype
    for name in ("y", "dx"):
        came[name] = came[name].astype(dtype)
    same_bits(came, run(norm(**params), x, dy))


@NORMS
def test_a_weight_gradient_beyond_float16_is_infinite_without_a_warning(norm):
    rng = np.random.default_rng(12)
    layer = norm(**draw(rng, "float16", weight=4, bias=4))
    x, dy = rng.standard_normal((3, 4)).astype("float16"), np.full((3, 4), 6e4, "float16")
    _, grads = layer.backward(dy, layer.forward(x)[1])
    same_bits(grads["bias"], np.full(4, np.inf, "float16"))


@NORMS
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 3e-20, 1, 1e10, 1e30, 1e38])
@pytest.mark.parametrize("eps", [0.0, 1e-37, 1e-5])
def test_float32_can_be_the_working_precision(norm, size, eps):
    rng = np.random.default_rng(13)
    x = (rng.standard_normal((3, 6)) * size).astype("float32")
    dy, params = rng.standard_normal((3, 6)).astype("float32"), draw(rng, "float32", weight=6, bias=6)
    layer = norm(**params, eps=eps, compute="float32")
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    expected = exact_norm(x, params["weight"], params["bias"], eps, dy, norm is LayerNorm)
    for came, right in zip((y, dx, grads["weight"], grads["bias"]), expected, strict=True):
        assert came.dtype == np.float32
        if 1e-35 < np.abs(right).max() < 3e38:  # within the normal range of float32
            close(came, right, 1e-6)


@NORMS
def test_float64_is_not_cut_short(norm):
    x = np.random.default_rng(14).standard_normal((2, 3))
    with pytest.raises(TypeError, match="would cut float64 arrays short"):
        norm(compute="float32").forward(x)
    with pytest.raises(TypeError, match="would cut float64 arrays short"):
        norm(np.ones(3), compute="float32").forward(x.astype("float32"))


@NORMS
@pytest.mark.parametrize("compute", ["float16", "int64", "double precision"])
def test_another_working_precision_is_refused(norm, compute):
    with pytest.raises(ValueError, match=f"compute is '{compute}'. Choose None, 'float64' or 'float32'"):
        norm(compute=compute)


@NORMS
def test_the_buffer_size_of_the_caller_stays(norm):
    before = np.getbufsize()
    x = np.random.default_rng(15).standard_normal((2, 1024))
    layer = norm(np.ones(1024))
    layer.backward(x, layer.forward(x)[1])
    assert np.getbufsize() == before


MEAN_SQUARES = {
    "a power": lambda row, x: row.mean(x**2),
    "magnitudes": lambda row, x: row.mean(abs(x) * abs(x)),
    "a ufunc": lambda row, x: row.mean(np.square(x)),
    "a ufunc of two": lambda row, x: row.mean(np.power(x, 2)),
    "a method": lambda row, x: (x * x).mean(-1, keepdims=True),
    "a NumPy function": lambda row, x: np.mean(x * x, -1, keepdims=True),
    "a part": lambda row, x: row.mean(x[...] * x),
    "a quotient": lambda row, x: row.mean(1 / (1 / x / x)),
    "a comparison": lambda row, x: row.mean(x * np.where(x > 0, x, x)),
    "a product of three": lambda row, x: row.mean(x * x * (x * x)) / row.mean(x * x),
}


@pytest.mark.parametrize("what", MEAN_SQUARES)
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_a_formula_may_ask_an_array_for_anything_that_arrays_have(what, compute):
    def forward(row, x, w, b):
        rstd = 1 / np.sqrt(MEAN_SQUARES[what](row, x) + row.eps)
        return x * rstd * w + b, (rstd,)

    rng = np.random.default_rng(21)
    x, dy = rng.standard_normal((2, 6, 64)).astype("float32")
    found = []
    for a in (x, x.astype("float64")):
        formula = Formula(forward, rms_norm.backward, None)
        rows = Rows(Features("a norm", SOLO), formula, 1e-5, compute if a is x else None)
        y, statistics, _ = rows.forward(a, {})
        found.append((y, rows.backward(dy.astype(a.dtype), a, {}, statistics, None)[0]))
    for narrow, wide in zip(*found, strict=True):
        same_bits(narrow, wide.astype("float32"))


def test_what_a_debugger_shows_of_an_array_says_what_it_is():
    seen = []

    def forward(row, x, w, b):
        seen.append(repr(x * 2 + 1))
        return x * w + b, ()

    Rows(Features("a norm", SOLO), Formula(forward, None, None), 0).forward(np.ones((3, 64), "float32"), {})
    assert seen == ["(3, 64) as a sum of 2 products, not formed yet"]
