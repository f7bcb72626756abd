"""The sources of kernels, and the host that runs them; whole norms are in `tests.test_device`."""

import re
import sys
from functools import partial

import numpy as np
import pytest

from npnorm import cuda, norms
from npnorm.arrays import round_to
from npnorm.axes import Channels, Features
from npnorm.group import SOLO
from npnorm.norms import layer_norm
from npnorm.terms import Unwritten
from npnorm.written import limits_of, record
from tests import fake_cuda
from tests.check import BFLOAT16, same_bits


@pytest.fixture
def device(monkeypatch):
    device = fake_cuda.Device()
    monkeypatch.setitem(sys.modules, "cupy", device.module())
    return device


def sources(device, make, shape, params=(), dtype="float32"):
    """Return the sources of forward and backward of a norm."""
    put = sys.modules["cupy"].asarray
    x = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    norm = make(**{name: put(np.ones(x.shape[-1 if x.ndim == 2 else 1], dtype)) for name in params})
    _, saved = norm.forward(put(x))
    norm.backward(put(x), saved)
    return device.sources


def kind(axes, shape, arrays, params=(), period=1):
    of = dict.fromkeys
    return cuda.Kind(
        axes, shape, period, of(arrays, "float32"), of(params, "float32"), "float64", 1, 0.1, limits_of(axes, "float64")
    )


def passes(source, kernel="row"):
    """Return how many loops over the row a kernel has that are not within a branch."""
    body = re.search(rf"void __launch_bounds__\(\d+\) {kernel}\(.*?\n}}", source, re.S)[0]
    return len(re.findall(r"\n    for \(int j = t;", body))


@pytest.mark.parametrize(
    ("make", "expected"),
    [(norms.LayerNorm, (3, 2)), (norms.RMSNorm, (2, 2)), (partial(norms.PartialRMSNorm, p=1), (2, 2))],
    ids=["LayerNorm", "RMSNorm", "PartialRMSNorm of all"],
)
def test_a_row_is_read_as_often_as_its_sums_need(device, make, expected):
    forward, backward = sources(device, make, (3, 40), ("weight",))
    assert (passes(forward), passes(backward)) == expected


@pytest.mark.parametrize("make", [partial(norms.GroupNorm, 2), norms.InstanceNorm, norms.BatchNorm])
def test_an_image_is_read_twice(device, make):
    forward, backward = sources(device, make, (3, 4, 40))
    assert (passes(forward), passes(backward)) == (2, 2)


def test_a_source_needs_no_header(device):
    for dtype in ("float32", "float16", BFLOAT16):
        assert not any("#include" in source for source in sources(device, norms.LayerNorm, (3, 40), ("weight",), dtype))


def test_a_source_is_the_same_every_time(device):
    first = list(sources(device, norms.LayerNorm, (3, 40), ("weight", "bias")))
    assert sources(device, norms.LayerNorm, (3, 40), ("weight", "bias"))[2:] == first


@pytest.mark.parametrize(("width", "threads"), [(8, 32), (128, 32), (512, 32), (516, 64), (4096, 256), (1 << 20, 1024)])
def test_a_row_has_the_threads_that_it_needs(width, threads):
    made = record("Features", partial(layer_norm.normalize, Features("", SOLO), ""), ("x",), (width,), (), 0, 0.1)
    assert cuda.forward(made, kind("Features", (width,), ["x"])._replace(width=4)).threads == threads


def test_channels_without_parameters_have_no_partial_sums():
    formula = partial(layer_norm.normalize_backward, Channels("", SOLO, 2))
    for params, partials in ((), 0), (("weight",), 2 * 3):  # dy x and dy, of three channels
        made = record("Channels", formula, ("dy", "x"), (3, 40), params, 3, 0.1)
        assert cuda.backward(made, kind("Channels", (3, 40), ["dy", "x"], params, 2)).partials == partials


def test_what_a_kernel_does_not_have_is_not_written():
    axes = Channels("", SOLO, 2)

    def channels_in_rows(x, w, b, eps):
        return x * axes.within(x), ()

    def unknown(x, w, b, eps):
        mean = axes.mean(x)
        return x * mean.tape.factor("cube", mean), ()

    for formula in (channels_in_rows, unknown):
        made = record("Channels", formula, ("x",), (3, 40), (), 0, 0.1)
        with pytest.raises(Unwritten):
            cuda.forward(made, kind("Channels", (3, 40), ["x"]))

    def of_a_number(dy, x, w, eps):
        return dy, {"weight": Features("", SOLO).mean(dy * x)}

    def of_a_parameter(dy, x, w, eps):
        return dy, {"weight": dy * w}

    def of_a_sum(dy, x, w, eps):
        return dy, {"weight": dy * Features("", SOLO).mean(x)}

    for formula in (of_a_number, of_a_parameter, of_a_sum):
        made = record("Features", formula, ("dy", "x"), (40,), ("weight",), 0, 0.1)
        with pytest.raises(Unwritten):
            cuda.backward(made, kind("Features", (40,), ["dy", "x"], ["weight"]))


def launch(code, *arrays, threads=32, blocks=1):
    """Run the kernel `test` of a source on NumPy arrays."""
    device = fake_cuda.Device()
    given = [fake_cuda.Array(a) if isinstance(a, np.ndarray) else a for a in arrays]
    fake_cuda.RawModule(device, code).get_function("test")((blocks,), (threads,), given)


@pytest.mark.parametrize("dtype", ["float16", BFLOAT16], ids=["float16", "bfloat16"])
def test_elements_of_16_bits_are_rounded_once(dtype):
    name = np.dtype(dtype).name
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(dtype)
    with np.errstate(all="ignore"):
        wide = values.astype("float64")
    finite = np.sort(wide[np.isfinite(wide)])
    middle = (finite[1:] + finite[:-1]) / 2
    beyond = np.array([np.inf, -np.inf, np.nan, 1e300, -1e300, 1e-300, -1e-300, 0.0, -0.0])
    x = np.concatenate([finite, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf), beyond])
    with np.errstate(all="ignore"):
        singles = x.astype("float32")
    y, z, back = (np.zeros(a.shape, t) for a, t in ((x, np.uint16), (x, np.uint16), (bits, "float32")))
    code = cuda.CONVERSIONS[name] + (
        "__global__ void __launch_bounds__(32) test(const double *x, const float *s, const unsigned short *h, "
        "unsigned short *y, unsigned short *z, float *back, long long n, long long m) {\n"
        f"for (long long i = threadIdx.x; i < n; i += 32) y[i] = to_{name}(x[i]);\n"
        f"for (long long i = threadIdx.x; i < n; i += 32) z[i] = single_to_{name}(s[i]);\n"
        f"for (long long i = threadIdx.x; i < m; i += 32) back[i] = from_{name}(h[i]);\n}}"
    )
    launch(code, x, singles, bits, y, z, back, np.int64(x.size), np.int64(bits.size))
    for came, given in ((y, x), (z, singles)):
        expected = round_to(given, np.dtype(dtype))
        nan = np.isnan(given)
        same_bits(came[~nan], expected[~nan].view(np.uint16))
        assert np.isnan(came.view(dtype)[nan].astype("float32")).all()
    known = ~np.isnan(wide)
    same_bits(back[known], wide[known].astype("float32"))


def test_threads_that_wait_for_ever_are_found():
    code = "__global__ void __launch_bounds__(64) test(double *x) { if (threadIdx.x < 40) __syncthreads(); }"
    with pytest.raises(AssertionError, match="wait for ever"):
        launch(code, np.zeros(1), threads=64)


@pytest.mark.parametrize("at", [-1, 4])
def test_a_write_beside_an_array_is_found(at):
    code = f"__global__ void __launch_bounds__(32) test(float *x) {{ if (threadIdx.x == 7) x[{at}] = 1; }}"
    device = fake_cuda.Device()
    with pytest.raises(AssertionError, match="wrote be"):
        fake_cuda.RawModule(device, code).get_function("test")((1,), (32,), [fake_cuda.empty(4, "float32")])


@pytest.mark.parametrize("barrier", ["__syncthreads();", ""])
def test_a_barrier_that_is_missing_shows(barrier):
    code = (
        "__global__ void __launch_bounds__(64) test(double *x) { __shared__ double s[64]; const int t = threadIdx.x;"
        f" s[t] = t + 1; {barrier} x[t] = s[63 - t]; }}"
    )
    x = np.zeros(64)
    launch(code, x, threads=64)
    assert np.array_equal(x, np.arange(64, 0, -1)) == bool(barrier)


def test_numbers_are_exchanged_within_a_warp():
    code = (
        "__global__ void __launch_bounds__(64) test(double *x) { const int t = threadIdx.x; double a = x[t];"
        " for (int step = 16; step > 0; step >>= 1) a += __shfl_xor_sync(0xffffffffu, a, step);"
        " x[t] = a + 1000 * (__syncthreads_or(t == 5) != 0) + 5000 * __syncthreads_or(0); }"
    )
    x = np.arange(64.0)
    launch(code, x, threads=64)
    assert set(x[:32]) == {1000 + 31 * 16}
    assert set(x[32:]) == {1000 + 31 * 16 + 32 * 32}
