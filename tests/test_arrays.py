import sys
import types
from contextlib import nullcontext

import array_api_strict
import numpy as np
import pytest

from npnorm import arrays
from tests.check import BFLOAT16, same_bits

DEVICE = array_api_strict.Device("device1")
BITS = {np.dtype("float32"): np.uint32, np.dtype("float16"): np.uint16, BFLOAT16: np.uint16}
NAMES = [dtype.name for dtype in BITS]


class FakeCuPyArray:
    def __init__(self, values):
        self.values, self.device = values, nullcontext()


@pytest.fixture
def cupy(monkeypatch):
    module = types.ModuleType("cupy")
    module.ndarray, module.asarray, module.asnumpy = FakeCuPyArray, FakeCuPyArray, lambda x: x.values
    monkeypatch.setitem(sys.modules, "cupy", module)
    return module


def test_the_module_of_an_array_is_found():
    assert arrays.array_module(np.arange(3)) is np
    assert arrays.array_module(np.float32(3)) is np
    assert arrays.array_module(array_api_strict.ones(3)) is array_api_strict


def test_a_cupy_array_is_known_once_cupy_is_loaded(cupy):
    assert arrays.array_module(FakeCuPyArray(np.arange(3))) is cupy


@pytest.mark.parametrize("value", [[1.0, 2.0], 3.0, None])
def test_what_is_not_an_array_is_refused(value):
    with pytest.raises(TypeError, match=rf"works on arrays of NumPy.*got a {type(value).__name__}\. .*numpy\.asarray"):
        arrays.array_module(value)


def test_a_masked_array_is_refused_and_its_mask_not_ignored():
    masked = np.ma.masked_greater(np.arange(3.0), 1)
    with pytest.raises(TypeError, match=r"got a MaskedArray\. Its mask would be ignored\. .* by x\.filled\(0\)"):
        arrays.array_module(masked)
    assert arrays.array_module(masked.filled(0)) is np


def test_numpy_arrays_travel_without_a_copy():
    x = np.arange(6.0)
    assert arrays.to_numpy(x) is x
    assert arrays.from_numpy(x, np.ones(2)) is x


@pytest.mark.parametrize("dtype", ["float64", "float32", "int64"])
def test_values_come_back_from_a_device(dtype):
    x = np.random.default_rng(1).standard_normal((3, 2)).astype(dtype)
    there = arrays.from_numpy(x, array_api_strict.ones(1, device=DEVICE))
    assert there.device == DEVICE
    same_bits(arrays.to_numpy(there), x)


def test_values_come_back_from_cupy(cupy):
    x = np.arange(3.0)
    there = arrays.from_numpy(x, FakeCuPyArray(np.ones(1)))
    assert isinstance(there, FakeCuPyArray)
    assert arrays.to_numpy(there) is x


@pytest.mark.parametrize("x", [np.ones((2, 3), ">f4"), array_api_strict.ones((2, 3), dtype=array_api_strict.float32)])
def test_an_array_is_described_the_same_in_every_module(x):
    assert arrays.dtype_name(x) == "float32"
    assert arrays.describe(x) == "(2, 3) float32"


def test_contiguous_gives_c_order_and_the_same_values():
    x = np.random.default_rng(2).standard_normal((3, 4)).T
    y = arrays.contiguous(x)
    assert y.flags.c_contiguous
    same_bits(y, x)
    strict = array_api_strict.ones((2, 3))
    assert arrays.contiguous(strict) is strict


@pytest.mark.parametrize("dtype", BITS, ids=NAMES)
def test_rounding_is_to_nearest_with_ties_to_even(dtype):
    rng = np.random.default_rng(3)
    bits = BITS[dtype]
    top = int(np.array(np.inf, dtype).view(bits))
    low = rng.integers(0, top - 1, 20000).astype(bits)  # every pair of neighbours, subnormal ones too
    down, up = low.view(dtype), (low + bits(1)).view(dtype)
    middle = (down.astype(np.float64) + up.astype(np.float64)) / 2  # exact
    side = rng.integers(-1, 2, low.size)
    x = middle * (1 + side * 2.0 ** -rng.integers(25, 53, low.size))
    x = np.where(side < 0, np.minimum(x, np.nextafter(middle, 0)), np.where(side > 0, x, middle))
    assert np.all(np.sign(x - middle) == side)
    even = np.where(low % 2 == 0, down, up)
    expected = np.where(side == 0, even, np.where(side < 0, down, up))
    same_bits(arrays.round_to(x, dtype), expected)
    same_bits(arrays.round_to(-x, dtype), -expected)


def test_bfloat16_is_not_rounded_twice():
    x = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8 - 2**-40, 1 + 3 * 2**-8 - 2**-40])
    same_bits(arrays.round_to(x, BFLOAT16), np.array([1 + 2**-7, 1, 1 + 2**-7], BFLOAT16))
    assert float(arrays.round_to(x[:1], BFLOAT16)[0]) == 1.0078125


@pytest.mark.parametrize("dtype", BITS, ids=NAMES)
def test_rounding_keeps_zeros_infinities_and_nan(dtype):
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e300, -1e300, 1e-300, -1e-300])
    expected = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, np.inf, -np.inf, 0.0, -0.0])
    with np.errstate(over="ignore", under="ignore"):
        y = arrays.round_to(x, dtype).astype(np.float64)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(np.signbit(y), np.signbit(expected))


def test_rounding_leaves_its_input_alone():
    x = np.random.default_rng(4).standard_normal(50)
    before = x.copy()
    arrays.round_to(x, BFLOAT16)
    same_bits(x, before)


def test_rounding_to_its_own_dtype_is_free():
    x = np.arange(3.0)
    assert arrays.round_to(x, x.dtype) is x


def test_rounding_stays_on_the_device():
    x = array_api_strict.asarray([0.1, 0.2], device=DEVICE)
    y = arrays.round_to(x, array_api_strict.float32)
    assert (y.device, y.dtype) == (DEVICE, array_api_strict.float32)


@pytest.mark.parametrize("name", ["sqrt", "exp", "log", "tanh"])
def test_functions_are_those_of_the_module(name):
    values = np.array([0.3, 1.0, 2.7])
    y = getattr(arrays, name)(array_api_strict.asarray(values, device=DEVICE))
    assert y.device == DEVICE
    np.testing.assert_array_equal(arrays.to_numpy(y), getattr(np, name)(values))


def test_transpose_exchanges_the_last_two_axes():
    x = np.random.default_rng(5).standard_normal((2, 3, 4))
    same_bits(arrays.transpose(x), x.swapaxes(1, 2))
