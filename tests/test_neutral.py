"""The same text on other array modules: arrays of the standard on a device where every stray NumPy call raises."""

import importlib.util

import array_api_strict
import numpy as np
import pytest

from npnorm import Config, LayerNorm, RMSNorm, Transformer
from npnorm.arrays import dtype_name, to_numpy
from npnorm.config import init
from npnorm.layers import (
    GELU,
    GRU,
    MLP,
    Attention,
    AvgPool2d,
    Conv2d,
    CrossEntropy,
    Embedding,
    GlobalAvgPool2d,
    GRUCell,
    Linear,
    MaxPool2d,
    Positions,
    ReLU,
    Rotary,
    SiLU,
    SwiGLU,
)
from npnorm.tree import leaves, map_tree
from tests.check import WithLoss, close, draw, run
from tests.layers import test_recurrent as recurrent

DEVICE = array_api_strict.Device("device1")


class Strict:
    """Arrays of array-api-strict on a device that is not the host."""

    def put(self, a):
        return array_api_strict.asarray(np.ascontiguousarray(a), device=DEVICE)

    def holds(self, a):
        return isinstance(a, type(self.put(np.zeros(1)))) and a.device == DEVICE


class CuPy:
    def put(self, a):
        return self.cupy.asarray(a)

    def holds(self, a):
        return isinstance(a, self.cupy.ndarray)


def available():
    """Return the modules that can be used here."""
    modules = [Strict()]
    if importlib.util.find_spec("cupy"):
        import cupy

        if cupy.is_available():
            modules.append(CuPy())
            modules[-1].cupy = cupy
    return modules


MODULES = pytest.mark.parametrize("module", available(), ids=lambda module: type(module).__name__)
NORMS = pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])


def compare(module, make, params, x, rng, tolerance=1e-12):
    """Run a layer here and there, and hold the one result against the other; return y from there."""

    def results(put):
        found = run(make(map_tree(put, params), put), put(x), put(dy))
        return {name: a for name, a in found.items() if a is not None}

    dy = np.asarray(rng.standard_normal(make(params, np.asarray).forward(x)[0].shape))
    if x.dtype.kind == "f":
        dy = dy.astype(x.dtype)
    here, there = results(np.asarray), results(module.put)
    for (name, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        assert module.holds(a), name
        assert dtype_name(a) == dtype_name(b), name
        close(to_numpy(a), b, tolerance)


@MODULES
@NORMS
@pytest.mark.parametrize("names", [(), ("weight",), ("bias",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (0, 7)])
def test_a_norm(module, norm, names, shape):
    rng = np.random.default_rng(1)
    params = draw(rng, **dict.fromkeys(names, 7))
    compare(module, lambda p, _: norm(**p), params, rng.standard_normal(shape), rng)


@MODULES
@NORMS
@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("size", [1e-300, 1e300])
def test_a_norm_of_rows_out_of_range(module, norm, size, eps):
    rng = np.random.default_rng(2)
    params, x = draw(rng, weight=7, bias=7), rng.standard_normal((3, 7)) * [[1], [size], [1]]
    compare(module, lambda p, _: norm(**p, eps=eps), params, x, rng)


@MODULES
@NORMS
@pytest.mark.parametrize("compute", [None, "float32"])
def test_a_norm_of_float32(module, norm, compute):
    rng = np.random.default_rng(3)
    params = draw(rng, "float32", weight=7, bias=7)
    x = (rng.standard_normal((3, 7)) * [[1], [1e30], [1e-30]]).astype("float32")
    compare(module, lambda p, _: norm(**p, compute=compute), params, x, rng, 1e-6 if compute else 1e-12)


@MODULES
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5)])
def test_linear(module, shape):
    rng = np.random.default_rng(4)
    compare(module, lambda p, _: Linear(**p), draw(rng, weight=(4, 5), bias=4), rng.standard_normal(shape), rng)


@MODULES
@pytest.mark.parametrize("layer", [ReLU(), GELU(), SiLU(), Rotary()], ids=["ReLU", "GELU", "SiLU", "Rotary"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_layer_without_parameters(module, layer, dtype):
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 3, 6)).astype(dtype)
    compare(module, lambda p, _: layer, {}, x, rng, 1e-12 if dtype == "float64" else 1e-6)


@MODULES
@pytest.mark.parametrize(("stride", "padding"), [(1, 1), (2, 0), (3, 2)])
@pytest.mark.parametrize("images", [0, 2])
def test_convolution(module, stride, padding, images):
    rng = np.random.default_rng(12)
    params, x = draw(rng, weight=(4, 3, 2, 3), bias=4), rng.standard_normal((images, 3, 6, 5))
    compare(module, lambda p, _: Conv2d(**p, stride=stride, padding=padding), params, x, rng)


@MODULES
@pytest.mark.parametrize("layer", [MaxPool2d(2), MaxPool2d(3, 2, 1), AvgPool2d(3, 2), GlobalAvgPool2d()], ids=repr)
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_pooling(module, layer, images, dtype):
    rng = np.random.default_rng(13)
    x = rng.standard_normal((images, 3, 6, 5)).astype(dtype)
    compare(module, lambda p, _: layer, {}, x, rng, 1e-12 if dtype == "float64" else 1e-6)


@MODULES
@pytest.mark.parametrize("rotary", [None, Rotary()], ids=["no positions", "rotary"])
def test_attention(module, rotary):
    rng = np.random.default_rng(6)
    sizes = {"q_proj": (24, 7), "k_proj": (8, 7), "v_proj": (8, 7), "o_proj": (7, 24)}
    params = {name: draw(rng, weight=size, bias=size[0]) for name, size in sizes.items()}
    compare(module, lambda p, _: Attention(p, 6, 2, rotary), params, rng.standard_normal((2, 5, 7)), rng)


@MODULES
@pytest.mark.parametrize("kind", [MLP, SwiGLU])
def test_mlp(module, kind):
    rng = np.random.default_rng(7)
    sizes = {"gate_proj": (9, 5), "up_proj": (9, 5), "down_proj": (5, 9)}
    if kind is MLP:
        del sizes["gate_proj"]
    params = {name: draw(rng, weight=size, bias=size[0]) for name, size in sizes.items()}
    compare(module, lambda p, _: kind(p), params, rng.standard_normal((2, 3, 5)), rng)


@MODULES
@pytest.mark.parametrize("kind", recurrent.KINDS)
@pytest.mark.parametrize("layer", [GRU, GRUCell])
def test_a_recurrent_layer(module, layer, kind):
    rng = np.random.default_rng(12)
    params, x = recurrent.draw(rng, kind), rng.standard_normal((2, 3, 5) if layer is GRU else (2, 5))
    if layer is GRU:
        compare(module, lambda p, _: recurrent.making(kind)(p), params, x, rng)
    params = {"h": rng.standard_normal((2, 4)), "layer": params}
    compare(module, lambda p, _: recurrent.from_state(kind, layer)(p), params, x, rng)


@MODULES
def test_embedding_and_positions(module):
    rng = np.random.default_rng(8)
    ids = rng.integers(0, 11, (2, 3))
    compare(module, lambda p, _: Embedding(**p), draw(rng, weight=(11, 5)), ids, rng)
    compare(module, lambda p, _: Positions(**p), draw(rng, weight=(4, 5)), rng.standard_normal((2, 3, 5)), rng)


@MODULES
def test_cross_entropy(module):
    rng = np.random.default_rng(9)
    logits, targets = rng.standard_normal((2, 3, 7)), rng.integers(0, 7, (2, 3))
    loss, saved = CrossEntropy().forward(logits, targets)
    loss_there, saved_there = CrossEntropy().forward(module.put(logits), module.put(targets))
    dx, dx_there = CrossEntropy().backward(1.7, saved), CrossEntropy().backward(1.7, saved_there)
    assert module.holds(loss_there)
    assert module.holds(dx_there)
    close(to_numpy(loss_there), loss)
    close(to_numpy(dx_there), dx)


@MODULES
@pytest.mark.parametrize("settings", [Config.original, Config.modern], ids=["original", "modern"])
@pytest.mark.parametrize("tied", [False, True], ids=["a head of its own", "tied"])
def test_the_transformer_up_to_the_loss(module, settings, tied):
    rng = np.random.default_rng(10)
    config = settings(12, width=24, depth=2, heads=6, kv_heads=3, hidden=36, context=7, tied=tied)
    params = map_tree(lambda a: a + 0.3 * rng.standard_normal(a.shape), init(config, rng, "float64"))
    ids, targets = (rng.integers(0, 12, (3, 5)) for _ in range(2))
    compare(module, lambda p, put: WithLoss(Transformer(config, p), put(targets)), params, ids, rng)


@MODULES
def test_arrays_of_two_modules_are_refused(module):
    rng = np.random.default_rng(11)
    table, x, ids = rng.standard_normal((4, 3)), rng.standard_normal((2, 3)), rng.integers(0, 4, 2)
    for name, layer, came in (
        ("LayerNorm", LayerNorm(table[0]), x),
        ("RMSNorm", RMSNorm(table[0]), x),
        ("Linear", Linear(table), x),
        ("Embedding", Embedding(table), ids),
        ("Conv2d", Conv2d(table[:, :, None, None]), x[:, :, None, None]),
    ):
        with pytest.raises(TypeError, match=rf"{name}: weight is an array of numpy, x one of .* same device first"):
            layer.forward(module.put(came))


def test_the_device_refuses_numpy():
    x = Strict().put(np.arange(3.0))
    with pytest.raises((RuntimeError, TypeError)):
        np.sum(x)
    with pytest.raises((RuntimeError, TypeError)):
        np.sqrt(x)
