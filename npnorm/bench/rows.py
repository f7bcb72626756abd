"""Rows that need care: how much longer a norm takes on them than on ordinary rows, and how much more memory.

    python -m npnorm.bench --rows

npnorm finds the rows of which rounding would take digits, and computes them again. Each norm meets six inputs of one
shape, and all six take turns in one process:

    ordinary         x and dy are standard normal
    dy of ones       and a weight of ones: the dx of a norm that centres vanishes
    dy = y           and a weight of ones: dx vanishes but for eps
    mean 5           the mean of x is 5 times its spread
    mean 1000        the mean of x is 1000 times its spread
    constant         all elements of a row are equal
"""

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from npnorm import norms
from npnorm.bench.grid import GROUPS, Effort
from npnorm.bench.timing import Contender, interleave

INPUTS = ("ordinary", "dy of ones", "dy = y", "mean 5", "mean 1000", "constant")
COMPUTES = ("float64", "float32")
SLOWER, EXTRA = 5.0, 32.0
"""The goals: the largest ratio to ordinary rows, and the largest extra memory in MiB."""

EFFORT = Effort(seconds=0.4, least=2, most=25, warm=0)


class Kind(NamedTuple):
    """How a norm is made, and what it takes.

    Parameters
    ----------
    make : callable
        From weight, bias and settings to the norm.
    large, small : tuples of int
        The shapes of x.
    row : tuple of int
        The axes along which constant rows are constant.
    """

    make: Callable[..., Any]
    large: tuple[int, ...] = (4096, 1024)
    small: tuple[int, ...] = (8, 64)
    row: tuple[int, ...] = (-1,)


IMAGES = (16, 64, 64, 64), (2, 16, 4, 4)

KINDS = {
    "LayerNorm": Kind(norms.LayerNorm),
    "RMSNorm": Kind(lambda w, b, **kw: norms.RMSNorm(w, **kw)),
    "GroupNorm": Kind(lambda w, b, **kw: norms.GroupNorm(GROUPS, w, b, **kw), *IMAGES, (1, 2, 3)),
    "BatchNorm": Kind(norms.BatchNorm, *IMAGES, (0, 2, 3)),
    "InstanceNorm": Kind(norms.InstanceNorm, *IMAGES, (2, 3)),
    "PartialRMSNorm": Kind(lambda w, b, **kw: norms.PartialRMSNorm(w, p=1.0, **kw)),
    "ScaleNorm": Kind(lambda w, b, **kw: norms.ScaleNorm(w[:1], **kw)),
    "L2Norm": Kind(lambda w, b, **kw: norms.L2Norm(**kw)),
    "QKNorm": Kind(lambda w, b, **kw: norms.QKNorm(w, w, **kw), (2, 8, 2048, 128), (1, 2, 4, 64)),
    "GatedRMSNorm": Kind(lambda w, b, **kw: norms.GatedRMSNorm(w, **kw)),
    "AdaptiveNorm": Kind(lambda w, b, **kw: norms.AdaptiveNorm(norms.LayerNorm(**kw)), (8, 512, 1024), (2, 4, 64)),
    "AddRMSNorm": Kind(lambda w, b, **kw: norms.AddRMSNorm(w, **kw)),
}
"""The norms by name."""


def contender(norm: str, shape: tuple[int, ...], given: str, compute: str) -> Contender:
    """Return forward and backward of a norm on one of INPUTS."""
    kind, rng = KINDS[norm], np.random.default_rng(0)
    features = shape[-1] if kind.row == (-1,) else shape[1]

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, np.float32)

    x, dy, other = normal(*shape), normal(*shape), normal(*shape)
    w, b = rng.uniform(0.5, 1.5, features).astype(np.float32), normal(features)
    if given in ("dy of ones", "dy = y"):
        w, b, dy = np.ones_like(w), np.zeros_like(b), np.ones_like(dy)
    elif given == "constant":
        row = [axis % x.ndim for axis in kind.row]
        x = np.array(np.broadcast_to(normal(*(1 if i in row else n for i, n in enumerate(shape))), shape))
    elif given != "ordinary":
        x += np.float32(given.removeprefix("mean "))
    layer = kind.make(w, b, compute=compute)
    inputs: tuple[np.ndarray, ...] = (x,)
    grads: tuple[np.ndarray, ...] = (dy,)
    if norm == "QKNorm":
        inputs, grads = (x, x[::-1].copy()), (dy, dy)
    elif norm == "AddRMSNorm":  # the sum of two halves is x
        inputs, grads = (x / 2, x / 2), (dy, other)
    elif norm == "GatedRMSNorm":
        inputs = x, other
    elif norm == "AdaptiveNorm":
        samples = np.ones((shape[0], 1), np.float32)
        inputs = x, samples * (w - 1), samples * b
    if given == "dy = y":
        y = layer.forward(*inputs)[0]
        grads = (y[0], other) if norm == "AddRMSNorm" else y if norm == "QKNorm" else (y,)
    return Contender(lambda: layer.forward(*inputs), lambda state: layer.backward(*grads, state[1]))


def measure(chosen: Sequence[str] = tuple(KINDS), quick: bool = False) -> pd.DataFrame:
    """Return a line for each norm, shape, compute, operation and input.

    Parameters
    ----------
    chosen : sequence of str
        Norms.
    quick : bool
        The small shapes alone.
    """
    lines = [
        line
        for norm in chosen
        for shape in ([KINDS[norm].small] if quick else [KINDS[norm].large, KINDS[norm].small])
        for compute in COMPUTES
        for line in _measure(norm, shape, compute)
    ]
    return pd.DataFrame(lines)


def _measure(norm: str, shape: tuple[int, ...], compute: str) -> Iterator[dict[str, Any]]:
    found = {given: contender(norm, shape, given, compute) for given in INPUTS}
    extra = {given: _memory(contender) for given, contender in found.items()}
    for given, times in interleave(found, EFFORT).items():
        for op in ("forward", "backward"):
            yield {
                "norm": norm,
                "shape": "x".join(map(str, shape)),
                "compute": compute,
                "op": op,
                "input": given,
                **times[op]._asdict(),
                "extra": extra[given][op],
            }


def _memory(contender: Contender) -> dict[str, int]:
    forward, backward = contender
    assert backward is not None
    forward()  # scratch memory, and whatever is made once
    state, there = peak(forward, lambda result: result[0])
    _, back = peak(lambda: backward(state), lambda result: result)
    return {"forward": there, "backward": back}


def peak(call: Callable[[], Any], result: Callable[[Any], Any]) -> tuple[Any, int]:
    """Return what a call returns, and the bytes of its largest extra memory, without its result."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        came = call()
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return came, most - before - _nbytes(result(came))


def _nbytes(result: Any) -> int:
    """Return the bytes of all arrays of a result."""
    if isinstance(result, np.ndarray):
        return result.nbytes
    return sum(map(_nbytes, result.values() if isinstance(result, dict) else result))


KEY = ["norm", "shape", "compute", "op"]


def report(frame: pd.DataFrame) -> str:
    """Return the two tables and the goals as text."""
    ratio = frame.pivot_table("median", KEY, "input", sort=False)[list(INPUTS)]
    ordinary = ratio.pop("ordinary")
    ratio = ratio.div(ordinary, axis=0)
    ratio.insert(0, "ordinary ms", ordinary * 1e3)
    memory = frame.pivot_table("extra", KEY, "input", sort=False)[list(INPUTS)] / 2**20
    memory = memory[memory.max(axis=1) >= 1]
    parts = {
        "Rows that need care: time, by that of ordinary rows": ratio.reset_index(),
        "Largest extra memory without the result, in MiB (calls below 1 MiB are left out)": memory.reset_index(),
        f"Goals: at most {SLOWER:g} times ordinary, below {EXTRA:g} MiB": goals(frame),
    }
    return "\n\n".join(f"{title}\n\n{table.to_markdown(index=False, floatfmt='.2f')}" for title, table in parts.items())


def goals(frame: pd.DataFrame) -> pd.DataFrame:
    """Return for each norm and compute the worst cell of time and memory, and how many cells miss the goal."""
    base = frame[frame["input"] == "ordinary"].set_index(KEY)["median"]
    some = frame.assign(ratio=frame["median"] / base.loc[pd.MultiIndex.from_frame(frame[KEY])].to_numpy())
    some = some[some["input"] != "ordinary"].assign(mib=some["extra"] / 2**20)
    rows = []
    for (norm, compute), cells in some.groupby(["norm", "compute"], sort=False):
        slow, fat = cells.loc[cells["ratio"].idxmax()], cells.loc[cells["mib"].idxmax()]
        missed = (cells["ratio"] > SLOWER).sum(), (cells["mib"] >= EXTRA).sum()
        rows.append(
            {
                "norm": norm,
                "compute": compute,
                "slowest": slow["ratio"],
                "where": f"{slow['shape']} {slow['op']}, {slow['input']}",
                "slow": f"{missed[0]} of {len(cells)}",
                "largest MiB": fat["mib"],
                "on": f"{fat['shape']} {fat['op']}, {fat['input']}",
                "large": f"{missed[1]} of {len(cells)}",
                "met": "no" if any(missed) else "yes",
            }
        )
    return pd.DataFrame(rows)


if __name__ == "__main__":
    print(report(measure()))
