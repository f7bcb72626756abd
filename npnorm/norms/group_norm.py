"""Group normalization.

Yuxin Wu and Kaiming He, "Group Normalization", ECCV 2018, arXiv:1803.08494, equations 1 to 7.

Forward, for each row x of n elements, the channels of one group of one sample and all their space:

    c    = x - mean(x)
    var  = mean(c^2)
    rstd = 1 / sqrt(var + eps)
    z    = c rstd
    y    = z w + b                        w and b: one number for each channel

Backward, given dy:

    dz = dy w
    dx = rstd (dz - mean(dz) - z mean(dz z))
    dw = sum over batch and space of dy z
    db = sum over batch and space of dy

These are the formulas of `npnorm.norms.layer_norm`, over other rows. With one group it is LayerNorm over (C, ...) with
a weight for each channel; with as many groups as channels it is InstanceNorm. Ranks split the channels. If their number
divides that of the groups of channels, each rank holds whole groups and nothing is communicated.
"""

from typing import Any, NamedTuple, Self, Unpack

from numpy.typing import DTypeLike

from npnorm import checks, engine
from npnorm.arrays import Array
from npnorm.norms import layer_norm, norm, options


class Saved(NamedTuple):
    """What backward needs of forward; the statistics are one number for each group of each sample."""

    x: Array
    mean: engine.Mean
    rstd: Array
    exponent: Array | None  # rows whose squares overflow were divided by 2^exponent; None: there were none


class GroupNorm(norm.ChannelNorm[Saved]):
    """Give each group of channels mean 0 and variance 1, sample by sample.

    Parameters
    ----------
    groups : int
        Groups of neighbouring channels, over all ranks.
    weight, bias : arrays of shape (channels,), or None
        w and b; None leaves it out. On a group, this rank's shard.
    eps : float
        Added to the variance (that of n, not n - 1), so in units of x squared.
    **settings : group, compute
        As for every `ChannelNorm`. The ranks of the group split the channels equally. Communicated: nothing if the
        ranks divide the groups; if the groups divide the ranks, what LayerNorm communicates, for every group, and for
        float64 one number more: whether some row is out of range. Otherwise an error.

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if the groups do not divide the channels, the parameters are not floats of one shape
        (channels,), or eps is not finite and >= 0.

    Examples
    --------
    >>> import numpy as np
    >>> norm = GroupNorm(2, eps=0)
    >>> y, saved = norm.forward(np.array([[1.0, 3.0, 10.0, 30.0]]))  # one sample, four channels, no space
    >>> y
    array([[-1.,  1., -1.,  1.]])
    """

    groups: options.Fixed[int]
    formula = engine.Formula(layer_norm.forward, layer_norm.backward, Saved)

    def __init__(
        self,
        groups: int,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-5,
        **settings: Unpack[options.Common],
    ) -> None:
        checks.check_groups("GroupNorm", groups, self._set_common(settings))
        group = self._set_channels(weight, bias, eps, settings, sizes=f"{groups}, {{}}", groups=groups)
        for array in self.params.values():
            checks.check_divides("GroupNorm", groups, array.shape[0], group)
        layout = engine.Channels("GroupNorm", group, groups)
        self._set(groups=groups, rows=engine.Rows(layout, self.formula, eps, self.compute))

    @classmethod
    def init(  # type: ignore[override]
        cls, groups: int, channels: int, dtype: DTypeLike = "float32", **settings: Unpack[options.WithEps]
    ) -> Self:
        """Return the norm with a weight of ones and a bias of zeros; settings: eps, group, compute.

        On a group, groups are those of all ranks, and channels those of this rank's shard.
        """
        return cls._init(channels, dtype, settings, groups)

    def _check(self, **arrays: Array) -> None:
        super()._check(**arrays)
        checks.check_divides("GroupNorm", self.groups, arrays["x"].shape[1], self.group)

    def _shown(self) -> dict[str, Any]:
        return {"groups": self.groups, **super()._shown()}
