"""Instance normalization: group normalization with one channel in each group.

Dmitry Ulyanov, Andrea Vedaldi and Victor Lempitsky, "Instance Normalization: The Missing Ingredient for Fast
Stylization", 2016, arXiv:1607.08022, equation 3. Forward and backward are those of `npnorm.norms.group_norm`; a row is
one channel of one sample. On a group of ranks, which splits the channels, nothing is communicated.
"""

from typing import Unpack

from npnorm import checks
from npnorm.arrays import Array
from npnorm.engine import Channels, Rows
from npnorm.group import SOLO
from npnorm.norms import group_norm, norm, options


class InstanceNorm(norm.ChannelNorm[group_norm.Saved]):
    """Give each channel of each sample mean 0 and variance 1 over its space.

    Parameters
    ----------
    weight, bias : arrays of shape (channels,), or None
        w and b; None leaves it out. On a group, this rank's shard.
    eps : float
        Added to the variance (that of n, not n - 1), so in units of x squared.
    **settings : group, compute
        As for every `ChannelNorm`. The ranks of the group split the channels equally. Nothing is communicated.

    Raises
    ------
    ValueError, TypeError
        As `GroupNorm`; and where the space of a channel is a single element, whose variance says nothing.

    Examples
    --------
    >>> import numpy as np
    >>> y, saved = InstanceNorm(eps=0).forward(np.array([[[1.0, 3.0], [10.0, 30.0]]]))
    >>> y
    array([[[-1.,  1.],
            [-1.,  1.]]])
    """

    formula = group_norm.GroupNorm.formula

    def __init__(
        self,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-5,
        **settings: Unpack[options.Common],
    ) -> None:
        group = self._set_channels(weight, bias, eps, settings)
        layout = Channels("InstanceNorm", SOLO, None)
        self._set(rows=Rows(layout, self.formula, eps, self.compute, group=group))

    def _check(self, **arrays: Array) -> None:
        super()._check(**arrays)
        checks.check_space("InstanceNorm", arrays["x"], self.group)
