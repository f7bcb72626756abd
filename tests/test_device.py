"""Norms on a GPU that is not there: the kernels run on the host, see `tests.fake_cuda`, and are held against NumPy."""

import sys
from functools import partial

import numpy as np
import pytest

from npnorm import norms
from npnorm.arrays import array_module, dtype_name, to_numpy
from npnorm.careful import Careful
from npnorm.config import Config
from npnorm.group import SOLO
from npnorm.training.program import arguments, train_on_text
from npnorm.tree import leaves, map_tree
from tests import fake_cuda
from tests.check import BFLOAT16, close, same_bits
from tests.norms.catalogue import CATALOGUE

COMPUTE = pytest.mark.parametrize("compute", ["float64", "float32"])
DTYPE = pytest.mark.parametrize("dtype", ["float32", "float16", BFLOAT16], ids=["float32", "float16", "bfloat16"])
FORWARD = ["row", "wait"]
OF_FEATURES = ["row", "columns", "total", "wait"]
OF_CHANNELS = ["row", "total", "wait"]


@pytest.fixture
def device(monkeypatch):
    device = fake_cuda.Device()
    monkeypatch.setitem(sys.modules, "cupy", device.module())
    return device


class Inference(norms.BatchNorm):
    """BatchNorm with statistics that are given."""

    def forward(self, x, out=None):
        c, xp = x.shape[1], array_module(x)
        self.running_mean = xp.asarray(np.linspace(-1, 1, c))
        self.running_var = xp.asarray(np.linspace(0.5, 2, c))
        return self.inference(x, out)


class Added(norms.AddRMSNorm):
    """AddRMSNorm of x and x, so that it takes one array."""

    def forward(self, x):
        (y, _), saved = super().forward(x, x)
        return y, saved

    def backward(self, dy, saved):
        (dx, _), grads = super().backward(dy, dy, saved)
        return dx, grads


MAKE = {
    "LayerNorm": norms.LayerNorm,
    "RMSNorm": norms.RMSNorm,
    "RMSNorm with offset": partial(norms.RMSNorm, offset=1),
    "PartialRMSNorm of all": partial(norms.PartialRMSNorm, p=1),
    "AddRMSNorm": Added,
    "GroupNorm": partial(norms.GroupNorm, 2),
    "GroupNorm of one group": partial(norms.GroupNorm, 1),
    "InstanceNorm": norms.InstanceNorm,
    "BatchNorm": norms.BatchNorm,
    "BatchNorm in inference": Inference,
}
IMAGES = [name for name in MAKE if name.startswith(("Group", "Instance", "Batch"))]


def draw(shape, dtype, name="", rows=None):
    """Return parameters, x and dy."""
    rng = np.random.default_rng(sum(shape))
    channels = shape[1] if name in IMAGES else shape[-1]
    params = {n: (rng.standard_normal(channels) + 1).astype(dtype) for n in ("weight", "bias")}
    return params, *((rng.standard_normal(shape) + 0.3).astype(dtype) for _ in range(2))


def run(put, make, params, x, dy, device=None):
    """Return y, dx and gradients as NumPy arrays."""
    norm = make(**map_tree(put, params))
    y, saved = norm.forward(put(x))
    dx, grads = norm.backward(put(dy), saved)
    launches = [] if device is None else list(device.launches)
    return map_tree(to_numpy, {"y": y, "dx": dx, "grads": grads}), launches


def compare(device, make, params, x, dy, compute="float64"):
    """Hold the device against NumPy in float64; return what was launched."""
    there, launches = run(sys.modules["cupy"].asarray, partial(make, compute=compute), params, x, dy, device)
    here, _ = run(np.asarray, make, params, x, dy)
    if compute == "float64":
        same_bits(there, here)
    else:
        within(there, here)
    return launches


def within(there, here, units=4):
    """Raise unless numbers agree within units in the last place of the largest of their row; a gradient is a row."""
    for (name, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        wide_a, wide_b = (
            c.astype("float64").reshape(-1, c.shape[-1] if name in ("y", "dx") else c.size) for c in (a, b)
        )
        largest = np.abs(wide_b).max(axis=1, keepdims=True)
        unit = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[a.dtype.name]
        if not np.all(np.abs(wide_a - wide_b) <= units * unit * largest):
            raise AssertionError(f"{name}: {a}\nexpected\n{b}")


@pytest.mark.parametrize("name", MAKE)
@COMPUTE
@DTYPE
def test_a_norm(device, name, compute, dtype):
    shape = (3, 4, 4, 6) if name in IMAGES else (5, 40)
    launches = compare(device, MAKE[name], *draw(shape, dtype, name), compute)
    assert [word for word in launches if word != "wait"] == [
        "row",
        *((OF_CHANNELS if name in IMAGES else OF_FEATURES)[:-1]),
    ]


@pytest.mark.parametrize("width", [8, 11, 33, 64, 70, 1000, 4099, 20000])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_a_width(device, name, width):
    for compute in ("float64", "float32"):
        device.launches.clear()
        launches = compare(device, MAKE[name], *draw((3, width), "float32"), compute)
        assert launches[: len(FORWARD + OF_FEATURES)] == FORWARD + OF_FEATURES


@pytest.mark.parametrize("space", [(16,), (7, 7), (3, 50), (40, 40)])
@pytest.mark.parametrize("channels", [2, 6, 40])
@pytest.mark.parametrize("name", IMAGES)
def test_a_space(device, name, channels, space):
    compare(device, MAKE[name], *draw((2, channels, *space), "float32", name))
    assert device.launches.count("row") == 2


@pytest.mark.parametrize("each", [1, 2, 16])
def test_any_number_of_threads(device, monkeypatch, each):
    monkeypatch.setattr("npnorm.cuda.EACH", each)
    compare(device, norms.LayerNorm, *draw((3, 520), "float32"))
    compare(device, MAKE["GroupNorm"], *draw((2, 6, 40), "float32", "GroupNorm"))


@pytest.mark.parametrize("names", [(), ("weight",), ("bias",)], ids=["none", "weight", "bias"])
@pytest.mark.parametrize("name", MAKE)
def test_without_some_parameters(device, name, names):
    if "offset" in name and "weight" not in names:
        names = ("weight",)
    shape = (3, 4, 4, 6) if name in IMAGES else (5, 40)
    params, x, dy = draw(shape, "float32", name)
    launches = compare(device, MAKE[name], {n: params[n] for n in names}, x, dy)
    assert ("total" in launches) == bool(names)


@pytest.mark.parametrize("rows", [1, 31, 100])
def test_chunks_of_rows(device, rows):
    params, x, dy = draw((rows, 24), "float32")
    compare(device, norms.LayerNorm, params, x, dy)
    compare(device, norms.LayerNorm, params, x, dy, "float32")


def test_parameters_of_another_dtype(device):
    params, x, dy = draw((5, 40), "float16")
    compare(device, norms.LayerNorm, map_tree(lambda a: a.astype("float32"), params), x, dy, "float32")
    params = map_tree(lambda a: a.astype("float64"), params)
    there, here = (run(put, norms.LayerNorm, params, x, dy)[0] for put in (sys.modules["cupy"].asarray, np.asarray))
    for (_, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        assert a.dtype == b.dtype
        close(a, b, 1e-14)
    assert device.launches.count("row") == 4


def careful_rows(x):
    """Put rows that need care among others."""
    x[1] = 0
    x[3] += 3e4
    x[4] *= 1e-30
    x[6] *= 1e30
    x[8] = 1.5
    return x


@COMPUTE
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "AddRMSNorm"])
def test_rows_that_need_care(device, name, compute):
    params, x, dy = draw((12, 40), "float32")
    x = careful_rows(x)
    dy[2] = 0
    dy[9] = x[9] / params["weight"]  # dz is along z: nothing is left but its part of eps
    compare(device, MAKE[name], params, x, dy, compute)
    assert device.launches.count("row") == 2


@COMPUTE
@pytest.mark.parametrize("name", IMAGES)
def test_channels_that_need_care(device, name, compute):
    params, x, dy = draw((6, 6, 20), "float32", name)
    x[1], x[2, :3], x[:, 4] = 7, x[2, :3] * 1e25, x[:, 4] + 3e5
    dy[3] = 0
    compare(device, MAKE[name], params, x, dy, compute)
    assert device.launches.count("row") == 2


@COMPUTE
@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "BatchNorm"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(device, name, compute, bad):
    shape = (3, 4, 4, 6) if name in IMAGES else (5, 40)
    params, x, dy = draw(shape, "float32", name)
    x[1, 2] = bad
    put, make = sys.modules["cupy"].asarray, partial(MAKE[name], compute=compute)
    there, here = run(put, make, params, x, dy)[0], run(np.asarray, MAKE[name], params, x, dy)[0]
    for (key, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), key)
        np.testing.assert_allclose(a, b, 3e-5, 1e-5)


@COMPUTE
@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "BatchNorm"])
def test_a_weight_that_is_too_large(device, name, compute):
    shape = (3, 4, 4, 6) if name in IMAGES else (5, 40)
    params, x, dy = draw(shape, "float32", name)
    params["weight"][-1] = 1e25
    compare(device, MAKE[name], params, x, dy, compute)
    assert "row" in device.launches


@COMPUTE
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"])
def test_the_rows_that_get_care_are_those_of_numpy(device, monkeypatch, name, compute):
    shape = (3, 12, 4, 6) if name in IMAGES else (12, 40)
    params, x, dy = draw(shape, "float32", name)
    rows = (
        (lambda a: a.swapaxes(0, 1)) if name == "BatchNorm" else (lambda a: a[0]) if name == "GroupNorm" else np.asarray
    )
    x, dy = x.copy(), dy.copy()
    rows(x)[1], rows(x)[0] = 0, rows(x)[0] * 1e-36
    careful_rows(rows(x)[2:])
    rows(dy)[9], rows(dy)[7] = 0, rows(dy)[7] * 1e-25
    seen = []

    def spy(method):
        original = getattr(Careful, method)

        def call(self, formula, arrays, *rest, **settings):
            seen.append([to_numpy(a) for a in arrays])
            return original(self, formula, arrays, *rest, **settings)

        monkeypatch.setattr(Careful, method, call)

    spy("forward_rows")
    spy("backward_rows")
    found = []
    for put in (sys.modules["cupy"].asarray, np.asarray):
        seen.clear()
        run(put, partial(MAKE[name], compute=compute), params, x, dy)
        found.append({str(i): {str(j): a for j, a in enumerate(arrays)} for i, arrays in enumerate(seen)})
    assert len(found[0]) == 2 or compute == "float64"
    same_bits(*found)


def test_a_weight_beyond_the_limit_is_no_reason_to_count_twice(device):
    params, x, dy = draw((5, 40), "float32")
    params["weight"][-1] = 2.0**21
    compare(device, norms.LayerNorm, params, x, dy, "float32")


def test_a_norm_takes_rows_of_any_length(device):
    norm, put = norms.LayerNorm(), sys.modules["cupy"].asarray
    for width in (40, 48, 40):
        _, x, _ = draw((5, width), "float32")
        same_bits(norm.forward(put(x))[0].a, norms.LayerNorm().forward(x)[0])


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_gradients_that_are_not_finite_are_evaluated_again(device, monkeypatch, bad):
    params, x, dy = draw((3, 4, 4, 6), "float32", "BatchNorm")
    dy[1, 2] = bad
    here, _ = run(np.asarray, Inference, params, x, dy)
    calls, original = [], Careful.backward
    monkeypatch.setattr(Careful, "backward", lambda *args: calls.append(1) or original(*args))
    there, _ = run(sys.modules["cupy"].asarray, Inference, params, x, dy)
    for (_, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        np.testing.assert_array_equal(a, b)
    assert calls


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "BatchNorm"])
def test_memory_that_is_not_aligned(device, name):
    shape = (3, 4, 4, 6) if name in IMAGES else (5, 40)
    params, x, dy = draw(shape, "float32", name)

    def put(a):
        memory = fake_cuda.empty(a.size + 1, a.dtype)
        memory.a[1:] = a.ravel()
        return fake_cuda.Array(memory.a[1:].reshape(a.shape))

    there, here = run(put, MAKE[name], params, x, dy)[0], run(np.asarray, MAKE[name], params, x, dy)[0]
    same_bits(there, here)
    assert all(" v[1]; }" in source for source in device.sources)
    aligned = run(sys.modules["cupy"].asarray, MAKE[name], params, x, dy)[0]
    same_bits(aligned, here)
    assert any(" v[4]; }" in source for source in device.sources)


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "BatchNorm"])
def test_any_memory_layout_gives_the_same_bits(device, name):
    shape = (3, 4, 4, 6) if name in IMAGES else (5, 40)
    params, x, dy = draw(shape, "float32", name)
    here, _ = run(np.asarray, MAKE[name], params, x, dy)
    for layout in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=-1)[..., ::2]):
        same_bits(run(lambda a: fake_cuda.Array(layout(a)), MAKE[name], params, x, dy)[0], here)  # noqa: B023


@pytest.mark.parametrize("name", MAKE)
def test_the_order_of_the_threads_does_not_matter(device, name):
    shape = (3, 4, 10, 10) if name in IMAGES else (5, 600)
    problem = draw(shape, "float32", name)
    put, make = sys.modules["cupy"].asarray, partial(MAKE[name], compute="float32")
    first, _ = run(put, make, *problem)
    device.backwards = True
    same_bits(run(put, make, *problem)[0], first)


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "BatchNorm", "BatchNorm in inference"])
def test_results_are_written_to_out(device, name):
    shape = (3, 4, 4, 6) if name in IMAGES else (5, 40)
    params, x, dy = draw(shape, "float32", name)
    if name not in IMAGES:
        x[1] = 0
    here, _ = run(np.asarray, MAKE[name], params, x, dy)
    put = sys.modules["cupy"].asarray
    norm = MAKE[name](**map_tree(put, params))
    to_y, to_dx = fake_cuda.empty(shape, "float32"), fake_cuda.empty(shape, "float32")
    y, saved = norm.forward(put(x), out=to_y)
    dx, _ = norm.backward(put(dy), saved, out=to_dx)
    assert y is to_y
    assert dx is to_dx
    same_bits({"y": y.a, "dx": dx.a}, {"y": here["y"], "dx": here["dx"]})


def test_out_that_cannot_be_written_to_is_refused(device):
    put = sys.modules["cupy"].asarray
    x = put(np.ones((5, 40), "float32"))
    with pytest.raises(ValueError, match="in C order"):
        norms.LayerNorm().forward(x, out=fake_cuda.Array(np.ones((40, 5), "float32").T))
    with pytest.raises(ValueError, match="shares memory"):
        norms.LayerNorm().forward(x, out=x)


@pytest.mark.parametrize(
    "make",
    [partial(norms.RMSNorm, cast="llama"), norms.PartialRMSNorm],
    ids=["a cast", "a subset"],
)
def test_what_cannot_be_written_goes_the_careful_way(device, make):
    params, x, dy = draw((5, 40), "float32")
    params = {"weight": params["weight"]}
    there, launches = run(sys.modules["cupy"].asarray, make, params, x, dy, device)
    assert "row" not in launches
    here, _ = run(np.asarray, make, params, x, dy)
    within(there, here, 1)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_arrays_that_have_no_kernel(device, dtype):
    params, x, dy = draw((5, 40 if dtype == "float64" else 7), dtype)
    there, launches = run(sys.modules["cupy"].asarray, norms.LayerNorm, params, x, dy, device)
    here, _ = run(np.asarray, norms.LayerNorm, params, x, dy)
    assert "row" not in launches
    for (_, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        close(a, b, 1e-12 if dtype == "float64" else 1e-6)


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.name != "Derf"], ids=lambda entry: entry.name)
def test_every_norm_on_the_device(device, entry):
    rng = np.random.default_rng(1)
    params, x = entry.draw(rng, "float32")
    dy = rng.standard_normal(entry.make(params).forward(x)[0].shape).astype("float32")

    def of(put):
        layer = entry.make(map_tree(put, params))
        y, saved = layer.forward(put(x))
        dx, grads = layer.backward(put(dy), saved)
        return {"y": y, "dx": dx, "grads": grads}

    there, here = of(sys.modules["cupy"].asarray), of(np.asarray)
    for (name, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        assert isinstance(a, fake_cuda.Array), name
        assert dtype_name(a) == dtype_name(b)
        close(a.a, b, 1e-6)


def test_a_kernel_is_written_once(device):
    params, x, dy = draw((5, 40), "float32")
    put = sys.modules["cupy"].asarray
    norm = norms.LayerNorm(**map_tree(put, params))
    for _ in range(3):
        _, saved = norm.forward(put(x))
        norm.backward(put(dy), saved)
    assert len(device.sources) == 2


def train(tmp_path, device):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question; " * 40)
    small = "--steps 3 --rows 4 --context 16 --width 32 --depth 1 --heads 2 --sample 3".split()
    settings = arguments(SOLO, "A test.", ["--text", str(text), *small, "--device", device])
    return train_on_text(SOLO, Config.modern, settings)


def test_the_training_program(device, tmp_path):
    assert abs(train(tmp_path, "gpu") - train(tmp_path, "cpu")) < 1e-5
    assert {"row", "columns", "total"} <= set(device.launches)


def test_the_training_program_says_what_is_missing(device, tmp_path, monkeypatch):
    sys.modules["cupy"].cuda.is_available = lambda: False
    with pytest.raises(SystemExit, match=r"error: CuPy finds no GPU\."):
        train(tmp_path, "gpu")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(SystemExit, match=r"error: there is no CuPy .*pip install"):
        train(tmp_path, "gpu")


BUGS = {
    "another column": ("weight_q = ((const pack_float32 *)weight)[j]", "weight_q = ((const pack_float32 *)weight)[0]"),
    "another channel": ("* 4 + j / ", "* 4 + 0 * j / "),
    "no barrier before the totals": ("__syncthreads();\n    n", "n"),
    "no barrier before the gradient": ("__syncthreads();\n    if (slice", "if (slice"),
    "a chunk too short": ("first + each < rows ? first + each", "first + each < rows ? first + each - 1"),
    "a chunk that is left out": ("chunk < chunks", "chunk < chunks - 1"),
    "rows that need care count twice": ("const int good = !flags[row]", "const int good = 1"),
    "a warp that is left out": ("i < 4; i++", "i < 3; i++"),
    "a row too far": ("row * 500 + j;", "row * 500 + j + 1;"),
    "the last pack is left out": ("j < 500;", "j < 499;"),
    "limits that do not count": ("if (bad)", "if (0)"),
    "flags of another row": ("flags[row] = flags[rows] = 1", "flags[0] = flags[rows] = 1"),
    "a lane too short": ("j += 32)", "j += 64)"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_noticed(device, bug):
    old, new = BUGS[bug]
    changed = []

    def change(code):
        changed.append(old in code)
        return code.replace(old, new)

    device.change = change
    of_rows, of_groups = draw((70, 2000), "float32"), draw((3, 8, 40, 12), "float32", "GroupNorm")
    of_rows[1][5] *= 1e-3
    of_rows[1][5] += 3e4
    found = []
    for backwards in (False, True):
        device.backwards = backwards
        for name, problem in (("LayerNorm", of_rows), ("GroupNorm", of_groups)):
            try:
                compare(device, MAKE[name], *problem)
            except AssertionError:
                found.append(name)
    assert any(changed), device.sources
    assert found
