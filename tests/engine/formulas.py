"""Rows of every kind that is evaluated fast, each with the formula of a page."""

from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import to_numpy
from npnorm.engine import Batch, Channels, Features, Formula, Rows
from npnorm.group import SOLO
from npnorm.norms import batch_norm, layer_norm, rms_norm
from npnorm.tree import map_tree


class Case(NamedTuple):
    """Rows, and how they are called."""

    layout: Any
    formula: Formula
    channels: bool
    constants: bool = False
    offset: float = 0.0

    def rows(self, compute=None, eps=1e-5):
        """Return the rows."""
        return Rows(self.layout, self.formula, eps, compute, offset=self.offset)

    def draw(self, shape=None, dtype="float32", names=("weight", "bias")):
        """Return parameters, x and dy."""
        shape = shape or ((6, 4, 5, 8) if self.channels else (9, 40))
        rng = np.random.default_rng(sum(shape))
        width = shape[1] if self.channels else shape[-1]
        params = {name: (rng.standard_normal(width) + 1).astype(dtype) for name in names}
        return params, *((rng.standard_normal(shape) + 0.3).astype(dtype) for _ in range(2))

    def run(self, put, params, x, dy, compute=None, eps=1e-5, plus=None):
        """Return y, dx and the gradients as NumPy arrays."""
        rows, x, dy, params = self.rows(compute, eps), put(x), put(dy), map_tree(put, params)
        constants = ()
        if self.constants:
            count = x.shape[1]
            numbers = np.linspace(-1, 1, count), np.linspace(0.5, 2, count)
            constants = tuple(put(a.reshape(-1, 1, 1)) for a in numbers)
        y, statistics, exponent = rows.forward(x, params, constants=constants)
        given = constants or statistics
        more = {} if plus is None else {"plus": put(plus)}
        dx, grads = rows.backward(dy, x, params, given, exponent, **more)
        return map_tree(to_numpy, {"y": y, "dx": dx, "grads": grads})


TRAINING = Formula(batch_norm.forward, batch_norm.backward, None)
INFERENCE = Formula(batch_norm.inference, batch_norm.inference_backward, None)
LAYER = Formula(layer_norm.forward, layer_norm.backward, None)
RMS = Formula(rms_norm.forward, rms_norm.backward, None)
CASES = {
    "LayerNorm": Case(Features("LayerNorm", SOLO), LAYER, False),
    "RMSNorm": Case(Features("RMSNorm", SOLO), RMS, False),
    "RMSNorm with offset": Case(Features("RMSNorm", SOLO), RMS, False, offset=1.0),
    "GroupNorm": Case(Channels("GroupNorm", SOLO, 2), LAYER, True),
    "GroupNorm of one group": Case(Channels("GroupNorm", SOLO, 1), LAYER, True),
    "InstanceNorm": Case(Channels("InstanceNorm", SOLO, None), LAYER, True),
    "BatchNorm": Case(Batch("BatchNorm", SOLO), TRAINING, True),
    "BatchNorm of products": Case(Batch("BatchNorm", SOLO), LAYER, True),
    "BatchNorm in inference": Case(
        Batch("BatchNorm", SOLO), Formula(batch_norm.inference, batch_norm.inference_backward, None), True, True
    ),
}
IMAGES = [name for name, case in CASES.items() if case.channels]


def within(there, here, units=4):
    """Raise unless numbers agree within units in the last place of the largest of their row; a gradient is a row."""
    for name, a, b in pairs(there, here):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise AssertionError(f"{name}: {a.dtype} {a.shape}, expected {b.dtype} {b.shape}")
        wide_a, wide_b = (
            c.astype("float64").reshape(-1, c.shape[-1] if name in ("y", "dx") else c.size) for c in (a, b)
        )
        largest = np.abs(wide_b).max(axis=1, keepdims=True)
        unit = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}[a.dtype.name]
        with np.errstate(invalid="ignore"):
            near = (wide_a == wide_b) | (np.abs(wide_a - wide_b) <= units * unit * np.minimum(largest, 1e300))
        if not np.all(near):
            raise AssertionError(f"{name}: {a}\nexpected\n{b}")


def pairs(there, here):
    """Yield the arrays of two results, and their name."""
    yield "y", there["y"], here["y"]
    yield "dx", there["dx"], here["dx"]
    for name in here["grads"]:
        yield name, there["grads"][name], here["grads"][name]


def hard_rows(x):
    """Put rows that lose digits among others."""
    x = x.copy()
    x[1] = 0
    x[3] += 3e4
    x[4] *= 1e-30
    x[6] *= 1e30
    x[7] *= 1e-40
    x[8] = 1.5
    return x
