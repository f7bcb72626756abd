"""The file of a study, NAME.json: what was set and on which machine, a line for each cell, and the claims at the end.

A file without claims is of a study that was stopped. What was measured has 7 digits, what was varied all of them; JSON
has no numbers that are not finite, which are written as text.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
"""Another number is another meaning of the parts."""

ALL = 17
"""Digits of a float, so that it comes back as it was."""

PARTS = ("study", "format", "settings", "machine", "cells")


def plain(value: Any, digits: int = 7) -> Any:
    """Return a value as JSON has it: lists for tuples and arrays, numbers of so many digits, text for nan and inf."""
    if isinstance(value, Mapping):
        return {name: plain(item, digits) for name, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item, digits) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else str(float(value))
    return value


def numbers(value: Any) -> Any:
    """Return the numbers that `plain` wrote as text."""
    if isinstance(value, dict):
        return {name: numbers(item) for name, item in value.items()}
    if isinstance(value, list):
        return [numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value


def line(value: Any) -> str:
    """Return a value as one line of the file."""
    return json.dumps(value, ensure_ascii=False)


def key(cell: Mapping[str, Any]) -> str:
    """Return what tells a cell from the others of its study."""
    return json.dumps(plain(cell, ALL), sort_keys=True)


def read(path: Path) -> dict[str, Any]:
    """Return what a file has.

    Raises
    ------
    ValueError
        If there is none, or it is not of a study.
    """
    try:
        file = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is not there. Run the study first.") from None
    except OSError as problem:
        raise ValueError(f"{path} cannot be read: {problem.strerror}. Take another --out.") from None
    except ValueError as problem:
        raise ValueError(f"{path} is not a file of a study: {problem}. Take another --out.") from None
    missing = [part for part in PARTS if part not in file] if isinstance(file, dict) else list(PARTS)
    if missing or file["format"] != FORMAT:
        why = f"it has no {', '.join(missing)}" if missing else f"its format is {file['format']}, not {FORMAT}"
        raise ValueError(f"{path} is not a file of a study: {why}. Take another --out.")
    return file


def write(path: Path, head: Mapping[str, Any], cells: list[str], claims: list[str] | None = None) -> None:
    """Replace a file at once, so that one who is stopped while writing leaves the former."""
    parts = [f"{line(name)}: {line(value)}" for name, value in head.items()]
    for name, lines in (("cells", cells), ("claims", claims)):
        if lines is not None:
            parts += [f"{line(name)}: [\n" + ",\n".join(lines) + "\n]"]
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as handle:
        handle.write("{" + ",\n".join(parts) + "}\n")
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(path)


def require_same(path: Path, file: Mapping[str, Any], head: Mapping[str, Any]) -> None:
    """Raise unless the cells of a file can stand beside new ones.

    Raises
    ------
    ValueError
        If study, settings, processor or versions differ; it names the first difference.
    """
    pairs = [("study", file["study"], head["study"])]
    there, here = file["settings"], head["settings"]
    pairs += [(f"setting {name!r}", there.get(name), here.get(name)) for name in dict.fromkeys([*here, *there])]
    pairs += [(name, file["machine"].get(name), head["machine"][name]) for name in ("processor", "versions")]
    for name, former, now in pairs:  # thread pools are seen only once they are loaded, so they are not compared
        if former != now:
            raise ValueError(
                f"{path} was measured with another {name}: {former} there, {now} here. Take another --out, or remove "
                "the file to measure anew."
            )
