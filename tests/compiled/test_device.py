"""Norms on a GPU that is not there: kernels run on the host, see `tests.compiled.fake_cuda`, and are held to NumPy."""

import pickle
import sys
import warnings

import numpy as np
import pytest

from npnorm import CastRMSNorm, LayerNorm, PartialRMSNorm, RMSNorm
from npnorm.arrays import dtype_name, round_to, to_numpy
from npnorm.compiled import c, check, cuda
from npnorm.compiled import device as compiled
from npnorm.config import Config
from npnorm.engine import Features, Formula, Rows
from npnorm.engine.guards import Guards, Lost
from npnorm.group import SOLO
from npnorm.norms import rms_norm
from npnorm.training.program import arguments, train_on_text
from npnorm.tree import leaves, map_tree
from tests.check import BFLOAT16, close, same_bits
from tests.compiled import fake_cuda
from tests.compiled.problems import COMPUTE, DTYPE, IMAGES, MAKE, compare, draw, fake_device, hard_rows, put, run
from tests.engine.formulas import within
from tests.norms.catalogue import CATALOGUE

FORWARD = ["row", "wait"]
OF_FEATURES = ["row", "columns", "wait"]
OF_IMAGES = ["row", "wait"]
MODEL = ["LayerNorm", "GroupNorm", "BatchNorm"]


@pytest.fixture
def device(monkeypatch):
    return fake_device(monkeypatch)


@pytest.fixture
def unchecked(monkeypatch):
    """Let every kernel pass its check."""
    for name in ("forward", "backward"):
        monkeypatch.setattr(check, name, lambda *_: None)


@pytest.mark.parametrize("name", MAKE)
@COMPUTE
@DTYPE
def test_a_norm(device, name, compute, dtype):
    problem = draw(name, dtype=dtype)
    compare(name, problem, compute)
    device.launches.clear()
    compare(name, problem, compute)
    launches = [word for word in device.launches if word != "wait"]
    assert launches == ["row", *((OF_IMAGES if name in IMAGES else OF_FEATURES)[:-1])]


@pytest.mark.parametrize("width", [8, 11, 33, 64, 70, 1000, 4099, 20000])
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_a_width(device, unchecked, name, width):
    for compute in ("float64", "float32"):
        device.launches.clear()
        compare(name, draw(name, (3, width)), compute)
        assert device.launches[: len(FORWARD + OF_FEATURES)] == FORWARD + OF_FEATURES


@pytest.mark.parametrize("space", [(16,), (7, 7), (3, 50), (40, 40)])
@pytest.mark.parametrize("channels", [2, 6, 40])
@pytest.mark.parametrize("name", IMAGES)
def test_a_space(device, unchecked, name, channels, space):
    compare(name, draw(name, (2, channels, *space)))
    assert device.launches.count("row") == 2


@pytest.mark.parametrize("each", [1, 2, 16])
def test_any_number_of_threads(device, monkeypatch, each):
    monkeypatch.setattr(cuda, "EACH", each)
    compare("LayerNorm", draw("LayerNorm", (3, 520)))
    compare("GroupNorm", draw("GroupNorm", (2, 6, 40)))


@pytest.mark.parametrize("names", [(), ("weight",), ("bias",)], ids=["none", "weight", "bias"])
@pytest.mark.parametrize("name", MAKE)
def test_without_some_parameters(device, name, names):
    if "offset" in name and "weight" not in names:
        names = ("weight",)
    params, x, dy = draw(name)
    compare(name, ({n: params[n] for n in names}, x, dy))
    assert ("columns" in device.launches) == (bool(names) and name not in IMAGES)


@pytest.mark.parametrize("rows", [1, 31, 100])
@COMPUTE
def test_chunks_of_rows(device, rows, compute):
    compare("LayerNorm", draw("LayerNorm", (rows, 64)), compute)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_parameters_of_another_dtype(device, dtype):
    params, x, dy = draw("LayerNorm", dtype="float16")
    params = map_tree(lambda a: a.astype(dtype), params)
    there, here = run(put, LayerNorm, params, x, dy), run(np.asarray, LayerNorm, params, x, dy)
    for (_, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        assert a.dtype == b.dtype
        close(a, b, 1e-14 if a.dtype == "float64" else 1e-7)


def test_what_is_added_is_rounded_once(device):
    params, x, dy = draw("RMSNorm")
    rows = Rows(Features("RMSNorm", SOLO), Formula(rms_norm.forward, rms_norm.backward, None), 1e-5)
    found = []
    for place in (put, np.asarray):
        own, at, d, plus = map_tree(place, params), place(x), place(dy), place(dy[::-1] * 3)
        _, statistics, _ = rows.forward(at, own)
        dx, grads = rows.backward(d, at, own, statistics, None, plus=plus)
        found.append(map_tree(to_numpy, {"dx": dx, "grads": grads}))
    same_bits(*found)


# Rows that lost digits.


@COMPUTE
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("eps", [1e-5, 0.3, 1e39])
def test_hard_rows(device, name, compute, eps):
    params, x, dy = draw(name, (12, 40))
    x, dy = hard_rows(x), dy.copy()
    dy[2], dy[10] = 0, dy[10] * 1e-42
    dy[9] = x[9] / params["weight"]  # dz is along z: nothing is left but its part of eps
    device.launches.clear()
    make = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}[name]
    there = run(put, lambda **p: make(**p, eps=eps, compute=compute), params, x, dy)
    here = run(np.asarray, lambda **p: make(**p, eps=eps), params, x, dy)
    within(there, here, 1 if compute == "float64" else 4)
    assert "row" in device.launches


@COMPUTE
@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_hard_rows_without_kernels(device, monkeypatch, name, compute):
    monkeypatch.setattr(compiled._Process, "uses_kernels", False)
    params, x, dy = draw(name, (12, 40))
    x, dy, params = hard_rows(x), dy.copy(), {"weight": params["weight"]}
    dy[2], dy[10] = 0, dy[10] * 1e-42
    there = run(put, lambda **p: MAKE[name](**p, compute=compute), params, x, dy)
    within(there, run(np.asarray, MAKE[name], params, x, dy), 1 if compute == "float64" else 4)
    assert "row" not in device.launches


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
def test_subnormal_numbers_are_no_zeros(device, name):
    params, x, dy = draw(name, (12, 40))
    tiny = {n: (a * np.float32(1e-40)).astype("float32") for n, a in params.items()}
    for problem in ((params, x * np.float32(1e-40), dy), (params, x, dy * np.float32(1e-40)), (tiny, x, dy)):
        compare(name, problem)
    assert compiled._Process.uses_kernels


@COMPUTE
@pytest.mark.parametrize("name", [name for name in IMAGES if "inference" not in name])
def test_hard_channels(device, name, compute):
    params, x, dy = draw(name, (6, 6, 20))
    x, dy = x.copy(), dy.copy()
    x[1], x[2, :3], x[:, 4] = 7, x[2, :3] * 1e25, x[:, 4] + 3e5
    dy[3] = 0
    compare(name, (params, x, dy), compute)
    assert "row" in device.launches


@COMPUTE
@pytest.mark.parametrize("name", MODEL)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(device, name, compute, bad):
    params, x, dy = draw(name)
    x[1, 2] = bad
    there = run(put, lambda **p: MAKE[name](**p, compute=compute), params, x, dy)
    here = run(np.asarray, lambda **p: MAKE[name](**p, compute=compute), params, x, dy)
    assert compiled._Process.uses_kernels
    for (key, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(b), key)
        np.testing.assert_allclose(a, b, 3e-5, 1e-5)


@COMPUTE
@pytest.mark.parametrize("name", MODEL)
def test_a_weight_that_is_too_large(device, name, compute):
    params, x, dy = draw(name)
    params["weight"] *= np.float32(1e25)
    compare(name, (params, x, dy), compute)


@pytest.mark.parametrize("dtype", ["float16", BFLOAT16], ids=["float16", "bfloat16"])
def test_results_of_16_bits_are_rounded_once(device, unchecked, dtype):
    """Of 40,000 rows those in which some y is another number if it is rounded to float32 on the way."""
    params, x, dy = draw("RMSNorm", (40000, 40), dtype)
    y, _ = RMSNorm(**map_tree(lambda a: a.astype("float64"), params)).forward(x.astype("float64"))
    rows = (round_to(y, np.dtype(dtype)) != y.astype("float32").astype(dtype)).any(axis=1)
    assert rows.sum() > 5
    compare("RMSNorm", (params, x[rows], dy[rows]))


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"])
@COMPUTE
def test_the_rows_that_lost_digits_are_those_of_numpy(device, unchecked, monkeypatch, name, compute):
    params, x, dy = draw(name, (3, 12, 4, 6) if name in IMAGES else (12, 40))
    rows = {"BatchNorm": lambda a: a.swapaxes(0, 1), "GroupNorm": lambda a: a[0]}.get(name, np.asarray)
    x, dy = x.copy(), dy.copy()
    rows(x)[...] = hard_rows(rows(x))
    rows(x)[0] *= np.float32(1e-36)
    rows(dy)[9], rows(dy)[7] = 0, rows(dy)[7] * np.float32(1e-25)
    rows(dy)[5] = rows(x)[5] / (1 if name in IMAGES else params["weight"])
    if name not in IMAGES:  # with this mean, more of dz must be left
        dy[10] = (x[10] - x[10].mean()) / params["weight"]
        x[10] += 100
    there, here = [], []

    def spy_there(function):
        original = getattr(compiled, function)

        def call(flags):
            lost = original(flags)
            there.append(np.zeros(len(flags) - 1, bool) if lost is None else to_numpy(lost))
            return lost

        monkeypatch.setattr(compiled, function, call)

    def spy_here(function):
        original = getattr(Guards, function)

        def call(self, *given):
            lost, count = original(self, *given), len(given[0])
            own = [lost.rows, lost.dx] if isinstance(lost, Lost) else [lost]
            here.append(sum((a for a in own if a is not None), np.zeros(count, bool)))
            return lost

        monkeypatch.setattr(Guards, function, call)

    spy_there("_lost")
    spy_here("lost_forward")
    spy_here("lost_backward")
    make = MAKE[name]
    first = {}
    norm = make(**params, compute=compute)
    _, saved = norm.forward(x)
    first["forward"] = here[0]
    here.clear()
    norm.backward(dy, saved)
    first["backward"] = here[0]
    norm = make(**map_tree(put, params), compute=compute)
    norm.backward(put(dy), norm.forward(put(x))[1])
    same_bits({"forward": there[0], "backward": there[1]}, first)
    assert first["backward"].any() or (name != "LayerNorm" and compute == "float64")


def test_a_mean_of_many_digits_is_kept_where_dx_cancels(device):
    params, x, dy = draw("LayerNorm", (12, 40))
    x += 2
    dy = (x / params["weight"] + dy * np.float32(1e-4)).astype("float32")
    compare("LayerNorm", (params, x, dy), "float32")


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_gradients_that_are_not_finite_are_evaluated_again(device, bad):
    params, x, dy = draw("BatchNorm in inference")
    dy[1, 2] = bad
    there, here = (run(place, MAKE["BatchNorm in inference"], params, x, dy) for place in (put, np.asarray))
    for (_, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        np.testing.assert_array_equal(a, b)


@COMPUTE
@pytest.mark.parametrize("name", MAKE)
def test_no_ordinary_data_fail_the_check(device, name, compute):
    for seed in range(4):
        compiled._kernels.cache_clear()
        rng = np.random.default_rng(seed)
        params, x, dy = draw(name)
        for a in params.values():
            a *= np.exp(2 * rng.standard_normal(a.shape)).astype("float32")
        x, dy = x * np.float32(10.0 ** rng.integers(-3, 5)), dy * np.float32(10.0 ** rng.integers(-6, 4))
        x[..., 3] *= 300  # some features are much larger than others
        run(put, lambda **p: MAKE[name](**p, compute=compute), params, x, dy)  # a warning would be an error
    assert compiled._Process.uses_kernels


# Memory.


@pytest.mark.parametrize("name", MODEL)
def test_memory_that_is_not_aligned(device, name):
    params, x, dy = draw(name)

    def unaligned(a):
        memory = fake_cuda.empty(a.size + 1, a.dtype)
        memory.a[1:] = a.ravel()
        return fake_cuda.Array(memory.a[1:].reshape(a.shape))

    here = run(np.asarray, MAKE[name], params, x, dy)
    same_bits(run(unaligned, MAKE[name], params, x, dy), here)
    kernels = [source for source in device.sources if "__global__" in source]
    assert all("element v[1]; } pack;" in source for source in kernels)
    same_bits(run(put, MAKE[name], params, x, dy), here)
    assert any("element v[4]; } pack;" in source for source in device.sources)


@pytest.mark.parametrize("name", MODEL)
def test_any_memory_layout_gives_the_same_bits(device, name):
    params, x, dy = draw(name)
    here = run(np.asarray, MAKE[name], params, x, dy)
    for layout in (np.asfortranarray, lambda a: np.repeat(a, 2, axis=-1)[..., ::2]):
        same_bits(run(lambda a: fake_cuda.Array(layout(a)), MAKE[name], params, x, dy), here)  # noqa: B023


@pytest.mark.parametrize("name", MAKE)
def test_the_order_of_the_threads_does_not_matter(device, unchecked, name):
    problem = draw(name, (3, 4, 10, 10) if name in IMAGES else (5, 600))
    first = run(put, lambda **p: MAKE[name](**p, compute="float32"), *problem)
    device.backwards = True
    same_bits(run(put, lambda **p: MAKE[name](**p, compute="float32"), *problem), first)


@pytest.mark.parametrize("name", [*MODEL, "BatchNorm in inference"])
def test_results_are_written_to_out(device, name):
    params, x, dy = draw(name)
    if name not in IMAGES:
        x[1] = 7
    here = run(np.asarray, MAKE[name], params, x, dy)
    norm = MAKE[name](**map_tree(put, params))
    to_y, to_dx = fake_cuda.empty(x.shape, "float32"), fake_cuda.empty(x.shape, "float32")
    y, saved = norm.forward(put(x), out=to_y)
    dx, _ = norm.backward(put(dy), saved, out=to_dx)
    assert y is to_y
    assert dx is to_dx
    same_bits({"y": y.a, "dx": dx.a}, {"y": here["y"], "dx": here["dx"]})


def test_out_that_cannot_be_written_to_is_refused(device):
    x = put(np.ones((5, 40), "float32"))
    with pytest.raises(ValueError, match="in C order"):
        LayerNorm().forward(x, out=fake_cuda.Array(np.ones((40, 5), "float32").T))
    with pytest.raises(ValueError, match="shares memory"):
        LayerNorm().forward(x, out=x)


def test_a_used_norm_pickles(device):
    norm = LayerNorm(eps=0.1)
    x = draw("LayerNorm")[1]
    norm.backward(put(x), norm.forward(put(x))[1])
    same_bits(pickle.loads(pickle.dumps(norm)).forward(x)[0], norm.forward(x)[0])


# What has no kernel, and the caches.


@pytest.mark.parametrize("width", [7, 40])
def test_arrays_that_have_no_kernel(device, width):
    problem = draw("LayerNorm", (5, width), "float64" if width == 40 else "float32")
    there, here = run(put, LayerNorm, *problem), run(np.asarray, LayerNorm, *problem)
    assert "row" not in device.launches
    for (_, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        close(a, b, 1e-12 if width == 40 else 1e-6)


@pytest.mark.parametrize(
    "make", [lambda weight: CastRMSNorm(weight, cast="llama"), PartialRMSNorm], ids=["a cast", "a subset"]
)
def test_formulas_that_have_no_kernel(device, make):
    params, x, dy = draw("RMSNorm")
    params = {"weight": params["weight"]}
    there, here = run(put, make, params, x, dy), run(np.asarray, make, params, x, dy)
    assert "row" not in device.launches
    within(there, here, 1)
    tiny = {"weight": params["weight"]}, x * np.float32(1e-41), dy * np.float32(1e-3)
    there, here = run(put, make, *tiny), run(np.asarray, make, *tiny)
    assert 0 < np.abs(here["y"]).max() < 1e-37
    same_bits(there["y"], here["y"])


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.name != "Derf"], ids=lambda entry: entry.name)
def test_every_norm(device, entry):
    rng = np.random.default_rng(1)
    params, x = entry.draw(rng, "float32")
    dy = rng.standard_normal(entry.make(params).forward(x)[0].shape).astype("float32")

    def of(place):
        layer = entry.make(map_tree(place, params))
        y, saved = layer.forward(place(x))
        dx, grads = layer.backward(place(dy), saved)
        return {"y": y, "dx": dx, "grads": grads}

    for (name, a), (_, b) in zip(leaves(of(put)), leaves(of(np.asarray)), strict=True):
        assert isinstance(a, fake_cuda.Array), name
        assert dtype_name(a) == dtype_name(b)
        close(a.a, b, 1e-6)


def train(tmp_path, device):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question; " * 40)
    small = "--steps 3 --rows 4 --context 16 --width 32 --depth 1 --heads 2 --sample 3".split()
    settings = arguments(SOLO, "A test.", ["--text", str(text), *small, "--device", device])
    return train_on_text(SOLO, Config.modern, settings)


def test_the_training_program(device, tmp_path):
    assert abs(train(tmp_path, "gpu") - train(tmp_path, "cpu")) < 1e-5
    assert {"row", "columns"} <= set(device.launches)
    assert compiled._Process.uses_kernels


def test_the_training_program_says_what_is_missing(device, tmp_path, monkeypatch):
    sys.modules["cupy"].cuda.is_available = lambda: False
    with pytest.raises(SystemExit, match=r"error: CuPy finds no GPU\."):
        train(tmp_path, "gpu")
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(SystemExit, match=r"error: there is no CuPy .*pip install"):
        train(tmp_path, "gpu")


def product(row, x, w, b):
    """Return what is no sum of products of two arrays."""
    rstd = 1 / (row.mean(x * x) + row.eps)
    return x * x * x * rstd, (rstd,)


def raised(row, x, w, b):
    """Return what a trace, and only a trace, does not have."""
    rstd = (row.mean(x * x) + row.eps) ** -0.5
    return x * rstd * w + b, (rstd,)


@pytest.mark.parametrize("forward", [product, raised])
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_a_formula_that_cannot_be_traced(device, forward, compute):
    rows = Rows(Features("Test", SOLO), Formula(forward, rms_norm.backward, None), 0.1, compute)
    x = draw("LayerNorm")[1]
    y, _, _ = rows.forward(put(x), {})
    close(y.a, rows.forward(x, {})[0], 1e-6)
    assert "row" not in device.launches
    assert compiled._Process.uses_kernels


def test_a_long_row_has_no_kernel(device, monkeypatch):
    monkeypatch.setattr(compiled, "LARGEST", 40)
    compare("LayerNorm", draw("LayerNorm"))
    assert "row" not in device.launches


@pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm"])
def test_a_kernel_is_written_once(device, name):
    params, x, dy = draw(name)
    for _ in range(2):
        norm = MAKE[name](**map_tree(put, params))
        for _ in range(3):
            norm.backward(put(dy), norm.forward(put(x))[1])
    assert sum("__global__" in source for source in device.sources) == 2


def test_eps_and_the_number_of_rows_need_no_other_kernel(device):
    for rows, eps in ((5, 0.1), (6, 0.2), (7, 1e39)):
        params, x, dy = draw("LayerNorm", (rows, 40))
        there, here = (
            run(place, lambda **p: LayerNorm(**p, eps=eps), params, x, dy)  # noqa: B023
            for place in (put, np.asarray)
        )
        same_bits(there, here)
    assert sum("__global__" in source for source in device.sources) == 2


def test_few_kernels_are_kept(device):
    formula = Formula(rms_norm.forward, rms_norm.backward, None)
    for width in range(40, 40 + compiled.KNOWN + 10):
        kind = c.Kind("Features", (width,), "float32", "float64", False, ("x",), ())
        assert compiled._kernels(formula, kind, (), (), 0) is not None
    assert compiled._kernels.cache_info().currsize == compiled.KNOWN == 64


def test_a_norm_takes_rows_of_any_length(device):
    norm = LayerNorm()
    for width in (40, 48, 40):
        _, x, _ = draw("LayerNorm", (5, width))
        same_bits(norm.forward(put(x))[0].a, LayerNorm().forward(x)[0])


# Kernels that do not work.


def fallback(name="LayerNorm", compute="float64"):
    """Run a norm twice; return the warnings, once the results are right."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            compare(name, draw(name), compute)
    return caught


def is_the_one_warning(caught, reason):
    (warning,) = caught
    assert warning.category is RuntimeWarning
    text = str(warning.message)
    return reason in text and "Please report this message" in text and "show_config" in text


@COMPUTE
def test_a_source_that_does_not_compile(device, monkeypatch, compute):
    def fail(**_):
        raise fake_cuda.CompileException("error: expected a ';'")

    monkeypatch.setattr(sys.modules["cupy"], "RawModule", fail)
    assert is_the_one_warning(fallback(compute=compute), "CompileException: error: expected a ';'")
    assert "row" not in device.launches


@pytest.mark.parametrize("error", [RuntimeError, ImportError, OSError])
def test_a_kernel_that_cannot_be_launched(device, monkeypatch, error):
    def fail(*_):
        raise error("CUDA_ERROR_INVALID_IMAGE")

    monkeypatch.setattr(fake_cuda.RawModule, "get_function", lambda *_: fail)
    assert is_the_one_warning(fallback(), "CUDA_ERROR_INVALID_IMAGE")


def test_a_kernel_that_fails_later(device, monkeypatch):
    compare("LayerNorm", draw("LayerNorm"))

    def fail(*_):
        raise RuntimeError("CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES")

    monkeypatch.setattr(compiled, "_row", fail)
    assert is_the_one_warning(fallback(), "OUT_OF_RESOURCES")


@COMPUTE
def test_a_kernel_that_is_wrong(device, compute):
    device.change = lambda code: code.replace("q.v[k] = store(", "q.v[k] = store(1.0001 * ")
    assert is_the_one_warning(fallback(compute=compute), "CheckFailed: y")
    assert device.launches.count("row") == 1  # that of the check


def test_a_gpu_that_takes_subnormal_numbers_for_zeros(device):
    """As npnorm's own kernels were, until conversions were written out."""
    device.change = lambda code: code.replace("return float_to_double(a);", "return (double)a;")
    assert is_the_one_warning(fallback(), "CheckFailed")


def test_memory_that_is_short_is_the_callers(device, monkeypatch):
    def fail(*_):
        raise MemoryError("out of memory")

    monkeypatch.setattr(compiled, "_row", fail)
    with pytest.raises(MemoryError):
        run(put, LayerNorm, *draw("LayerNorm"))
    assert compiled._Process.uses_kernels


@pytest.mark.parametrize(
    ("module", "name"), [(c, "split"), (c, "literal"), (cuda, "block"), (compiled, "flatten"), (compiled, "_row")]
)
def test_a_typo_in_the_writer_is_raised(device, monkeypatch, module, name):
    def typo(*_):
        return [].lenght

    monkeypatch.setattr(module, name, typo)
    with pytest.raises(AttributeError, match="lenght"):
        run(put, LayerNorm, *draw("LayerNorm"))


def test_a_typo_in_a_page_is_raised(device):
    def typo(row, x, w, b):
        return x * row.maen(x), ()

    rows = Rows(Features("Test", SOLO), Formula(typo, rms_norm.backward, None), 0.1)
    with pytest.raises(AttributeError, match="maen"):
        rows.forward(put(draw("LayerNorm")[1]), {})


BUGS = {
    "another column": ("weight_q = ((const pack_number *)weight)[j]", "weight_q = ((const pack_number *)weight)[0]"),
    "another channel": ("* 4 + j / ", "* 4 + 0 * j / "),
    "no barrier before the totals": ("__syncthreads();\n    n", "n"),
    "a chunk too short": ("first + each < rows ? first + each", "first + each < rows ? first + each - 1"),
    "rows that lost digits count twice": ("const int good = !flags[row]", "const int good = 1"),
    "a warp that is left out": ("i < 4; i++", "i < 3; i++"),
    "a row too far": ("row * 500 + j;", "row * 500 + j + 1;"),
    "the last pack is left out": ("j < 500;", "j < 499;"),
    "limits that do not count": ("if (bad)", "if (0)"),
    "flags of another row": ("flags[row] = flags[rows] = 1", "flags[0] = flags[rows] = 1"),
    "a lane too short": ("j += 32)", "j += 64)"),
    "a conversion that flushes": ("return float_to_double(a);", "return (double)a;"),
    "another eps": ("const number eps_ = (number)eps;", "const number eps_ = (number)eps * 1.01;"),
    "another mean": ("given[0 * rows + row] = ", "given[0 * rows + row] = 1.01 * "),
    "a constant row that is lost": ("far0 = differs;", "far0 |= differs;"),
}
BY_COMPARISON = set(BUGS) - {"a constant row that is lost"}
"""A row that is evaluated again for nothing is right, and slow."""

BY_CHECK = BY_COMPARISON - {"a row too far"}
"""Where the host sees a write beside an array, a GPU may end the process."""


def problems():
    """Return rows and images that are large enough for several warps, some of which lost digits."""
    of_rows, of_groups = draw("LayerNorm", (70, 2000)), draw("GroupNorm", (3, 8, 40, 12))
    of_rows[1][5] *= np.float32(1e-3)
    of_rows[1][5] += np.float32(3e4)
    of_rows[2][6] *= np.float32(1e-42)
    return {"LayerNorm": of_rows, "GroupNorm": of_groups}


def plant(device, bug):
    """Plant a bug; return a list that is filled with whether it met any source."""
    old, new = BUGS[bug]
    changed = []

    def change(code):
        changed.append(old in code)
        return code.replace(old, new)

    device.change = change
    return changed


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_is_noticed_by_comparison(device, unchecked, bug):
    changed, found = plant(device, bug), []
    for backwards in (False, True):
        device.backwards = backwards
        for name, problem in problems().items():
            try:
                compare(name, problem)
            except AssertionError:
                found.append(name)
    assert any(changed), device.sources
    assert bool(found) == (bug in BY_COMPARISON)


@pytest.mark.parametrize("bug", [bug for bug in BUGS if bug != "a row too far"])
def test_a_bug_is_noticed_by_the_check(device, bug):
    changed = plant(device, bug)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, problem in problems().items():
            if bug in BY_CHECK:
                compare(name, problem)  # what comes out is right
            else:
                run(put, MAKE[name], *problem)
    assert any(changed)
    assert [w.category for w in caught] == [RuntimeWarning] * (bug in BY_CHECK)
    assert compiled._Process.uses_kernels != (bug in BY_CHECK)


def test_the_check_is_made_once_for_each_kernel(device, monkeypatch):
    seen, original = [], check.forward
    monkeypatch.setattr(check, "forward", lambda *given: seen.append(1) or original(*given))
    for _ in range(3):
        compare("LayerNorm", draw("LayerNorm"))
    assert len(seen) == 1
    compare("LayerNorm", draw("LayerNorm"), "float32")
    assert len(seen) == 2
