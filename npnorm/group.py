"""The group of ranks that share a layer's arrays; here the group of one.

An array is in one of three states on a group: *replicated* (every rank has all of it), *sharded* (each rank has its
equal part along one axis), or *partial* (the true array is the sum over the ranks). `Solo` is the group of one rank, in
which the three are the same. `npnorm.mpi.Ranks` has the same names over MPI, so that a layer is written once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from npnorm.arrays import Array, array_module, with_article


class RankError(RuntimeError):
    """An error that every rank raises at the same point, with the same text."""


class Group(Protocol):
    """What a layer asks of the ranks that it is split over.

    The `label` of a message is compared over the ranks before anything is sent, at no cost: it says what the message is
    for, and whatever else must be the same on all of them, such as the dtype of x (`npnorm.checks.message_label`).
    """

    rank: int
    size: int

    def sum(self, *arrays: Array, label: str = "") -> Any:
        """Turn partial arrays into replicated ones; several travel in one message and come back as a tuple."""

    def max(self, x: Array, label: str = "") -> Any:
        """Return the largest value over the ranks, element by element; a NaN on any rank stays."""

    def gather(self, x: Array, axis: int, label: str = "") -> Any:
        """Turn an array sharded along `axis` into a replicated one."""

    def shard(self, x: Array, axis: int | None) -> Any:
        """Return a copy of this rank's part of the replicated `x` along `axis` (None: of all of it)."""

    def require_same(self, label: str) -> None:
        """Raise the same error on every rank unless all ranks call it with the same text."""

    def shared_error(self, problem: Exception) -> Exception:
        """Return `problem`, to be raised, once every rank has it; raise on every rank if only some have it."""


class Solo:
    """The group of one rank: a sum over it is the array itself."""

    rank = 0
    size = 1

    def __repr__(self) -> str:
        return "Solo()"

    def sum(self, *arrays: Array, label: str = "") -> Any:
        """Return the arrays: a single one as it is, several as a tuple."""
        return arrays[0] if len(arrays) == 1 else arrays

    def max(self, x: Array, label: str = "") -> Any:
        """Return `x`."""
        return x

    def gather(self, x: Array, axis: int, label: str = "") -> Any:
        """Return `x`."""
        return x

    def shard(self, x: Array, axis: int | None) -> Any:
        """Return a copy of `x`."""
        return array_module(x).astype(x, x.dtype)

    def require_same(self, label: str) -> None:
        """Do nothing: one rank agrees with itself."""

    def shared_error(self, problem: Exception) -> Exception:
        """Return `problem`."""
        return problem


SOLO = Solo()
"""The group that every layer belongs to unless it is given another."""


@contextmanager
def errors_on_all_ranks(group: Group) -> Iterator[None]:
    """Raise on every rank of the group what any rank raises within; the others learn of it at their next message.

    Examples
    --------
    >>> with errors_on_all_ranks(SOLO):
    ...     raise ValueError("on all")
    Traceback (most recent call last):
    ValueError: on all
    """
    if not hasattr(group, "require_same"):
        raise TypeError(f"group is {with_article(group)}. Wrap a communicator first: npnorm.mpi.Ranks(comm).")
    try:
        yield
    except RankError:
        raise
    except Exception as problem:
        raise group.shared_error(problem) from None


def shard_slice(group: Group, length: int, label: str) -> slice:
    """Return the slice of `length` entries that the group's rank holds.

    Raises
    ------
    ValueError
        On every rank, if the ranks do not divide the length; `label` names what is to be shared.

    Examples
    --------
    >>> shard_slice(SOLO, 6, "6 heads")
    slice(0, 6, None)
    """
    if length % group.size:
        raise group.shared_error(
            ValueError(
                f"{group.size} ranks cannot share {label} equally: {length} is not a multiple of {group.size}. "
                "Choose a size that the ranks divide, or another number of ranks."
            )
        )
    step = length // group.size
    return slice(group.rank * step, (group.rank + 1) * step)
