"""On which machine, and with which libraries, something was measured."""

import datetime
import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from threadpoolctl import threadpool_info


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine(packages: Iterable[str] = ()) -> dict[str, str]:
    """Return lines with names: date, processor, system, thread pools, and the versions of what is installed.

    Examples
    --------
    >>> list(machine(["numpy", "no_such_package"]))
    ['date', 'processor', 'system', 'BLAS and OpenMP', 'versions']
    """
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    pools = {f"{pool['internal_api']} {pool['version'] or ''}".strip() for pool in threadpool_info()}
    return {
        "date": datetime.date.today().isoformat(),
        "processor": f"{(names or [platform.processor() or 'unknown'])[0]}, {cores()} cores, {platform.machine()}",
        "system": f"{platform.system()}, {' '.join(platform.libc_ver()).strip() or 'unknown C library'}",
        "BLAS and OpenMP": ", ".join(sorted(pools)),
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions(["npnorm", *packages])]),
    }


def _versions(packages: Iterable[str]) -> list[str]:
    found = []
    for name in packages:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found
