"""A process for each heap and each number of threads, so that nothing is left over from another one.

A large array that is freed goes back to the operating system, and the next one is made of new pages, which cost more
than a norm. Who allocates when, and how, then decides who is faster. So everything is measured twice:

    default     the C library as it comes
    retained    the C library keeps what is freed, and takes no array from the operating system by itself
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from npnorm.bench.child import Plan
from npnorm.bench.machine import machine
from npnorm.bench.records import Measured, from_json, together

RETAINED = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
"""What tells glibc to keep what is freed."""

REGIMES: dict[str, dict[str, str]] = {"default": {}, "retained": RETAINED}
"""The environment of each heap, by name."""


def regimes() -> list[str]:
    """Return the heaps that there are: both with glibc, elsewhere the default."""
    return list(REGIMES) if platform.libc_ver()[0] == "glibc" else ["default"]


def thread_counts(cores: int) -> list[int]:
    """Return one thread, and all cores.

    Examples
    --------
    >>> thread_counts(1), thread_counts(8)
    ([1], [1, 8])
    """
    return sorted({1, cores})


def plans(
    grid: str,
    sections: Sequence[str],
    norms: Sequence[str],
    peers: Sequence[str],
    threads: Sequence[int],
    heaps: Sequence[str],
) -> list[Plan]:
    """Return the processes of a run.

    Memory is measured once, with one thread in the default heap; scaling, and in a quick run the step of training, in
    the retained heap, if there is one.
    """
    found = []
    for regime in heaps:
        for n in threads:
            skipped = set()
            if (regime, n) != (heaps[0], threads[0]):
                skipped.add("memory")
            if regime != heaps[-1]:
                skipped |= {"scaling", "step"} if grid == "quick" else {"scaling"}
            some = tuple(name for name in sections if name not in skipped)
            if some:
                found.append(Plan(grid, some, tuple(norms), tuple(peers), regime, n))
    return found


def environment(plan: Plan, base: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a process: `base`, with the heap and the number of threads of the plan.

    BLAS gets one thread: npnorm shares work among threads of its own, and torch is told by `set_num_threads`. JAX
    takes the number from NPROC.

    Examples
    --------
    >>> plan = Plan("quick", ("norms",), (), (), "retained", 2)
    >>> environment(plan, {"MALLOC_ARENA_MAX": "4"})["MALLOC_MMAP_MAX_"]
    '0'
    """
    kept = {name: value for name, value in base.items() if name not in RETAINED}
    threads = {"OPENBLAS_NUM_THREADS": "1", "NPROC": str(plan.threads)}
    if plan.threads == 1:
        threads["XLA_FLAGS"] = f"{base.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()
    others = {"JAX_PLATFORMS": "cpu", "KINETO_LOG_LEVEL": "99"}  # the latter keeps torch's profiler quiet
    return kept | threads | others | REGIMES[plan.regime]


def run(todo: Sequence[Plan]) -> Measured:
    """Measure each plan in a process of its own, one after the other.

    Raises
    ------
    RuntimeError
        If one of them fails; it has said why on the standard error stream.
    """
    parts = [_in_a_process(plan) for plan in todo]
    if sys.stderr.isatty():
        print(f"\r{'':<79}\r", end="", file=sys.stderr, flush=True)
    return together([*parts, Measured([], [], {}, machine())])


def _in_a_process(plan: Plan) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        there, back = Path(folder) / "plan.json", Path(folder) / "result.json"
        there.write_text(json.dumps(plan._asdict()), encoding="utf-8")
        command = [sys.executable, "-m", "npnorm.bench.child", str(there), str(back)]
        done = subprocess.run(command, env=environment(plan, os.environ), check=False)
        if done.returncode:
            raise RuntimeError(f"The process that measures ({plan.label}) ended with status {done.returncode}.")
        return from_json(json.loads(back.read_text(encoding="utf-8")))


def rows(threads: int) -> int:
    """Run `npnorm.bench.rows` in the retained heap, if there is one, and return its exit status."""
    plan = Plan("", (), (), (), regimes()[-1], threads)
    command = [sys.executable, "-m", "npnorm.bench.rows"]
    return subprocess.run(command, env=environment(plan, os.environ), check=False).returncode
