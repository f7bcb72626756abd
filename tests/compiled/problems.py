"""Norms for the kernels: pages of the package, how they are drawn, and how results are compared."""

import sys
from functools import partial
from typing import Any

import numpy as np
import pytest

from npnorm.arrays import array_module, to_numpy
from npnorm.compiled import device as compiled
from npnorm.norms import AddRMSNorm, BatchNorm, GroupNorm, InstanceNorm, LayerNorm, PartialRMSNorm, RMSNorm
from npnorm.tree import map_tree
from tests.check import BFLOAT16, same_bits
from tests.compiled import fake_cuda
from tests.engine.formulas import within

COMPUTE = pytest.mark.parametrize("compute", ["float64", "float32"])
DTYPE = pytest.mark.parametrize("dtype", ["float32", "float16", BFLOAT16], ids=["float32", "float16", "bfloat16"])


class Inference:
    """The inference of a BatchNorm, with statistics that are given, as a norm."""

    def __init__(self, weight=None, bias=None, compute=None):
        self.params = {name: a for name, a in (("weight", weight), ("bias", bias)) if a is not None}
        self.compute = compute

    def forward(self, x, *, out=None):
        xp, c = array_module(x), x.shape[1]
        mean, var = (xp.asarray(np.linspace(*ends, c)) for ends in ((-1, 1), (0.5, 2)))
        self.norm = BatchNorm(**self.params, compute=self.compute, running_mean=mean, running_var=var)
        return self.norm.inference(x, out=out)

    def backward(self, dy, saved, *, out=None):
        return self.norm.backward(dy, saved, out=out)


class Added(AddRMSNorm):
    """AddRMSNorm of x and x, so that it takes one array."""

    def forward(self, x):
        (y, _), saved = super().forward(x, x)
        return y, saved

    def backward(self, dy, saved):
        (dx, _), grads = super().backward(dy, dy, saved)
        return dx, grads


MAKE: dict[str, Any] = {
    "LayerNorm": LayerNorm,
    "RMSNorm": RMSNorm,
    "AddRMSNorm": Added,
    "PartialRMSNorm of all": partial(PartialRMSNorm, p=1),
    "RMSNorm with offset": partial(RMSNorm, offset=1),
    "GroupNorm": partial(GroupNorm, 2),
    "GroupNorm of one group": partial(GroupNorm, 1),
    "InstanceNorm": InstanceNorm,
    "BatchNorm": BatchNorm,
    "BatchNorm in inference": Inference,
}
IMAGES = [name for name in MAKE if name.startswith(("Group", "Instance", "Batch"))]


def fake_device(monkeypatch):
    """Return a device that stands in for a GPU, and put its module in the place of CuPy."""
    device = fake_cuda.Device()
    monkeypatch.setitem(sys.modules, "cupy", device.module())
    monkeypatch.setattr(compiled._Process, "uses_kernels", True)
    compiled._kernels.cache_clear()
    return device


def put(a):
    """Return an array on the device."""
    return sys.modules["cupy"].asarray(a)


def draw(name, shape=None, dtype="float32"):
    """Return parameters, x and dy."""
    shape = shape or ((3, 4, 4, 6) if name in IMAGES else (5, 40))
    rng = np.random.default_rng(sum(shape))
    channels = shape[1] if name in IMAGES else shape[-1]
    params = {n: (rng.standard_normal(channels) + 1).astype(dtype) for n in ("weight", "bias")}
    return params, *((rng.standard_normal(shape) + 0.3).astype(dtype) for _ in range(2))


def run(place, make, params, x, dy):
    """Return y, dx and gradients as NumPy arrays."""
    norm = make(**map_tree(place, params))
    y, saved = norm.forward(place(x))
    dx, grads = norm.backward(place(dy), saved)
    return map_tree(to_numpy, {"y": y, "dx": dx, "grads": grads})


def compare(name, problem, compute="float64"):
    """Hold the device against NumPy in float64."""
    there, here = run(put, partial(MAKE[name], compute=compute), *problem), run(np.asarray, MAKE[name], *problem)
    if compute == "float64":
        same_bits(there, here)
    else:
        within(there, here)


def hard_rows(x, axis=0):
    """Return x with rows that lose digits among others."""
    x = x.copy()
    rows = x.swapaxes(0, axis)
    rows[1] = 0
    rows[3] += 3e4
    rows[4] *= 1e-30
    rows[6] *= 1e30
    rows[7] *= 1e-40
    rows[8] = 1.5
    return x
