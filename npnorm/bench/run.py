"""A process for each heap and each number of threads, so that nothing is left over from another one.

A large array that is freed goes back to the operating system, and the next one is made of new pages, which cost more
than a norm. Who allocates when, and how, then decides who is faster. So everything is measured twice:

    default     the C library as it comes
    retained    the C library keeps what is freed, and takes no array from the operating system by itself

What all processes measured is one table: a line for each section, norm, shape, heap, number of threads, peer, input
(of rows that need care) and operation, with median, p10 and p90 in seconds, rounds, and extra memory in bytes.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from npnorm.bench.grid import GRIDS, Case
from npnorm.bench.memory import memory
from npnorm.bench.peers import contenders
from npnorm.bench.rows import COMPUTES, KINDS, rows
from npnorm.bench.step import MODELS, steps
from npnorm.bench.timing import interleave
from npnorm.threads import set_threads

RETAINED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
"""What tells glibc to keep what is freed."""

REGIMES: dict[str, dict[str, str]] = {"default": {}, "retained": RETAINED}
"""The environment of each heap, by name."""

SCALED = ("f64", "f32", "out", "torch")
"""The peers of the section "scaling"."""

COLUMNS = ["section", "norm", "shape", "mib", "heap", "threads", "peer", "input", "op", "median", "p10", "p90"]
COLUMNS += ["rounds", "extra"]


class Plan(NamedTuple):
    """What a process measures: the name of a grid; sections, norms and peers; its heap and number of threads."""

    grid: str
    sections: Sequence[str]
    norms: Sequence[str]
    peers: Sequence[str]
    heap: str
    threads: int


def heaps() -> list[str]:
    """Return the heaps that there are: both with glibc, elsewhere the default."""
    return list(REGIMES) if platform.libc_ver()[0] == "glibc" else ["default"]


def plans(
    grid: str,
    sections: Sequence[str],
    norms: Sequence[str],
    peers: Sequence[str],
    threads: Sequence[int],
    heaps: Sequence[str],
) -> list[Plan]:
    """Return the processes of a run.

    Memory is measured once, with one thread in the default heap; rows that need care once, with all threads in the
    retained heap; scaling, and in a quick run the step of training, in the retained heap, if there is one.
    """
    found = []
    for heap in heaps:
        for n in threads:
            skipped = {"memory"} if (heap, n) != (heaps[0], threads[0]) else set()
            if (heap, n) != (heaps[-1], threads[-1]):
                skipped.add("rows")
            if heap != heaps[-1]:
                skipped |= {"scaling", "step"} if grid == "quick" else {"scaling"}
            if some := [name for name in sections if name not in skipped]:
                found.append(Plan(grid, some, norms, peers, heap, n))
    return found


def environment(plan: Plan, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process: `base`, with the heap and the number of threads of the plan.

    BLAS gets one thread: npnorm shares work among threads of its own, and torch is told by `set_num_threads`. JAX
    takes the number from NPROC.

    Examples
    --------
    >>> environment(Plan("quick", [], [], [], "retained", 2), {"MALLOC_MMAP_MAX_": "4"})["MALLOC_MMAP_MAX_"]
    '0'
    """
    kept = {name: value for name, value in base.items() if name not in RETAINED}
    threads = {"OPENBLAS_NUM_THREADS": "1", "NPROC": str(plan.threads)}
    if plan.threads == 1:
        threads["XLA_FLAGS"] = f"{base.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    others = {"JAX_PLATFORMS": "cpu", "KINETO_LOG_LEVEL": "99"}  # the latter keeps torch's profiler quiet
    return kept | threads | others | REGIMES[plan.heap]


def run(todo: Sequence[Plan]) -> pd.DataFrame:
    """Measure each plan in a process of its own, one after the other; the standard error stream tells which.

    Raises
    ------
    RuntimeError
        If one of them fails; it has said why on the standard error stream.
    """
    lines = []
    for number, plan in enumerate(todo, 1):
        what = f"{plan.heap} heap, {plan.threads} threads"
        print(f"process {number} of {len(todo)}: {what}", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "npnorm.bench.run", json.dumps(plan._asdict())]
        done = subprocess.run(command, env=environment(plan, os.environ), stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise RuntimeError(f"The process that measures ({what}) ended with status {done.returncode}.")
        lines += json.loads(done.stdout)
    frame, seconds = pd.DataFrame(lines, columns=COLUMNS), ["median", "p10", "p90"]
    frame[seconds] = frame[seconds].astype(float).map(lambda number: float(f"{number:.4g}"))
    return frame


def measure(plan: Plan) -> Iterator[dict[str, Any]]:
    """Measure all of a plan in this process, and yield its lines."""
    set_threads(plan.threads)
    if {"torch", "compile"} & set(plan.peers):
        import torch

        torch.set_num_threads(plan.threads)
    for section, case, lines in _sections(plan):
        if sys.stderr.isatty():
            said = f"{plan.heap} heap, {plan.threads} threads: {section}, {case.norm} {case.size}"
            print(f"\r{said:<79}", end="", file=sys.stderr, flush=True)
        place = {"section": section, "norm": case.norm, "shape": case.size, "mib": case.mib}
        yield from (place | {"heap": plan.heap, "threads": plan.threads, "input": ""} | line for line in lines)
    if sys.stderr.isatty():
        print(f"\r{'':<79}\r", end="", file=sys.stderr, flush=True)


def _sections(plan: Plan) -> Iterator[tuple[str, Case, Iterator[dict[str, Any]]]]:
    """Yield each section, case and the lines of it, which are measured when they are asked for."""
    grid = GRIDS[plan.grid]

    def timed(case: Case, peers: Sequence[str]) -> Iterator[dict[str, Any]]:
        yield from interleave(contenders(case, peers), grid.effort)

    def step(case: Case) -> Iterator[dict[str, Any]]:
        yield from interleave(steps(case.norm, grid.step, plan.peers), grid.step_effort)

    scaled = [name for name in plan.peers if name in SCALED]
    for section, cases, lines in (
        ("norms", grid.norms, lambda case: timed(case, plan.peers)),
        ("small", grid.small, lambda case: timed(case, plan.peers)),
        ("scaling", grid.scaling, lambda case: timed(case, scaled)),
        ("memory", grid.memory, lambda case: memory(case, plan.peers)),
    ):
        yield from ((section, c, lines(c)) for c in cases if section in plan.sections and c.norm in plan.norms)
    if "step" in plan.sections:
        yield from (("step", c, step(c)) for c in (Case(m, (grid.step.batch, grid.step.length)) for m in MODELS))
    if "rows" in plan.sections:
        for norm in (norm for norm in KINDS if norm in plan.norms):
            for shape in [KINDS[norm].large] * grid.large_rows + [KINDS[norm].small]:
                for peer in (peer for peer in COMPUTES if peer in plan.peers):
                    case = Case(norm, shape)
                    yield "rows", case, rows(case, peer, grid.rows_effort)


if __name__ == "__main__":
    print(json.dumps(list(measure(Plan(**json.loads(sys.argv[1]))))))
