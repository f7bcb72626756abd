"""L2 normalization: each row becomes a unit vector.

    norm = max(sqrt(sum(x^2)), eps)
    y    = x / norm

Backward, given dy:

    dx = (dy - y sum(dy y)) / norm        where |x| >= eps
    dx = dy / eps                         where the row is shorter than eps

As `torch.nn.functional.normalize`. Beware of the name: the classes Llama4TextL2Norm of the library transformers and
L2Norm of Megatron-LM divide by the root mean square; that is `RMSNorm` without a weight, sqrt(n) times this.

A row split over the ranks of a group costs one all-reduce forward, of sum(x^2), and one backward, of sum(dy y).
"""

from typing import Any

from npnorm.group import SOLO, Group
from npnorm.norms.scale_norm import ScaleNorm


class L2Norm(ScaleNorm):
    """Divide each row by its Euclidean length: y = x / max(|x|, eps).

    Parameters
    ----------
    eps : float
        The least length that is divided by; in units of x.
    axes : int
        How many trailing axes are the features.
    group : Group
        The ranks over which the last axis is split equally. Communicated: one sum of a number for each row forward,
        one backward.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

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

    layer = "L2Norm"

    def __init__(self, eps: float = 1e-12, *, axes: int = 1, group: Group = SOLO, compute: str | None = None) -> None:
        super().__init__(None, eps, axes=axes, group=group, compute=compute)

    @classmethod
    def init(cls, features: int | None = None, dtype: str = "float32", **settings: Any) -> "L2Norm":
        """Return the norm, which has no parameters, whatever the features and their dtype."""
        return cls(**settings)
