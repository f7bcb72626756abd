import sys

import numpy as np
import pytest

from npnorm.arrays import contiguous, round_to
from npnorm.cuda_casts import CASTS, CONVERSIONS
from tests.check import BFLOAT16, rounded, same_bits
from tests.compiled import fake_cuda

DTYPES = {"float32": np.dtype("float32"), "float64": np.dtype("float64"), "bfloat16": BFLOAT16}


@pytest.fixture
def device(monkeypatch):
    device = fake_cuda.Device()
    monkeypatch.setitem(sys.modules, "cupy", device.module())
    return device


def numbers(dtype):
    """Return numbers of a dtype: of every size, and where rounding to fewer digits is decided."""
    if dtype == "bfloat16":
        return np.arange(1 << 16, dtype="uint16").view(BFLOAT16)
    with np.errstate(all="ignore"):
        single = np.random.default_rng(1).integers(0, 1 << 32, 20000, dtype="uint32").view("float32")
    single = np.concatenate([single, np.arange(64, dtype="uint32").view("float32"), np.float32([1e-40, -3e-42])])
    if dtype == "float32":
        return single
    single = single[np.isfinite(single)]
    short = np.arange(0x7F80, dtype="uint16").view(BFLOAT16).astype("float64")
    of_bfloat16 = (short[1:] + short[:-1]) / 2
    of_float32 = (single.astype("float64") + np.nextafter(single, np.float32(0))) / 2
    middles = [of_bfloat16, -of_bfloat16, of_float32]
    around = [np.nextafter(a, b) for a in middles for b in (np.inf, -np.inf)]
    return np.concatenate([*middles, *around, [np.inf, -np.inf, np.nan, 1e300, -1e300, 1e-300, 0.0, -0.0]])


@pytest.mark.parametrize(("source", "target"), CASTS)
def test_a_cast_on_the_device_is_that_of_the_host(device, source, target):
    x = numbers(source)
    put, dtype = sys.modules["cupy"].asarray, DTYPES[target]
    came = round_to(put(x), dtype).a
    expected = round_to(x, dtype)
    known = ~np.isnan(expected.astype("float64"))
    same_bits(came[known], expected[known])
    assert np.isnan(came[~known].astype("float64")).all()
    assert came.dtype == dtype
    same_bits(contiguous(put(x), dtype).a[known], expected[known])
    assert len(device.sources) == 1


def test_the_host_rounds_once():
    x = numbers("float64")
    normal = x[np.isfinite(x) & (abs(x) > 1e-37) & (abs(x) < 3e38)]
    same_bits(round_to(normal, BFLOAT16), rounded(normal, BFLOAT16))


@pytest.mark.parametrize("shape", [(), (0, 3), (4, 1, 5)])
def test_any_shape_and_layout(device, shape):
    x = np.random.default_rng(2).standard_normal(shape).astype("float32")
    for a in (x, x.T):
        same_bits(round_to(sys.modules["cupy"].asarray(a), np.float64).a, np.asarray(a, "float64"))


def test_a_plain_cast_would_not_do(device):
    x = sys.modules["cupy"].asarray(np.float32([1e-40, 1.0]))
    assert sys.modules["cupy"].astype(x, np.float64).a.tolist() == [0.0, 1.0]
    assert (x * 1.0).a.tolist() == [0.0, 1.0]
    assert round_to(x, np.float64).a[0] > 0


@pytest.mark.parametrize("mend", ["float_to_double(", "double_to_float("])
def test_nor_would_one_in_c(device, mend):
    device.change = lambda code: code.replace(f"y = {mend}", "y = (")
    source, target = ("float32", "float64") if mend.startswith("float") else ("float64", "float32")
    x = sys.modules["cupy"].asarray(np.array([1e-40, 1.0], source))
    assert round_to(x, np.dtype(target)).a.tolist() == [0.0, 1.0]


def test_other_casts_are_left_to_the_module(device):
    x = sys.modules["cupy"].asarray(np.float32([1.5, 2.5]))
    assert round_to(x, np.dtype("float16")).dtype == "float16"
    assert round_to(x, np.dtype("float32")).dtype == "float32"
    assert not device.sources


def test_every_conversion_to_or_from_float32_is_written_out():
    for line in CONVERSIONS.splitlines():
        assert "(float)" not in line
        assert "(double)" not in line
    assert CONVERSIONS.count("asm(") == 5
    assert "ftz" not in CONVERSIONS
