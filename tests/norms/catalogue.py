"""Every norm of the package in small, so that what holds for all is tested on all."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest

from npnorm import norms
from npnorm.arrays import array_module, from_numpy
from npnorm.norms.norm import Norm
from tests.check import draw, exact_norm


class Entry(NamedTuple):
    """A norm: how it is made of its parameters, and what it takes."""

    name: str
    make: Any  # (params, eps=0.3, **settings) -> layer with forward(x) and backward(dy, saved); maybe without eps
    params: dict[str, tuple[int, ...]]
    x: tuple[int, ...]
    more: tuple[tuple[int, ...], ...] = ()  # other shapes of x
    rows: Any = None  # x -> its rows, of a norm that `exact_norm` knows
    axis: int = -1  # the axis of x that the parameters of such a norm belong to

    def draw(self, rng, dtype="float64"):
        """Return parameters and x."""
        return draw(rng, dtype, **self.params), rng.standard_normal(self.x).astype(dtype)

    def problem(self, seed, dtype="float64"):
        """Return parameters, x and dy."""
        rng = np.random.default_rng(seed)
        params, x = self.draw(rng, dtype)
        return params, x, rng.standard_normal(self.make(params).forward(x)[0].shape).astype(dtype)

    def exact(self, params, x, dy, eps):
        """Return what `run` should, in float64: each row is one of `exact_norm`."""
        index = self.rows(np.arange(x.size).reshape(x.shape))
        along = [-1 if i == self.axis % x.ndim else 1 for i in range(x.ndim)]
        affine = {"weight": np.ones(x.shape[self.axis]), "bias": np.zeros(x.shape[self.axis])} | params

        def rows(a):
            return np.broadcast_to(a, x.shape).ravel()[index]

        def whole(values):
            result = np.empty(x.shape)
            np.put(result, index, values)
            return result

        w, b = (rows(affine[name].reshape(along)) for name in ("weight", "bias"))
        centred = "RMSNorm" not in self.name
        y, dx, _, _ = exact_norm(rows(x), w, b, eps, rows(dy), centred=centred)
        z = whole(exact_norm(rows(x), np.ones(w.shape), np.zeros(w.shape), eps, rows(dy), centred=centred)[0])
        wide, others = dy.astype("float64"), tuple(i for i in range(x.ndim) if along[i] == 1)
        grads = {"weight": np.sum(wide * z, axis=others), "bias": np.sum(wide, axis=others)}
        return {"y": whole(y), "dx": whole(dx), **{name: grads[name] for name in params}}


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

    def __init__(self, params, eps=0.3, **settings):
        self.params = params
        mean, var = (from_numpy(a, next(iter(params.values()), a)) for a in MEAN_AND_VAR)
        self.norm = norms.BatchNorm(**params, eps=eps, running_mean=mean, running_var=var, **settings)

    def forward(self, x):
        return self.norm.inference(x)

    def backward(self, dy, saved):
        return self.norm.backward(dy, saved)


def norm_of(made):
    """Return the norm itself of what an entry makes."""
    return next(a for a in (made, getattr(made, "layer", None), getattr(made, "norm", None)) if isinstance(a, Norm))


def flat(grads):
    """Return the gradients of a QKNorm by the names of its arguments."""
    return (
        {"q_weight": grads["q_norm"]["weight"], "k_weight": grads["k_norm"]["weight"]} if "q_norm" in grads else grads
    )


def of(kind, *args, **settings):
    """Return `make` for a norm of one input."""
    return lambda params, eps=0.3, **more: kind(*args, **params, eps=eps, **settings, **more)


def without_eps(kind):
    """Return the same for a norm that has no eps."""
    return lambda params, **settings: kind(**params, **settings)


def inputs(build, *names):
    """Return `make` for a layer whose other inputs are the `names`."""
    return lambda params, eps=0.3, **more: Inputs(
        build(**{n: a for n, a in params.items() if n not in names}, eps=eps, **more), params, names
    )


def adaptive(kind):
    """Return `make` for an AdaptiveNorm of a norm."""
    return inputs(lambda **settings: norms.AdaptiveNorm(kind(**settings)), "scale", "shift")


W = {"weight": (6,)}
WB = {"weight": (6,), "bias": (6,)}
WB3 = {"weight": (3,), "bias": (3,)}
QK = {"q_weight": (6,), "k_weight": (6,)}
MEAN_AND_VAR = np.array([[0.5, -1.0, 2.0], [0.2, 1.0, 3.0]])

ROWS = ((6,), (4, 6), (2, 4, 3, 6))


def features(x):
    return x.reshape(-1, x.shape[-1])


def groups(count):
    return lambda x: x.reshape(x.shape[0] * count, -1)


def channels(x):
    return np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)


# Rows of fewer than 8 features, or 16 elements of space, are evaluated exactly; longer ones fast, but for float64.
CATALOGUE = [
    Entry("LayerNorm", of(norms.LayerNorm), WB, (2, 5, 6), ROWS, features),
    Entry("LayerNorm of wide rows", of(norms.LayerNorm), {"weight": (40,), "bias": (40,)}, (3, 40), (), features),
    Entry("LayerNorm over two axes", of(norms.LayerNorm), {"weight": (3, 4), "bias": (3, 4)}, (2, 5, 3, 4)),
    Entry("LayerNorm without parameters over two axes", of(norms.LayerNorm, axes=2), {}, (2, 5, 3, 4)),
    Entry("RMSNorm", of(norms.RMSNorm), WB, (2, 5, 6), ROWS, features),
    Entry("RMSNorm of wide rows", of(norms.RMSNorm), {"weight": (40,), "bias": (40,)}, (3, 40), (), features),
    Entry("RMSNorm over three axes", of(norms.RMSNorm), {"weight": (2, 3, 4)}, (5, 2, 3, 4)),
    Entry("RMSNorm with offset", of(norms.RMSNorm, offset=1), W, (2, 5, 6)),
    Entry("CastRMSNorm of Llama", of(norms.CastRMSNorm, cast="llama"), WB, (2, 5, 6)),
    Entry("CastRMSNorm of Gemma", of(norms.CastRMSNorm, cast="gemma", offset=1), WB, (2, 5, 6)),
    Entry("PartialRMSNorm", of(norms.PartialRMSNorm, p=0.4), WB, (2, 5, 6), ROWS),
    Entry("PartialRMSNorm of all", of(norms.PartialRMSNorm, p=1), WB, (2, 5, 6)),
    Entry("GroupNorm", of(norms.GroupNorm, 3), WB, (2, 6, 4, 5), ((5, 6), (3, 6, 7), (2, 6, 3, 4, 5)), groups(3), 1),
    Entry("GroupNorm of much space", of(norms.GroupNorm, 3), WB, (2, 6, 20), (), groups(3), 1),
    Entry("GroupNorm of one group", of(norms.GroupNorm, 1), WB, (2, 6, 7), ((5, 6),), groups(1), 1),
    Entry("GroupNorm without space", of(norms.GroupNorm, 2), WB, (5, 6), (), groups(2), 1),
    Entry("InstanceNorm", of(norms.InstanceNorm), WB, (2, 6, 4, 5), ((3, 6, 7), (2, 6, 3, 2, 5)), groups(6), 1),
    Entry("BatchNorm", of(norms.BatchNorm), WB3, (4, 3, 2, 5), ((7, 3), (4, 3, 5), (2, 3, 4, 2, 5)), channels, 1),
    Entry("BatchNorm of much space", of(norms.BatchNorm), WB3, (4, 3, 20), (), channels, 1),
    Entry("BatchNorm without space", of(norms.BatchNorm), WB3, (4, 3), (), channels, 1),
    Entry("BatchNorm in inference", Pass, WB3, (4, 3, 5), ((7, 3),)),
    Entry("GatedRMSNorm, norm first", inputs(norms.GatedRMSNorm, "gate"), W | {"gate": (2, 5, 6)}, (2, 5, 6)),
    Entry(
        "GatedRMSNorm, gate first, groups",
        inputs(partial(norms.GatedRMSNorm, groups=2, norm_before_gate=False), "gate"),
        W | {"gate": (2, 5, 6)},
        (2, 5, 6),
    ),
    Entry("AddRMSNorm", inputs(norms.AddRMSNorm, "residual"), WB | {"residual": (2, 5, 6)}, (2, 5, 6)),
    Entry("AdaptiveNorm of LayerNorm", adaptive(norms.LayerNorm), {"scale": (3, 6), "shift": (3, 6)}, (3, 2, 4, 6)),
    Entry("AdaptiveNorm of RMSNorm", adaptive(norms.RMSNorm), {"scale": (3, 6), "shift": (3, 6)}, (3, 6), ((3, 5, 6),)),
    Entry("QKNorm per head", inputs(norms.QKNorm, "k"), QK | {"k": (2, 4, 1, 6)}, (2, 4, 1, 6)),
    Entry(
        "QKNorm over the full width",
        inputs(partial(norms.QKNorm, full_width=True), "k"),
        QK | {"k": (2, 5, 6)},
        (2, 5, 6),
    ),
    Entry("ScaleNorm", of(norms.ScaleNorm), {"weight": (1,)}, (2, 5, 6), ROWS),
    Entry(
        "ScaleNorm of short rows",
        lambda p, eps=2.3, **settings: norms.ScaleNorm(**p, eps=eps, **settings),
        {"weight": ()},
        (4, 5, 6),
    ),
    Entry("L2Norm", of(norms.L2Norm), {}, (2, 5, 6), ROWS),
    Entry("WeightNorm", without_eps(norms.WeightNorm), {"weight_g": (5, 1, 1)}, (5, 3, 4)),
    Entry("DyT", without_eps(norms.DyT), {"alpha": (1,), **WB}, (2, 5, 6), ROWS),
    Entry("Derf", without_eps(norms.Derf), {"alpha": (1,), "shift": (), **WB}, (2, 5, 6), ROWS),
]

EACH = pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)


def each(entries):
    """Mark a test to be run on some of the entries."""
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name)


def named(*names):
    """Return the entries of these names."""
    return [entry for entry in CATALOGUE if entry.name in names]
