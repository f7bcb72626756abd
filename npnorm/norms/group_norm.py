"""Group normalization.

Yuxin Wu and Kaiming He, "Group Normalization", ECCV 2018, arXiv:1803.08494, equations 1 to 7.

Forward, for each row x of n elements, the channels of one group of one sample and all their space:

    c    = x - mean(x)
    rstd = 1 / sqrt(mean(c^2) + eps)
    z    = c rstd
    y    = z w + b                        w and b: one number for each channel

Backward, given dy:

    dz = dy w
    dx = rstd (dz - mean(dz) - z mean(dz z))
    dw = sum over batch and space of dy z
    db = sum over batch and space of dy

It is the formula of `npnorm.norms.layer_norm`, over other rows. With one group it is LayerNorm over (C, ...) with a
weight for each channel, with as many groups as channels InstanceNorm. A group of ranks splits the channels. Where the
ranks divide the groups, each rank holds whole groups and nothing is communicated.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array
from npnorm.axes import Channels
from npnorm.blocked import Rows
from npnorm.checks import check_channels, check_saved, check_settings, is_count
from npnorm.group import SOLO, Group, Solo, errors_on_all_ranks
from npnorm.norms.layer_norm import normalize, normalize_backward


class Saved(NamedTuple):
    """What backward needs of forward; the statistics are one number for each group of each sample."""

    x: Array
    mean: Array
    rest: Array  # what rounding had left of the mean
    rstd: Array
    scale: Array | None  # the exponent of two a row was divided by, where its squares leave the range


class GroupNorm:
    """Give each group of channels mean 0 and variance 1, sample by sample.

    Parameters
    ----------
    groups : int
        Groups of neighbouring channels, over all ranks.
    weight : array of shape (channels,), or None
        The gain w; None leaves it out. On a group, this rank's shard.
    bias : array of shape (channels,), or None
        The shift b; None leaves it out.
    eps : float
        Added to the variance (that of n, not n - 1); in units of x squared.
    group : Group
        The ranks over which the channels are split equally. Communicated: nothing where the ranks divide the groups;
        where the groups divide the ranks, what LayerNorm communicates, for every group, and for float64 one number
        more: whether some row is out of range. Otherwise an error.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if the groups do not divide the channels, the parameters are not floats of one shape
        (channels,), or eps is not finite and >= 0.

    Examples
    --------
    >>> norm = GroupNorm(2, eps=0)
    >>> y, saved = norm.forward(np.array([[1.0, 3.0, 10.0, 30.0]]))  # one sample, four channels, no space
    >>> y
    array([[-1.,  1., -1.,  1.]])
    """

    layer = "GroupNorm"
    sizes = "groups, {}"  # the arguments of init, for a message

    def __init__(
        self,
        groups: int,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-5,
        *,
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        self.params = {name: a for name, a in (("weight", weight), ("bias", bias)) if a is not None}
        self.groups, self.eps, self.group, self.compute = groups, eps, group, compute
        check_settings(self.layer, self.params, eps, group, "(channels,)", self.sizes, groups=groups, compute=compute)
        self.shards = dict.fromkeys(self.params, None if isinstance(group, Solo) else 0)
        with errors_on_all_ranks(group):
            if not is_count(groups):
                raise ValueError(f"{self.layer}: groups is {groups!r}. It must be an integer, 1 or more.")
            if groups % group.size and group.size % groups:
                raise ValueError(
                    f"{self.layer}: {group.size} ranks cannot share {groups} groups. "
                    "The ranks must divide the groups, or the groups the ranks."
                )
            for array in self.params.values():
                self._check_groups(array.shape[0])
        self.rows = Rows(Channels(self.layer, group, groups), eps, compute)

    @classmethod
    def init(cls, groups: int, channels: int, dtype: str = "float32", **settings: Any) -> "GroupNorm":
        """Return the norm with a weight of ones and a bias of zeros."""
        return cls(groups, np.ones(channels, dtype), np.zeros(channels, dtype), **settings)

    def forward(self, x: Array, out: Array | None = None) -> tuple[Array, Saved]:
        """Return y, of the shape and dtype of x: (N, C, ...), and what backward needs; y is written to `out`."""
        rows = self._rows(x=x)
        formula = partial(normalize, rows.axes, "two-pass")
        y, (mean, rest, rstd), scale = rows.forward(formula, x, self.params, out=out)
        return y, Saved(x, mean, rest, rstd, scale)

    def backward(self, dy: Array, saved: Saved, out: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """Return dx, of the shape and dtype of x, and the gradients of the parameters; dx is written to `out`."""
        check_saved(self.layer, saved, Saved, self.group)
        x, mean, rest, rstd, scale = saved
        rows = self._rows(dy=dy, x=x)
        formula = partial(normalize_backward, rows.axes)
        return rows.backward(formula, dy, x, self.params, (mean, rest, rstd), scale, out=out)

    def _rows(self, **arrays: Array) -> Rows:
        """Check the arrays; return their rows."""
        check_channels(self.layer, self.params, self.group, **arrays)
        with errors_on_all_ranks(self.group):
            self._check_groups(arrays["x"].shape[1])
        return self.rows

    def _check_groups(self, held: int) -> None:
        channels = held * self.group.size
        if channels % self.groups:
            raise ValueError(
                f"{self.layer}: {self.groups} groups cannot share {channels} channels equally. "
                "Choose a number of groups that divides the channels."
            )
