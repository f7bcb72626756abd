"""What was measured, and the JSON that carries it from one process to the other and into a file."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from npnorm.bench.grid import Case
from npnorm.bench.timing import Spread, Times


class Record(NamedTuple):
    """The times of all contenders on one case.

    Parameters
    ----------
    section : str
        "norms", "small", "step" or "scaling".
    case : Case
        Of the section "step" its `norm` is the name of a model, and its shape the batch and the length.
    regime : str
        The heap: "default" or "retained".
    threads : int
    times : dict
        For each contender its times, by operation.
    """

    section: str
    case: Case
    regime: str
    threads: int
    times: dict[str, Times]

    def seconds(self, peer: str, op: str) -> float:
        """Return the median of a contender."""
        return self.times[peer][op].median

    def calm(self, *peers: str) -> bool:
        """Return whether enough turns of these contenders were calm; see `npnorm.bench.timing`."""
        return all(spread.calm for name in peers for spread in self.times[name].values())

    def ratio(self, peer: str, to: str, op: str) -> float:
        """Return the time of a contender divided by that of another in the same run; below 1 it is faster."""
        return self.seconds(peer, op) / self.seconds(to, op)


class MemoryUse(NamedTuple):
    """The largest extra memory of a contender, in bytes."""

    norm: str
    shape: tuple[int, ...]
    peer: str
    forward: int
    backward: int


class Measured(NamedTuple):
    """All of a run.

    Parameters
    ----------
    records : list of Record
    memory : list of MemoryUse
    others : dict
        For each process of measurement, by heap and threads, the share of the cores that other processes took.
    machine : dict
        Lines that say on what it was measured.
    """

    records: list[Record]
    memory: list[MemoryUse]
    others: dict[str, float]
    machine: dict[str, str]


def to_json(measured: Measured) -> dict[str, Any]:
    """Return lists and dicts with names, which `from_json` takes back."""
    return {
        "machine": measured.machine,
        "others": measured.others,
        "records": [
            {
                "section": r.section,
                "norm": r.case.norm,
                "shape": list(r.case.shape),
                "regime": r.regime,
                "threads": r.threads,
                "seconds": {p: {op: s._asdict() for op, s in times.items()} for p, times in r.times.items()},
            }
            for r in measured.records
        ],
        "memory": [use._asdict() for use in measured.memory],
    }


def from_json(data: dict[str, Any]) -> Measured:
    """Return what `to_json` was given."""
    records = [
        Record(
            r["section"],
            Case(r["norm"], tuple(r["shape"])),
            r["regime"],
            r["threads"],
            {p: {op: Spread(**s) for op, s in times.items()} for p, times in r["seconds"].items()},
        )
        for r in data["records"]
    ]
    memory = [MemoryUse(**{**use, "shape": tuple(use["shape"])}) for use in data["memory"]]
    return Measured(records, memory, data["others"], data["machine"])


def together(parts: Iterable[Measured]) -> Measured:
    """Return several runs as one."""
    found = Measured([], [], {}, {})
    for part in parts:
        found.records.extend(part.records)
        found.memory.extend(part.memory)
        found.others.update(part.others)
        found.machine.update(part.machine)
    return found
