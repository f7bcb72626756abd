"""What each rank does in the study of communication: count, compare and time forms of a norm, alone and in a block.

A form is RMSNorm, LayerNorm by one of its three ways to mean and variance (docs/norms/statistics.md), or "replicated":
LayerNorm of whole rows, which every rank has. The block is that of a transformer with the norm before each sub-layer.
Where the norm is split, so is x, by its features, and the sub-layers, split by heads and hidden features, take and give
whole rows:

    x = x + cut(attention(gather(norm(x)))),  x = x + cut(mlp(gather(norm(x))))

So each sub-layer costs a gather and a sum, forward and backward, beside what its norm sends. A block of the form
"replicated" has whole rows throughout, and costs the sum alone.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from npnorm import LayerNorm, RMSNorm
from npnorm.arrays import Array
from npnorm.blocks import Chain, Composite, PreNorm
from npnorm.config import Config, init
from npnorm.group import Group
from npnorm.layers import MLP, Attention
from npnorm.tree import Layer, Tree, hand_down

MESSAGES: dict[str, list[tuple[str, int]]] = {
    "RMSNorm": [("sum", 1)],
    "two-pass": [("sum", 1), ("sum", 2)],
    "packed": [("sum", 2)],
    "gathered": [("gather", 4)],
    "replicated": [],
}
"""The forms, and what each sends in a forward pass: operations, with their float64 numbers for each row."""

SPLIT = tuple(form for form, messages in MESSAGES.items() if messages)

TURN = 4e-3
"""Seconds of a turn, at least: what is faster is called several times."""

MOST = 201
"""Rounds at most."""


class Counting(Group, Protocol):
    """A group that counts its messages, as `npnorm.mpi.Ranks` does."""

    calls: Counter[str]
    bytes: Counter[str]
    check: bool


class Whole(Composite):
    """A sub-layer of whole rows between layers of split ones: its input is gathered, and its output is cut.

    Communicated, beside what the sub-layer sends: one gather forward, of x, and one backward, of dy.
    """

    def __init__(self, sublayer: Layer, group: Group) -> None:
        super().__init__({"sublayer": sublayer})
        self.sublayer, self.group = sublayer, group

    def forward(self, x: Array) -> tuple[Any, Any]:
        """Return this rank's part of y, for its part of x."""
        hand_down(self.params, self.layers)
        y, saved = self.sublayer.forward(self.group.gather(x, axis=-1, label="Whole"))
        return self.group.shard(y, axis=-1), saved

    def backward(self, dy: Array, saved: Any) -> tuple[Any, Tree]:
        """Return this rank's part of dx, for its part of dy, and the gradients of the sub-layer."""
        hand_down(self.params, self.layers)
        dx, sublayer = self.sublayer.backward(self.group.gather(dy, axis=-1, label="Whole.backward"), saved)
        return self.group.shard(dx, axis=-1), {"sublayer": sublayer}


class Held(NamedTuple):
    """A layer, with this rank's part of its input and of the gradient of its output."""

    layer: Layer
    x: np.ndarray
    dy: np.ndarray

    def forward(self) -> Any:
        """Return what forward saved."""
        return self.layer.forward(self.x)[1]

    def backward(self, saved: Any) -> tuple[Any, Tree]:
        """Return dx and the gradients."""
        return self.layer.backward(self.dy, saved)

    def both(self) -> tuple[Any, Tree]:
        """Return dx and the gradients, after a forward pass."""
        return self.backward(self.forward())


def part(form: str, whole: np.ndarray, group: Group) -> Any:
    """Return what a rank holds of an array whose last axis is that of the features."""
    return whole if form == "replicated" else group.shard(whole, axis=-1)


def norm_of(form: str, weight: np.ndarray, group: Group) -> Layer:
    """Return the norm of a form, for the whole weight. None has a bias, so that they differ in their statistics."""
    mine = part(form, weight, group)
    if form == "replicated":
        return LayerNorm(mine)
    if form == "RMSNorm":
        return RMSNorm(mine, group=group)
    return LayerNorm(mine, statistics=cast(Any, form), group=group)


def block_of(form: str, params: Tree, heads: int, group: Group) -> Layer:
    """Return the block at the top of this file with the norm of a form, for whole parameters."""
    attention = Attention(params["attention"]["sublayer"], heads, group=group)
    sublayers: dict[str, Layer] = {"attention": attention, "mlp": MLP(params["mlp"]["sublayer"], group=group)}
    if form != "replicated":
        sublayers = {name: Whole(sublayer, group) for name, sublayer in sublayers.items()}
    norms = {name: norm_of(form, params[name]["norm"]["weight"], group) for name in sublayers}
    return Chain({name: PreNorm(norms[name], sublayer) for name, sublayer in sublayers.items()})


def rank_main(group: Counting, settings: Mapping[str, Any], cell: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return for each form what was counted, compared and timed; the times are those without checks."""
    width, heads, rows, length = settings["features"], settings["heads"], cell["rows"], settings["length"]
    rng = np.random.default_rng(cell["seed"])  # the same arrays on every rank
    x, dy = rng.standard_normal((2, max(rows // length, 1), min(rows, length), width), np.float32)
    params = init(Config(1, width=width, depth=1, heads=heads, mlp="gelu"), rng)["blocks"]["0"]

    def held(form: str, layer: Layer) -> Held:
        return Held(layer, part(form, x, group), part(form, dy, group))

    norms = {form: held(form, norm_of(form, params["mlp"]["norm"]["weight"], group)) for form in MESSAGES}
    blocks = {}
    if rows <= settings["block_rows"]:
        blocks = {form: held(form, block_of(form, params, heads, group)) for form in MESSAGES}
    found: dict[str, dict[str, Any]] = {form: counts(group, norms[form], "norm") for form in MESSAGES}
    for form, block in blocks.items():
        found[form] |= counts(group, block, "block")
    for form in SPLIT:
        found[form]["errors"] = [error(form, width, mean, rng, group) for mean in settings["means"]]
    timed: dict[str, dict[str, Callable[[], Any]]] = {
        "messages": {form: partial(send, form, rows, group) for form in SPLIT},
        "forward": {form: norm.forward for form, norm in norms.items()},
        "backward": {form: partial(norm.backward, norm.forward()) for form, norm in norms.items()},
        "block": {form: block.both for form, block in blocks.items()},
    }
    group.check = False
    for what, calls in timed.items():
        for form, (seconds, ratio) in interleaved(group, calls, settings["seconds"], settings["rounds"]).items():
            found[form] |= {f"{what} seconds": seconds, f"{what} ratio": ratio}
    group.check = True
    return found


def counts(group: Counting, held: Held, what: str) -> dict[str, list[int]]:
    """Return what a rank sends, forward and backward: messages, their bytes, and the group's own checks."""

    def sent(work: Callable[[], Any]) -> tuple[Any, list[int]]:
        calls, volume = Counter(group.calls), Counter(group.bytes)
        result = work()
        calls, volume = Counter(group.calls) - calls, Counter(group.bytes) - volume
        checks = calls["check"]
        return result, [calls.total() - checks, volume.total() - volume["check"], checks]

    saved, forward = sent(held.forward)
    _, backward = sent(partial(held.backward, saved))
    return {f"{what} forward": forward, f"{what} backward": backward}


def error(form: str, width: int, mean: float, rng: np.random.Generator, group: Group) -> float:
    """Return the largest error of y beside the serial one / the largest y, in float64; NaN if the form refuses x."""
    x, weight = rng.standard_normal((64, width)) + mean, np.ones(width)
    serial = RMSNorm(weight) if form == "RMSNorm" else LayerNorm(weight)
    y, _ = serial.forward(x)
    try:
        mine, _ = norm_of(form, weight, group).forward(group.shard(x, axis=-1))
    except ValueError:
        return float("nan")
    off = np.abs(mine - group.shard(y, axis=-1)).max() / np.abs(y).max()
    return float(group.max(np.array([off]))[0])


def send(form: str, rows: int, group: Group) -> None:
    """Send what the norm of a form sends in a forward pass, and do nothing else."""
    for operation, numbers in MESSAGES[form]:
        array = np.ones((numbers, rows))
        if operation == "sum":
            group.sum(array)
        else:
            group.gather(array[None], axis=0)


def interleaved(
    group: Group, calls: Mapping[str, Callable[[], Any]], seconds: float, least: int
) -> dict[str, tuple[float, float]]:
    """Time calls in turns; return the median seconds of each, and its median ratio to the first in the same round.

    A turn takes as long as its slowest rank. Every other round runs backwards. There are at least so many rounds, and
    more where they fit in the seconds.
    """

    def turn(name: str, count: int) -> float:
        group.require_same(name)  # the ranks begin together
        start = time.perf_counter()
        for _ in range(count):
            calls[name]()
        return float(group.max(np.array([time.perf_counter() - start]))[0]) / count

    names = list(calls)
    for _ in range(2):  # the first is to warm up
        once = {name: turn(name, 1) for name in names}
    repeats = {name: min(max(round(TURN / once[name]), 1), 1000) for name in names}
    rounds = round(seconds / max(sum(repeats[name] * once[name] for name in names), 1e-9))
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(min(max(rounds, least), MOST)):
        for name in names if i % 2 == 0 else reversed(names):
            samples[name].append(turn(name, repeats[name]))

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(samples[name], samples[names[0]], strict=True))

    return {name: (statistics.median(samples[name]), ratio(name)) for name in names}
