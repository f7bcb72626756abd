"""The sources of kernels, and the host that runs them; whole norms are in `tests.compiled.test_device`."""

import re

import numpy as np
import pytest

from npnorm.arrays import round_to
from npnorm.compiled import cuda
from npnorm.compiled.c import Kind, NotWritten
from npnorm.compiled.trace import trace_backward, trace_forward
from npnorm.cuda_casts import CONVERSIONS
from npnorm.engine import Batch, Channels, Features, Row
from npnorm.engine.exact import Formula
from npnorm.group import SOLO
from npnorm.norms import batch_norm, layer_norm, rms_norm
from tests.check import BFLOAT16, same_bits
from tests.compiled import fake_cuda

LAYER = Formula(layer_norm.forward, layer_norm.backward, None)
RMS = Formula(rms_norm.forward, rms_norm.backward, None)
BATCH = Formula(batch_norm.forward, batch_norm.backward, None)
LAYOUTS = {"Features": Features("", SOLO), "Channels": Channels("", SOLO, 2), "Batch": Batch("", SOLO)}


def sources(axes, formula, shape, params=("weight", "bias"), dtype="float32", work="float64", width=1):
    """Return the sources of both directions."""
    layout, folds = LAYOUTS[axes], axes != "Features"
    traced = trace_forward(formula, layout, shape, folds, params, 0)
    forward = cuda.write_forward(traced, Kind(axes, shape, dtype, work, folds, ("x",), params, width))
    means = tuple(isinstance(s, tuple) for s in traced.statistics)
    traced = trace_backward(formula, layout, shape, folds, params, means, plus=False)
    read = tuple(name for name in params if name == "weight")
    backward = cuda.write_backward(traced, Kind(axes, shape, dtype, work, folds, ("dy", "x"), read, width))
    return forward, backward


def passes(source, kernel="row"):
    """Return how many loops over the row a kernel has that are not within a branch."""
    body = re.search(rf"void __launch_bounds__\(\d+\) {kernel}\(.*?\n}}", source.code, re.S)[0]
    return len(re.findall(r"\n    for \(int [ji] = t", body))


@pytest.mark.parametrize(("formula", "expected"), [(LAYER, (3, 2)), (RMS, (2, 2))], ids=["LayerNorm", "RMSNorm"])
def test_a_row_is_read_as_often_as_its_sums_need(formula, expected):
    assert tuple(map(passes, sources("Features", formula, (40,), ("weight",)))) == expected


@pytest.mark.parametrize(
    ("axes", "formula"), [("Channels", LAYER), ("Batch", BATCH), ("Batch", LAYER)], ids=["Group", "Batch", "products"]
)
def test_an_image_is_read_twice(axes, formula):
    assert tuple(map(passes, sources(axes, formula, (3, 40), ()))) == (2, 2)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("work", ["float32", "float64"])
def test_a_source_needs_no_header(dtype, work):
    for source in sources("Features", LAYER, (40,), dtype=dtype, work=work):
        assert "#include" not in source.code


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_no_element_is_converted_by_a_plain_cast(dtype):
    for work in ("float64", "float32"):
        for source in sources("Features", LAYER, (40,), dtype=dtype, work=work):
            load, store = (
                re.search(rf"{name}\(.*?\) {{ return (.*?); }}", source.code)[1] for name in ("load", "store")
            )
            assert "(double)" not in load + store
            assert "(float)" not in load + store
            assert ("float_to_double" in load) == (work == "float64")
            assert store == "a" or "_to_" in store


def test_a_source_is_the_same_every_time():
    assert sources("Channels", LAYER, (3, 40)) == sources("Channels", LAYER, (3, 40))


def test_eps_is_no_part_of_a_source():
    for source in sources("Features", LAYER, (40,)):
        assert "double eps" in source.code
        assert "inf" not in source.code
        assert "nan" not in source.code


@pytest.mark.parametrize(("width", "threads"), [(8, 32), (128, 32), (512, 32), (516, 64), (4096, 256), (1 << 20, 1024)])
def test_a_row_has_the_threads_that_it_needs(width, threads):
    assert sources("Features", LAYER, (width,), (), width=4)[0].threads == threads


def test_channels_without_parameters_have_no_partial_sums():
    for params, partials in ((), 0), (("weight",), 2 * 3):  # dy x and dy, of three channels
        assert sources("Channels", LAYER, (3, 40), params)[1].partials == partials


def test_the_numbers_that_a_kernel_gives():
    assert [s.given for s in sources("Features", LAYER, (40,))] == [3, 0]  # the mean in two summands, rstd
    assert [s.given for s in sources("Channels", LAYER, (3, 40))] == [3, 6]
    assert [s.given for s in sources("Batch", BATCH, (3, 40))] == [5, 2]
    assert sources("Batch", BATCH, (3, 40))[0].kernels == ("row",)
    assert sources("Features", LAYER, (40,))[1].kernels == ("row", "columns")
    assert sources("Features", LAYER, (40,), ())[1].kernels == ("row",)


def backward_only(backward):
    return Formula(layer_norm.forward, backward, None)


def test_what_a_kernel_does_not_have_is_not_written():
    def of_a_number(row: Row, dy, x, w, mean, rstd):
        return dy * rstd, row.mean(dy * x), dy

    def of_a_parameter(row, dy, x, w, mean, rstd):
        return dy * rstd, dy * w, dy

    def of_a_sum(row, dy, x, w, mean, rstd):
        return dy * rstd, dy * row.mean(x), dy

    for backward in (of_a_number, of_a_parameter, of_a_sum):
        with pytest.raises(NotWritten):
            sources("Features", backward_only(backward), (40,))


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
    code = CONVERSIONS + (
        "__global__ void __launch_bounds__(32) test(const double *x, const float *s, const unsigned short *h, "
        "unsigned short *y, unsigned short *z, float *back, long long n, long long m) {\n"
        f"for (long long i = threadIdx.x; i < n; i += 32) y[i] = double_to_{name}(x[i]);\n"
        f"for (long long i = threadIdx.x; i < n; i += 32) z[i] = float_to_{name}(s[i]);\n"
        f"for (long long i = threadIdx.x; i < m; i += 32) back[i] = {name}_to_float(h[i]);\n}}"
    )
    launch(code, x, singles, bits, y, z, back, np.int64(x.size), np.int64(bits.size))
    for came, given in ((y, x), (z, singles)):
        expected = round_to(given, np.dtype(dtype))
        nan = np.isnan(given)
        same_bits(came[~nan], expected[~nan].view(np.uint16))
        assert np.isnan(came.view(dtype)[nan].astype("float32")).all()
    known = ~np.isnan(wide)
    same_bits(back[known], wide[known].astype("float32"))


def test_the_host_flushes_as_a_gpu_does():
    code = (
        "__global__ void __launch_bounds__(32) test(float *x, double *y) { if (threadIdx.x == 0) {"
        " y[0] = x[0]; y[1] = float_to_double(x[0]); x[1] = x[0] + x[0]; x[2] = (float)y[2];"
        " x[3] = double_to_float(y[2]); } }"
    )
    x, y = np.array([1e-40, 1, 1, 1], "float32"), np.array([1, 1, 1e-40])
    launch(CONVERSIONS + code, x, y)
    assert y.tolist() == [0.0, float(x[0]), 1e-40]
    assert x.tolist() == [x[0], 0.0, 0.0, x[0]]
    assert x[0] > 0


def test_numbers_are_arguments():
    code = "__global__ void __launch_bounds__(32) test(double a, double *x, long long n) { x[n] = a; }"
    x = np.zeros(3)
    launch(code, np.float64(1e-39), x, np.int64(2))
    assert x.tolist() == [0.0, 0.0, 1e-39]


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
