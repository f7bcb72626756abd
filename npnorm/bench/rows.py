"""Rows that need care: how much longer a norm takes on them than on ordinary rows, and how much more memory.

npnorm finds the rows of which rounding would take digits, and computes them again. Each norm meets six inputs of one
shape, and all six take turns in one process:

    ordinary         x and dy are standard normal
    dy of ones       and a weight of ones: the dx of a norm that centres vanishes
    dy = y           and a weight of ones: dx vanishes but for eps
    mean 5           the mean of x is 5 times its spread
    mean 1000        the mean of x is 1000 times its spread
    constant         all elements of a row are equal

Memory is the largest that a call takes beyond what was there before, without its results: y, or dx and the gradients.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npnorm import norms
from npnorm.bench.grid import GROUPS, Case, Effort
from npnorm.bench.memory import peak
from npnorm.bench.timing import Contender, interleave

INPUTS = ("ordinary", "dy of ones", "dy = y", "mean 5", "mean 1000", "constant")
COMPUTES = {"f64": "float64", "f32": "float32"}
"""The working precision of npnorm's peers."""


class Kind(NamedTuple):
    """How a norm is made of weight, bias and settings, two shapes of its x, and the axes of a constant row."""

    make: Callable[..., Any]
    large: tuple[int, ...] = (4096, 1024)
    small: tuple[int, ...] = (8, 64)
    row: tuple[int, ...] = (-1,)


IMAGES = (16, 64, 64, 64), (2, 16, 4, 4)

KINDS = {
    "LayerNorm": Kind(norms.LayerNorm),
    "RMSNorm": Kind(lambda w, b, **settings: norms.RMSNorm(w, **settings)),
    "GroupNorm": Kind(partial(norms.GroupNorm, GROUPS), *IMAGES, (1, 2, 3)),
    "BatchNorm": Kind(norms.BatchNorm, *IMAGES, (0, 2, 3)),
    "InstanceNorm": Kind(norms.InstanceNorm, *IMAGES, (2, 3)),
    "PartialRMSNorm": Kind(lambda w, b, **settings: norms.PartialRMSNorm(w, p=1.0, **settings)),
    "ScaleNorm": Kind(lambda w, b, **settings: norms.ScaleNorm(w[:1], **settings)),
    "L2Norm": Kind(lambda w, b, **settings: norms.L2Norm(**settings)),
    "QKNorm": Kind(lambda w, b, **settings: norms.QKNorm(w, w, **settings), (2, 8, 2048, 128), (1, 2, 4, 64)),
    "GatedRMSNorm": Kind(lambda w, b, **settings: norms.GatedRMSNorm(w, **settings)),
    "AdaptiveNorm": Kind(
        lambda w, b, **settings: norms.AdaptiveNorm(norms.LayerNorm(**settings)), (8, 512, 1024), (2, 4, 64)
    ),
    "AddRMSNorm": Kind(lambda w, b, **settings: norms.AddRMSNorm(w, **settings)),
}
"""The norms by name."""


def contender(case: Case, given: str, compute: str) -> Contender:
    """Return forward and backward of a norm on one of INPUTS."""
    norm, shape = case
    kind, rng = KINDS[norm], np.random.default_rng(0)
    features = shape[-1] if kind.row == (-1,) else shape[1]
    x, dy, other = (rng.standard_normal(shape, np.float32) for _ in range(3))
    w, b = rng.uniform(0.5, 1.5, features).astype(np.float32), rng.standard_normal(features, np.float32)
    if given in ("dy of ones", "dy = y"):
        w, b, dy = np.ones_like(w), np.zeros_like(b), np.ones_like(dy)
    elif given == "constant":
        first = tuple(slice(1) if i - x.ndim in kind.row or i in kind.row else slice(None) for i in range(x.ndim))
        x = x[first] + np.zeros_like(x)
    elif given != "ordinary":
        x += np.float32(given.removeprefix("mean "))
    layer = kind.make(w, b, compute=compute)
    inputs: tuple[np.ndarray, ...] = (x,)
    if norm == "QKNorm":
        inputs = x, x[::-1].copy()
    elif norm == "AddRMSNorm":
        inputs = x / 2, x / 2  # whose sum is x
    elif norm == "GatedRMSNorm":
        inputs = x, other
    elif norm == "AdaptiveNorm":
        inputs = x, *(np.tile(a, (shape[0], 1)) for a in (w - 1, b))
    y = layer.forward(*inputs)[0] if given == "dy = y" else (dy, dy)
    first_y = y[0] if isinstance(y, tuple) else y
    grads = y if norm == "QKNorm" else (first_y, other) if norm == "AddRMSNorm" else (first_y,)
    return Contender(lambda: layer.forward(*inputs), lambda state: layer.backward(*grads, state[1]))


def rows(case: Case, peer: str, effort: Effort) -> Iterator[dict[str, Any]]:
    """Yield a line for each input and operation of a norm that computes as the peer "f64" or "f32" does."""
    found = {given: contender(case, given, COMPUTES[peer]) for given in INPUTS}
    extra = {given: _memory(contender) for given, contender in found.items()}
    for line in interleave(found, effort):
        given, op = line.pop("peer"), line["op"]
        if op != "both":
            yield {"peer": peer, "input": given, **line, "extra": extra[given][op]}


def _memory(contender: Contender) -> dict[str, int]:
    forward, backward = contender
    assert backward is not None
    forward()  # scratch memory, and whatever is made once
    state, there = peak(forward)
    result, back = peak(partial(backward, state))
    return {"forward": there - nbytes(state[0]), "backward": back - nbytes(result)}


def nbytes(result: Any) -> int:
    """Return the bytes of all arrays of a result.

    Examples
    --------
    >>> nbytes((np.ones(2), {"weight": np.ones(3)}))
    40
    """
    if isinstance(result, np.ndarray):
        return result.nbytes
    return sum(map(nbytes, result.values() if isinstance(result, dict) else result))
