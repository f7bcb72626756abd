"""Bytes per second by size, for each norm, beside the copy of the same memory."""

from pathlib import Path
from typing import Any

from npnorm.bench.grid import NORMS
from npnorm.bench.needs import need
from npnorm.bench.peers import COPIES
from npnorm.bench.records import Measured, Record
from npnorm.bench.report import rate
from npnorm.bench.run import REGIMES

LOOK: dict[str, dict[str, Any]] = {
    "f32": {"color": "tab:blue", "label": "npnorm float32"},
    "out": {"color": "tab:blue", "linestyle": "--", "label": "npnorm float32, out="},
    "f64": {"color": "tab:cyan", "label": "npnorm float64"},
    "torch": {"color": "tab:orange", "label": "torch eager"},
    "compile": {"color": "tab:red", "label": "torch.compile"},
    "jax": {"color": "tab:green", "label": "JAX, jitted"},
    "naive": {"color": "tab:gray", "label": "naive NumPy"},
}
"""How a contender is drawn."""


def plot(measured: Measured, path: Path) -> None:
    """Draw forward and backward together; a row for each heap and number of threads, a column for each norm.

    A hollow mark was disturbed, see `npnorm.bench.timing`.

    Parameters
    ----------
    path : Path
        Its suffix is the format, such as .svg or .png.

    Raises
    ------
    Missing
        Without matplotlib.
    ValueError
        If the section "norms" was not measured.
    """
    matplotlib = need("matplotlib.figure")
    records = [r for r in measured.records if r.section == "norms"]
    norms = [norm for norm in NORMS if any(r.case.norm == norm for r in records)]
    rows = [
        (regime, n)
        for n in sorted({r.threads for r in records})
        for regime in REGIMES
        if any((r.regime, r.threads) == (regime, n) for r in records)
    ]
    if not rows:
        raise ValueError("The plot shows the section norms, which was not measured.")
    width, height = max(6.4, 2.9 * len(norms) + 0.6), 2.3 * len(rows) + 0.9
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(len(rows), len(norms), squeeze=False, sharey=True)
    for i, (regime, n) in enumerate(rows):
        for j, norm in enumerate(norms):
            some = [r for r in records if (r.regime, r.threads, r.case.norm) == (regime, n, norm)]
            _panel(axes[i][j], sorted(some, key=lambda r: r.case.nbytes))
            axes[i][j].yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axes[i][j].yaxis.set_major_formatter("{x:g}")
            if i == 0:
                axes[i][j].set_title(norm)
            if i == len(rows) - 1:
                axes[i][j].set_xlabel("MiB of x")
        axes[i][0].set_ylabel(f"{regime} heap, {n} thread{'s' * (n > 1)}\nGB/s")
    handles = {h.get_label(): h for row in axes for ax in row for h in ax.get_lines() if h.get_label()[0] != "_"}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=1 + max(2, len(norms)), frameon=False
    )
    figure.suptitle(
        "Forward and backward, float32: the least bytes that must move, by time\n(hollow marks: disturbed)",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _panel(ax: Any, records: list[Record]) -> None:
    sizes = [r.case.mebibytes for r in records]
    copy = [max(rate(r, name, "both") for name in COPIES) / 1e9 for r in records]
    ax.plot(sizes, copy, color="black", linestyle=":", marker=".", label="copy")
    for peer, look in LOOK.items():
        if all(peer in r.times for r in records):
            rates = [rate(r, peer, "both") / 1e9 for r in records]
            ax.plot(sizes, rates, **look)
            for r, size, y in zip(records, sizes, rates, strict=True):
                face = look["color"] if r.calm(peer) else "white"
                ax.plot([size], [y], "o", markersize=4, color=look["color"], markerfacecolor=face)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sizes, [f"{size:.3g}" for size in sizes])
    ax.minorticks_off()
    ax.margins(x=0.1)
    ax.grid(alpha=0.3)
