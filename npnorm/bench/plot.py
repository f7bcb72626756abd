"""Bytes per second by size, for each norm, beside the copy of the same memory."""

from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from npnorm import plotting
from npnorm.bench.peers import COPIES
from npnorm.bench.tables import derive

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


@plotting.styled()
def plot(frame: pd.DataFrame, path: Path) -> None:
    """Draw forward and backward together: a row for each heap and number of threads, a column for each norm.

    Parameters
    ----------
    path : Path
        Its suffix is the format, such as .svg or .png.

    Raises
    ------
    ValueError
        If the section "norms" was not measured.
    """
    frame = derive(frame).query("section == 'norms' and op == 'both'")
    if frame.empty:
        raise ValueError("The plot shows the section norms, which was not measured.")
    norms, rows = frame["norm"].unique(), sorted(set(zip(frame["threads"], frame["heap"], strict=True)))
    figure = Figure(figsize=(max(6.4, 2.9 * len(norms) + 0.6), 2.3 * len(rows) + 0.9), layout="constrained")
    axes = figure.subplots(len(rows), len(norms), squeeze=False, sharex="col", sharey=True)
    for i, (threads, heap) in enumerate(rows):
        for j, norm in enumerate(norms):
            cells = frame[(frame["threads"] == threads) & (frame["heap"] == heap) & (frame["norm"] == norm)]
            _panel(axes[i][j], cells)
            axes[0][j].set_title(norm)
            axes[-1][j].set_xlabel("MiB of x")
        axes[i][0].set_ylabel(f"{heap} heap, {threads} thread{'s' * (threads > 1)}\nGB/s")
    handles = {h.get_label(): h for h in axes[0][0].get_lines()}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=1 + max(2, len(norms)), frameon=False
    )
    figure.suptitle("Forward and backward, float32: the least bytes that must move, by time", fontsize="medium")
    plotting.save(figure, path)


def _panel(ax: Any, cells: pd.DataFrame) -> None:
    copy = cells[cells["peer"].isin(list(COPIES))].groupby("mib")["rate"].max() / 1e9
    ax.plot(copy.index, copy, color="black", linestyle=":", label="copy")
    for peer, look in LOOK.items():
        some = cells[cells["peer"] == peer]
        if not some.empty:
            ax.plot(some["mib"], some["rate"] / 1e9, **look)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks(copy.index, [f"{size:.3g}" for size in copy.index])
    ax.minorticks_off()
    ax.tick_params(left=False, bottom=False)
    ax.margins(x=0.1)
    ax.grid(visible=False, axis="x")
