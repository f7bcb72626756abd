"""How the pictures of npnorm look, and how they are written. It draws nothing by itself.

Lines differ in colour, lightness, marker and dashes, so that they can be told apart in grey and at half size. In an SVG
text stays text.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "npnorm",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
}

LOOKS: tuple[dict[str, Any], ...] = (
    {"color": "#0b3c6f", "marker": "o", "linestyle": "-"},
    {"color": "#d9741a", "marker": "s", "linestyle": "--"},
    {"color": "#2f9e6e", "marker": "^", "linestyle": "-."},
    {"color": "#8c1d40", "marker": "D", "linestyle": (0, (5, 1))},
    {"color": "#62a8dc", "marker": "v", "linestyle": (0, (3, 1, 1, 1))},
    {"color": "#b59a00", "marker": "P", "linestyle": (0, (1, 1))},
    {"color": "#7a56a8", "marker": "X", "linestyle": (0, (6, 2, 1, 2))},
    {"color": "#3a3a3a", "marker": "<", "linestyle": (0, (2, 1))},
)
"""One for each line of a plot, from the first on."""

NONE: dict[str, Any] = {"color": "#777777", "marker": "x", "linestyle": ":"}
"""The line of what has no norm."""

REFERENCE: dict[str, Any] = {"color": "#222222", "linestyle": (0, (1, 2)), "linewidth": 1.0}
"""The line of a theory, of a floor, or of chance: it has no marker."""

LOOK_OF: dict[str, dict[str, Any]] = {
    "none": NONE,
    "LayerNorm": LOOKS[0],
    "RMSNorm": LOOKS[1],
    "pRMSNorm": LOOKS[2],
    "BatchNorm": LOOKS[3],
    "GroupNorm": LOOKS[4],
    "WeightNorm": LOOKS[5],
}
"""The norms that stand in several pictures look the same in all."""

LOOK_OF_PLACEMENT: dict[str, dict[str, Any]] = {
    "pre": LOOKS[0],
    "post": LOOKS[1],
    "res-post": LOOKS[2],
    "deep": LOOKS[3],
    "sandwich": LOOKS[4],
}
"""The same of where a norm stands, by the names of `Config.placement`."""


@contextmanager
def styled() -> Iterator[None]:
    """Within it, new figures look as all pictures here do."""
    with mpl.rc_context(STYLE):
        yield


def reference(ax: Axes, y: float, text: str, *, left: bool = False, gap: float = 2) -> None:
    """Draw a horizontal line at y, with its text at the right or left end, `gap` points above it."""
    ax.axhline(y, **REFERENCE)
    coordinates: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    look = {"ha": "left" if left else "right", "fontsize": 7.5, "color": REFERENCE["color"]}
    ax.annotate(text, (0 if left else 1, y), (0, gap), **coordinates, **look)


def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the suffix of `path`; an SVG is small, and has the same bytes each time."""
    if path.suffix != ".svg":
        figure.savefig(path, dpi=120)
        return
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"<[^>]*>", lambda tag: re.sub(r'([ "\n(-]\d+\.\d)\d+', r"\1", tag[0]), text)  # a tenth of a point
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to a group
    path.write_text(re.sub(r"\n +", "\n", text), encoding="utf-8")
