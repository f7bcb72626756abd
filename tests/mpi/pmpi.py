"""Counts MPI calls below Python: a small C library stands before the MPI library and keeps the books.

MPI's profiling interface offers every `MPI_X` a second time as `PMPI_X`, so that a library loaded earlier can define
`MPI_X` itself. Needed are Linux and a C compiler, but no mpi.h: each argument is passed on as a 64-bit word, which
suits the integer handles of MPICH and the pointers of Open MPI alike.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

WRAPPED = {  # name: number of arguments, and which of them are the count and the datatype that give the bytes
    "Allgather": (7, 1, 2),
    "Allgatherv": (8, 1, 2),
    "Allreduce": (6, 2, 3),
    "Alltoall": (7, 1, 2),
    "Barrier": (1, None, None),
    "Bcast": (5, 1, 2),
    "Gather": (8, 1, 2),
    "Gatherv": (9, 1, 2),
    "Iallgather": (8, 1, 2),
    "Iallreduce": (7, 2, 3),
    "Ibarrier": (2, None, None),
    "Ibcast": (6, 1, 2),
    "Irecv": (7, 1, 2),
    "Isend": (7, 1, 2),
    "Recv": (7, 1, 2),
    "Reduce": (7, 2, 3),
    "Reduce_scatter": (6, None, 3),  # one count for each rank: its bytes are not counted
    "Reduce_scatter_block": (6, 2, 3),
    "Scatter": (8, 1, 2),
    "Send": (6, 1, 2),
    "Sendrecv": (12, 1, 2),
}

PROBE = """
import ctypes, sys, mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
library = ctypes.CDLL(MPI.__file__)
print(MPI.__file__, *(name for name in sys.argv[1:] if hasattr(library, "PMPI_" + name)), sep="\\n")
"""

SOURCE = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>

long npnorm_calls[%(size)d], npnorm_bytes[%(size)d];

/* The MPI library is loaded privately by mpi4py, so its names are found through mpi4py's module. */
static void *find(const char *name) {
    void *module = dlopen(%(module)s, RTLD_LAZY | RTLD_NOLOAD);
    void *function = module ? dlsym(module, name) : NULL;
    if (!function) { fprintf(stderr, "the MPI library has no %%s\\n", name); abort(); }
    return function;
}

static long bytes(long count, long datatype) {
    static long (*type_size)(long, int *);
    int size = 0;
    if (!type_size) type_size = find("PMPI_Type_size");
    if (count) type_size(datatype, &size);
    return count * size;
}
"""

WRAPPER = """
long MPI_%(name)s(%(declared)s) {
    static long (*real)(%(types)s);
    if (!real) real = find("PMPI_%(name)s");
    npnorm_calls[%(index)d] += 1;
    npnorm_bytes[%(index)d] += %(bytes)s;
    return real(%(passed)s);
}
"""


def compiler() -> str | None:
    """Return the machine's C compiler, or None if it has none that could serve here."""
    names = [*(sysconfig.get_config_var("CC") or "").split()[:1], "cc", "gcc"]
    return next(filter(None, map(shutil.which, names)), None) if sys.platform == "linux" else None


def call(command: list[str], text: str = "") -> str:
    """Run a command and return what it prints, or raise with what it complains about."""
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr}")
    return done.stdout


def wrapper(name: str) -> str:
    """Return the C function that counts one MPI function."""
    base = name.removesuffix("_c")
    arity, count, datatype = WRAPPED[base]
    passed = [f"a{i}" for i in range(arity)]
    integer = "" if name.endswith("_c") else "(int)"  # the upper half of an int's register may hold anything
    return WRAPPER % {
        "name": name,
        "index": list(WRAPPED).index(base),
        "declared": ", ".join(f"long {a}" for a in passed),
        "types": ", ".join(["long"] * arity),
        "passed": ", ".join(passed),
        "bytes": "0" if count is None else f"bytes({integer}a{count}, a{datatype})",
    }


@functools.cache
def build() -> Path:
    """Build the library once in this process and return its path, for the ranks' LD_PRELOAD."""
    # mpi4py asks by weak symbols which large-count forms (_c) MPI has, so none may be defined that MPI lacks.
    forms = [base + suffix for base in WRAPPED for suffix in ("", "_c")]
    module, *names = call([sys.executable, "-c", PROBE, *forms]).splitlines()
    source = SOURCE % {"size": len(WRAPPED), "module": json.dumps(module)} + "".join(map(wrapper, names))
    folder = Path(tempfile.mkdtemp(prefix="npnorm-pmpi-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = folder / "libpmpi.so"
    call([compiler() or "cc", "-O2", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library), "-ldl"], source)
    return library


def totals() -> dict[str, tuple[int, int]]:
    """Return the calls and bytes of each function since this rank's start."""
    loaded = ctypes.CDLL(None)  # the process itself, and with it what LD_PRELOAD brought in
    counts = ctypes.c_long * len(WRAPPED)
    try:
        calls, sizes = (counts.in_dll(loaded, f"npnorm_{what}") for what in ("calls", "bytes"))
    except ValueError:
        raise RuntimeError("MPI calls are counted only in a test marked @pytest.mark.mpi(counted=True)") from None
    return {name: (calls[i], sizes[i]) for i, name in enumerate(WRAPPED)}


@contextmanager
def counting() -> Iterator[dict[str, tuple[int, int]]]:
    """Count this rank's MPI calls in a `with` block: afterwards `calls["Allreduce"] == (calls, bytes)`."""
    calls: dict[str, tuple[int, int]] = {}
    before = totals()
    yield calls
    for name, (number, size) in totals().items():
        if number > before[name][0]:
            calls[name] = (number - before[name][0], size - before[name][1])
