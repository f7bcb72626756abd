"""How much time does RMSNorm save? Networks with LayerNorm, RMSNorm, pRMSNorm and no norm, beside the paper's tables.

Biao Zhang and Rico Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019, arXiv:1910.07467. Its percentages
are time saved, and not speed-up. With the times t of a network with LayerNorm and X in the same places:

    saved     1 - t(X) / t(LayerNorm)
    speed-up  t(LayerNorm) / t(X) - 1

What a network without norms saves is the most that any norm can: it is LayerNorm's share of the time.

`npnorm.studies.speed_networks` has the networks, `npnorm.studies.speed_torch` the same in torch. Both run forward and
backward on one thread, in float32.
"""

from collections.abc import Mapping
from importlib.util import find_spec

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from npnorm.plotting import LOOK_OF, LOOKS
from npnorm.studies import speed_networks
from npnorm.studies.speed_networks import NORMS, Passes, Sizes
from npnorm.studies.speed_timing import interleaved, one_thread
from npnorm.studies.study import Cell, Claim, Results, Settings, Study

SOURCE = "Zhang and Sennrich 2019, arXiv:1910.07467"
WITH_TORCH = ("torch", "torch, written out")
IMPLEMENTATIONS = ("npnorm", *(WITH_TORCH if find_spec("torch") else ()))
OTHERS = tuple(name for name in NORMS if name != "LayerNorm")
FIRST, SECOND = "pRMSNorm 6.25 %", "pRMSNorm 25 %"

PAPER = {
    "2: RNNSearch, TensorFlow": (399, 665, 501, 493),
    "3: RNNSearch, Theano": (596, 988, 652, 658),
    "3: RNNSearch, PyTorch": (427, 857, 763, 754),
    "4: Transformer, TensorFlow": (210, 248, 231, 225),
    "6: attentive reader, Theano": (315, 392, 333, 330),
    "8: order-embedding, Theano": (2.11, 12.02, 7.12, 4.34),
    "10: ConvPool-CNN-C, Theano": (21, 39, 31, 30),
}
"""Seconds of so many steps by table, for NORMS without the last: p is 6.25 %, and 12.5 % in table 10."""


def saved(table: str) -> dict[str, float]:
    """Return which share of LayerNorm's time each norm saves in a table of the paper.

    Examples
    --------
    >>> {name: round(share, 3) for name, share in saved("8: order-embedding, Theano").items()}
    {'none': 0.824, 'RMSNorm': 0.408, 'pRMSNorm 6.25 %': 0.639}
    """
    times = dict(zip(NORMS, PAPER[table], strict=False))
    return {name: 1 - seconds / times["LayerNorm"] for name, seconds in times.items() if name != "LayerNorm"}


def cells(settings: Settings) -> list[Cell]:
    """Return a cell for each network, implementation and seed; a seed is a repetition of all that stands before it."""
    return [
        {"network": network, "implementation": implementation, "seed": seed}
        for seed in range(settings["seeds"])
        for network in settings["networks"]
        for implementation in IMPLEMENTATIONS
    ]


def measure(settings: Settings, cell: Cell) -> dict[str, float]:
    """Return the time of LayerNorm's network, and the share of it that each other one saves."""
    np.empty((32 << 20) - 8192, np.uint8)  # as in training: the C library keeps what is freed, see training/gradients
    with one_thread(torch=cell["implementation"] != "npnorm"):
        passes = _networks(settings["networks"][cell["network"]], cell)
        seconds = interleaved(passes, settings["turn"], settings["rounds"])
    base = seconds.pop("LayerNorm")
    shares = {f"{name} saves": float(1 - np.median(times / base)) for name, times in seconds.items()}
    return {"LayerNorm ms": float(1e3 * np.median(base)), **shares}


def _networks(sizes: Sizes, cell: Cell) -> dict[str, Passes]:
    if cell["implementation"] == "npnorm":
        return speed_networks.networks(sizes, cell["seed"])
    from npnorm.studies import speed_torch

    return speed_torch.networks(sizes, cell["seed"], own=cell["implementation"] == "torch")


def claims(results: Results) -> list[Claim]:
    """Return what is said of the time, with the numbers of the paper and of this study."""
    whole, partial = ([saved(table)[name] for table in PAPER] for name in ("RMSNorm", FIRST))
    found = [
        Claim(
            "In the paper's tables RMSNorm saves up to 64 % of LayerNorm's time.",
            f"{SOURCE}, abstract; minimind-notes, 01-normalization, README.md",
            "largest share of LayerNorm's time that RMSNorm saves in a table",
            [max(whole)],
            0.635,  # 64 %, rounded
            0.645,
            exact=True,
        ),
        Claim(
            "In the paper's tables RMSNorm saves at least 7 % of LayerNorm's time.",
            f"{SOURCE}, abstract",
            "smallest share of LayerNorm's time that RMSNorm saves in a table",
            [min(whole)],
            low=0.065,  # 7 %, rounded
            exact=True,
        ),
        Claim(
            "The largest of the paper's percentages, of pRMSNorm in table 8, is a speed-up of 64 %.",
            f"{SOURCE}, section 1",
            "speed-up in table 8: t(LayerNorm) / t(pRMSNorm) - 1",
            [1 / (1 - max(partial)) - 1],
            0.635,
            0.645,
            exact=True,
        ),
        Claim(
            "pRMSNorm saves more than RMSNorm in each of the paper's tables.",
            f"implied by {SOURCE}, section 6.1, which says so of theory, and not of practice",
            "share of LayerNorm's time that pRMSNorm saves less that of RMSNorm, smallest of the tables",
            [min(p - w for p, w in zip(partial, whole, strict=True))],
            low=0,
            exact=True,
        ),
    ]
    for implementation in results.distinct("implementation"):
        found += _claims_of(implementation, results.where(implementation=implementation))
    return found


def _claims_of(implementation: str, results: Results) -> list[Claim]:
    """Return what is said of the time in one implementation."""
    networks, share = results.distinct("network"), "share of LayerNorm's time"
    rms = {network: results.values("RMSNorm saves", network=network) for network in networks}
    found = [
        Claim(
            f"RMSNorm saves 7 to 64 % of LayerNorm's time {_place(network)} ({implementation}).",
            f"implied by {SOURCE}, abstract, of whole models" if _alone(network) else f"{SOURCE}, abstract",
            f"{share} that RMSNorm saves",
            rms[network],
            0.07,
            0.64,
        )
        for network in networks
    ]
    found.append(
        Claim(
            f"The GRU gains more by RMSNorm than the transformer ({implementation}).",
            f"{SOURCE}, section 6.1",
            f"{share} that RMSNorm saves in the GRU, less that in the transformer",
            rms["GRU"] - rms["transformer"],
            low=0,
        )
    )
    if implementation == "torch":
        largest = [network for network in networks if _alone(network)][-1]
        says = f"torch's RMSNorm takes longer than its LayerNorm {_place(largest)}."
        found.append(
            Claim(
                says,
                "pytorch/pytorch, issue 157345, which is about a GPU",
                f"{share} that RMSNorm saves; below 0 it takes longer",
                rms[largest],
                high=0,
            )
        )
        return found
    found += [
        Claim(
            f"pRMSNorm takes less time than RMSNorm {_place(network)} ({implementation}).",
            f"{SOURCE}, section 6.1: in theory",
            f"{share} that pRMSNorm (p = 6.25 %) saves less that of RMSNorm",
            results.values(f"{FIRST} saves", network=network) - rms[network],
            low=0,
        )
        for network in networks
        if not _alone(network)
    ]
    return found


def _alone(network: str) -> bool:
    """Return whether there is nothing but the norm."""
    return network.startswith("norm")


def _place(network: str) -> str:
    """Return where the norm is, as a part of a sentence."""
    if _alone(network):
        return f"when measured alone on {network.removeprefix('norm, ')}"
    return f"in the {'convolutional network' if network == 'convolution' else network}"


def table(results: Results) -> list[dict[str, str]]:
    """Return a line for each network and implementation: means over the seeds, and their standard deviations."""
    columns = {"RMSNorm": "RMSNorm saves, %", FIRST: "pRMSNorm 6.25 %", SECOND: "pRMSNorm 25 %", "none": "no norm"}
    rows = []
    for network in results.distinct("network"):
        for implementation in results.distinct("implementation"):
            some = results.where(network=network, implementation=implementation)
            row = {
                "network": network,
                "in": implementation,
                "LayerNorm, ms": f"{some.values('LayerNorm ms').mean():.3g}",
            }
            rows.append(row | {column: _spread(some, name) for name, column in columns.items()})
    return rows


def _spread(results: Results, name: str) -> str:
    """Return what a norm saves, in percent: mean and standard deviation."""
    if not _has(results, name):
        return "-"
    values = 100 * results.values(f"{name} saves")
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if values.size > 1 else "")


def _has(results: Results, name: str) -> bool:
    return f"{name} saves" in results.lines[0]


def parts(results: Results) -> dict[str, str]:
    """Return the paper's times and what they save, and which implementations were measured."""
    rows = []
    for name, times in PAPER.items():
        of_x = {f"{x}, %": f"{100 * share:.1f}" for x, share in saved(name).items()}
        rows.append({"table": name, **dict(zip(("no norm, s", "LayerNorm, s"), map(str, times), strict=False)), **of_x})
    there = results.distinct("implementation")
    missing = "" if "torch" in there else " torch was not installed, and its lines are left out."
    return {
        "paper": tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True),
        "implementations": f"Measured in: {'; '.join(there)}.{missing}",
    }


POINTS = {
    "RMSNorm": LOOK_OF["RMSNorm"],
    FIRST: LOOK_OF["pRMSNorm"],
    SECOND: LOOKS[4],
    "none": LOOK_OF["none"],
}
"""How the norms look in the picture, from top to bottom in each line of it."""

LEAST = -100.0
"""The left end of the picture, in percent; of what lies beyond it, the number is written there."""


def draw(results: Results, figure: Figure) -> None:
    """Draw what each norm saves: in the paper's tables above, and in each implementation below."""
    there = results.distinct("implementation")
    grid = figure.add_gridspec(2, len(there), height_ratios=[1, 1.7])
    paper = {table: {name: np.array([share]) for name, share in saved(table).items()} for table in PAPER}
    _panel(figure.add_subplot(grid[0, :]), "Zhang and Sennrich 2019, by table: training", paper, -10)
    for i, implementation in enumerate(there):
        ax, rows = figure.add_subplot(grid[1, i]), {}
        for network in results.distinct("network"):
            some = results.where(network=network, implementation=implementation)
            rows[network] = {name: some.values(f"{name} saves") for name in OTHERS if _has(some, name)}
        _panel(ax, implementation, rows, LEAST)
        ax.tick_params(labelleft=i == 0)
        ax.set_xlabel("time saved, %")
    handles, labels = figure.axes[1].get_legend_handles_labels()
    legend = dict(zip(labels, handles, strict=True))  # a label for each point
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=5)


def _panel(ax: Axes, title: str, rows: Mapping[str, Mapping[str, np.ndarray]], left: float) -> None:
    """Draw a line for each network, with a point for each norm: the mean, and the standard deviation."""
    ax.axvspan(7, 64, color="#000000", alpha=0.07, linewidth=0, label="7 to 64 %")
    ax.axvline(0, color="#222222", linewidth=0.8)
    for i, (name, look) in enumerate(POINTS.items()):
        looks = {**look, "linestyle": "none", "label": "no norm" if name == "none" else name}
        for y, values in ((y, 100 * shares[name]) for y, shares in enumerate(rows.values()) if name in shares):
            mean, height = values.mean(), y + 0.22 * (i - 1.5)
            spread = values.std(ddof=1) if values.size > 1 and mean > left else 0.0
            ax.errorbar(max(mean, left), height, xerr=spread, **looks)
            if mean < left:
                ax.annotate(
                    f"{mean:.0f}", (left, height), (5, 0), textcoords="offset points", va="center", fontsize=6.5
                )
    ax.set(title=title, xlim=(left - 6, 100), ylim=(len(rows) - 0.5, -0.5))
    ax.set_yticks(range(len(rows)), list(rows))


FULL = {
    "norm, 32 x 256": {"kind": "norm", "x": [32, 256]},
    "norm, 256 x 512": {"kind": "norm", "x": [256, 512]},
    "norm, 2048 x 1024": {"kind": "norm", "x": [2048, 1024]},
    "GRU": {"kind": "GRU", "x": [32, 20, 256], "dim": 256},
    "transformer": {"kind": "transformer", "x": [4, 64], "vocabulary": 1000, "width": 256, "depth": 2, "heads": 4},
    "convolution": {"kind": "convolution", "x": [8, 3, 32, 32], "channels": [32, 64, 64]},
}
QUICK = {
    "norm, 32 x 256": {"kind": "norm", "x": [32, 256]},
    "GRU": {"kind": "GRU", "x": [8, 4, 32], "dim": 32},
    "transformer": {"kind": "transformer", "x": [2, 16], "vocabulary": 50, "width": 64, "depth": 1, "heads": 4},
    "convolution": {"kind": "convolution", "x": [2, 3, 16, 16], "channels": [8, 16]},
}

STUDY = Study(
    shows="how much of LayerNorm's time RMSNorm and pRMSNorm save, alone and in three networks, beside the paper",
    minutes=6,
    full={"networks": FULL, "turn": 0.02, "rounds": 15, "seeds": 5},
    quick={"networks": QUICK, "turn": 0.001, "rounds": 3, "seeds": 2},
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
    size=(7.2, 6.4),
    packages=("torch", "threadpoolctl"),
    parts=parts,
)
