"""Sums and products of floats without error, as pairs: the rounded result, and what rounding took.

T. J. Dekker, "A Floating-Point Technique for Extending the Available Precision", Numerische Mathematik 18, 1971, has
the product; Donald E. Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B, has the sum.
"""

from npnorm.arrays import Array, dtype_name


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a + b rounded, and what rounding took.

    Examples
    --------
    >>> two_sum(1.0, 1e-20)
    (1.0, 1e-20)
    """
    s = a + b
    of_b = s - a
    return s, (a - (s - of_b)) + (b - of_b)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a b rounded, and what rounding took; without overflow, a and b must be below 2^996 (float32: 2^115).

    Examples
    --------
    >>> import numpy as np
    >>> p, rest = two_product(np.array(1 + 2.0**-30), np.array(1 + 2.0**-30))
    >>> p - 1 == 2.0**-29, rest == 2.0**-60
    (np.True_, np.True_)
    """
    p = a * b
    (a_high, a_low), (b_high, b_low) = _halves(a), _halves(b)
    return p, ((a_high * b_high - p) + a_high * b_low + a_low * b_high) + a_low * b_low


def _halves(a: Array) -> tuple[Array, Array]:
    """Return two numbers of half the digits whose sum is a."""
    shifted = a * (2.0**12 + 1 if dtype_name(a) == "float32" else 2.0**27 + 1)
    high = shifted - (shifted - a)
    return high, a - high
