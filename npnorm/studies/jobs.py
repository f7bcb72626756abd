"""Jobs of several ranks: a study has a function of a group called on each, by mpirun."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from typing import Any

PROGRAM = """
import importlib, json, sys
from npnorm.mpi import run
module, name, arguments = json.loads(sys.argv[1])
def main(group):
    found = getattr(importlib.import_module(module), name)(group, *arguments)
    if group.rank == 0:
        print(json.dumps(found))
run(main)
"""
"""The program of a job; npnorm.mpi is named by programs alone, and by nothing in the package."""

LIMIT = 600
"""Seconds after which a job is ended."""

EXTRA = 'The extra brings all that it needs: pip install "npnorm[mpi]".'


def on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Return what `function(group, *arguments)` returns on the first of so many ranks; all of it must fit into JSON.

    Raises
    ------
    ValueError
        If there is no mpirun, or no mpi4py.
    RuntimeError
        If the job fails, with what it wrote.
    """
    places = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    mpirun = shutil.which("mpirun", path=places)
    if mpirun is None:
        raise ValueError(f"this study starts ranks, and there is no mpirun. {EXTRA}")
    work = json.dumps([function.__module__, function.__name__, arguments])
    job = [mpirun, "-n", str(ranks), sys.executable, "-c", PROGRAM, work]
    done = subprocess.run(job, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LIMIT, check=False)
    if "ImportError: npnorm.mpi needs" in done.stderr:
        raise ValueError(f"this study starts ranks, and they could not load npnorm.mpi. {EXTRA}")
    if done.returncode:
        raise RuntimeError(f"mpirun -n {ranks} ended with status {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout)
