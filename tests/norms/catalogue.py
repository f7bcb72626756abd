"""Every norm of the package in small, so that what holds for all is tested on all."""

from typing import Any, NamedTuple

import numpy as np

from npnorm import norms
from npnorm.arrays import array_module, from_numpy


class Entry(NamedTuple):
    """A norm: how it is made of its parameters, and what it takes."""

    name: str
    make: Any  # params -> layer with forward(x) and backward(dy, saved)
    params: dict[str, tuple[int, ...]]
    x: tuple[int, ...]

    def draw(self, rng, dtype="float64"):
        """Return parameters and x."""
        params = {name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, shape in self.params.items()}
        return params, rng.standard_normal(self.x).astype(dtype)


class Inputs:
    """A layer of several inputs as a layer of one: the other inputs count as parameters."""

    def __init__(self, layer, params, names):
        self.layer, self.params, self.names = layer, params, names

    def forward(self, x):
        y, saved = self.layer.forward(x, *(self.params[name] for name in self.names))
        return (array_module(x).stack(y) if isinstance(y, tuple) else y), saved

    def backward(self, dy, saved):
        takes_pairs = isinstance(self.layer, (norms.AddRMSNorm, norms.QKNorm))
        (dx, *others), grads = self.layer.backward(*((dy[0, ...], dy[1, ...]) if takes_pairs else (dy,)), saved)
        found = dict(zip(self.names, others, strict=True)) | flat(grads)
        return dx, {name: found[name] for name in self.params}


class Pass:
    """The inference of a BatchNorm as a layer."""

    def __init__(self, params):
        self.params = params
        mean, var = (from_numpy(np.array(a), params["weight"]) for a in ([0.5, -1.0, 2.0], [0.2, 1.0, 3.0]))
        self.norm = norms.BatchNorm(**params, eps=0.3, running_mean=mean, running_var=var)

    def forward(self, x):
        return self.norm.inference(x)

    def backward(self, dy, saved):
        return self.norm.backward(dy, saved)


def flat(grads):
    """Return the gradients of a QKNorm by the names of its arguments."""
    return (
        {"q_weight": grads["q_norm"]["weight"], "k_weight": grads["k_norm"]["weight"]} if "q_norm" in grads else grads
    )


def inputs(build, *names):
    """Return `make` for a layer whose other inputs are the `names`."""
    return lambda params: Inputs(build(**{n: a for n, a in params.items() if n not in names}), params, names)


W = {"weight": (6,)}
WB = {"weight": (6,), "bias": (6,)}

CATALOGUE = [
    Entry("LayerNorm", lambda p: norms.LayerNorm(**p, eps=0.3), WB, (2, 5, 6)),
    Entry(
        "LayerNorm over two axes",
        lambda p: norms.LayerNorm(**p, eps=0.3),
        {"weight": (3, 4), "bias": (3, 4)},
        (2, 5, 3, 4),
    ),
    Entry("LayerNorm without parameters over two axes", lambda p: norms.LayerNorm(axes=2), {}, (2, 5, 3, 4)),
    Entry("RMSNorm", lambda p: norms.RMSNorm(**p, eps=0.3), WB, (2, 5, 6)),
    Entry("RMSNorm over three axes", lambda p: norms.RMSNorm(**p, eps=0.3), {"weight": (2, 3, 4)}, (5, 2, 3, 4)),
    Entry("RMSNorm with offset", lambda p: norms.RMSNorm(**p, eps=0.3, offset=1), W, (2, 5, 6)),
    Entry("PartialRMSNorm", lambda p: norms.PartialRMSNorm(**p, p=0.4, eps=0.3), WB, (2, 5, 6)),
    Entry("PartialRMSNorm of all", lambda p: norms.PartialRMSNorm(**p, p=1, eps=0.3), WB, (2, 5, 6)),
    Entry("GroupNorm", lambda p: norms.GroupNorm(3, **p, eps=0.3), WB, (2, 6, 4, 5)),
    Entry("GroupNorm of one group", lambda p: norms.GroupNorm(1, **p, eps=0.3), WB, (2, 6, 7)),
    Entry("GroupNorm without space", lambda p: norms.GroupNorm(2, **p, eps=0.3), WB, (5, 6)),
    Entry("InstanceNorm", lambda p: norms.InstanceNorm(**p, eps=0.3), WB, (2, 6, 4, 5)),
    Entry("BatchNorm", lambda p: norms.BatchNorm(**p, eps=0.3), {"weight": (3,), "bias": (3,)}, (4, 3, 2, 5)),
    Entry("BatchNorm without space", lambda p: norms.BatchNorm(**p, eps=0.3), {"weight": (3,), "bias": (3,)}, (4, 3)),
    Entry("BatchNorm in inference", Pass, {"weight": (3,), "bias": (3,)}, (4, 3, 5)),
    Entry(
        "GatedRMSNorm, norm first",
        inputs(lambda **p: norms.GatedRMSNorm(**p, eps=0.3), "gate"),
        W | {"gate": (2, 5, 6)},
        (2, 5, 6),
    ),
    Entry(
        "GatedRMSNorm, gate first, groups",
        inputs(lambda **p: norms.GatedRMSNorm(**p, eps=0.3, groups=2, norm_before_gate=False), "gate"),
        W | {"gate": (2, 5, 6)},
        (2, 5, 6),
    ),
    Entry(
        "AddRMSNorm",
        inputs(lambda **p: norms.AddRMSNorm(**p, eps=0.3), "residual"),
        WB | {"residual": (2, 5, 6)},
        (2, 5, 6),
    ),
    Entry(
        "AdaptiveNorm of LayerNorm",
        inputs(lambda **p: norms.AdaptiveNorm(norms.LayerNorm(eps=0.3)), "scale", "shift"),
        {"scale": (3, 6), "shift": (3, 6)},
        (3, 2, 4, 6),
    ),
    Entry(
        "AdaptiveNorm of RMSNorm",
        inputs(lambda **p: norms.AdaptiveNorm(norms.RMSNorm(eps=0.3)), "scale", "shift"),
        {"scale": (3, 6), "shift": (3, 6)},
        (3, 6),
    ),
    Entry(
        "QKNorm per head",
        inputs(lambda **p: norms.QKNorm(**p, eps=0.3), "k"),
        {"q_weight": (6,), "k_weight": (6,), "k": (2, 4, 5, 6)},
        (2, 4, 5, 6),
    ),
    Entry(
        "QKNorm over the full width",
        inputs(lambda **p: norms.QKNorm(**p, eps=0.3, full_width=True), "k"),
        {"q_weight": (6,), "k_weight": (6,), "k": (2, 5, 6)},
        (2, 5, 6),
    ),
    Entry("ScaleNorm", lambda p: norms.ScaleNorm(**p, eps=0.3), {"weight": (1,)}, (2, 5, 6)),
    Entry("ScaleNorm of short rows", lambda p: norms.ScaleNorm(**p, eps=2.3), {"weight": ()}, (4, 5, 6)),
    Entry("L2Norm", lambda p: norms.L2Norm(), {}, (2, 5, 6)),
    Entry("WeightNorm", lambda p: norms.WeightNorm(**p), {"weight_g": (5, 1, 1)}, (5, 3, 4)),
    Entry("DyT", lambda p: norms.DyT(**p), {"alpha": (1,), **WB}, (2, 5, 6)),
    Entry("Derf", lambda p: norms.Derf(**p), {"alpha": (1,), "shift": (), **WB}, (2, 5, 6)),
]
