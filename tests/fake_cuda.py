"""CUDA kernels on the host, and a module that stands in for CuPy: NumPy arrays, and kernels that `cc` compiles.

The source that a GPU would get is compiled as C against a few definitions of what CUDA adds. The threads of a block are
contexts that take turns, each until it waits for the others: at a barrier, or to exchange numbers within its warp. So a
run has one order, and a barrier that is missing shows: a thread reads what another has not yet written.
"""

import ctypes
import functools
import hashlib
import re
import subprocess
import tempfile
import types
from contextlib import nullcontext
from pathlib import Path

import numpy as np

SHIM = r"""
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)
#define __align__(bytes) __attribute__((aligned(bytes)))

typedef struct { unsigned x, y, z; } dim3;
static dim3 blockIdx, blockDim, gridDim, threadIdx;

static unsigned __float_as_uint(float a) { unsigned u; memcpy(&u, &a, 4); return u; }
static float __uint_as_float(unsigned u) { float a; memcpy(&a, &u, 4); return a; }

#define STACK 65536
static ucontext_t contexts[1024], host;
static int over[1024], turns[1024], arrived_in_block, arrived_in_warp[32], backwards, stuck;
static int waits_for_block[1024], waits_for_warp[1024], exchanges[1024], barriers[1024], ored[2];
static double exchanged[2][1024];
static char *stacks;

static void pause_thread(void) { swapcontext(&contexts[threadIdx.x], &host); }

static int __syncthreads_or(int value) {
    const int t = threadIdx.x, turn = barriers[t]++ % 2;
    if (arrived_in_block % (int)blockDim.x == 0) ored[turn] = 0;
    ored[turn] |= value != 0;
    arrived_in_block++;
    while (arrived_in_block < (int)blockDim.x * barriers[t]) pause_thread();
    return ored[turn];
}
static void __syncthreads(void) { __syncthreads_or(0); }

static double __shfl_xor_sync(unsigned mask, double value, int other) {
    const int t = threadIdx.x, warp = t / 32, turn = exchanges[t]++ % 2;
    (void)mask;
    exchanged[turn][t] = value;
    arrived_in_warp[warp]++;
    while (arrived_in_warp[warp] < 32 * exchanges[t]) pause_thread();
    return exchanged[turn][t ^ other];
}

static float half_bits(unsigned short h) {
    const float size = __uint_as_float((unsigned)(h & 0x7fff) << 13) * 0x1p112f;
    const unsigned bits = size >= 65536 ? __float_as_uint(size) | 0x7f800000u : __float_as_uint(size);
    return __uint_as_float(bits | (unsigned)(h & 0x8000) << 16);
}
static float from_float16(unsigned short h) { return half_bits(h); }
static unsigned short to_float16(double a) { /* to nearest, ties to even */
    const unsigned short sign = signbit(a) ? 0x8000 : 0;
    const double size = fabs(a);
    int exponent;
    if (a != a) return 0x7e00;
    if (size >= 65520) return sign | 0x7c00;
    frexp(size, &exponent);
    if (size < 0x1p-14) return sign | (unsigned short)rint(size * 0x1p24);
    return sign | (unsigned short)(((exponent + 13) << 10) + (int)rint(ldexp(size, 11 - exponent)));
}
static unsigned short single_to_float16(float a) { return to_float16(a); }
"""

DRIVER = r"""
static void (*entry)(void **);
static void **arguments;

static void thread(int t) {
    entry(arguments);
    over[t] = 1;
    swapcontext(&contexts[t], &host);
}

static int block(void) {
    const int count = blockDim.x;
    int i, left = count;
    memset(over, 0, sizeof over); memset(exchanges, 0, sizeof exchanges); memset(barriers, 0, sizeof barriers);
    memset(arrived_in_warp, 0, sizeof arrived_in_warp); arrived_in_block = 0;
    for (i = 0; i < count; i++) {
        getcontext(&contexts[i]);
        contexts[i].uc_stack.ss_sp = stacks + (size_t)i * STACK;
        contexts[i].uc_stack.ss_size = STACK;
        contexts[i].uc_link = &host;
        makecontext(&contexts[i], (void (*)(void))thread, 1, i);
    }
    while (left) {
        const int before = left, block_before = arrived_in_block;
        int warps_before = 0, warps = 0, w, moved = 0;
        for (w = 0; w < 32; w++) warps_before += arrived_in_warp[w];
        for (i = 0; i < count; i++) {
            const int t = backwards ? count - 1 - i : i;
            if (over[t]) continue;
            threadIdx.x = t;
            swapcontext(&host, &contexts[t]);
            if (over[t]) left--;
        }
        for (w = 0; w < 32; w++) warps += arrived_in_warp[w];
        moved = left != before || arrived_in_block != block_before || warps != warps_before;
        if (!moved && ++stuck > 2) return 1;
        if (moved) stuck = 0;
    }
    return 0;
}

static int launch(void (*kernel)(void **), int *grid, int threads, void **given, int reversed, char *memory) {
    stacks = memory; entry = kernel; arguments = given; backwards = reversed; stuck = 0;
    blockDim.x = threads; gridDim.x = grid[0]; gridDim.y = grid[1];
    for (blockIdx.y = 0; blockIdx.y < gridDim.y; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; blockIdx.x++)
            if (block()) return 1;
    return 0;
}
"""


def compiled(code):
    """Return a library with the kernels of a source: `name(arguments, grid, threads, backwards)` returns 0."""
    code = SHIM + code + DRIVER + "".join(entries(code))
    path = folder() / f"{hashlib.sha256(code.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        command = ["cc", "-std=gnu11", "-O1", "-w", "-ffp-contract=off", "-fPIC", "-shared", "-x", "c", "-"]
        done = subprocess.run([*command, "-o", path, "-lm"], input=code, text=True, capture_output=True, check=False)
        if done.returncode:
            raise AssertionError(f"cc: {done.stderr}\n{code}")
    return ctypes.CDLL(str(path))


def entries(code):
    """Yield a C function for each kernel, that takes its arguments as an array."""
    for name, parameters in re.findall(r"__global__ void __launch_bounds__\(\d+\) (\w+)\((.*?)\) {", code):
        kinds = [re.sub(r"\w+$", "", parameter.strip()) for parameter in parameters.split(",")]
        given = ", ".join(f"({kind})(intptr_t)a[{i}]" for i, kind in enumerate(kinds))
        yield f"\nstatic void enter_{name}(void **a) {{ {name}({given}); }}"
        yield f"\nint launch_{name}(int *grid, int threads, void **given, int reversed, char *memory)"
        yield f"{{ return launch(enter_{name}, grid, threads, given, reversed, memory); }}"
        yield f"\nconst int count_{name} = {len(kinds)};\n"


@functools.cache
def folder():
    """Return a folder for libraries; it is kept for this process."""
    kept = tempfile.TemporaryDirectory(prefix="npnorm-cuda-")
    folder.kept = kept
    return Path(kept.name)


STACKS = ctypes.create_string_buffer(1024 << 16)
GUARD = 256
"""Bytes before and after new memory that no kernel may touch."""


class Array(np.lib.mixins.NDArrayOperatorsMixin):
    """An array that NumPy's functions do not take, as CuPy's are; its values are `a`."""

    device = nullcontext()

    def __init__(self, a, guarded=None):
        self.a, self.guarded = a, guarded

    def __array_ufunc__(self, ufunc, method, *inputs, **settings):
        if ufunc not in OPERATORS or method != "__call__":
            raise TypeError(f"numpy.{ufunc.__name__} on a device's array")
        out = settings.pop("out", None)
        if out is not None:
            settings["out"] = tuple(map(inside, out))
        with np.errstate(all="ignore"):
            result = ufunc(*map(inside, inputs), **settings)
        return out[0] if out else Array(np.asarray(result))

    def __array__(self, *_, **__):
        raise TypeError("a device's array does not become NumPy's by itself")

    def __array_function__(self, function, *_):
        raise TypeError(f"numpy.{function.__name__} on a device's array")

    def __getattr__(self, name):
        if name not in ("shape", "dtype", "ndim", "size", "flags", "T"):
            raise AttributeError(name)
        return getattr(self.a, name)

    def __getitem__(self, key):
        return Array(np.asarray(self.a[inside(key)]))

    def __setitem__(self, key, value):
        self.a[inside(key)] = inside(value)

    def __len__(self):
        return len(self.a)

    def __bool__(self):
        return bool(self.a)

    def __float__(self):
        return float(self.a)

    def __int__(self):
        return int(self.a)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.a.__array_interface__["data"][0])

    def nonzero(self):
        return tuple(map(Array, self.a.nonzero()))


OPERATORS = {
    np.add,
    np.subtract,
    np.multiply,
    np.divide,
    np.negative,
    np.absolute,
    np.power,
    np.matmul,
    np.floor_divide,
}
OPERATORS |= {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal, np.invert}
OPERATORS |= {np.bitwise_and, np.bitwise_or, np.remainder}


def inside(value):
    """Return NumPy's arrays for those of the device, also in tuples and lists."""
    if isinstance(value, Array):
        return value.a
    return type(value)(map(inside, value)) if type(value) in (tuple, list) else value


def outside(value):
    if isinstance(value, (np.ndarray, np.generic)):
        return Array(np.asarray(value))
    return type(value)(map(outside, value)) if type(value) in (tuple, list) else value


def empty(shape, dtype=float):
    """Return memory full of ones in every bit, NaNs for floats, between two guards."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape)) * dtype.itemsize
    memory = np.full(nbytes + 2 * GUARD + 64, 0xFF, np.uint8)
    start = GUARD + -(memory.__array_interface__["data"][0] + GUARD) % 64
    return Array(np.ndarray(shape, dtype, memory, start), (memory, start, nbytes))


class Device:
    """What a module that stands in for CuPy knows of its kernels.

    Attributes
    ----------
    launches : list of str
        The kernels that ran, and "wait" where the host waited for numbers.
    backwards : bool
        Whether the last thread of a block comes first.
    change : callable
        Changes a source before it is compiled, to plant a bug.
    """

    def __init__(self):
        self.launches, self.backwards, self.change = [], False, lambda code: code
        self.sources = []

    def module(self):
        """Return the module."""
        cupy = types.ModuleType("cupy")
        cupy.ndarray, cupy.empty = Array, empty
        cupy.asnumpy, cupy.asarray = self.asnumpy, lambda a, **kw: Array(np.array(inside(a), **kw, order="C"))
        cupy.zeros = lambda shape, dtype=float: Array(np.zeros(shape, dtype))
        cupy.RawModule = functools.partial(RawModule, self)
        cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(is_hip=False), is_available=lambda: True)
        cupy.__getattr__ = self.function
        return cupy

    def asnumpy(self, a):
        self.launches.append("wait")
        return a.a.copy()

    def function(self, name):
        value = getattr(np, name)
        if not callable(value) or isinstance(value, type):
            return value

        def call(*args, **settings):
            with np.errstate(all="ignore"):
                return outside(value(*map(inside, args), **{k: inside(v) for k, v in settings.items()}))

        return call


class RawModule:
    """Kernels that `cc` has compiled."""

    def __init__(self, device, code):
        self.device, self.code = device, code
        device.sources.append(code)
        self.library = compiled(device.change(code))

    def get_function(self, name):
        launch, count = (
            getattr(self.library, f"launch_{name}"),
            ctypes.c_int.in_dll(self.library, f"count_{name}").value,
        )

        def call(grid, block, args):
            self.device.launches.append(name)
            assert len(args) == count, f"{name} takes {count} arguments, {len(args)} came"
            assert all(isinstance(arg, (Array, np.int64)) for arg in args)
            assert min(grid) > 0
            assert block[0] % 32 == 0
            given = (ctypes.c_void_p * count)(*(a.data.ptr if isinstance(a, Array) else int(a) for a in args))
            sizes = (ctypes.c_int * 2)(*grid, *[1] * (2 - len(grid)))
            if launch(sizes, *block, given, int(self.device.backwards), STACKS):
                raise AssertionError(f"{name}: some threads wait for ever")
            for arg in args:
                if isinstance(arg, Array) and arg.guarded is not None:
                    memory, start, nbytes = arg.guarded
                    assert (memory[:start] == 0xFF).all(), f"{name} wrote before an array"
                    assert (memory[start + nbytes :] == 0xFF).all(), f"{name} wrote behind an array"

        return call
