"""What a row is: the elements of an array that a norm averages over, whole or split over the ranks of a group.

    Features    the trailing axes of (..., features)                      LayerNorm, RMSNorm, ...
    Samples     the same; each sample brings a weight and bias of its own AdaptiveNorm
    Subset      the same; a part of the features is measured              PartialRMSNorm
    Groups      a group of neighbouring features                          GatedRMSNorm
    Channels    all space, and the channels of a group: (N, C, ...)       GroupNorm, InstanceNorm
    Batch       all space, and the batch: (N, C, ...)                     BatchNorm, WeightNorm

Each of them turns an array into rows and back, brings parameters to the rows and their gradients back, and sums over a
row, which is a message where the row is split.
"""

import math
from typing import Any

from npnorm.arrays import Array, array_module, contiguous, square_sum
from npnorm.group import SOLO, Group, Solo
from npnorm.terms import Terms


class Axes:
    """Rows of shape (rows, ...): the sums over them, on one rank or many.

    Parameters
    ----------
    layer : str
        The name of the norm, for messages.
    group : Group
        The ranks over which the rows are split; `SOLO` where each rank holds whole rows.
    """

    period = 1
    """After how many rows the parameters repeat; a block holds whole periods."""

    kernel = ""
    """What `npnorm.kernels` calls these axes; empty where it does not know them."""

    extends = False
    """Whether what is measured may leave the range of x."""

    def __init__(self, layer: str, group: Group) -> None:
        self.layer = layer
        self.group = group

    def rows(self, x: Array) -> Array:
        """Return `x` as rows: of shape (rows, ...)."""
        raise NotImplementedError

    def restore(self, rows: Array, x: Array) -> Array:
        """Return rows in the shape of `x`."""
        raise NotImplementedError

    def spread(self, param: Array, rows: slice) -> Array:
        """Return a parameter so that it meets these rows."""
        raise NotImplementedError

    def within(self, d: Array) -> Array:
        """Sum the elements of a row that share a parameter; here each has its own."""
        return d

    def over_rows(self, d: Array) -> Array:
        """Sum a block of rows as far as the parameter does not vary."""
        raise NotImplementedError

    def join(self, blocks: list[Array], block: Array) -> list[Array]:
        """Take in one more block's sum."""
        return [*blocks, block]

    def gradient(self, blocks: list[Array], param: Array) -> Array:
        """Return the blocks' sums as the gradient of `param`."""
        raise NotImplementedError

    def held(self, rows: Array) -> int:
        """Return how many elements of a row this rank holds."""
        return math.prod(rows.shape[1:])

    def n(self, rows: Array) -> int:
        """Return how many elements a row has, over all ranks that share it equally."""
        return self.held(rows) * self.group.size

    def held_sum(self, rows: Array) -> Array:
        """Return the sum over this rank's part of each row, of shape (rows, 1, ...)."""
        if isinstance(rows, Terms):
            return rows.sum_over_row()
        xp, count = array_module(rows), rows.shape[0]
        flat = xp.reshape(rows, (count, self.held(rows)))
        return xp.reshape(xp.sum(flat, axis=-1), (count, *[1] * (rows.ndim - 1)))

    def held_square(self, rows: Array) -> Array:
        """Return the sum of the squared magnitudes of this rank's part of each row, for comparisons."""
        xp, count = array_module(rows), rows.shape[0]
        return xp.reshape(square_sum(xp.reshape(rows, (count, self.held(rows)))), (count, *[1] * (rows.ndim - 1)))

    def sum(self, *arrays: Array) -> Any:
        """Return the sums over whole rows; several arrays share one message."""
        return self.group.sum(*(self.held_sum(a) for a in arrays), label=self.what(arrays[0]))

    def what(self, rows: Array) -> str:
        """Return what a message is about."""
        return self.layer

    def mean(self, *arrays: Array) -> Any:
        """Return the means over whole rows; several arrays share one message."""
        n, sums = self.n(arrays[0]), self.sum(*arrays)
        return sums / n if len(arrays) == 1 else tuple(total / n for total in sums)

    def measured(self, x: Array, *others: Array) -> Array:
        """Return what of a block of rows the norm measures: here all of x."""
        return x

    def any(self, flags: Array) -> bool:
        """Return whether a flag of some row is set: the same on every rank, as the flags are."""
        return bool(array_module(flags).any(flags))

    def largest(self, rows: Array) -> Array:
        """Return the largest magnitude of each row, over all ranks, of shape (rows, 1, ...)."""
        return self.group.max(self._largest(rows), label=self.layer)

    def _largest(self, rows: Array) -> Array:
        xp, count, held = array_module(rows), rows.shape[0], self.held(rows)
        if not held:
            return abs(self.held_sum(rows))
        return xp.reshape(xp.max(abs(xp.reshape(rows, (count, held))), axis=-1), (count, *[1] * (rows.ndim - 1)))


class Features(Axes):
    """The trailing axes of (..., features), the same parameters for each row; a group splits the last axis."""

    kernel = "Features"

    def __init__(self, layer: str, group: Group, count: int = 1) -> None:
        super().__init__(layer, group)
        self.count = count

    def what(self, rows: Array) -> str:
        """Return what a message is about."""
        return f"{self.layer} of {self.n(rows)} features"

    def rows(self, x: Array) -> Array:
        """Return `x` in the shape (rows, features)."""
        return array_module(x).reshape(contiguous(x), (-1, math.prod(x.shape[x.ndim - self.count :])))

    def restore(self, rows: Array, x: Array) -> Array:
        """Return rows in the shape of `x`."""
        return array_module(x).reshape(rows, x.shape)

    def spread(self, param: Array, rows: slice) -> Array:
        """Return a parameter so that it meets each row: of shape (features,)."""
        return array_module(param).reshape(param, (-1,))

    def over_rows(self, d: Array) -> Array:
        """Sum over the rows of a block."""
        return array_module(d).sum(d, axis=0)

    def join(self, blocks: list[Array], block: Array) -> list[Array]:
        """Add one more block's sum."""
        return [blocks[0] + block] if blocks else [block]

    def gradient(self, blocks: list[Array], param: Array) -> Array:
        """Return the sum over the blocks."""
        return array_module(param).reshape(blocks[0], param.shape)


class Subset(Features):
    """The trailing axis, of which a part is measured: where `mask`, of shape (features,), is True."""

    kernel = ""

    def __init__(self, layer: str, group: Group, mask: Array) -> None:
        super().__init__(layer, group)
        self.mask = mask

    def measured(self, x: Array, *others: Array) -> Array:
        """Return x with zeros for what is not measured."""
        return array_module(x).where(self.mask, x, array_module(x).zeros_like(x))


class Groups(Features):
    """Groups of neighbouring features of (..., features); parameters of shape (features,).

    A group of ranks splits the one group of features, or else each rank holds whole groups.
    """

    kernel = ""

    def __init__(self, layer: str, group: Group, groups: int) -> None:
        super().__init__(layer, group if groups == 1 else SOLO)
        self.period = max(1, groups // group.size)  # the groups that this rank holds

    def rows(self, x: Array) -> Array:
        """Return `x` in the shape (rows of x times groups, features of a group)."""
        return array_module(x).reshape(contiguous(x), (-1, x.shape[-1] // self.period))

    def spread(self, param: Array, rows: slice) -> Array:
        """Return the parameters of each row's group; a block of rows starts with the first group."""
        xp = array_module(param)
        return xp.tile(xp.reshape(param, (self.period, -1)), ((rows.stop - rows.start) // self.period, 1))

    def over_rows(self, d: Array) -> Array:
        """Sum over the rows of x in a block."""
        xp = array_module(d)
        return xp.sum(xp.reshape(d, (-1, self.period, d.shape[1])), axis=0)


class Samples(Features):
    """The trailing axis; parameters of shape (samples, features), for the samples along the first axis of x."""

    kernel = ""

    def __init__(self, layer: str, group: Group, x: Array) -> None:
        super().__init__(layer, group)
        self.each = math.prod(x.shape[1:-1])  # rows of a sample
        self.samples = x.shape[0]

    def spread(self, param: Array, rows: slice) -> Array:
        """Return the parameters of each row's sample, of shape (rows, features)."""
        xp = array_module(param)
        if self.each == 0:
            return param[:0, ...]
        first, last = rows.start // self.each, -(-rows.stop // self.each)
        repeated = xp.repeat(param[first:last, ...], self.each, axis=0)
        start = rows.start - first * self.each
        return repeated[start : start + rows.stop - rows.start, ...]

    def over_rows(self, d: Array) -> Array:
        """Keep the rows."""
        return d

    def join(self, blocks: list[Array], block: Array) -> list[Array]:
        """Keep the blocks."""
        return [*blocks, block]

    def gradient(self, blocks: list[Array], param: Array) -> Array:
        """Sum over the rows of each sample."""
        xp = array_module(param)
        return xp.sum(xp.reshape(xp.concat(blocks), (self.samples, self.each, param.shape[1])), axis=1)


class Channels(Axes):
    """All space, and the channels of a group: (N, C, ...) in `count` groups; parameters of shape (C,).

    A group of ranks splits the channels. Where the ranks divide the groups, each holds whole groups, and nothing is
    communicated. Where the groups divide the ranks, several ranks share a group; all sums travel in one message.
    """

    kernel = "Channels"

    def __init__(self, layer: str, group: Group, count: int) -> None:
        whole = count % group.size == 0
        super().__init__(layer, SOLO if whole else group)
        self.held_groups = count // group.size if whole else 1
        self.count = count

    def rows(self, x: Array) -> Array:
        """Return `x` in the shape (N groups, channels of a group, space)."""
        space = math.prod(x.shape[2:])
        shape = (x.shape[0] * self.held_groups, x.shape[1] // self.held_groups, space)
        return array_module(x).reshape(contiguous(x), shape)

    def restore(self, rows: Array, x: Array) -> Array:
        """Return rows in the shape of `x`."""
        return array_module(x).reshape(rows, x.shape)

    def n(self, rows: Array) -> int:
        """Return how many elements a group has, over all ranks that share it."""
        return self.held(rows) if isinstance(self.group, Solo) else self.held(rows) * self.group.size // self.count

    def spread(self, param: Array, rows: slice) -> Array:
        """Return the parameters of each row's group, of shape (rows, channels of a group, 1)."""
        xp = array_module(param)
        groups = xp.reshape(param, (self.held_groups, -1, 1))
        first = rows.start // self.held_groups
        repeated = xp.tile(groups, (-(-rows.stop // self.held_groups) - first, 1, 1))
        start = rows.start - first * self.held_groups
        return repeated[start : start + rows.stop - rows.start, ...]

    def within(self, d: Array) -> Array:
        """Sum over the space."""
        if isinstance(d, Terms):
            return d.sum_over_lane()
        return array_module(d).sum(d, axis=-1, keepdims=True)

    def over_rows(self, d: Array) -> Array:
        """Sum over the space, if `within` has not, and keep the rows."""
        return array_module(d).sum(d, axis=-1)

    def gradient(self, blocks: list[Array], param: Array) -> Array:
        """Sum over the batch."""
        xp = array_module(param)
        return xp.sum(xp.reshape(xp.concat(blocks), (-1, param.shape[0])), axis=0)

    def sum(self, *arrays: Array) -> Any:
        """Return the sums over whole groups: every rank adds to the slots of its group."""
        if isinstance(self.group, Solo):
            return super().sum(*arrays)
        slot = self.group.rank * self.count // self.group.size
        sums = self.group.sum(*(self._in_slot(self.held_sum(a), slot) for a in arrays), label=self.what(arrays[0]))
        return sums[slot, ...] if len(arrays) == 1 else tuple(total[slot, ...] for total in sums)

    def largest(self, rows: Array) -> Array:
        """Return the largest magnitude of each row, over the ranks that share its group."""
        if isinstance(self.group, Solo):
            return super().largest(rows)
        slot = self.group.rank * self.count // self.group.size
        return self.group.max(self._in_slot(self._largest(rows), slot), label=self.layer)[slot, ...]

    def any(self, flags: Array) -> bool:
        """Return whether a flag of some row on some rank is set."""
        if isinstance(self.group, Solo):
            return super().any(flags)
        xp = array_module(flags)
        return bool(self.group.max(xp.astype(xp.any(flags), xp.float64), label=self.layer) > 0)

    def what(self, rows: Array) -> str:
        """Return what a message is about."""
        return f"{self.layer} of {self.n(rows)} elements in a group"

    def _in_slot(self, sums: Array, slot: int) -> Array:
        xp = array_module(sums)
        return xp.stack([sums if i == slot else xp.zeros_like(sums) for i in range(self.count)])


class Batch(Axes):
    """All space, and the batch: a row is a channel of (N, C, ...); parameters of shape (C,).

    A group of ranks splits the batch, equally or not; statistics count.
    """

    kernel = "Batch"

    def rows(self, x: Array) -> Array:
        """Return `x` in the shape (C, N, space), without moving it in memory."""
        xp = array_module(x)
        space = math.prod(x.shape[2:])
        return xp.moveaxis(xp.reshape(contiguous(x), (x.shape[0], x.shape[1], space)), 1, 0)

    def restore(self, rows: Array, x: Array) -> Array:
        """Return rows in the shape of `x`."""
        xp = array_module(x)
        return xp.reshape(contiguous(xp.moveaxis(rows, 0, 1)), x.shape)

    def spread(self, param: Array, rows: slice) -> Array:
        """Return one number for each row, of shape (rows, 1, 1)."""
        return array_module(param).reshape(param, (-1, 1, 1))[rows, ...]

    def over_rows(self, d: Array) -> Array:
        """Sum over the row."""
        return array_module(d).reshape(self.held_sum(d), (-1,))

    def gradient(self, blocks: list[Array], param: Array) -> Array:
        """Return the rows' sums."""
        return array_module(param).reshape(array_module(param).concat(blocks), param.shape)
