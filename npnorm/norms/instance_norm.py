"""Instance normalization: group normalization with one channel in each group.

Dmitry Ulyanov, Andrea Vedaldi and Victor Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
Stylization", 2016, arXiv:1607.08022, equation 3. Forward and backward are those of `npnorm.norms.group_norm`; a row is
one channel of one sample. On a group of ranks, which splits the channels, nothing is communicated.
"""

from typing import Any

import numpy as np

from npnorm.arrays import Array
from npnorm.axes import Channels
from npnorm.blocked import Rows
from npnorm.checks import check_channels
from npnorm.group import SOLO, Group, errors_on_all_ranks
from npnorm.norms.group_norm import GroupNorm


class InstanceNorm(GroupNorm):
    """Give each channel of each sample mean 0 and variance 1 over its space.

    Parameters
    ----------
    weight : array of shape (channels,), or None
        The gain w; None leaves it out. On a group, this rank's shard.
    bias : array of shape (channels,), or None
        The shift b; None leaves it out.
    eps : float
        Added to the variance (that of n, not n - 1); in units of x squared.
    group : Group
        The ranks over which the channels are split equally. Nothing is communicated.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Raises
    ------
    ValueError, TypeError
        As `GroupNorm`; and where the space of a channel is a single element, whose variance says nothing.

    Examples
    --------
    >>> y, saved = InstanceNorm(eps=0).forward(np.array([[[1.0, 3.0], [10.0, 30.0]]]))
    >>> y
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """

    layer = "InstanceNorm"
    sizes = "{}"

    def __init__(
        self,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-5,
        *,
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        ranks = getattr(group, "size", 1)  # what is no group is refused there
        super().__init__(ranks, weight, bias, eps, group=group, compute=compute)  # the groups come with x
        self._known: dict[int, Rows] = {}

    @classmethod
    def init(cls, channels: int, dtype: str = "float32", **settings: Any) -> "InstanceNorm":  # type: ignore[override]
        """Return the norm with a weight of ones and a bias of zeros."""
        return cls(np.ones(channels, dtype), np.zeros(channels, dtype), **settings)

    def _rows(self, **arrays: Array) -> Rows:
        check_channels(self.layer, self.params, self.group, **arrays)
        x = arrays["x"]
        with errors_on_all_ranks(self.group):
            if x.ndim < 3 or (x[:1, :1, ...].size == 1 and x.shape[0]):
                raise ValueError(
                    f"InstanceNorm takes (N, C, ...) with more than one element of space; x has shape {tuple(x.shape)}."
                    " The variance of a single element is 0."
                )
        channels = x.shape[1]
        if channels not in self._known:
            self._known[channels] = Rows(Channels(self.layer, SOLO, channels), self.eps, self.compute)
        return self._known[channels]
