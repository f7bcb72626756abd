"""The float formats: precision, range, and the unit in the last place (ulp)."""

from typing import Any, NamedTuple

import numpy as np

from npnorm.studies.accuracy.needs import need


class Format(NamedTuple):
    """A binary float format, as in IEEE 754.

    Parameters
    ----------
    name : str
        The name of the dtype.
    precision : int
        Bits of the significand, with the leading one.
    smallest : int
        The smallest normal number is 2^smallest.
    beyond : int
        All numbers are below 2^beyond.
    """

    name: str
    precision: int
    smallest: int
    beyond: int

    @property
    def dtype(self) -> Any:
        """The NumPy dtype."""
        if self.name == "bfloat16":
            need("ml_dtypes")  # which makes the name known to NumPy
        return np.dtype(self.name)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        return (2.0 - 2.0 ** (1 - self.precision)) * 2.0 ** (self.beyond - 1)

    def ulp(self, scale: np.ndarray) -> np.ndarray:
        """Return the exponent of the ulp of each number: |scale| has its last place at 2^exponent."""
        exponent = np.frexp(scale)[1] - 1
        return np.where(scale > 0, np.maximum(exponent, self.smallest), self.smallest) - (self.precision - 1)


FORMATS = {
    f.name: f
    for f in (
        Format("float32", 24, -126, 128),
        Format("float16", 11, -14, 16),
        Format("bfloat16", 8, -126, 128),
        Format("float64", 53, -1022, 1024),
    )
}
