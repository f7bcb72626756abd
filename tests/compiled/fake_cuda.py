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
#include <setjmp.h>
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
static jmp_buf paused[1024], host;
static int begun[1024], over[1024], arrived_in_block, arrived_in_warp[32], backwards, stuck;
static int exchanges[1024], barriers[1024], ored[2];
static double exchanged[2][1024];
static char *stacks;

/* Not by swapcontext, which makes a system call each time. */
static void pause_thread(void) { if (!_setjmp(paused[threadIdx.x])) _longjmp(host, 1); }

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

/* The conversions of npnorm.cuda_casts, by integers: no mode of the processor changes them. */

static unsigned long long bits_of(double a) { unsigned long long u; memcpy(&u, &a, 8); return u; }
static double double_of(unsigned long long u) { double a; memcpy(&a, &u, 8); return a; }

static double float_to_double(float a) {
    const unsigned u = __float_as_uint(a), size = u & 0x7fffffffu;
    const unsigned long long sign = (unsigned long long)(u >> 31) << 63;
    if (size < 0x00800000u) return double_of(sign | bits_of((double)(int)size * 0x1p-149));
    if (size >= 0x7f800000u) return double_of(sign | 0x7ffull << 52 | (unsigned long long)(size & 0x7fffffu) << 29);
    return double_of(sign | ((unsigned long long)size << 29) + (896ull << 52));
}

static float double_to_float(double a) { /* to nearest, ties to even */
    const unsigned long long u = bits_of(a), digits = (u & 0xfffffffffffffull) | 1ull << 52;
    const unsigned sign = (unsigned)(u >> 63) << 31;
    const int exponent = (int)(u >> 52 & 0x7ff) - 1023;
    const int shift = exponent >= -126 ? 29 : 29 - 126 - exponent;
    unsigned long long kept, rest;
    if (a != a) return __uint_as_float(0x7fc00000u);
    if (exponent > 127) return __uint_as_float(sign | 0x7f800000u);
    if (shift > 54) return __uint_as_float(sign);
    kept = digits >> shift, rest = digits & ((1ull << shift) - 1);
    kept += rest > 1ull << (shift - 1) || (rest == 1ull << (shift - 1) && (kept & 1));
    return __uint_as_float(sign | ((exponent >= -126 ? (unsigned)(exponent + 126) << 23 : 0) + (unsigned)kept));
}

static float float16_to_float(unsigned short h) {
    const unsigned sign = (unsigned)(h & 0x8000) << 16, exponent = h >> 10 & 31, digits = h & 1023;
    if (!exponent) return __uint_as_float(sign | __float_as_uint((float)digits * 0x1p-24f));
    return __uint_as_float(sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | digits << 13);
}

static unsigned short double_to_float16(double a) { /* to nearest, ties to even */
    const unsigned short sign = signbit(a) ? 0x8000 : 0;
    const double size = fabs(a);
    int exponent;
    if (a != a) return 0x7e00;
    if (size >= 65520) return sign | 0x7c00;
    frexp(size, &exponent);
    if (size < 0x1p-14) return sign | (unsigned short)rint(size * 0x1p24);
    return sign | (unsigned short)(((exponent + 13) << 10) + (int)rint(ldexp(size, 11 - exponent)));
}
static unsigned short float_to_float16(float a) { return double_to_float16(a); }

/* As with -ftz=true: every other operation takes subnormal numbers for zeros, of float and, beyond CUDA, of double. */
static unsigned set_mode(unsigned mode) {
#ifdef __SSE2__
    const unsigned before = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(mode);
    return before;
#else
    return mode;
#endif
}
static const unsigned FLUSH = 0x9fc0;
"""

DRIVER = r"""
static void (*entry)(void **);
static void **arguments;

static void thread(void) {
    for (;;) { /* block by block */
        entry(arguments);
        over[threadIdx.x] = 1;
        pause_thread();
    }
}

static void resume(int t) {
    ucontext_t context;
    threadIdx.x = t;
    if (_setjmp(host)) return;
    if (begun[t]) _longjmp(paused[t], 1);
    begun[t] = 1;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + (size_t)t * STACK;
    context.uc_stack.ss_size = STACK;
    makecontext(&context, thread, 0);
    setcontext(&context);
}

static int block(void) {
    const int count = blockDim.x;
    int left = count;
    memset(over, 0, sizeof over); memset(exchanges, 0, sizeof exchanges); memset(barriers, 0, sizeof barriers);
    memset(arrived_in_warp, 0, sizeof arrived_in_warp); arrived_in_block = 0;
    while (left) {
        const int before = left, block_before = arrived_in_block;
        int warps_before = 0, warps = 0, i, w, moved = 0;
        for (w = 0; w < 32; w++) warps_before += arrived_in_warp[w];
        for (i = 0; i < count; i++) {
            const int t = backwards ? count - 1 - i : i;
            if (over[t]) continue;
            resume(t);
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
    const unsigned before = set_mode(FLUSH);
    int waits = 0;
    stacks = memory; entry = kernel; arguments = given; backwards = reversed; stuck = 0;
    memset(begun, 0, sizeof begun);
    blockDim.x = threads; gridDim.x = grid[0]; gridDim.y = grid[1];
    for (blockIdx.y = 0; blockIdx.y < gridDim.y && !waits; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < gridDim.x && !waits; blockIdx.x++) waits = block();
    set_mode(before);
    return waits;
}
"""


def compiled(code):
    """Return a library with the kernels of a source: `name(arguments, grid, threads, backwards)` returns 0."""
    return library(SHIM + code + DRIVER + "".join(entries(code)))


def library(code):
    """Return what `cc` makes of C."""
    path = folder() / f"{hashlib.sha256(code.encode()).hexdigest()[:24]}.so"
    if not path.exists():
        # Compiling takes longer than what it makes faster: not optimized.
        command = ["cc", "-std=gnu11", "-O0", "-w", "-ffp-contract=off", "-fPIC", "-shared", "-x", "c", "-"]
        done = subprocess.run([*command, "-o", path, "-lm"], input=code, text=True, capture_output=True, check=False)
        if done.returncode:
            raise AssertionError(f"cc: {done.stderr}\n{code}")
    return ctypes.CDLL(str(path))


def entries(code):
    """Yield a C function for each kernel, that takes its arguments as an array."""
    for name, parameters in re.findall(r"__global__ void __launch_bounds__\(\d+\) (\w+)\((.*?)\) {", code):
        kinds = [re.sub(r"\w+$", "", parameter.strip()) for parameter in parameters.split(",")]
        given = ", ".join(
            f"*(double *)&a[{i}]" if kind.strip() == "double" else f"({kind})(intptr_t)a[{i}]"
            for i, kind in enumerate(kinds)
        )
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
            result = flushed(ufunc(*(flushed(inside(a)) for a in inputs), **settings))
        return out[0] if out else Array(np.asarray(result))

    def __array__(self, *_, **__):
        raise TypeError("a device's array does not become NumPy's by itself")

    def __array_function__(self, function, *_):
        raise TypeError(f"numpy.{function.__name__} on a device's array")

    def __getattr__(self, name):
        if name not in ("shape", "dtype", "ndim", "size", "flags", "T"):
            raise AttributeError(name)
        return getattr(self.a, name)

    def view(self, dtype):
        return Array(self.a.view(dtype))

    def __getitem__(self, key):
        return self.part(np.asarray(self.a[inside(key)]))

    def part(self, a):
        """Return an array, between the guards of this one if it lies in the same memory."""
        return Array(a, self.guarded if np.may_share_memory(a, self.a) else None)

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


COMPUTES = {"astype", "sum", "max", "sqrt"}
"""The functions that compute, of those that the engine calls; the others only move numbers."""


def flushed(a):
    """Return numbers as CuPy, which compiles with -ftz=true, reads and writes them: subnormal float32 are zeros."""
    if not isinstance(a, np.ndarray) or a.dtype.name not in ("float32", "bfloat16"):
        return a
    return np.where(np.abs(a) < a.dtype.type(2.0**-126), np.copysign(a.dtype.type(0), a), a)


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


def empty_like(array):
    """Return memory of the shape and dtype of an array, with its axes in the same order in memory."""
    order = sorted(range(array.ndim), key=lambda i: -array.a.strides[i])
    memory = empty([array.shape[i] for i in order], array.dtype)
    return Array(memory.a.transpose(np.argsort(order)), memory.guarded)


class CompileException(Exception):
    """What CuPy raises where a source does not compile."""


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
        cupy.ndarray, cupy.empty, cupy.empty_like = Array, empty, empty_like
        cupy.moveaxis = lambda a, source, to: a.part(np.moveaxis(a.a, source, to))
        cupy.asnumpy, cupy.asarray = self.asnumpy, lambda a, **kw: Array(np.array(inside(a), **kw, order="C"))
        cupy.zeros = lambda shape, dtype=float: Array(np.zeros(shape, dtype))
        cupy.RawModule = functools.partial(RawModule, self)
        cupy.ElementwiseKernel = functools.partial(ElementwiseKernel, self)
        cupy.cuda = types.SimpleNamespace(runtime=types.SimpleNamespace(is_hip=False), is_available=lambda: True)
        cupy.cuda.compiler = types.SimpleNamespace(CompileException=CompileException)
        cupy.__getattr__ = self.function
        return cupy

    def asnumpy(self, a):
        self.launches.append("wait")
        return a.a.copy()

    def function(self, name):
        value = getattr(np, name)
        if not callable(value) or isinstance(value, type):
            return value

        flush = flushed if name in COMPUTES else lambda a: a

        def call(*args, **settings):
            given, settings = [flush(inside(a)) for a in args], {key: inside(a) for key, a in settings.items()}
            with np.errstate(all="ignore"):
                return outside(flush(value(*given, **settings)))

        return call


def as_pointer(argument):
    """Return the address of an array, or the bits of a number."""
    return argument.data.ptr if isinstance(argument, Array) else int(argument.view(np.uint64))


class ElementwiseKernel:
    """A kernel for each element of one array, as a loop that `cc` has compiled."""

    def __init__(self, device, in_params, out_params, operation, name, preamble=""):
        self.source, self.target = in_params.split()[0], out_params.split()[0]
        names = {"uint16": "unsigned short", "float32": "float", "float64": "double"}
        loop = f"const {names[self.source]} x = a[i]; {names[self.target]} y; {operation} b[i] = y;"
        arguments = f"const {names[self.source]} *a, {names[self.target]} *b, long long n"
        loop = f"for (long long i = 0; i < n; i++) {{ {loop} }}"
        mode = "const unsigned before = set_mode(FLUSH);"
        code = f"{SHIM}{preamble}\nvoid {name}({arguments}) {{ {mode} {loop} set_mode(before); }}"
        device.sources.append(preamble + operation)
        self.function = getattr(library(device.change(code)), name)

    def __call__(self, x):
        assert x.dtype == self.source
        a, b = np.ascontiguousarray(x.a), np.empty(x.shape, self.target)
        self.function(*(ctypes.c_void_p(c.ctypes.data) for c in (a, b)), ctypes.c_longlong(a.size))
        return Array(b)


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
            assert all(isinstance(arg, (Array, np.int64, np.float64)) for arg in args)
            assert min(grid) > 0
            assert block[0] % 32 == 0
            given = (ctypes.c_void_p * count)(*map(as_pointer, args))
            sizes = (ctypes.c_int * 2)(*grid, *[1] * (2 - len(grid)))
            if launch(sizes, *block, given, int(self.device.backwards), STACKS):
                raise AssertionError(f"{name}: some threads wait for ever")
            for arg in args:
                if isinstance(arg, Array) and arg.guarded is not None:
                    memory, start, nbytes = arg.guarded
                    assert (memory[:start] == 0xFF).all(), f"{name} wrote before an array"
                    assert (memory[start + nbytes :] == 0xFF).all(), f"{name} wrote behind an array"

        return call
