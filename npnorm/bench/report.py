"""What was measured as tables: ratios to torch, and shares of what a copy of the same memory reaches."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from npnorm.bench.grid import traffic
from npnorm.bench.peers import ABOUT, COPIES, PEERS
from npnorm.bench.records import Measured, Record
from npnorm.bench.run import REGIMES, RETAINED
from npnorm.bench.table import Table

OPS = {"forward": "fwd", "backward": "bwd", "both": "both"}
SHARES = ("torch", "f32", "out")
"""Whose share of the copy is shown."""

NONE = "-"


def limit(record: Record, op: str) -> float:
    """Return the seconds that a copy takes to move what the operation must move at least.

    A copy moves two arrays, and forward of most norms does, too; see `npnorm.bench.grid.traffic` for the others.
    """
    copy = min(record.seconds(name, "both") for name in COPIES)
    return copy * traffic(record.case.norm, op) / 2


def share(record: Record, peer: str, op: str) -> float:
    """Return which part of the speed of a copy a contender reaches."""
    return limit(record, op) / record.seconds(peer, op)


def rate(record: Record, peer: str, op: str) -> float:
    """Return bytes per second, counting what the operation must move at least; of a copy, what it moves."""
    arrays = 2 if peer in COPIES else traffic(record.case.norm, op)
    return arrays * record.case.nbytes / record.seconds(peer, "both" if peer in COPIES else op)


def base(records: Iterable[Record]) -> str:
    """Return the contender that ratios refer to: torch, or without it the textbook, or whoever is there."""
    peers = dict.fromkeys(peer for record in records for peer in record.times)
    return next((name for name in ("torch", "naive") if name in peers), next(iter(peers), "f32"))


def noise(record: Record, op: str) -> float:
    """Return the widest spread in a row of a table: (p90 - p10) / median of the contender where it is largest."""
    found = [times[op] for times in record.times.values() if op in times]
    return max((s.p90 - s.p10) / s.median for s in found)


def tables(measured: Measured) -> list[Table]:
    """Return all tables but the summary, in the order of the sections."""
    return [table for make in (_norms, _small, _step, _scaling, _memory) for table in make(measured)]


def _norms(measured: Measured) -> Iterator[Table]:
    records = _of(measured, "norms")
    for norm in dict.fromkeys(r.case.norm for r in records):
        for threads in sorted({r.threads for r in records}):
            some = [r for r in records if (r.case.norm, r.threads) == (norm, threads)]
            yield _ratios(f"{norm}, {_threads(threads)}", some, ["shape"], lambda r: [r.case.size], 1e3, "ms", True)


def _small(measured: Measured) -> Iterator[Table]:
    if records := _of(measured, "small"):
        yield _ratios(
            "Small calls",
            records,
            ["norm", "shape", "T"],
            lambda r: [r.case.norm, r.case.size, str(r.threads)],
            1e6,
            "us",
            False,
        )


def _ratios(
    title: str,
    records: Sequence[Record],
    lead: list[str],
    leading: Callable[[Record], list[str]],
    unit: float,
    unit_name: str,
    copies: bool,
) -> Table:
    """Return a table of times of the base, ratios to it, and shares of the copy; the heaps below each other."""
    to = base(records)
    others = [name for name in PEERS if name != to and any(name in r.times for r in records)]
    shown = [name for name in SHARES if copies and any(name in r.times for r in records)]
    header = [*lead, "op", "heap", f"{to} {unit_name}", *others, *(f"%{name}" for name in shown), "+-%"]
    heaps = list(REGIMES)
    order = list(dict.fromkeys((r.case, r.threads) for r in records))
    rows = []
    for key in order:
        same = sorted((r for r in records if (r.case, r.threads) == key), key=lambda r: heaps.index(r.regime))
        for op, short in OPS.items():
            rows += [
                [
                    *leading(r),
                    short,
                    r.regime,
                    _digits(r.seconds(to, op) * unit),
                    *(f"{r.ratio(name, to, op):.2f}" if name in r.times else NONE for name in others),
                    *(f"{100 * share(r, name, op):.0f}" if name in r.times else NONE for name in shown),
                    _noise(r, op),
                ]
                for r in same
            ]
    return Table(title, header, rows, left=len(lead) + 2)


def _step(measured: Measured) -> Iterator[Table]:
    records = _of(measured, "step")
    if not records:
        return
    others = [name for name in ("torch", "compile") if any(name in r.times for r in records)]
    header = ["model", "T", "heap", "npnorm ms", *(f"{name} ms" for name in others)]
    header += [*(f"npnorm / {name}" for name in others), "+-%"]
    rows = [
        [
            r.case.norm,
            str(r.threads),
            r.regime,
            *(_digits(r.seconds(name, "both") * 1e3) for name in ("npnorm", *others)),
            *(f"{r.ratio('npnorm', name, 'both'):.2f}" for name in others),
            _noise(r, "both"),
        ]
        for r in sorted(records, key=lambda r: (r.case, r.threads))
    ]
    yield Table("A step of training a transformer", header, rows, left=3)


def _scaling(measured: Measured) -> Iterator[Table]:
    records = _of(measured, "scaling")
    if not records:
        return
    peers = [name for name in (*PEERS, *COPIES) if any(name in r.times for r in records)]
    rows = [
        [r.case.norm, r.case.size, str(r.threads), *(f"{rate(r, name, 'both') / 1e9:.1f}" for name in peers)]
        for r in sorted(records, key=lambda r: (r.case.norm, r.case.nbytes, r.case.shape, r.threads))
    ]
    title = f"Rows, width, threads: GB/s of forward and backward, {records[0].regime} heap"
    yield Table(title, ["norm", "shape", "T", *peers], rows, left=3)


def _memory(measured: Measured) -> Iterator[Table]:
    uses = measured.memory
    if not uses:
        return
    peers = dict.fromkeys(use.peer for use in uses)
    rows = []
    for norm, shape in dict.fromkeys((use.norm, use.shape) for use in uses):
        found = {use.peer: use for use in uses if (use.norm, use.shape) == (norm, shape)}
        for op in ("forward", "backward"):
            cells = (f"{getattr(found[name], op) / 2**20:.2f}" if name in found else NONE for name in peers)
            rows.append([norm, "x".join(map(str, shape)), OPS[op], *cells])
    yield Table("Largest extra memory of a call, in MiB", ["norm", "shape", "op", *peers], rows, left=3)


def conditions(measured: Measured) -> list[str]:
    """Return lines on the machine, the heaps, and how busy others were."""
    settings = " ".join(f"{name}={value}" for name, value in RETAINED.items())
    lines = [f"{name}: {text}" for name, text in measured.machine.items()]
    lines.append(f"heaps: default, and retained: {settings}")
    disturbed = sum(not record.calm(*record.times) for record in measured.records)
    lines.append(
        f"disturbed: {disturbed} of {len(measured.records)} cases, marked !: some contender had too few turns in which "
        "its threads did not wait for a core, so that all of its turns count; the goals leave its cells out"
    )
    if measured.others:
        shares = ", ".join(f"{label} {100 * part:.0f} %" for label, part in measured.others.items())
        lines.append(f"cores busy with other processes: {shares}")
    return lines


def legend(measured: Measured) -> list[str]:
    """Return lines that say what the columns mean."""
    records = [r for r in measured.records if r.section != "step"]
    present = [name for name in ABOUT if any(name in r.times for r in records)]
    lines = [f"{name}: {ABOUT[name]}" for name in present]
    if records:
        lines += [
            f"columns of peers: time divided by that of {base(records)}, medians of one interleaved run",
            "%: share of the speed of a copy of the same memory by the same threads; forward moves 2 arrays of the "
            "size of x, backward 3, both 5; for BatchNorm, whose rows run through the whole array, 3, 5 and 8",
            "+-%: (p90 - p10) / median of the contender in the row where it is largest",
            "T: threads",
        ]
    if records and "torch" not in present:
        lines.append("torch is not installed, or was not asked for: its columns are left out")
    return lines


def _of(measured: Measured, section: str) -> list[Record]:
    return [record for record in measured.records if record.section == section]


def _noise(record: Record, op: str) -> str:
    calm = all(times[op].calm for times in record.times.values() if op in times)
    return f"{100 * noise(record, op):.0f}{'' if calm else '!'}"


def _threads(n: int) -> str:
    return f"{n} thread{'s' * (n > 1)}"


def _digits(number: float) -> str:
    """Return three digits.

    >>> _digits(0.01234), _digits(1.2), _digits(1234.5)
    ('0.0123', '1.20', '1234')
    """
    if number >= 100:
        return f"{number:.0f}"
    return f"{number:.2f}" if number >= 1 else f"{number:.3g}"
