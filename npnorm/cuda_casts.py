"""Conversions between floats on a GPU: rounded once, with subnormal numbers as they are.

CuPy compiles everything with `-ftz=true` (v14.2.0, cupy/cuda/compiler.py), which takes subnormal float32 for zeros, and
a conversion from or to float32 is no exception. An instruction that is written out keeps what it says. bfloat16 has the
exponents of float32, and so the same subnormal numbers.
"""

import functools
from typing import Any

CONVERSIONS = """\
#ifdef __CUDACC__
static __device__ double float_to_double(float a) {
    double d;
    asm("cvt.f64.f32 %0, %1;" : "=d"(d) : "f"(a));
    return d;
}
static __device__ float double_to_float(double a) {
    float f;
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(f) : "d"(a));
    return f;
}
static __device__ float float16_to_float(unsigned short a) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(a));
    return f;
}
static __device__ unsigned short double_to_float16(double a) {
    unsigned short h;
    asm("cvt.rn.f16.f64 %0, %1;" : "=h"(h) : "d"(a));
    return h;
}
static __device__ unsigned short float_to_float16(float a) {
    unsigned short h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(a));
    return h;
}
#endif

static __device__ float bfloat16_to_float(unsigned short a) { return __uint_as_float((unsigned)a << 16); }

static __device__ unsigned short float_to_bfloat16(float a) {
    const unsigned bits = __float_as_uint(a);
    return (unsigned short)(a != a ? 0x7fc0u : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

/* By way of float, whose last bit remembers that something was cut off: else it would be rounded twice. */
static __device__ unsigned short double_to_bfloat16(double a) {
    const float single = double_to_float(a);
    const double back = float_to_double(single);
    unsigned bits = __float_as_uint(single);
    if (a != a) return 0x7fc0u;
    bits -= fabs(back) > fabs(a);
    bits |= back != a;
    return float_to_bfloat16(__uint_as_float(bits));
}
"""
"""Elements of 16 bits are held as their bits."""

CASTS = {
    ("float32", "float64"): "y = float_to_double(x);",
    ("float64", "float32"): "y = double_to_float(x);",
    ("bfloat16", "float64"): "y = float_to_double(bfloat16_to_float(x));",
    ("float64", "bfloat16"): "y = double_to_bfloat16(x);",
}
"""Those that CuPy's `astype` flushes to zero, or rounds twice."""


def cast(xp: Any, x: Any, source: str, dtype: Any, target: str) -> Any:
    """Return an array of CuPy in another dtype, by one of `CASTS`.

    Parameters
    ----------
    xp : module
    x : array
    source, target : str
        The names of the two dtypes.
    dtype : dtype
        The one to convert to.
    """
    x = x.view(xp.uint16) if source == "bfloat16" else x
    y = _kernel(xp, source, target)(x)
    return y.view(dtype) if target == "bfloat16" else y


@functools.lru_cache(maxsize=2 * len(CASTS))
def _kernel(xp: Any, source: str, target: str) -> Any:
    held = {"bfloat16": "uint16"}
    x, y = f"{held.get(source, source)} x", f"{held.get(target, target)} y"
    return xp.ElementwiseKernel(x, y, CASTS[source, target], f"{source}_to_{target}", preamble=CONVERSIONS)
