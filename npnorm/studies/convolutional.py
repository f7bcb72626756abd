"""Norms in a small convolutional network: the error by epoch, each with its best learning rate.

After Biao Zhang and Rico Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467, appendix A.4 and
table 10: ConvPool-CNN-C on CIFAR-10, without a norm with a learning rate of 0.0003, with norms with 0.003. Here each
norm has the same learning rates to choose from, and the network and the images are small: see `small_convnets`.

An image inside the network has the axes (C, H, W). The paper's LayerNorm and RMSNorm take their statistics over (H, W),
for each channel by itself ("to the width and height dimensions"): here "LayerNorm, space", which is InstanceNorm, and
"RMSNorm, space". Over all of (C, H, W) they are called by their name alone. Weight and bias are one for each channel.
"""

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from npnorm.plotting import LOOK_OF, LOOKS
from npnorm.studies import small_convnets as small
from npnorm.studies.study import Cell, Claim, Results, Settings, Study
from npnorm.training import AdamW

PAPER = "Zhang and Sennrich 2019, arXiv:1910.07467"
TABLE, APPENDIX = f"{PAPER}, table 10", f"{PAPER}, appendix A.4"
ASKED = "asked here"

PUBLISHED = {
    "none": 8.96,
    "BatchNorm": 8.25,
    "WeightNorm": 8.28,
    "LayerNorm, space": 10.49,
    "RMSNorm, space": 8.83,
}
"""Test error in %, on CIFAR-10."""

LOOK = LOOK_OF | {"LayerNorm, space": LOOKS[6], "RMSNorm, space": LOOKS[7]}


def cells(settings: Settings) -> list[Cell]:
    """Return a cell for each norm, learning rate and seed."""
    lrs, seeds = settings["lrs"], range(settings["seeds"])
    return [{"norm": norm, "lr": lr, "seed": s} for norm in small.NORMS for lr in lrs for s in seeds]


def measure(settings: Settings, cell: Cell) -> dict[str, Any]:
    """Return the error on the images held out after some of the epochs, in %; from a loss that is not finite on: 90."""
    split, weights, batches = (np.random.default_rng([cell["seed"], i]) for i in range(3))
    data, rows = small.digits(settings["learn"], settings["held out"], split), settings["rows"]
    model = small.network(cell["norm"], weights)
    optimizer = AdamW(model.params, betas=(0.9, 0.999), weight_decay=0.0)
    epoch = len(data.images) // rows
    seen = {after * epoch: i for i, after in enumerate(settings["epochs"])}
    lrs = small.half_constant(cell["lr"], max(seen))
    errors, step = [100 * small.CHANCE] * len(seen), 0
    for step, _ in enumerate(small.train(model, optimizer, data, rows, lrs, batches), 1):
        if step in seen:
            errors[seen[step]] = 100 * small.error(model, data)
    return {"errors": errors, "finite steps": step}


def errors(results: Results, norm: str) -> np.ndarray:
    """Return the errors in %, by learning rate, seed and epoch."""
    return np.array([results.values("errors", norm=norm, lr=lr) for lr in results.settings["lrs"]])


def best(results: Results, norm: str) -> tuple[float, np.ndarray]:
    """Return the learning rate with the lowest error at the end, in the mean, and its errors by seed and epoch."""
    found = errors(results, norm)
    i = found[:, :, -1].mean(axis=1).argmin()
    return results.settings["lrs"][i], found[i]


def claims(results: Results) -> list[Claim]:
    """Return what is said of the norms, with the numbers: differences for each seed, in percentage points."""
    found = {norm: best(results, norm)[1] for norm in small.NORMS}
    epochs = results.settings["epochs"]
    at = epochs.index(results.settings["early"])
    first, top = results.settings["lrs"][0], results.settings["lrs"][-1]
    layer, rms = "LayerNorm, space", "RMSNorm, space"

    def lower(a: str, b: str, says: str, source: str, epoch: int = -1) -> Claim:
        """Return the claim that norm a ends lower than norm b, each with its best learning rate."""
        what = f"error after {epochs[epoch]} epochs with the best learning rates"
        return difference(a, b, says, source, what, found[b][:, epoch] - found[a][:, epoch])

    def lower_with(lr: float, a: str, b: str, says: str, source: str) -> Claim:
        """Return the claim that norm a ends lower than norm b, both with the same learning rate."""
        ends = {norm: results.values("errors", norm=norm, lr=lr)[:, -1] for norm in (a, b)}
        what = f"error after {epochs[-1]} epochs with a learning rate of {lr:g}"
        return difference(a, b, f"With a learning rate of {lr:g}, {says}", source, what, ends[b] - ends[a])

    def difference(a: str, b: str, says: str, source: str, what: str, values: np.ndarray) -> Claim:
        return Claim(says, source, f"{what}: {_name(b)} less {_name(a)}, in percentage points", values, low=0)

    return [
        lower("BatchNorm", "none", "BatchNorm ends lower than no norm.", TABLE),
        lower("WeightNorm", "none", "WeightNorm ends lower than no norm.", TABLE),
        lower(rms, "none", "RMSNorm over space ends lower than no norm.", TABLE),
        lower("none", layer, "LayerNorm over space ends higher than no norm.", TABLE),
        lower("BatchNorm", layer, "BatchNorm ends lower than LayerNorm over space.", TABLE),
        lower(rms, layer, "RMSNorm over space ends lower than LayerNorm over space.", TABLE),
        lower("RMSNorm", "LayerNorm", "RMSNorm over channels and space ends lower than LayerNorm over them.", ASKED),
        lower("LayerNorm", "none", "LayerNorm over channels and space ends lower than no norm.", ASKED),
        lower("BatchNorm", "GroupNorm", "BatchNorm ends lower than GroupNorm.", "Wu and He 2018, table 1"),
        *(
            lower(
                norm, "none", f"At first the error falls faster with {_name(norm)} than without a norm.", APPENDIX, at
            )
            for norm in ("BatchNorm", layer, rms)
        ),
        lower_with(first, "none", layer, "LayerNorm over space ends higher than no norm.", TABLE),
        lower_with(first, rms, layer, "RMSNorm over space ends lower than LayerNorm over space.", TABLE),
        *(
            lower_with(top, norm, "none", f"{_name(norm)} ends lower than no norm.", f"implied by {APPENDIX}")
            for norm in ("BatchNorm", "WeightNorm", layer, rms)
        ),
    ]


def _name(norm: str) -> str:
    """Return the name of a norm as a part of a sentence."""
    return "no norm" if norm == "none" else norm.replace(", space", " over space")


def table(results: Results) -> list[dict[str, str]]:
    """Return a line for each norm: means over the seeds, and standard deviations."""
    epochs, early = results.settings["epochs"], results.settings["early"]
    rows = []
    for norm in small.NORMS:
        (lr, some), ends = best(results, norm), errors(results, norm)[:, :, -1]
        row = {"norm": _name(norm), "best lr": f"{lr:g}"}
        row[f"error after {early} epochs, %"] = _spread(some[:, epochs.index(early)])
        row[f"after {epochs[-1]} epochs, %"] = _spread(some[:, -1])
        row |= {f"with lr {lr:g}, %": _spread(end) for lr, end in zip(results.settings["lrs"], ends, strict=True)}
        rows.append(row | {"paper, CIFAR-10, %": f"{PUBLISHED[norm]}" if norm in PUBLISHED else ""})
    return rows


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.1f} ± {values.std(ddof=min(1, values.size - 1)):.1f}"


def draw(results: Results, figure: Figure) -> None:
    """Draw the error by epoch, each norm with its best learning rate; and the error at the end by learning rate."""
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    for norm in small.NORMS:
        left.plot(results.settings["epochs"], best(results, norm)[1].mean(axis=0), label=_name(norm), **LOOK[norm])
        right.plot(results.settings["lrs"], errors(results, norm)[:, :, -1].mean(axis=1), **LOOK[norm])
    left.set(title="each with its best learning rate", xlabel="epoch", yscale="log")
    left.set_ylabel("error on held-out digits (%)")
    left.set_xticks(results.settings["epochs"])
    right.set(title="after the last epoch", xlabel="learning rate", xscale="log")
    right.set_xticks(results.settings["lrs"])
    left.set_yticks([2, 5, 10, 20, 50, 90])
    for axis in (left.yaxis, right.xaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    for ax in (left, right):
        ax.minorticks_off()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4)


STUDY = Study(
    shows="eight norms in a small convolutional network: the error by epoch, and by learning rate",
    minutes=10,
    full={
        "learn": 512,
        "held out": 1285,
        "rows": 32,
        "epochs": [1, 2, 3, 5, 8, 12],
        "early": 3,
        "lrs": [0.003, 0.01, 0.03],
        "seeds": 6,
    },
    quick={"learn": 64, "held out": 128, "rows": 8, "epochs": [1, 3], "early": 1, "lrs": [0.01], "seeds": 2},
    cells=cells,
    measure=measure,
    claims=claims,
    table=table,
    draw=draw,
    packages=("scikit-learn",),
)
