"""npnorm on a GPU, held against NumPy: `pytest -m gpu`. Without the marker these tests are left out."""

import importlib
from functools import partial

import numpy as np
import pytest

from npnorm.arrays import from_numpy, round_to, to_numpy
from npnorm.compiled import device as compiled
from npnorm.config import Config, init
from npnorm.cuda_casts import CASTS
from npnorm.group import SOLO
from npnorm.layers import AvgPool2d, Conv2d, GlobalAvgPool2d, MaxPool2d
from npnorm.training.adamw import AdamW
from npnorm.training.gradients import loss_and_grads
from npnorm.training.program import arguments, train_on_text
from npnorm.transformer import Transformer
from npnorm.tree import leaves, map_tree
from tests.check import BFLOAT16, close, same_bits
from tests.compiled.problems import IMAGES, MAKE, draw, hard_rows, run
from tests.engine.formulas import within
from tests.layers import test_recurrent as recurrent
from tests.norms.catalogue import CATALOGUE
from tests.test_cuda_casts import numbers

pytestmark = pytest.mark.gpu

DTYPES = ["float64", "float32", "float16", "bfloat16"]
CLOSE = {"float64": 1e-12, "float32": 1e-6, "float16": 2.0**-9, "bfloat16": 2.0**-6}


@pytest.fixture(scope="session")
def cupy():
    try:
        module = importlib.import_module("cupy")
    except ImportError as problem:
        pytest.exit(f"no GPU: CuPy could not be loaded ({problem})", returncode=1)
    if not module.cuda.is_available():
        pytest.exit("no GPU: CuPy finds none", returncode=1)
    return module


@pytest.fixture
def dtype(request, cupy):
    if request.param != "bfloat16":
        return np.dtype(request.param)
    try:
        cupy.asarray(np.ones(1, BFLOAT16)) * cupy.asarray(np.ones(1, BFLOAT16))
    except (TypeError, ValueError, NotImplementedError):
        pytest.skip("this CuPy has no bfloat16")
    return BFLOAT16


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
@pytest.mark.parametrize("dtype", DTYPES, indirect=True)
def test_a_norm(cupy, entry, dtype):
    rng = np.random.default_rng(1)
    params, x = entry.draw(rng, dtype)
    dy = rng.standard_normal(entry.make(params).forward(x)[0].shape).astype(dtype)

    def of(put):
        layer = entry.make(map_tree(put, params))
        y, saved = layer.forward(put(x))
        dx, grads = layer.backward(put(dy), saved)
        return {"y": y, "dx": dx, "grads": grads}

    there, here = of(cupy.asarray), of(np.asarray)
    for (name, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        assert isinstance(a, cupy.ndarray), name
        assert a.dtype == b.dtype, name
        close(to_numpy(a).astype("float64"), b.astype("float64"), CLOSE[dtype.name])


@pytest.fixture(autouse=True)
def kernels(cupy):
    """Hold that the kernels passed their checks: without them everything is right as well."""
    yield
    assert compiled._Process.uses_kernels


@pytest.mark.parametrize("compute", ["float64", "float32"])
@pytest.mark.parametrize("size", [8, 33, 1000, 4096, 40000])
@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", DTYPES[1:], indirect=True)
def test_a_kernel(cupy, name, size, compute, dtype):
    problem = draw(name, (4, 6, 4, max(4, size // 64)) if name in IMAGES else (70, size), dtype)
    make = partial(MAKE[name], compute=compute)
    there = run(cupy.asarray, make, *problem)
    within(there, run(np.asarray, MAKE[name], *problem), 1 if compute == "float64" else 4)
    same_bits(run(cupy.asarray, make, *problem), there)


@pytest.mark.parametrize("compute", ["float64", "float32"])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "AddRMSNorm"])
def test_rows_that_lose_digits(cupy, name, compute):
    params, x, dy = draw(name, (12, 40))
    x = hard_rows(x)
    there = run(cupy.asarray, partial(MAKE[name], compute=compute), params, x, dy)
    within(there, run(np.asarray, MAKE[name], params, x, dy), 1 if compute == "float64" else 4)


@pytest.mark.parametrize(("source", "target"), CASTS)
def test_a_cast(cupy, source, target):
    x, dtype = numbers(source), {"bfloat16": BFLOAT16}.get(target, np.dtype(target))
    came, expected = to_numpy(round_to(cupy.asarray(x), dtype)), round_to(x, dtype)
    known = ~np.isnan(expected.astype("float64"))
    same_bits(came[known], expected[known])


def gradients(put, config, params, ids, targets):
    """Return the logits, the loss, and the gradients as NumPy arrays; and the parameters after a step of AdamW."""
    model = Transformer(config, map_tree(lambda a: put(a.copy()), params))
    logits, _ = model.forward(put(ids))
    loss, grads = loss_and_grads(model, put(ids), put(targets))
    AdamW(model.params).step(grads, 1e-3)
    return map_tree(to_numpy, {"logits": logits, "loss": loss, "grads": grads}), map_tree(to_numpy, model.params)


@pytest.mark.parametrize("settings", [Config.original, Config.modern], ids=["original", "modern"])
@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_the_transformer_and_a_step_of_adamw(cupy, settings, kind):
    rng = np.random.default_rng(2)
    config = settings(24, width=48, depth=2, heads=4, context=32)
    params = map_tree(lambda a: a + (0.1 * rng.standard_normal(a.shape)).astype(kind), init(config, rng, kind))
    ids, targets = (rng.integers(0, 24, (3, 32)) for _ in range(2))
    there, stepped_there = gradients(cupy.asarray, config, params, ids, targets)
    here, stepped = gradients(np.asarray, config, params, ids, targets)
    tolerance = 1e-10 if kind == "float64" else 2e-4
    for part in ("logits", "loss", "grads"):
        largest = max(np.abs(b).max() for _, b in leaves(here[part]))
        for (_, a), (_, b) in zip(leaves(there[part]), leaves(here[part]), strict=True):
            assert np.abs(a - b).max() <= tolerance * largest
    for (_, a), (_, b) in zip(leaves(stepped_there), leaves(stepped), strict=True):
        close(a, b, 1e-8 if kind == "float64" else 1e-2)  # of a gradient near 0 the sign decides


@pytest.mark.parametrize("norm", recurrent.KINDS)
@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_a_recurrent_layer(cupy, norm, kind):
    rng = np.random.default_rng(3)
    params = map_tree(lambda a: (0.3 * a).astype(kind), recurrent.draw(rng, norm, 24, 48))
    x, h0, dy = (rng.standard_normal(shape).astype(kind) for shape in ((3, 32, 24), (3, 48), (3, 32, 48)))

    def of(put):
        layer = recurrent.making(norm)(map_tree(put, params))
        y, saved = layer.forward(put(x), put(h0))
        (dx, dh0), grads = layer.backward(put(dy), saved)
        return {"y": y, "dx": dx, "dh0": dh0, "grads": grads}

    for (name, a), (_, b) in zip(leaves(of(cupy.asarray)), leaves(of(np.asarray)), strict=True):
        assert isinstance(a, cupy.ndarray), name
        assert a.dtype == b.dtype, name
        close(to_numpy(a), b, 1e-12 if kind == "float64" else 1e-5)


LAYERS = {
    "Conv2d": (partial(Conv2d, stride=2, padding=1), {"weight": (32, 24, 3, 3), "bias": (32,)}),
    "Conv2d, 1 x 1": (Conv2d, {"weight": (32, 24, 1, 1)}),
    "MaxPool2d": (partial(MaxPool2d, 3, 2, 1), {}),
    "AvgPool2d": (partial(AvgPool2d, 3, 2), {}),
    "GlobalAvgPool2d": (GlobalAvgPool2d, {}),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", ["float64", "float32"])
def test_a_layer_of_images(cupy, name, kind):
    rng = np.random.default_rng(4)
    make, shapes = LAYERS[name]
    params = {name: rng.standard_normal(shape).astype(kind) for name, shape in shapes.items()}
    x = rng.standard_normal((6, 24, 17, 16)).astype(kind)
    dy = rng.standard_normal(make(**params).forward(x)[0].shape).astype(kind)

    def of(put):
        layer = make(**map_tree(put, params))
        y, saved = layer.forward(put(x))
        dx, grads = layer.backward(put(dy), saved)
        return {"y": y, "dx": dx, **grads}

    for (name, a), (_, b) in zip(leaves(of(cupy.asarray)), leaves(of(np.asarray)), strict=True):
        assert isinstance(a, cupy.ndarray), name
        assert a.dtype == b.dtype, name
        close(to_numpy(a), b, 1e-12 if kind == "float64" else 1e-5)


def test_the_training_program(cupy, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question; " * 60)
    small = "--steps 5 --rows 4 --context 16 --width 32 --depth 1 --heads 2 --sample 5".split()
    losses = []
    for device in ("cpu", "gpu"):
        settings = arguments(SOLO, "A test.", ["--text", str(text), *small, "--device", device])
        losses.append(train_on_text(SOLO, Config.modern, settings))
    assert abs(losses[0] - losses[1]) < 1e-2
    assert from_numpy(np.zeros(1), cupy.zeros(0)).device == cupy.zeros(0).device
