"""Rows of the table beside torch, and odd inputs that work, as data: what `docs/norms/bad_input.md` shows."""

import warnings

import array_api_strict as strict
import numpy as np
import torch
import torch.nn.functional as F

from npnorm import norms
from tests.check import BFLOAT16
from tests.norms.bad_input.table import TABLE, array

X, IMAGE, W = array((4, 6)), array((4, 6, 5)), np.ones(6)
TX, TIMAGE, TW = (torch.from_numpy(a) for a in (X, IMAGE, W))


def layer_norm(x=TX, shape=(6,), weight=TW, bias=None, **settings):
    return F.layer_norm(x, shape, weight, bias, **settings)


def batch_norm(x=TX, mean=None, var=None, weight=None, training=True, **settings):
    return F.batch_norm(x, mean, var, weight, training=training, **settings)


def with_last(a, number):
    """Return numbers of which the last one is replaced."""
    a = a.clone()
    a[-1] = number
    return a


def layer_norm_backward(dy):
    x = TX.clone().requires_grad_()
    return torch.autograd.grad(layer_norm(x), x, dy)[0]


def tracked(x):
    """Return the running mean after a batch."""
    mean = torch.zeros(1, dtype=torch.float64)
    batch_norm(torch.tensor(x, dtype=torch.float64)[:, None], mean, torch.ones(1, dtype=torch.float64))
    return mean


REFUSED = {
    # a row of the table: the same by torch (None: there is nothing to compare with), and what that does
    "LayerNorm: x of shape (4, 5)": (lambda: layer_norm(TX[:, :5]), "RuntimeError"),
    "LayerNorm: x of too few axes": (lambda: layer_norm(TX[0], (4, 6), None), "RuntimeError"),
    "RMSNorm: x of too few axes": (lambda: F.rms_norm(TX[0], (4, 6)), "ValueError"),
    "LayerNorm: x of shape (), without parameters": (lambda: F.layer_norm(torch.tensor(1.0), (1,)), "RuntimeError"),
    "LayerNorm: x of shape (4, 0), without parameters": (lambda: F.layer_norm(TX[:, :0], (0,)), "accepted"),
    "LayerNorm: axes=0": (lambda: F.layer_norm(TX, ()), "RuntimeError"),
    "LayerNorm: axes that contradict the weight": (lambda: layer_norm(shape=(4, 6)), "RuntimeError"),
    "LayerNorm: weight of 1 for x of 6": (lambda: layer_norm(weight=TW[:1]), "RuntimeError"),
    "LayerNorm: weight (1, 6)": (lambda: layer_norm(weight=TW[None]), "RuntimeError"),
    "LayerNorm: weight of 5 and bias of 6": (lambda: layer_norm(weight=TW[:5], bias=TW), "RuntimeError"),
    "LayerNorm: x of int64": (lambda: F.layer_norm(TX.long(), (6,)), "NotImplementedError"),
    "BatchNorm: x of bool": (lambda: batch_norm(TX > 0), "NotImplementedError"),
    "L2Norm: x of int64": (lambda: F.normalize(TX.long()), "RuntimeError"),
    "LayerNorm: x of complex64": (lambda: F.layer_norm(TX.to(torch.complex64), (6,)), "NotImplementedError"),
    "RMSNorm: x of complex64": (lambda: F.rms_norm(TX.to(torch.complex64), (6,)), "accepted"),
    "LayerNorm: x of object": (None, "none"),
    "LayerNorm: x is a list": (lambda: layer_norm([1.0]), "TypeError"),
    "LayerNorm: weight is a list": (lambda: layer_norm(weight=[1.0]), "TypeError"),
    "LayerNorm: x is masked": (None, "none"),
    "RMSNorm: weight replaced by integers, before the first forward": (
        lambda: F.rms_norm(TX, (6,), TW.long()),
        "accepted",
    ),
    "InstanceNorm: bias replaced by (7,), before the first forward": (
        lambda: F.instance_norm(TIMAGE, bias=torch.ones(7).double()),
        "RuntimeError",
    ),
    "LayerNorm: params with a misspelled name, before the first forward": (None, "none"),
    "LayerNorm: weight of int64": (lambda: layer_norm(weight=TW.long()), "RuntimeError"),
    "LayerNorm: weight of another module": (lambda: layer_norm(weight=strict.asarray(W)), "TypeError"),
    "LayerNorm: weight on another device": (lambda: layer_norm(weight=TW.to("meta")), "RuntimeError"),
    "LayerNorm: eps=-9.0": (lambda: layer_norm(eps=-9.0), "NaN"),
    "RMSNorm: eps=-9.0": (lambda: F.rms_norm(TX, (6,), eps=-9.0), "NaN"),
    "GroupNorm: eps=-9.0": (lambda: F.group_norm(TX, 3, eps=-9.0), "NaN"),
    "InstanceNorm: eps=-9.0": (lambda: F.instance_norm(TIMAGE, eps=-9.0), "NaN"),
    "BatchNorm: eps=-9.0": (lambda: batch_norm(eps=-9.0), "ValueError"),
    "L2Norm: eps=-9.0": (lambda: F.normalize(TX, eps=-9.0), "accepted"),
    "LayerNorm: eps=nan": (lambda: layer_norm(eps=np.nan), "NaN"),
    "LayerNorm: eps=inf": (lambda: layer_norm(eps=np.inf), "accepted"),
    "LayerNorm: eps='1e-5'": (lambda: layer_norm(eps="1e-5"), "TypeError"),
    "LayerNorm: eps=None": (lambda: layer_norm(eps=None), "TypeError"),
    "RMSNorm: eps=None": (lambda: F.rms_norm(TX, (6,), eps=None), "accepted"),
    "LayerNorm: eps=True": (lambda: layer_norm(eps=True), "accepted"),
    "GroupNorm: 4 groups of 6": (lambda: F.group_norm(TX, 4), "RuntimeError"),
    "GroupNorm: groups=0": (lambda: F.group_norm(TX, 0), "ZeroDivisionError"),
    "GroupNorm: groups=-3": (lambda: F.group_norm(TX, -3), "RuntimeError"),
    "GroupNorm: groups=1.5": (lambda: F.group_norm(TX, 1.5), "TypeError"),
    "GroupNorm: groups=True": (lambda: F.group_norm(TX, True), "TypeError"),
    "GroupNorm: groups=None": (lambda: F.group_norm(TX, None), "TypeError"),
    "GroupNorm: x of shape (6,), without parameters": (lambda: F.group_norm(TX[0], 3), "RuntimeError"),
    "GroupNorm: weight of 3 for x of 6": (lambda: F.group_norm(TIMAGE, 3, TW[:3]), "RuntimeError"),
    "GroupNorm: x of shape (4, 6, 0), without parameters": (lambda: F.group_norm(TIMAGE[..., :0], 3), "accepted"),
    "InstanceNorm: one element of space: (4, 6, 1)": (lambda: F.instance_norm(TIMAGE[..., :1]), "ValueError"),
    "InstanceNorm: one element of space: (4, 6)": (lambda: F.instance_norm(TX), "ValueError"),
    "InstanceNorm: weight of 3 for x of 6": (lambda: F.instance_norm(TIMAGE, weight=TW[:3]), "RuntimeError"),
    "BatchNorm: 1 values in a channel: (1, 6)": (lambda: batch_norm(TX[:1]), "ValueError"),
    "BatchNorm: 0 values in a channel: (0, 6)": (lambda: batch_norm(TX[:0]), "accepted"),
    "BatchNorm: x of shape (6,), without parameters": (lambda: batch_norm(TX[0]), "IndexError"),
    "BatchNorm: weight of 3 for x of 6": (lambda: batch_norm(TIMAGE, weight=TW[:3]), "RuntimeError"),
    "BatchNorm: running_mean of 5": (lambda: batch_norm(mean=TW[:5].clone(), var=TW.clone()), "RuntimeError"),
    "BatchNorm: running_mean alone": (lambda: batch_norm(mean=TW.clone()), "ValueError"),
    "BatchNorm: running_var with -1.0": (
        lambda: batch_norm(mean=TW.clone(), var=with_last(TW, -1.0), training=False),
        "NaN",
    ),
    "BatchNorm: running_mean with nan": (
        lambda: batch_norm(mean=with_last(TW, np.nan), var=TW.clone(), training=False),
        "NaN",
    ),
    "BatchNorm: track of [1.0, nan, 3.0]": (lambda: tracked([1.0, np.nan, 3.0]), "NaN"),
    "BatchNorm: inference with a variance of 0": (
        lambda: batch_norm(mean=0 * TW, var=0 * TW, training=False, eps=0),
        "NaN",
    ),
    "BatchNorm: inference without statistics": (lambda: batch_norm(training=False), "RuntimeError"),
    "BatchNorm: momentum=-0.1": (lambda: batch_norm(mean=TW.clone(), var=TW.clone(), momentum=-0.1), "accepted"),
    "BatchNorm: momentum=1.1": (lambda: batch_norm(mean=TW.clone(), var=TW.clone(), momentum=1.1), "accepted"),
    "BatchNorm: momentum='0.1'": (lambda: batch_norm(mean=TW.clone(), var=TW.clone(), momentum="0.1"), "TypeError"),
    "LayerNorm: dy of shape (1, 6)": (lambda: layer_norm_backward(TX[:1]), "RuntimeError"),
    "LayerNorm: dy of int64": (lambda: layer_norm_backward(TX.long()), "accepted"),
    "LayerNorm: dy is a list": (lambda: layer_norm_backward([1.0]), "TypeError"),
    "LayerNorm: npnorm.norms.partial_rms_norm.Saved for saved": (None, "none"),
    "AddRMSNorm: residual of another shape": (lambda: F.rms_norm(TX + TX[:1], (6,)), "accepted"),
    "AddRMSNorm: x and residual of two dtypes": (lambda: F.rms_norm(TX + TX.float(), (6,)), "accepted"),
    "LayerNorm: y to an out of another shape": (None, "none"),
    "LayerNorm: y to an out of another dtype": (None, "none"),
    "LayerNorm: y to an out column by column": (None, "none"),
    "LayerNorm: y to an out that is x": (None, "none"),
    "PartialRMSNorm: p=0": (None, "none"),
}


def ours(norm, x=X):
    return lambda: norm.forward(x)[0]


def of(dtype):
    return X.astype(dtype)


NAN = np.where(np.arange(24).reshape(4, 6) == 0, np.nan, X)

ACCEPTED = [
    # what, npnorm, what it does, torch, what that does
    ("LayerNorm: a batch of 0", ours(norms.LayerNorm(W), X[:0]), "works", lambda: layer_norm(TX[:0]), "works"),
    ("GroupNorm: a batch of 0", ours(norms.GroupNorm(3), X[:0]), "works", lambda: F.group_norm(TX[:0], 3), "works"),
    (
        "LayerNorm: one feature",
        ours(norms.LayerNorm(), X[:, :1]),
        "works",
        lambda: F.layer_norm(TX[:, :1], (1,)),
        "works",
    ),
    (
        "GroupNorm: one sample, one element in a group",
        ours(norms.GroupNorm(6), X[:1]),
        "works",
        lambda: F.group_norm(TX[:1], 6),
        "ValueError",
    ),
    (
        "GroupNorm: four samples, one element in a group",
        ours(norms.GroupNorm(6)),
        "works",
        lambda: F.group_norm(TX, 6),
        "works",
    ),
    ("LayerNorm: eps=0", ours(norms.LayerNorm(eps=0)), "works", lambda: layer_norm(eps=0), "works"),
    (
        "LayerNorm: eps=0, a constant row",
        ours(norms.LayerNorm(eps=0), np.ones((2, 6))),
        "NaN",
        lambda: layer_norm(torch.ones(2, 6).double(), eps=0),
        "NaN",
    ),
    (
        "RMSNorm: eps=0, a row of zeros",
        ours(norms.RMSNorm(eps=0), np.zeros((2, 6))),
        "NaN",
        lambda: F.rms_norm(torch.zeros(2, 6), (6,), eps=0),
        "NaN",
    ),
    (
        "L2Norm: a row of zeros",
        ours(norms.L2Norm(), np.zeros((2, 6))),
        "works",
        lambda: F.normalize(torch.zeros(2, 6)),
        "works",
    ),
    ("BatchNorm, training: eps=0", ours(norms.BatchNorm(eps=0)), "works", lambda: batch_norm(eps=0), "ValueError"),
    (
        "LayerNorm: bfloat16 x, float32 weight",
        ours(norms.LayerNorm(W.astype("float32")), of(BFLOAT16)),
        "works",
        lambda: layer_norm(TX.bfloat16(), weight=TW.float()),
        "works",
    ),
    (
        "LayerNorm: float32 x, float64 weight",
        ours(norms.LayerNorm(W), of("float32")),
        "works",
        lambda: layer_norm(TX.float()),
        "RuntimeError",
    ),
    (
        "LayerNorm: float32 x, float16 weight",
        ours(norms.LayerNorm(W.astype("float16")), of("float32")),
        "works",
        lambda: layer_norm(TX.float(), weight=TW.half()),
        "RuntimeError",
    ),
    (
        "RMSNorm: float32 x, float64 weight",
        ours(norms.RMSNorm(W), of("float32")),
        "works",
        lambda: F.rms_norm(TX.float(), (6,), TW),
        "works",
    ),
    (
        "LayerNorm: a NaN in a row, seen in the other rows",
        lambda: norms.LayerNorm().forward(NAN)[0][1:],
        "works",
        lambda: layer_norm(torch.tensor(NAN))[1:],
        "works",
    ),
]


def verdict(call, works):
    """Return what a call comes to: the name of its error, "NaN", or `works`."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns once, of complex numbers and mixed dtypes
            y = call()
    except Exception as problem:
        return type(problem).__name__
    bad = torch.isnan(y) if isinstance(y, torch.Tensor) else np.isnan(y.astype("float64"))
    return "NaN" if bad.any() else works


def message(what):
    """Return what npnorm says of a row of the table."""
    (row,) = (row for row in TABLE if row.what == what)
    try:
        row.call()
    except row.error as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{what} is accepted")
