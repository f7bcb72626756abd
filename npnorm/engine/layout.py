"""What a row is: the elements of an array that a norm averages over.

    Features    the trailing axes of (..., features)                      LayerNorm, RMSNorm, ...
    Samples     the same; each sample brings a weight and bias of its own AdaptiveNorm
    Subset      the same; the norm measures a part of the features        PartialRMSNorm
    Groups      a group of neighbouring features                          GatedRMSNorm
    Channels    all space, and the channels of a group: (N, C, ...)       GroupNorm, InstanceNorm
    Batch       all space, and the batch: (N, C, ...)                     BatchNorm, WeightNorm

A layout turns an array into rows and back, brings a parameter to the rows that it meets, and brings the gradients of
the rows back to the parameter. How a row is summed, on one rank or many, is in `npnorm.engine.row`.
"""

import math
from typing import Any

from npnorm.arrays import Array, array_module, contiguous
from npnorm.group import SOLO, Group, Solo


class Layout:
    """Rows of shape (rows, ...).

    Parameters
    ----------
    layer : str
        The name of the norm, for messages.
    group : Group
        The ranks over which each row is split; `SOLO` if this rank holds whole rows.
    """

    adds = False
    """Whether the blocks of rows add to one gradient; otherwise each block has a part of its own."""

    is_flat = False
    """Whether a parameter of one axis meets each row as it is: a weight of 8 features a row of 8."""

    per_channel = False
    """Whether a parameter is one number for each channel, so that its product with a row's number is small."""

    row_is_channel = False
    """Whether a row is one channel, with all of the batch."""

    vectorized = True
    """Whether `npnorm.engine.terms` knows the layout."""

    k = 0
    """How many elements of a row the norm measures, if it does not measure all of them."""

    rows_differ = False
    """Whether the ranks of the group hold parts of different rows, such as two groups of channels on 4 ranks."""

    def __init__(self, layer: str, group: Group) -> None:
        self.layer = layer
        self.group = group
        self.local = isinstance(group, Solo)

    def to_rows(self, x: Array) -> Any:
        """Return `x` as rows, of shape (rows, ...)."""
        raise NotImplementedError

    def from_rows(self, rows: Array, x: Array) -> Any:
        """Return rows in the shape of `x`."""
        return array_module(x).reshape(rows, x.shape)

    def starts(self, count: int, most: int) -> list[int]:
        """Return where blocks begin, of at most so many rows, or as few as the layout allows. The last is the end."""
        return [*range(0, count, max(1, most)), count]

    def param_to_rows(self, param: Array, start: int, stop: int) -> Any:
        """Return a parameter so that it broadcasts with the rows of a block, from `start` to `stop`."""
        raise NotImplementedError

    def sum_over_rows(self, d: Array) -> Any:
        """Return the part of a gradient that a block of rows has: `d` summed as far as rows share a parameter."""
        raise NotImplementedError

    def to_param(self, total: Array, param: Array) -> Any:
        """Return the gradient of `param`, from the blocks' sums (added, or else concatenated)."""
        raise NotImplementedError

    def local_size(self, rows: Array) -> int:
        """Return how many elements of a row this rank holds."""
        return math.prod(rows.shape[1:])

    def size(self, rows: Array) -> int:
        """Return how many elements a row has, over all ranks that share it equally."""
        return self.local_size(rows) * self.group.size

    def measured(self, rows: Array) -> Any:
        """Return what of the rows the norm measures: here all."""
        return rows

    def to_message(self, numbers: Array) -> Any:
        """Return numbers for each row as the ranks add them up."""
        return numbers

    def from_message(self, numbers: Array) -> Any:
        """Return the numbers of this rank's rows from what the ranks have added up."""
        return numbers

    def label(self, rows: Array) -> str:
        """Return what a message between ranks is about."""
        return self.layer


class Features(Layout):
    """The trailing axes of (..., features), with the same parameters for each row. A group splits the last axis."""

    adds = True
    is_flat = True

    def __init__(self, layer: str, group: Group = SOLO, axes: int = 1) -> None:
        super().__init__(layer, group)
        self.axes = axes

    def label(self, rows: Array) -> str:
        """Return what a message between ranks is about."""
        return f"{self.layer} of {self.size(rows)} features"

    def to_rows(self, x: Array) -> Any:
        """Return `x` in the shape (rows, features)."""
        return array_module(x).reshape(contiguous(x), (-1, math.prod(x.shape[x.ndim - self.axes :])))

    def param_to_rows(self, param: Array, start: int, stop: int) -> Any:
        """Return a parameter of shape (features,)."""
        return array_module(param).reshape(param, (-1,))

    def sum_over_rows(self, d: Array) -> Any:
        """Return the sum over the rows of a block."""
        return array_module(d).sum(d, axis=0)

    def to_param(self, total: Array, param: Array) -> Any:
        """Return the sum over the blocks in the shape of `param`."""
        return array_module(param).reshape(total, param.shape)


class Subset(Features):
    """The trailing axis, of which the norm measures `k` features: where `mask`, of shape (features,), is True."""

    vectorized = False

    def __init__(self, layer: str, group: Group, mask: Any, k: int) -> None:
        super().__init__(layer, group)
        self.mask, self.k = mask, k

    def measured(self, rows: Array) -> Any:
        """Return the rows with zeros for what is not measured."""
        return array_module(rows).where(self.mask, rows, array_module(rows).zeros_like(rows))


class Groups(Features):
    """Groups of neighbouring features of (..., features), with parameters of shape (features,).

    A group of ranks splits the one group of features; or each rank holds whole groups of features.
    """

    is_flat = False
    vectorized = False

    def __init__(self, layer: str, group: Group, groups: int) -> None:
        super().__init__(layer, group if groups == 1 else SOLO)
        self.groups = max(1, groups // group.size)  # that this rank holds

    def to_rows(self, x: Array) -> Any:
        """Return `x` in the shape (rows of x times groups, features of a group)."""
        return array_module(x).reshape(contiguous(x), (-1, x.shape[-1] // self.groups))

    def starts(self, count: int, most: int) -> list[int]:
        """Return where blocks begin: each with the first group."""
        return super().starts(count, most // self.groups * self.groups or self.groups)

    def param_to_rows(self, param: Array, start: int, stop: int) -> Any:
        """Return the parameters of each row's group."""
        xp = array_module(param)
        return xp.tile(xp.reshape(param, (self.groups, -1)), ((stop - start) // self.groups, 1))

    def sum_over_rows(self, d: Array) -> Any:
        """Return the sum over the rows of x in a block."""
        xp = array_module(d)
        return xp.sum(xp.reshape(d, (-1, self.groups, d.shape[1])), axis=0)


class Samples(Features):
    """The trailing axis; parameters of shape (samples, features), for the samples along the first axis of x."""

    adds = False
    is_flat = False
    vectorized = False

    def __init__(self, layer: str, group: Group, x: Array) -> None:
        super().__init__(layer, group)
        self.rows_of_sample = math.prod(x.shape[1:-1])
        self.samples = x.shape[0]

    def starts(self, count: int, most: int) -> list[int]:
        """Return where blocks begin: each holds whole samples, or a part of one."""
        each = self.rows_of_sample
        if most >= each:
            return super().starts(count, most // max(1, each) * each)
        return [i + j for i in range(0, count, each) for j in range(0, each, max(1, most))] + [count]

    def param_to_rows(self, param: Array, start: int, stop: int) -> Any:
        """Return the parameters of each row's sample, of shape (rows, features)."""
        each = self.rows_of_sample
        if each == 0:
            return param[:0, ...]
        first, last = start // each, -(-stop // each)
        repeated = array_module(param).repeat(param[first:last, ...], each, axis=0)
        return repeated[start - first * each : stop - first * each, ...]

    def sum_over_rows(self, d: Array) -> Any:
        """Return the sum over the rows of each sample in a block, or of its part of one."""
        each = max(1, min(self.rows_of_sample, d.shape[0]))
        return array_module(d).sum(array_module(d).reshape(d, (d.shape[0] // each, each, d.shape[1])), axis=1)

    def to_param(self, total: Array, param: Array) -> Any:
        """Return the sum over the parts of each sample."""
        xp, parts = array_module(param), total.shape[0] // max(1, self.samples)
        return xp.sum(xp.reshape(total, (self.samples, parts, param.shape[1])), axis=1)


class Channels(Layout):
    """All space, and the channels of a group: (N, C, ...) in `groups` groups; parameters have shape (C,).

    With groups None each channel is a group.
    A group of ranks splits the channels. If the ranks divide the groups, each rank holds whole groups, and nothing is
    communicated. If the groups divide the ranks, several ranks share a group; all sums travel in one message.
    """

    per_channel = True
    rows_differ = True

    def __init__(self, layer: str, group: Group, groups: int | None) -> None:
        whole = groups is None or groups % group.size == 0
        super().__init__(layer, SOLO if whole else group)
        self.local_groups = None if groups is None else groups // group.size if whole else 1
        self.groups = groups or 1

    def label(self, rows: Array) -> str:
        """Return what a message between ranks is about."""
        return f"{self.layer} of {self.size(rows)} elements in a group"

    def to_rows(self, x: Array) -> Any:
        """Return `x` in the shape (N groups, channels of a group, space)."""
        groups = self.local_groups or x.shape[1]
        shape = (x.shape[0] * groups, x.shape[1] // groups, math.prod(x.shape[2:]))
        return array_module(x).reshape(contiguous(x), shape)

    def size(self, rows: Array) -> int:
        """Return how many elements a group has, over all ranks that share it."""
        return self.local_size(rows) if self.local else self.local_size(rows) * self.group.size // self.groups

    def param_to_rows(self, param: Array, start: int, stop: int) -> Any:
        """Return the parameters of each row's group, of shape (rows, channels of a group, 1)."""
        xp, groups = array_module(param), self.local_groups or param.shape[0]
        first = start // groups
        repeated = xp.tile(xp.reshape(param, (groups, -1, 1)), (-(-stop // groups) - first, 1, 1))
        return repeated[start - first * groups : stop - first * groups, ...]

    def sum_over_rows(self, d: Array) -> Any:
        """Return the sum over the space, for each channel of each row."""
        return array_module(d).sum(d, axis=-1)

    def to_param(self, total: Array, param: Array) -> Any:
        """Return the sum over the batch."""
        xp = array_module(param)
        return xp.sum(xp.reshape(total, (-1, param.shape[0])), axis=0)

    @property
    def _slot(self) -> int:
        """The group of channels, of all groups, that this rank has a part of."""
        return self.group.rank * self.groups // self.group.size

    def to_message(self, numbers: Array) -> Any:
        """Return the numbers in the slot of this rank's group of channels, and zeros in those of the others."""
        if self.local:
            return numbers
        xp = array_module(numbers)
        return xp.stack([numbers if i == self._slot else xp.zeros_like(numbers) for i in range(self.groups)])

    def from_message(self, numbers: Array) -> Any:
        """Return the numbers in the slot of this rank's group of channels."""
        return numbers if self.local else numbers[self._slot, ...]


class Batch(Layout):
    """All space, and the batch: a row is a channel of (N, C, ...); parameters have shape (C,).

    A group of ranks splits the batch, equally or not.
    """

    per_channel = True
    row_is_channel = True

    def to_rows(self, x: Array) -> Any:
        """Return `x` in the shape (C, N, space), without moving it in memory."""
        xp, space = array_module(x), math.prod(x.shape[2:])
        return xp.moveaxis(xp.reshape(contiguous(x), (x.shape[0], x.shape[1], space)), 1, 0)

    def from_rows(self, rows: Array, x: Array) -> Any:
        """Return rows in the shape of `x`."""
        xp = array_module(x)
        return xp.reshape(contiguous(xp.moveaxis(rows, 0, 1)), x.shape)

    def param_to_rows(self, param: Array, start: int, stop: int) -> Any:
        """Return one number for each row, of shape (rows, 1, 1)."""
        return array_module(param).reshape(param, (-1, 1, 1))[start:stop, ...]

    def sum_over_rows(self, d: Array) -> Any:
        """Return the sum over each row; a gradient that is one number for each row is complete."""
        xp = array_module(d)
        return xp.sum(xp.reshape(d, (d.shape[0], -1)), axis=-1)

    def to_param(self, total: Array, param: Array) -> Any:
        """Return the rows' sums in the shape of `param`."""
        return array_module(param).reshape(total, param.shape)
