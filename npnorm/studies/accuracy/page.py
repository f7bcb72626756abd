"""The page of the documentation: what was measured and how, the scoreboard, and a table for each dtype and norm."""

import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from textwrap import fill

from npnorm.studies.accuracy.formats import FORMATS
from npnorm.studies.accuracy.measure import Cell, Verdict
from npnorm.studies.accuracy.peers import Peer
from npnorm.studies.accuracy.problems import NORMS
from npnorm.studies.accuracy.run import Record
from npnorm.studies.accuracy.scoreboard import bar, scoreboard
from npnorm.studies.accuracy.table import table

WIDTH = 110
PROSE = Path(__file__).with_name("page.md")
PASSES = {"forward: y": ("y",), "backward: the worst of dx, dw, db": ("dx", "dw", "db")}


def page(records: list[Record], peers: Sequence[Peer], command: str) -> str:
    """Return the page: the prose of page.md, and what was measured in its place."""
    dtypes = [dtype for dtype in FORMATS if any(record.dtype == dtype for record in records)]
    parts = {
        "command": command,
        "peers": _peers(peers),
        "machine": _machine(peers),
        "scoreboards": "\n\n".join(f"### {dtype}\n\n{scoreboard(records, dtype)}" for dtype in dtypes),
        "misses": _misses(records),
        "refusals": _refusals(records),
        "tables": "\n\n".join(_tables(records, dtype) for dtype in dtypes),
    }
    text = PROSE.read_text(encoding="utf-8").rstrip()
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part)
    return text


def _peers(peers: Sequence[Peer]) -> str:
    return "\n".join(fill(f"- **{peer.name}**: {peer.about}.", WIDTH, subsequent_indent="  ") for peer in peers)


def _machine(peers: Sequence[Peer]) -> str:
    packages = dict.fromkeys(name for peer in peers for name in peer.packages)
    versions = [f"{name} {version(name)}" for name in ("npnorm", *packages, "gmpy2")]
    return fill(f"On {_cpu()}, with Python {platform.python_version()}, {', '.join(versions)}.", WIDTH)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or 'CPU'}, {platform.machine()}, {platform.system()}"


def _misses(records: list[Record]) -> str:
    """Return the cells of npnorm that are above its bars."""
    rows = [
        [r.dtype, NORMS[r.norm], r.case, name, shown([cell])]
        for r in records
        for name, cell in r.cells.items()
        if r.peer == "npnorm" and cell.verdict is not Verdict.REFUSED and not cell.ulps <= bar(r)
    ]
    return table(["dtype", "norm", "case", "result", "ulps"], rows, left=4) if rows else "None."


def _refusals(records: list[Record]) -> str:
    """Return, for each peer and norm, what it said and on which cases."""
    cases: dict[tuple[str, str, str], dict[str, None]] = {}
    for r in records:
        if r.refusal:
            cases.setdefault((r.peer, NORMS[r.norm], r.refusal), {})[r.case] = None
    rows = [[peer, norm, "; ".join(names), refusal] for (peer, norm, refusal), names in cases.items()]
    return table(["implementation", "norm", "cases", "what it says"], rows, left=4) if rows else "Nothing."


def _tables(records: list[Record], dtype: str) -> str:
    parts = [f"## {dtype}, case by case"]
    for norm in NORMS:
        some = [r for r in records if (r.dtype, r.norm) == (dtype, norm)]
        if some:
            parts += [
                f"### {NORMS[norm]}, {dtype}",
                *(f"{name}.\n\n{_by_case(some, of)}" for name, of in PASSES.items()),
            ]
    return "\n\n".join(parts)


def _by_case(records: list[Record], tensors: Sequence[str]) -> str:
    peers, cases = dict.fromkeys(r.peer for r in records), dict.fromkeys(r.case for r in records)
    found = {(r.case, r.peer): [r.cells[name] for name in tensors if name in r.cells] for r in records}
    rows = [[case, *(shown(found.get((case, peer), [])) for peer in peers)] for case in cases]
    return table(["case", *peers], rows)


def shown(cells: Iterable[Cell]) -> str:
    """Return the worst of some cells in a few characters: ulps, or in bold what is worse than any ulps."""
    order = list(Verdict)
    worst = max(cells, key=lambda cell: (order.index(cell.verdict), cell.ulps), default=None)
    if worst is None:
        return "-"
    if worst.verdict is Verdict.REFUSED:
        return "refused"
    if worst.verdict is Verdict.WRONG:
        return f"**{100 * worst.share:.0f} %**" if worst.share < 10 else "**> 1000 %**"
    if worst.verdict is not Verdict.NUMBER:
        return f"**{worst.verdict}**"
    return f"{worst.ulps:.2f}" if worst.ulps < 10 else f"{worst.ulps:.0f}" if worst.ulps < 1000 else f"{worst.ulps:.0e}"
