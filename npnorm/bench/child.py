"""The process that measures, with one heap and one number of threads: `python -m npnorm.bench.child PLAN RESULT`.

Both are files of JSON. The environment, which decides about heap and BLAS, is the parent's work: see `run`.
"""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from npnorm.bench.grid import GRIDS, Case, Effort
from npnorm.bench.machine import busy, share_of_others
from npnorm.bench.memory import memory
from npnorm.bench.needs import need
from npnorm.bench.peers import contenders
from npnorm.bench.records import Measured, MemoryUse, Record, to_json
from npnorm.bench.step import MODELS, steps
from npnorm.bench.timing import interleave
from npnorm.threads import set_threads

SCALED = ("f64", "f32", "out", "torch")
"""The peers of the section "scaling"."""


class Plan(NamedTuple):
    """What a process measures.

    Parameters
    ----------
    grid : str
        A name in GRIDS.
    sections, norms, peers : tuples of str
    regime : str
        The heap that this process has: a name for the records.
    threads : int
    """

    grid: str
    sections: tuple[str, ...]
    norms: tuple[str, ...]
    peers: tuple[str, ...]
    regime: str
    threads: int

    @property
    def label(self) -> str:
        """The process in a few words."""
        return f"{self.regime} heap, {self.threads} thread{'s' * (self.threads > 1)}"


def measure(plan: Plan) -> Measured:
    """Measure all of a plan."""
    set_threads(plan.threads)
    if {"torch", "compile"} & set(plan.peers):
        need("torch").set_num_threads(plan.threads)
    before, start = busy(), time.perf_counter()
    records = list(_records(plan))
    others = share_of_others(before, busy(), time.perf_counter() - start)
    return Measured(records, list(_memory(plan)), {} if others is None else {plan.label: others}, {})


def _records(plan: Plan) -> Iterator[Record]:
    grid = GRIDS[plan.grid]
    for section, cases in (("norms", grid.norms), ("small", grid.small), ("scaling", grid.scaling)):
        peers = [name for name in plan.peers if section != "scaling" or name in SCALED]
        for case in _chosen(plan, section, cases):
            yield _record(plan, section, case, contenders(case, peers), grid.effort)
    if "step" in plan.sections:
        for model in MODELS:
            case = Case(model, (grid.step.batch, grid.step.length))
            _tell(f"{plan.label}: step, {model}")
            yield _record(plan, "step", case, steps(model, grid.step, plan.peers), grid.step_effort)


def _record(plan: Plan, section: str, case: Case, found: dict[str, Any], effort: Effort) -> Record:
    return Record(section, case, plan.regime, plan.threads, interleave(found, effort))


def _memory(plan: Plan) -> Iterator[MemoryUse]:
    for case in _chosen(plan, "memory", GRIDS[plan.grid].memory):
        yield from memory(case, plan.peers)


def _chosen(plan: Plan, section: str, cases: Sequence[Case]) -> Iterator[Case]:
    for case in cases if section in plan.sections else ():
        if case.norm in plan.norms:
            _tell(f"{plan.label}: {section}, {case}")
            yield case


def _tell(what: str) -> None:
    """Say what is being measured, if somebody watches."""
    if sys.stderr.isatty():
        print(f"\r{what:<79}", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str]) -> None:
    """Read a plan, write what was measured."""
    plan, result = map(Path, argv)
    fields: dict[str, Any] = json.loads(plan.read_text(encoding="utf-8"))
    measured = measure(Plan(**fields))
    result.write_text(json.dumps(to_json(measured)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
