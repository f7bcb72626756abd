"""On what was measured: the processor, its caches, the libraries; and who else was busy on it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

CPU = Path("/sys/devices/system/cpu/cpu0")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def machine() -> dict[str, str]:
    """Return lines with names: the processor, the caches, huge pages, the libraries."""
    return {
        "processor": f"{_processor()}, {cores()} cores, {platform.machine()}",
        "caches": _caches() or "unknown",
        "system": f"{platform.system()}, {' '.join(platform.libc_ver()).strip() or 'unknown C library'}",
        "huge pages": _read(HUGE_PAGES) or "unknown",
        "BLAS of NumPy": _blas(),
        "versions": ", ".join([f"Python {platform.python_version()}", *_versions()]),
    }


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy() -> tuple[float, float] | None:
    """Return the seconds that all cores and that this process have been busy so far; None where nothing tells."""
    stat = _read(Path("/proc/stat"))
    if not stat:
        return None
    user, nice, system, _, _, *rest = map(int, stat.splitlines()[0].split()[1:9])  # without idle and waiting
    own = os.times()
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK"), own.user + own.system


def share_of_others(
    before: tuple[float, float] | None, after: tuple[float, float] | None, seconds: float
) -> float | None:
    """Return the share of all cores that other processes took between two results of `busy`.

    Examples
    --------
    >>> share_of_others((10.0, 1.0), (10.0, 1.0), 1.0)
    0.0
    """
    if before is None or after is None or seconds <= 0:
        return None
    others = (after[0] - before[0]) - (after[1] - before[1])
    return max(0.0, others) / (seconds * (os.cpu_count() or 1))


def _processor() -> str:
    info: dict[str, str] = {}
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        info.setdefault(name.strip(), value.strip())
    if "model name" not in info:
        return platform.processor() or "unknown processor"
    return f"{info['model name']} (family {info.get('cpu family', '?')}, model {info.get('model', '?')})"


def _caches() -> str:
    found = []
    for folder in sorted((CPU / "cache").glob("index*")):
        level, kind, size = (_read(folder / name) for name in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found)


def _blas() -> str:
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


def _versions() -> list[str]:
    found = []
    for name in ("npnorm", "numpy", "torch", "jax"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
