"""L2 normalization: each row becomes a unit vector. As `torch.nn.functional.normalize`.

Forward, for each row x:

    norm  = max(sqrt(sum(x^2)), eps)      longer: 1 where that is the length of x, 0 where it is eps
    rnorm = 1 / norm
    y     = x rnorm

Backward, given dy:

    dx = rnorm (dy - y longer sum(dy y))

These are the formulas of `npnorm.norms.scale_norm` without its weight, and so is what is communicated: one sum over the
ranks of a group forward, and one backward.

Beware of the name. The classes Llama4TextL2Norm of the library transformers and L2Norm of Megatron-LM divide by the
root mean square; that is `RMSNorm` without a weight, sqrt(n) times this.
"""

from typing import Self, Unpack

from numpy.typing import DTypeLike

from npnorm.norms.options import OfRows, Settings
from npnorm.norms.scale_norm import ScaleNorm


class L2Norm(ScaleNorm):
    """Divide each row by its Euclidean length: y = x / max(|x|, eps).

    Parameters
    ----------
    eps : float
        The least length that is divided by, so in units of x.
    **settings : axes, features, group, compute
        As for every `FeatureNorm`; here axes is 1 unless it is given.

    Raises
    ------
    ValueError
        On every rank alike, if eps is not finite and >= 0.

    Examples
    --------
    >>> import numpy as np
    >>> y, saved = L2Norm().forward(np.array([[3.0, 4.0]]))
    >>> y
    array([[0.6, 0.8]])
    """

    _shapes = {}

    def __init__(self, eps: float = 1e-12, **settings: Unpack[Settings]) -> None:
        self._set_common(settings, Settings)  # a weight is none
        super().__init__(None, eps, **settings)

    @classmethod
    def init(cls, features: int | None = None, dtype: DTypeLike = "float32", **settings: Unpack[OfRows]) -> Self:
        """Return the norm, which has no parameters, whatever the features and their dtype."""
        return cls(**settings)
