"""RMSNorm in the rounding orders of Llama, OLMo-2 and Gemma: where a result of 16 bits is rounded.

The orders are those of the classes LlamaRMSNorm (Qwen3, too), Olmo2RMSNorm and Gemma3RMSNorm of the library
transformers. They differ in the product with the weight, and for x of 64 bits not at all.

Forward, for each row x, with R(a) rounded to the dtype of x, and S(a) rounded to float32:

    z = x rstd                            as `npnorm.norms.rms_norm` has it
    y = R(z) w + b                        "llama"
    y = S(S(z) w) + b                     "olmo2" and "gemma"

All else is float64, and y is rounded to the dtype of x at the end. Gemma has an offset, 1, that is added to the weight
in float32; without it, its order is that of OLMo-2.

Backward, given dy, a gradient passes a rounding unchanged:

    dx, db as `npnorm.norms.rms_norm` has them
    dw = sum over rows of dy R(z)         "llama"
    dw = sum over rows of dy S(z)         "olmo2" and "gemma"

What is communicated is what RMSNorm communicates; a rounding sees one element.
"""

from typing import Any, Self, Unpack

from numpy.typing import DTypeLike

from npnorm.arrays import Array
from npnorm.engine import Formula, Row
from npnorm.group import Group, errors_on_all_ranks
from npnorm.norms import norm, options, rms_norm

Saved = rms_norm.Saved
"""What backward needs of forward."""


def forward_llama(row: Row, x: Array, w: Array, b: Array) -> tuple[Array, tuple[Array]]:
    """Return y, and the statistics to save."""
    z, statistics = rms_norm.forward(row, x, row.without_weight(x), row.without_bias(x))
    y = row.rounded(z) * w + b
    return y, statistics


def backward_llama(row: Row, dy: Array, x: Array, w: Array, rstd: Array) -> tuple[Array, Array, Array]:
    """Return dx, and dw and db before their sums over the rows."""
    z = x * rstd
    dx, _, db = rms_norm.backward(row, dy, x, w, rstd)
    return dx, dy * row.rounded(z), db


def forward_olmo2(row: Row, x: Array, w: Array, b: Array) -> tuple[Array, tuple[Array]]:
    """Return y, and the statistics to save."""
    z, statistics = rms_norm.forward(row, x, row.without_weight(x), row.without_bias(x))
    y = row.rounded(row.rounded(z, "float32") * w, "float32") + b
    return y, statistics


def backward_olmo2(row: Row, dy: Array, x: Array, w: Array, rstd: Array) -> tuple[Array, Array, Array]:
    """Return dx, and dw and db before their sums over the rows."""
    z = x * rstd
    dx, _, db = rms_norm.backward(row, dy, x, w, rstd)
    return dx, dy * row.rounded(z, "float32"), db


ORDERS = {
    None: rms_norm.RMSNorm.formula,
    "llama": Formula(forward_llama, backward_llama, Saved),
    "olmo2": Formula(forward_olmo2, backward_olmo2, Saved),
    "gemma": Formula(forward_olmo2, backward_olmo2, Saved),
}
"""The formula of each order; None is that of RMSNorm, which rounds once."""


def order(layer: str, cast: str | None, group: Group) -> Formula:
    """Return the formula of an order; raise, on every rank of the group, if there is none."""
    with errors_on_all_ranks(group):
        if not isinstance(cast, str | None) or cast not in ORDERS:
            raise ValueError(f"{layer}: cast is {cast!r}. Choose None, 'llama', 'olmo2' or 'gemma'.")
        group.require_same(f"{layer} with cast={cast}")
    return ORDERS[cast]


class CastRMSNorm(norm.FeatureNorm[Saved]):
    """RMSNorm, rounded where a model rounds.

    Parameters
    ----------
    weight, bias : arrays of the shape of the features, or None
        w and b; None leaves it out. On a group, this rank's shard of the last axis.
    eps : float
        Added to the mean square, so in units of x squared.
    cast : "llama", "olmo2", "gemma" or None
        Where the product with the weight is rounded, for x of 32 bits or fewer. None is RMSNorm: one rounding.
    offset : float
        Added to the weight, in float32 for weights of 32 bits or fewer: Gemma stores w - 1, and has offset=1.
    **settings : axes, features, group, compute
        As for every `FeatureNorm`.

    Examples
    --------
    >>> import numpy as np
    >>> x, weight = np.array([[1.0, 7.0]], "float16"), np.array([1.375, 1.375], "float16")
    >>> for cast in "llama", "olmo2":  # z = 1.4 is 1.4003906 in float16; times 1.375, exactly 1.925
    ...     y, saved = CastRMSNorm(weight, eps=0, cast=cast).forward(x)
    ...     print(cast, float(y[0, 1]))
    llama 1.92578125
    olmo2 1.9248046875
    """

    cast: options.Fixed[options.Cast]

    def __init__(
        self,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-6,
        *,
        cast: options.Cast,
        offset: float = 0,
        **settings: Unpack[options.Settings],
    ) -> None:
        formula = order(type(self).__name__, cast, self._set_common(settings, options.Settings))
        self._set(cast=cast, formula=formula)
        super().__init__(weight, bias, eps, settings, offset=offset)

    @classmethod
    def init(cls, features: options.Sizes, dtype: DTypeLike = "float32", **settings: Unpack[options.OfCasts]) -> Self:
        """Return the norm with a weight of ones, less the offset, and no bias; settings: cast, and those of `RMSNorm`.

        On a group, features are those of this rank's shard.
        """
        return cls._init(features, dtype, settings)

    def _shown(self) -> dict[str, Any]:
        return super()._shown() | {"cast": self.cast}
