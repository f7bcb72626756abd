"""The weight as models use it: an offset that is added to it, and where the product with it is rounded.

    offset   y = z (offset + w): with offset 1, weights that decay to 0 decay to a gain of 1 (Gemma, Qwen3-Next). The
             sum is formed in float32: in bfloat16, 1 + 0.00390625 is 1
    cast     where x of fewer than 64 bits is rounded:
             "llama" (Qwen3, too)   z to the dtype of x, then times w, rounded again
             "olmo2"                z to float32, times w in float32, then to the dtype of x
             "gemma"                as "olmo2", with the float32 of offset + w: at offset 0 the same arithmetic
             None                   float64 to the end, and one rounding

The orders are those of the classes LlamaRMSNorm, Olmo2RMSNorm and Gemma3RMSNorm of the library transformers.
"""

from typing import Any

from npnorm.arrays import Array, array_module, dtype_name, round_to
from npnorm.checks import is_number
from npnorm.group import Group, errors_on_all_ranks
from npnorm.terms import is_written

CASTS = (None, "llama", "olmo2", "gemma")


class Gain:
    """What z is multiplied by, and how that is rounded.

    Parameters
    ----------
    layer : str
        The name of the norm, for messages.
    offset : float
        Added to the weight.
    cast : None, "llama", "olmo2" or "gemma"
    group : Group
    """

    def __init__(self, layer: str, weight: Array | None, offset: float, cast: str | None, group: Group) -> None:
        with errors_on_all_ranks(group):
            if not is_number(offset):
                raise ValueError(f"{layer}: offset is {offset!r}. It must be a finite number, usually 0 or 1.")
            if offset and weight is None:
                raise ValueError(f"{layer}: offset is {offset}, and there is no weight to add it to. Leave it out.")
            if cast not in CASTS:
                raise ValueError(f"{layer}: cast is {cast!r}. Choose None, 'llama', 'olmo2' or 'gemma'.")
            group.require_same(f"{layer} with offset={offset}, cast={cast}")
        self.offset = float(offset)
        self.cast = cast
        self.narrow = weight is not None and dtype_name(weight) not in ("float64", "complex128")

    def of(self, w: Array | None) -> Array | None:
        """Return offset + w, in float32 for a weight of 32 bits or fewer."""
        if w is None or not self.offset:
            return w
        gain = self.offset + w
        if is_written(gain):
            return gain.to_float32() if self.narrow else gain
        return _to(gain, "float32") if self.narrow else gain

    def rounded(self, z: Array, x: Array) -> Array:
        """Return z as it meets the weight, in working precision again."""
        if self.cast is None or dtype_name(x) in ("float64", "complex128"):
            return z
        return _to(z, x.dtype if self.cast == "llama" else "float32")

    def times(self, z: Array, w: Array | None, x: Array) -> Array:
        """Return z (offset + w); the last rounding, to the dtype of x, is still to come."""
        z, gain = self.rounded(z, x), self.of(w)
        if gain is None:
            return z
        in_float32 = self.cast in ("olmo2", "gemma") and dtype_name(x) not in ("float64", "complex128")
        return _to(z * gain, "float32") if in_float32 else z * gain


def _to(z: Array, dtype: Any) -> Array:
    """Return z rounded to `dtype`, in its own dtype again; complex z as it is."""
    if dtype_name(z) == "complex128":
        return z
    xp = array_module(z)
    return xp.astype(round_to(z, getattr(xp, dtype) if isinstance(dtype, str) else dtype), z.dtype)
