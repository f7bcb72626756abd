"""BatchNorm and GroupNorm with small batches: the error by the number of images in a batch; and BatchNorm over ranks.

After Yuxin Wu and Kaiming He, "Group Normalization", 2018, arXiv:1803.08494, figure 1 and table 2: a ResNet-50 on
ImageNet, with 2 to 32 images for each worker, statistics over one worker's images, and gradients over those of 8. Here
statistics and gradients are over the same batch, and network and images are small: see `small_convnets`. As there, the
optimizer is SGD with momentum 0.9 and a decay of 1e-4, the learning rate is 0.1 for 32 images and grows in proportion
to the batch, and each run sees as many images.

On two ranks, each with half of a batch, BatchNorm takes its statistics over both, or over its rank's half alone:
`batch_size_ranks.py` is what they do.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from npnorm.plotting import LOOK_OF
from npnorm.studies import small_convnets as small
from npnorm.studies.batch_size_ranks import rank_main, rate, train
from npnorm.studies.jobs import on_ranks
from npnorm.studies.study import Cell, Claim, Results, Settings, Study

SOURCE = "Wu and He 2018, table 2"
NORMS = ("BatchNorm", "GroupNorm")
RANKS = 2

SAME = 1.0
"""Percentage points: errors that differ by less count as the same; the paper's differ by 0.2."""


def cells(settings: Settings) -> list[Cell]:
    """Return a cell for each norm, batch and seed, and one on ranks."""
    seeds = range(settings["seeds"])
    one = [{"norm": norm, "images": n, "seed": s} for norm in NORMS for n in settings["images"] for s in seeds]
    return [*one, {"norm": "on ranks"}]


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return the error at the end in %, or what the ranks found."""
    if cell["norm"] == "on ranks":
        return on_ranks(RANKS, rank_main, *(settings["ranks"][name] for name in ("images", "steps", "seeds")))
    images, seed = cell["images"], cell["seed"]
    data = small.digits(settings["learn"], settings["held out"], np.random.default_rng([seed, 0]))
    model = small.network(cell["norm"], np.random.default_rng([seed, 1]))
    steps = settings["epochs"] * (len(data.images) // images)
    taken = train(model, data, images, steps, seed)
    return {"error": 100 * (small.error(model, data) if taken == steps else small.CHANCE), "finite steps": taken}


def claims(results: Results) -> list[Claim]:
    """Return what is said of the two norms, with the numbers: differences for each seed, in percentage points."""
    sizes = results.settings["images"]
    error = {(norm, n): results.values("error", norm=norm, images=n) for norm in NORMS for n in sizes}
    few, usual = sizes[0], 32 if 32 in sizes else sizes[-1]
    batch, grouped = ({n: error[norm, n] for n in sizes} for norm in NORMS)
    ranks = results.where(norm="on ranks")  # one cell, with a list
    distance = "distance of the parameters from those of one rank / the way that these went"
    return [
        Claim(
            f"BatchNorm's error is higher with {few} images than with {usual}.",
            SOURCE,
            f"error with {few} - with {usual}, points",
            batch[few] - batch[usual],
            low=0,
        ),
        Claim(
            f"GroupNorm's error is the same with {few} images as with {usual}.",
            SOURCE,
            f"error with {few} - with {usual}, points",
            grouped[few] - grouped[usual],
            -SAME,
            SAME,
        ),
        Claim(
            f"With {few} images GroupNorm's error is lower than BatchNorm's.",
            SOURCE,
            "BatchNorm - GroupNorm, points",
            batch[few] - grouped[few],
            low=0,
        ),
        Claim(
            f"With {usual} images BatchNorm's error is lower than GroupNorm's.",
            SOURCE,
            "GroupNorm - BatchNorm, points",
            grouped[usual] - batch[usual],
            low=0,
        ),
        Claim(
            f"From {usual} images to {few}, BatchNorm loses more than GroupNorm.",
            "Wu and He 2018, figure 1",
            "(BatchNorm with few - many) - (GroupNorm with few - many), points",
            batch[few] - batch[usual] - grouped[few] + grouped[usual],
            low=0,
        ),
        Claim(
            f"{RANKS} ranks with synchronized statistics do what one rank does with the whole batch.",
            "theory",
            distance,
            ranks.values("synchronized").ravel(),
            high=1e-9,  # rounding is 1e-16, and grows with the steps
            exact=True,
        ),
        Claim(
            "Without synchronization they do not: each rank normalizes by its own images.",
            "theory",
            distance,
            ranks.values("apart").ravel(),
            low=0.01,
            exact=True,  # of each seed
        ),
    ]


def table(results: Results) -> list[dict[str, str]]:
    """Return a line for each number of images: means over the seeds, and standard deviations."""
    rows = []
    for n in results.settings["images"]:
        row = {"images in a batch": str(n), "learning rate": f"{rate(n):.4g}"}
        row["steps"] = str(results.settings["epochs"] * (results.settings["learn"] // n))
        for norm in NORMS:
            error = results.values("error", norm=norm, images=n)
            row[f"error {norm}, %"] = f"{error.mean():.2f} ± {error.std(ddof=min(1, error.size - 1)):.2f}"
        rows.append(row)
    return rows


def draw(results: Results, figure: Figure) -> None:
    """Draw the error by the number of images in a batch: means, and standard deviations over the seeds."""
    ax, sizes = figure.subplots(), results.settings["images"]
    for norm, shift in zip(NORMS, (0.98, 1.02), strict=True):
        found = np.array([results.values("error", norm=norm, images=n) for n in sizes])
        ax.errorbar(
            np.array(sizes) * shift, found.mean(axis=1), found.std(axis=1), capsize=3, label=norm, **LOOK_OF[norm]
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.set(xlabel="images in a batch", ylim=(0, None))
    ax.set_ylabel("error on held-out digits (%)")
    ax.legend()


STUDY = Study(
    shows="BatchNorm and GroupNorm with batches of 2 to 64 images, and BatchNorm synchronized over ranks",
    minutes=12,
    full={
        "learn": 512,
        "held out": 1285,
        "epochs": 12,
        "images": [2, 4, 8, 16, 32, 64],
        "ranks": {"images": 8, "steps": 16, "seeds": 3},
        "seeds": 6,
    },
    quick={
        "learn": 64,
        "held out": 256,
        "epochs": 2,
        "images": [2, 16],
        "ranks": {"images": 8, "steps": 2, "seeds": 2},
        "seeds": 2,
    },
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
    size=(5.4, 3.4),
    packages=("scikit-learn", "mpich", "openmpi"),
)
