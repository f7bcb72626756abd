"""A table for the examples: what each pass communicated, and how far its results are from the serial ones."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from npnorm.arrays import Array, to_numpy
from npnorm.mpi import Ranks

TOLERANCE = 1e-12
"""The largest difference from the serial result, relative to its largest element, in float64."""


def count(ranks: int) -> str:
    """Return the number of ranks in words."""
    return f"{ranks} rank" if ranks == 1 else f"{ranks} ranks"


class Table:
    """Rows of: pass, its messages, the bytes that each rank sent for them, the largest differences.

    Parameters
    ----------
    group : Ranks
    title : str
    """

    def __init__(self, group: Ranks, title: str) -> None:
        self.group = group
        self.title = title
        self.messages: dict[str, tuple[Counter[str], int]] = {}
        self.differences: dict[str, dict[str, float]] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Count the messages of the pass `name` (the group's own checks are left out)."""
        calls, sent = Counter(self.group.calls), Counter(self.group.bytes)
        yield
        made, volume = Counter(self.group.calls) - calls, Counter(self.group.bytes) - sent
        del made["check"], volume["check"]
        self.messages[name] = made, volume.total()

    def compare(self, name: str, **pairs: tuple[Array, Array]) -> None:
        """Note, for each `result=(mine, serial slice)` of the pass, the largest difference on any rank."""
        for result, (mine, serial) in pairs.items():
            mine, serial = to_numpy(mine), to_numpy(serial)
            difference = np.max(np.abs(mine - serial)) / np.max(np.abs(serial))
            largest = float(self.group.max(np.asarray(difference)))
            self.differences.setdefault(name, {})[result] = largest

    def finish(self) -> None:
        """Print the table from rank 0; leave with an error on every rank if a difference is too large."""
        if self.group.rank == 0:
            print(self.title)
            print(f"  {'pass':10}{'messages':18}{'bytes':>12}   largest difference from serial")
            for name, (made, volume) in self.messages.items():
                messages = ", ".join(f"{count} {call}" for call, count in made.items()) or "none"
                differences = "  ".join(f"{r} {d:.1e}" for r, d in self.differences.get(name, {}).items())
                print(f"  {name:10}{messages:18}{volume:12,}   {differences}", flush=True)
        every = [(r, d) for results in self.differences.values() for r, d in results.items()]
        wrong = [f"{r} by {d:.1e}" for r, d in every if not d <= TOLERANCE]
        if wrong:
            raise SystemExit(f"differs from serial by more than {TOLERANCE:.0e}: {', '.join(wrong)}")
