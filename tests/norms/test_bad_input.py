"""What does not fit is refused with one clear message, and what fits works, however odd: for every norm.

`docs/norms/bad_input.md` shows the rows of REFUSED and ACCEPTED to readers; a test holds it to them.
"""

import inspect
import pathlib
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import array_api_strict as strict
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from npnorm import norms
from npnorm.tree import leaves
from tests.check import BFLOAT16, check_protocol, close, same_bits
from tests.norms.catalogue import CATALOGUE

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "norms" / "bad_input.md"
ELSEWHERE = strict.Device("device1")


class Norm(NamedTuple):
    """A norm in small: the shapes of what its constructor, forward and backward take, by name."""

    make: Callable[..., Any]
    params: dict[str, tuple[int, ...]]
    inputs: dict[str, tuple[int, ...]]
    gradients: dict[str, tuple[int, ...]]
    shape: str = "(features,)"  # of the parameters, as messages say it
    names: dict[str, str] = {}  # what messages call an argument, where they use another name
    layers: dict[str, str] = {}  # what messages call the layer, where they use another name


ROWS = {"x": (4, 6)}, {"dy": (4, 6)}
IMAGES = {"x": (4, 6, 5)}, {"dy": (4, 6, 5)}
WB = {"weight": (6,), "bias": (6,)}
IN_RMS_NORM = dict.fromkeys(("weight", "bias", "eps"), "RMSNorm")

NORMS = {
    "LayerNorm": Norm(norms.LayerNorm, WB, *ROWS),
    "RMSNorm": Norm(norms.RMSNorm, WB, *ROWS),
    "PartialRMSNorm": Norm(norms.PartialRMSNorm, WB, *ROWS, "(features,), one axis"),
    "AddRMSNorm": Norm(
        norms.AddRMSNorm,
        WB,
        {"x": (4, 6), "residual": (4, 6)},
        {"dy": (4, 6), "dh": (4, 6)},
        layers=IN_RMS_NORM,
    ),
    "AdaptiveNorm": Norm(
        lambda: norms.AdaptiveNorm(norms.LayerNorm()),
        {},
        {"x": (3, 4, 6), "scale": (3, 6), "shift": (3, 6)},
        {"dy": (3, 4, 6)},
    ),
    "GatedRMSNorm": Norm(
        norms.GatedRMSNorm, {"weight": (6,)}, {"x": (4, 6), "gate": (4, 6)}, {"dy": (4, 6)}, "(features,), one axis"
    ),
    "QKNorm": Norm(
        norms.QKNorm,
        {"q_weight": (6,), "k_weight": (6,)},
        {"q": (2, 4, 6), "k": (2, 5, 6)},
        {"dq": (2, 4, 6), "dk": (2, 5, 6)},
        "(features,), one axis",
        {"q_weight": "weight", "k_weight": "weight", "dq": "dy", "dk": "dy"},
    ),
    "BatchNorm": Norm(norms.BatchNorm, WB, *IMAGES, "(channels,)"),
    "GroupNorm": Norm(lambda groups=3, **rest: norms.GroupNorm(groups, **rest), WB, *IMAGES, "(channels,)"),
    "InstanceNorm": Norm(norms.InstanceNorm, WB, *IMAGES, "(channels,)"),
    "ScaleNorm": Norm(norms.ScaleNorm, {"weight": (1,)}, *ROWS, "() or (1,)"),
    "L2Norm": Norm(norms.L2Norm, {}, *ROWS),
    "WeightNorm": Norm(
        norms.WeightNorm,
        {"weight_g": (4,)},
        {"weight_v": (4, 6)},
        {"dweight": (4, 6)},
        "(outputs,) or (outputs, 1, ...)",
    ),
    "DyT": Norm(norms.DyT, {"alpha": (1,), **WB}, *ROWS),
    "Derf": Norm(norms.Derf, {"alpha": (1,), "shift": (1,), **WB}, *ROWS),
}
SHAPES = {"alpha": "() or (1,)", "shift": "() or (1,)"}


def array(shape):
    """Return numbers of this shape, no two of them the same; anything but a tuple as it is."""
    return np.linspace(0.5, 2, int(np.prod(shape))).reshape(shape) if isinstance(shape, tuple) else shape


def attempt(name, everything=None, **changes):
    """Build a norm, run it forward and backward; `changes` are arrays, or shapes, or settings, by name.

    None leaves a parameter out. `everything` is applied to all arrays that are not changed.
    """
    norm = NORMS[name]
    put = everything or (lambda a: a)

    def arrays(shapes):
        return {n: array(changes.pop(n)) if n in changes else put(array(shape)) for n, shape in shapes.items()}

    params, inputs, gradients = arrays(norm.params), arrays(norm.inputs), arrays(norm.gradients)
    saved = changes.pop("saved", None)
    layer = norm.make(**{n: a for n, a in params.items() if a is not None}, **{n: array(a) for n, a in changes.items()})
    y, own = layer.forward(*inputs.values())
    return y, layer.backward(*gradients.values(), own if saved is None else saved)


class Row(NamedTuple):
    """A bad input, and what is said about it."""

    what: str
    call: Callable[[], Any]
    error: type[Exception]
    message: str  # a regular expression


def row(name, what, error, message, **changes):
    return Row(f"{name}: {what}", lambda: attempt(name, **changes), error, message)


def exact(message):
    return f"^{re.escape(message)}$"


def layer_of(name, argument):
    return NORMS[name].layers.get(argument, name)


def called(name, argument):
    return NORMS[name].names.get(argument, argument)


def settings():
    """Return rows for eps, groups, axes, momentum and other settings."""
    no_eps = ("AdaptiveNorm", "WeightNorm", "DyT", "Derf")
    for name in [name for name in NORMS if name not in no_eps]:
        for eps in (-1e-9, -0.5, np.nan, np.inf, -np.inf, "1e-5", None, True, 1j, [1e-5]):
            message = f"{layer_of(name, 'eps')}: eps is {eps!r}. It must be a finite number, 0 or greater."
            yield row(name, f"eps={eps!r}", ValueError, exact(message), eps=eps)
    for name in ("GroupNorm", "GatedRMSNorm"):
        for groups in (0, -3, 1.5, 2.0, True, "2", None, np.ones(2)):
            message = f"{name}: groups is {groups!r}. It must be an integer, 1 or more."
            yield row(name, f"groups={groups!r}", ValueError, exact(message), groups=groups)
        elements = {"GroupNorm": "channels", "GatedRMSNorm": "features"}[name]
        message = (
            f"{name}: 4 groups cannot share 6 {elements} equally. "
            f"Choose a number of groups that divides the {elements}."
        )
        yield row(name, "4 groups of 6", ValueError, exact(message), groups=4)
        without = {"weight": None} | ({"bias": None} if name == "GroupNorm" else {})
        yield row(name, "4 groups of 6, without parameters", ValueError, exact(message), groups=4, **without)
    for name in ("LayerNorm", "RMSNorm", "L2Norm", "ScaleNorm"):
        for axes in (0, -1, 1.5, True, "1"):
            message = f"{name}: axes is {axes!r}. It is how many trailing axes are the features: 1 or more."
            yield row(name, f"axes={axes!r}", ValueError, exact(message), axes=axes)
    for name in ("LayerNorm", "RMSNorm"):
        message = f"{name}: axes is 2, and the parameters have 1. Leave axes out."
        yield row(name, "axes that contradict the weight", ValueError, exact(message), axes=2)
    for momentum in (-0.1, 1.1, np.nan, np.inf, "0.1", True):
        message = f"BatchNorm: momentum is {momentum!r}. It must be a number from 0 to 1, or None."
        yield row("BatchNorm", f"momentum={momentum!r}", ValueError, exact(message), momentum=momentum)
    for batches in (-1, 1.5, True, None, "1"):
        message = f"BatchNorm: batches is {batches!r}. It must be an integer, 0 or greater."
        yield row("BatchNorm", f"batches={batches!r}", ValueError, exact(message), batches=batches)
    for p in (0, -0.5, 1.5, np.nan, "0.5", None, True):
        message = f"PartialRMSNorm: p is {p!r}. It must be above 0 and at most 1: k = ceil(n p) must be 1 or more."
        yield row("PartialRMSNorm", f"p={p!r}", ValueError, exact(message), p=p)
    message = "LayerNorm: statistics is 'fast'. Choose one of two-pass, packed, gathered."
    yield row("LayerNorm", "statistics='fast'", ValueError, exact(message), statistics="fast")
    message = "LayerNorm: statistics is []. Choose one of two-pass, packed, gathered."
    yield row("LayerNorm", "statistics=[]", ValueError, exact(message), statistics=[])
    message = r"^LayerNorm: eps is 10{400}\. It must be a finite number, 0 or greater\.$"
    yield row("LayerNorm", "eps=1000...", ValueError, message, eps=10**400)
    for name in ("RMSNorm", "QKNorm"):
        message = f"{name}: cast is 'bf16'. Choose None, 'llama', 'olmo2' or 'gemma'."
        yield row(name, "cast='bf16'", ValueError, exact(message), cast="bf16")
        for offset in (np.nan, "1", None, True):
            message = f"{name}: offset is {offset!r}. It must be a finite number, usually 0 or 1."
            yield row(name, f"offset={offset!r}", ValueError, exact(message), offset=offset)
    message = "RMSNorm: offset is 1, and there is no weight to add it to. Leave it out."
    yield row("RMSNorm", "offset without a weight", ValueError, exact(message), weight=None, offset=1)
    for name in [name for name in NORMS if name != "AdaptiveNorm"]:
        message = r"compute is 'float16'\. Choose None, 'float64' or 'float32'\.$"
        yield row(name, "compute='float16'", ValueError, message, compute="float16")
        message = r"compute='float32' would cut float64 arrays short\. Leave compute out for them\.$"
        yield row(name, "compute='float32' of float64", TypeError, message, compute="float32")
        message = r"group is a object\. Wrap a communicator first: npnorm\.mpi\.Ranks\(comm\)\.$"
        yield row(name, "a communicator that is not wrapped", TypeError, message, group=object())


def dtypes():
    """Return rows for arrays that do not hold floats, and for what is not an array."""
    for name, norm in NORMS.items():
        for argument, shape in (norm.params | norm.inputs | norm.gradients).items():
            layer, said = layer_of(name, argument), called(name, argument)
            for dtype in ("int64", "uint8", "bool", "object", "complex64", "longdouble", "str"):
                bad = array(shape).astype(dtype)
                remedy = {
                    "complex64": f"Take {said}.real; "
                    "the only complex dtype that is taken is complex128, for the complex step.",
                    "longdouble": f"Convert it first, for example by {said}.astype(numpy.float64).",
                }.get(dtype, f"Convert it first, for example by {said}.astype(numpy.float32).")
                message = f"{layer} works on float16, bfloat16, float32, float64; {said} is {bad.dtype.name}. {remedy}"
                yield row(name, f"{argument} of {dtype}", TypeError, exact(message), **{argument: bad})
            for bad in ([1.0], 1.0, "1.0", torch.ones(shape)):
                kind = type(bad).__name__
                if argument in norm.params and not hasattr(bad, "shape"):
                    message = exact(
                        f"{layer}: {said} must be an array of shape {SHAPES.get(argument, norm.shape)}; got a {kind}."
                        " Turn it into an array first, for example by numpy.asarray."
                    )
                else:
                    message = rf"; got a {kind}\. Turn it into an array first, for example by numpy\.asarray\.$"
                yield row(name, f"{argument} is a {kind}", TypeError, message, **{argument: bad})
            if argument in norm.inputs:
                message = r"; got a NoneType\. Turn it into an array first, for example by numpy\.asarray\.$"
                yield row(name, f"{argument} is None", TypeError, message, **{argument: None})


def sizes():
    """Return rows for a size where the weight belongs, as torch takes it."""
    for name in ("LayerNorm", "RMSNorm", "PartialRMSNorm", "BatchNorm", "GroupNorm", "InstanceNorm", "GatedRMSNorm"):
        made = re.escape(f"{name}.init(groups, 768)" if name == "GroupNorm" else f"{name}.init(768)")
        message = rf"^{name}: weight must be an array of shape .*; got an int\. {made} makes the weight\.$"
        yield row(name, "a number of features for weight", TypeError, message, weight=768)
    message = "LayerNorm: weight must be an array of shape (features,); got a list. LayerNorm.init([4, 6]) makes the"
    yield row("LayerNorm", "a shape for weight", TypeError, "^" + re.escape(message), weight=[4, 6])
    message = "DyT: alpha must be an array of shape () or (1,); got an int. Turn it into an array first, for example by"
    yield row("DyT", "an int for alpha", TypeError, "^" + re.escape(message), alpha=1)


def places():
    """Return rows for arrays of two modules, or on two devices."""
    for name, norm in NORMS.items():
        arguments = (norm.params | norm.inputs | norm.gradients).items()
        for argument, shape in arguments if len(arguments) > 1 else ():
            layer = layer_of(name, argument)
            modules = r"(numpy|array_api_strict)"
            message = rf": \w+ is an array of {modules}, \w+ one of {modules}\. Bring both to the same device first\.$"
            bad = strict.asarray(array(shape))
            yield row(
                name, f"{argument} of another module", TypeError, f"^({name}|{layer}){message}", **{argument: bad}
            )
            message = (
                r": \w+ is on .*Device\('\w+'\), \w+ on .*Device\('\w+'\)\. Bring both to the same device first\.$"
            )
            elsewhere = strict.asarray(array(shape), device=ELSEWHERE)
            yield row(
                name,
                f"{argument} on another device",
                TypeError,
                f"^({name}|{layer}){message}",
                everything=strict.asarray,
                **{argument: elsewhere},
            )


def shapes():
    """Return rows for shapes, each with its message."""
    one_axis = "each parameter must have shape (features,), one axis, the same for all; got"
    channels = "each parameter must have shape (channels,), the same for all; got"
    another = "Hand backward the gradient of the y that belongs to this saved."
    for name in ("LayerNorm", "RMSNorm", "DyT", "Derf"):
        features = f"{name}: each parameter must have shape (features,), the same for all; got"
        yield name, "weight of 5 and bias of 6", {"weight": (5,)}, f"{features} weight (5,), bias (6,)."
        yield name, "weight (1, 6) and bias (6,)", {"weight": (1, 6)}, f"{features} weight (1, 6), bias (6,)."
        yield name, "weight of no axis", {"weight": (), "bias": ()}, f"{features} weight (), bias ()."
        yield name, "empty weight", {"weight": (0,), "bias": (0,)}, f"{features} weight (0,), bias (0,)."
        for n in (1, 5, 7):
            said = f"{name} holds {n} features; x has shape (4, 6). The last axis must be {n}."
            yield name, f"weight of {n} for x of 6", {"weight": (n,), "bias": (n,)}, said
        said = f"{name} holds features of shape (1, 6); x has shape (4, 6). The last 2 axes must be (1, 6)."
        yield name, "weight (1, 6)", {"weight": (1, 6), "bias": None}, said
        for shape in ((4, 5), (5,), (6, 1), (4, 6, 0), (), (6, 0)):
            said = f"{name} holds 6 features; x has shape {shape}. The last axis must be 6."
            yield name, f"x of shape {shape}", {"x": shape}, said
        said = f"{name} holds features of shape (4, 6); x has shape (6,). The last 2 axes must be (4, 6)."
        yield name, "x of too few axes", {"weight": (4, 6), "bias": None, "x": (6,)}, said
    for name, none in (("PartialRMSNorm", {"bias": None}), ("GatedRMSNorm", {})):
        for n in (1, 5, 7):
            first = "gate" if name == "GatedRMSNorm" else "x"
            said = f"{name} holds {n} features; {first} has shape (4, 6). The last axis must be {n}."
            yield name, f"weight of {n} for x of 6", {"weight": (n,), **none}, said
        for shape in ((1, 6), (), (0,)):
            yield name, f"weight {shape}", {"weight": shape, **none}, f"{name}: {one_axis} weight {shape}."
        for shape in ((4, 5), (5,), (4, 0), ()):
            said = f"{name} holds 6 features; x has shape {shape}. The last axis must be 6."
            yield name, f"x of shape {shape}", {"x": shape}, said
    said = f"PartialRMSNorm: {one_axis} weight (5,), bias (6,)."
    yield "PartialRMSNorm", "weight of 5 and bias of 6", {"weight": (5,)}, said
    for name in ("LayerNorm", "RMSNorm", "PartialRMSNorm", "L2Norm", "ScaleNorm", "DyT", "Derf"):
        none = {} if name in ("L2Norm", "ScaleNorm") else {"weight": None, "bias": None}
        for shape in ((4, 0), (0,), ()):
            said = f"{name} needs at least one feature; x has shape {shape}. The last axis must not be empty."
            yield name, f"x of shape {shape}, without parameters", {"x": shape, **none}, said
    for name in ("LayerNorm", "RMSNorm", "L2Norm", "ScaleNorm"):
        none = {} if name in ("L2Norm", "ScaleNorm") else {"weight": None, "bias": None}
        said = f"{name} needs at least one feature; x has shape (4, 6). The last 3 axes must not be empty."
        yield name, "three axes of two", {"axes": 3, **none}, said
    said = "GatedRMSNorm: gate has shape (1, 6), and x (4, 6). Both must have the same shape."
    yield "GatedRMSNorm", "gate of another shape", {"gate": (1, 6)}, said
    for n in ((5,), (1, 6), ()):
        said = f"RMSNorm: each parameter must have shape (features,), the same for all; got weight {n}, bias"
        yield "AddRMSNorm", f"weight {n}", {"weight": n}, f"{said} (6,)."
    said = "AddRMSNorm holds 6 features; x has shape (4, 5). The last axis must be 6."
    yield "AddRMSNorm", "x of shape (4, 5)", {"x": (4, 5)}, said
    said = "AddRMSNorm holds 6 features; residual has shape (4, 5). The last axis must be 6."
    yield "AddRMSNorm", "residual of shape (4, 5)", {"residual": (4, 5)}, said
    said = "AddRMSNorm: residual has shape (1, 6), and x (4, 6). Both must have the same shape."
    yield "AddRMSNorm", "residual of another shape", {"residual": (1, 6)}, said
    said = "AddRMSNorm: dh has shape (1, 6), and x (4, 6). Both must have the same shape."
    yield "AddRMSNorm", "dh of another shape", {"dh": (1, 6)}, said
    for shape in ((3, 4, 0), ()):
        said = f"AdaptiveNorm needs at least one feature; x has shape {shape}. The last axis must not be empty."
        yield "AdaptiveNorm", f"x of shape {shape}", {"x": shape}, said
    takes = "They take (samples, ..., features) and (samples, features)."
    for argument in ("scale", "shift"):
        for shape in ((6,), (1, 6), (3, 1), (3, 5), (3, 4, 6), (4, 6)):
            said = f"AdaptiveNorm: x has shape (3, 4, 6), {argument} {shape}. {takes}"
            yield "AdaptiveNorm", f"{argument} {shape}", {argument: shape}, said
    said = f"AdaptiveNorm: x has shape (6,), scale (6,). {takes}"
    yield "AdaptiveNorm", "x without samples", {"x": (6,), "scale": (6,), "shift": (6,)}, said
    said = "QKNorm: the weight of the queries has shape (6,), of the keys (5,). Per head both have shape (head_dim,)."
    yield "QKNorm", "k_weight of 5", {"k_weight": (5,)}, said
    for shape in ((1, 6), (), (0,)):
        yield "QKNorm", f"q_weight {shape}", {"q_weight": shape}, f"QKNorm: {one_axis} weight {shape}."
    for argument in ("q", "k"):
        for shape in ((2, 4, 5), (5,), ()):
            said = f"QKNorm holds 6 features; {argument} has shape {shape}. The last axis must be 6."
            yield "QKNorm", f"{argument} of shape {shape}", {argument: shape}, said
        said = "QKNorm holds 1 features; q has shape (2, 4, 6). The last axis must be 1."
        yield "QKNorm", f"weights of 1, {argument} of 6", {"q_weight": (1,), "k_weight": (1,)}, said
    takes = "It takes (N, C, ...) with nothing empty but N; axis 1"
    for name in ("BatchNorm", "GroupNorm", "InstanceNorm"):
        yield name, "weight of 3 and bias of 6", {"weight": (3,)}, f"{name}: {channels} weight (3,), bias (6,)."
        for shape in ((1, 6), (6, 1, 1), (), (0,)):
            said = f"{name}: {channels} weight {shape}."
            yield name, f"weight {shape}", {"weight": shape, "bias": None}, said
        for n in (3, 9, 12):
            said = f"{name} holds {n} channels; x has shape (4, 6, 5). {takes} must be {n}."
            yield name, f"weight of {n} for x of 6", {"weight": (n,), "bias": (n,)}, said
        for shape in ((4, 5, 6), (6,), (), (4, 6, 0), (4, 0, 5)):
            said = f"{name} holds 6 channels; x has shape {shape}. {takes} must be 6."
            yield name, f"x of shape {shape}", {"x": shape}, said
        for shape in ((6,), (), (4, 6, 0), (4, 0)):
            said = f"{name} needs at least one channel; x has shape {shape}. {takes} is the channels."
            yield name, f"x of shape {shape}, without parameters", {"x": shape, "weight": None, "bias": None}, said
    takes = "InstanceNorm takes (N, C, ...) with more than one element of space; x has shape"
    for shape in ((4, 6), (4, 6, 1), (4, 6, 1, 1), (1, 6, 1)):
        said = f"{takes} {shape}. The variance of a single element is 0."
        yield "InstanceNorm", f"one element of space: {shape}", {"x": shape}, said
    for shape, n in (((1, 6), 1), ((1, 6, 1), 1), ((0, 6), 0), ((0, 6, 5), 0)):
        said = (
            f"BatchNorm: elements in a channel of x over all ranks: {n}. Its variance says nothing. "
            "Train with at least two, or call inference."
        )
        yield "BatchNorm", f"{n} values in a channel: {shape}", {"x": shape}, said
    arrays = {"weight": None, "bias": None}
    running = {"running_mean": (6,), "running_var": (6,)}
    said = f"BatchNorm: {channels} running_mean (5,), running_var (6,)."
    yield "BatchNorm", "running_mean of 5", {**arrays, **running, "running_mean": (5,)}, said
    said = f"BatchNorm: {channels} weight (6,), bias (6,), running_mean (5,), running_var (5,)."
    yield "BatchNorm", "running statistics of 5", {"running_mean": (5,), "running_var": (5,)}, said
    said = f"BatchNorm holds 6 channels; x has shape (4, 5). {'It takes (N, C, ...) with nothing empty but N; axis 1'}"
    yield "BatchNorm", "running statistics of 6 for x of 5", {**arrays, **running, "x": (4, 5)}, f"{said} must be 6."
    variances = np.array([1.0, 2, 3, 4, 5, -1e-30])
    said = "BatchNorm: running_var has a negative number. A variance is 0 or greater."
    yield "BatchNorm", "running_var with -1e-30", {"running_mean": (6,), "running_var": variances}, said
    for n in ("running_mean", "running_var"):
        for bad in (np.nan, np.inf, -np.inf):
            said = f"BatchNorm: {n} has a NaN or infinity. Start from finite numbers."
            yield "BatchNorm", f"{n} with {bad}", {**running, n: np.array([1.0, 2, 3, 4, 5, bad])}, said
    for n in ("running_mean", "running_var"):
        said = "BatchNorm: running_mean and running_var come together, or not at all."
        yield "BatchNorm", f"{n} alone", {n: (6,)}, said
    for shape in ((2,), (6,), (1, 1)):
        said = f"ScaleNorm: each parameter must have shape () or (1,), the same for all; got weight {shape}."
        yield "ScaleNorm", f"weight {shape}", {"weight": shape}, said
    for name, argument in (("DyT", "alpha"), ("Derf", "alpha"), ("Derf", "shift")):
        for shape in ((6,), (1, 1), (0,)):
            said = f"{name}: each parameter must have shape () or (1,), the same for all; got {argument} {shape}."
            yield name, f"{argument} {shape}", {argument: shape}, said
    for shape in ((), (4, 6), (2, 2), (0,)):
        said = "WeightNorm: each parameter must have shape (outputs,) or (outputs, 1, ...), the same for all; got"
        yield "WeightNorm", f"weight_g {shape}", {"weight_g": shape}, f"{said} weight_g {shape}."
    takes = "It takes (outputs, inputs, ...), with"
    for n in (1, 3):
        said = f"WeightNorm holds {n} lengths; weight_v has shape (4, 6). {takes} {n} outputs."
        yield "WeightNorm", f"{n} lengths", {"weight_g": (n,)}, said
    for shape in ((4,), (), (4, 0), (3, 6)):
        said = f"WeightNorm holds 4 lengths; weight_v has shape {shape}. {takes} 4 outputs."
        yield "WeightNorm", f"weight_v of shape {shape}", {"weight_v": shape}, said
    said = "WeightNorm: dweight has shape (4, 5), and weight_v (4, 6). Both must have the same shape."
    yield "WeightNorm", "dweight of another shape", {"dweight": (4, 5)}, said
    for name, norm in NORMS.items():
        if "dy" in norm.gradients:
            (first, shape), layer = next(iter(norm.inputs.items())), layer_of(name, "dy")
            more = (1, *shape) if len(shape) == 2 else (*shape, 1)
            for bad in ((1, *shape[1:]), more) if name != "AdaptiveNorm" else ((1, *shape[1:]),):
                said = f"{layer}: dy has shape {bad}, and the {first} that was saved {shape}. {another}"
                yield name, f"dy of shape {bad}", {"dy": bad}, said
    for argument, shape in NORMS["QKNorm"].inputs.items():
        said = f"QKNorm: dy has shape (1, 6), and the {argument} that was saved {shape}. {another}"
        yield "QKNorm", f"d{argument} of another shape", {f"d{argument}": (1, 6)}, said


def strangers():
    """Return rows for what backward did not get from forward."""
    for name in NORMS:
        layer = layer_of(name, "saved")
        other = norms.PartialRMSNorm if name != "PartialRMSNorm" else norms.LayerNorm
        _, theirs = other().forward(np.ones((4, 6)))
        for saved, kind in ((theirs, f"{type(theirs).__module__}.Saved"), ((1, 2), "builtins.tuple")):
            message = f"{layer}.backward takes what {layer}.forward saved; got {kind}."
            yield row(name, f"{kind} for saved", TypeError, exact(message), saved=saved)
    x = np.ones((4, 6))
    for bad, got in ((3, "an int"), (norms.GroupNorm(2), "a GroupNorm")):
        message = f"AdaptiveNorm takes a LayerNorm or RMSNorm; got {got}."
        yield Row(
            f"AdaptiveNorm: of a {type(bad).__name__}",
            lambda bad=bad: norms.AdaptiveNorm(bad),
            TypeError,
            exact(message),
        )
    for bad in (norms.LayerNorm(np.ones(6)), norms.RMSNorm(axes=2)):
        message = (
            f"AdaptiveNorm takes a norm without weight and bias, over one axis; this one has {list(bad.params)} and "
            f"{bad.axes.count} axes. The scale and shift of a sample stand for weight and bias."
        )
        yield Row(
            f"AdaptiveNorm: of a {type(bad).__name__} with its own axes or weight",
            lambda bad=bad: norms.AdaptiveNorm(bad),
            ValueError,
            exact(message),
        )
    message = (
        "AddRMSNorm: residual is float32, x is float64. Convert one of them: the sum would silently have the wider"
    )
    yield row("AddRMSNorm", "x and residual of two dtypes", TypeError, re.escape(message), residual=x.astype("float32"))
    message = "AddRMSNorm: dh is float32, x is float64. Convert one of them: the sum would silently have the wider"
    yield row("AddRMSNorm", "dh of another dtype", TypeError, re.escape(message), dh=x.astype("float32"))
    message = exact("PartialRMSNorm: rng is a int. Pass a generator: numpy.random.default_rng(seed).")
    yield Row("PartialRMSNorm: a seed for rng", lambda: norms.PartialRMSNorm().forward(x, 3), TypeError, message)
    message = exact(
        "BatchNorm: inference needs running statistics, and none are known. Track a batch first: norm.track(saved), "
        "or pass running_mean and running_var."
    )
    yield Row("BatchNorm: inference without statistics", lambda: norms.BatchNorm().inference(x), ValueError, message)

    def track(values):
        norm = norms.BatchNorm()
        norm.track(norm.forward(np.array(values)[:, None])[1])

    for values in ([1.0, np.nan, 3.0], [1.0, np.inf, 3.0], [1e300, -1e300, 0.0]):
        message = exact(
            "BatchNorm: statistics of this batch are not finite in float64; the running statistics stay as they were. "
            "Look for a NaN, an infinity or huge numbers in x."
        )
        yield Row(f"BatchNorm: track of {values}", lambda values=values: track(values), ValueError, message)
    message = exact("BatchNorm: running_var + eps is 0 in some channel. Take an eps above 0 for inference.")
    still = norms.BatchNorm(eps=0, running_mean=np.zeros(6), running_var=np.zeros(6))
    yield Row("BatchNorm: inference with a variance of 0", lambda: still.inference(x), ValueError, message)
    _, theirs = norms.LayerNorm().forward(x)
    message = exact("BatchNorm.backward takes what BatchNorm.forward saved; got npnorm.norms.layer_norm.Saved.")
    yield Row("BatchNorm: track of another norm", lambda: norms.BatchNorm().track(theirs), TypeError, message)


def mixed_up():
    """Return rows for what a norm of the same class, but with other settings, saved."""
    x = np.random.default_rng(1).standard_normal((2, 6, 4))
    rows_of = {
        "GroupNorm: saved by one of more groups": (norms.GroupNorm(3), norms.GroupNorm(6), 6, 12),
        "GroupNorm: saved by one of fewer groups": (norms.GroupNorm(6), norms.GroupNorm(3), 12, 6),
        "GroupNorm: saved by an InstanceNorm": (norms.GroupNorm(3), norms.InstanceNorm(), 6, 12),
        "InstanceNorm: saved by a GroupNorm": (norms.InstanceNorm(), norms.GroupNorm(3), 12, 6),
        "LayerNorm: saved by one of fewer axes": (norms.LayerNorm(axes=2), norms.LayerNorm(), 2, 12),
        "LayerNorm: saved by one of more axes": (norms.LayerNorm(), norms.LayerNorm(axes=2), 12, 2),
        "RMSNorm: saved by one of fewer axes": (norms.RMSNorm(axes=2), norms.RMSNorm(), 2, 12),
        "RMSNorm: saved by one of more axes": (norms.RMSNorm(), norms.RMSNorm(axes=2), 12, 2),
        "L2Norm: saved by one of fewer axes": (norms.L2Norm(axes=2), norms.L2Norm(), 2, 12),
    }
    for what, (norm, other, makes, came) in rows_of.items():
        message = (
            f"{what.partition(':')[0]}: this norm makes {makes} rows of x, and saved has statistics of {came}. "
            "Hand backward what this very norm saved."
        )
        yield Row(what, partial(norm.backward, x, other.forward(x)[1]), ValueError, exact(message))
    adaptive, other = norms.AdaptiveNorm(norms.RMSNorm()), norms.AdaptiveNorm(norms.LayerNorm())
    _, saved = other.forward(x, x[:, 0], x[:, 1])
    what = "AdaptiveNorm: saved by one of another norm"
    yield Row(what, partial(adaptive.backward, x, saved), ValueError, "^AdaptiveNorm.*saved")


def complex_numbers():
    """Return rows for complex128 beside floats; together they are let through, for the complex step."""
    for argument in ("weight", "dy"):
        bad = array(NORMS["LayerNorm"].params.get(argument, (4, 6))) + 0j
        yield row("LayerNorm", f"{argument} of complex128", TypeError, "^LayerNorm.*complex128", **{argument: bad})


def built(name):
    return NORMS[name].make(**{n: array(shape) for n, shape in NORMS[name].params.items()})


TAKE_OUT = [name for name in NORMS if "out" in inspect.signature(built(name).forward).parameters]


def outs():
    """Return rows for an out that cannot be written to, or that is read."""
    for name in TAKE_OUT:
        (shape,) = NORMS[name].inputs.values()
        like_x = f"{name}: out must be an array like x, {shape} float64;"
        fresh = "Make it by numpy.empty_like(x)."
        in_order = f"{name}: out must be writable, aligned and in C order. Make it by numpy.empty(x.shape, x.dtype)."
        shared = f"{name}: out shares memory with an array that is read, and that backward may need. Take another."
        fixed = np.empty(shape)
        fixed.flags.writeable = False
        wider = (*shape[:-1], shape[-1] + 1)
        for what, out, said in (
            ("of another shape", np.empty(wider), f"{like_x} got {wider} float64. {fresh}"),
            ("with an axis more", np.empty((1, *shape)), f"{like_x} got {(1, *shape)} float64. {fresh}"),
            ("of another dtype", np.empty(shape, "float32"), f"{like_x} got {shape} float32. {fresh}"),
            ("big-endian", np.empty(shape, ">f8"), f"{like_x} got {shape} float64. {fresh}"),
            ("of another library", strict.empty(shape), f"{like_x} got {shape} float64. {fresh}"),
            ("column by column", np.empty(shape, order="F"), in_order),
            ("every second of a larger array", np.empty((2 * shape[0], *shape[1:]))[::2], in_order),
            ("that may not be written to", fixed, in_order),
            ("that is x", lambda x, dy: x, shared),
            ("that overlaps x", lambda x, dy: x.base[1:], shared),
        ):
            yield Row(f"{name}: y to an out {what}", partial(write_to, name, out, False), ValueError, exact(said))
            yield Row(f"{name}: dx to an out {what}", partial(write_to, name, out, True), ValueError, exact(said))
        own = partial(write_to, name, lambda x, dy: dy, True)
        yield Row(f"{name}: dx to an out that is dy", own, ValueError, exact(shared))
        overlapping = partial(write_to, name, lambda x, dy: dy.base[1:], True)
        yield Row(f"{name}: dx to an out that overlaps dy", overlapping, ValueError, exact(shared))
        for bad in ([1.0], 1.0):
            for backward in (False, True):
                what = f"{name}: {'dx' if backward else 'y'} to an out that is a {type(bad).__name__}"
                message = rf"; got a {type(bad).__name__}\."
                yield Row(what, partial(write_to, name, bad, backward), TypeError, message)


def write_to(name, out, backward):
    """Run a norm forward, or backward, into `out`; x and dy are parts of larger arrays."""
    layer, (shape,) = built(name), NORMS[name].inputs.values()
    x, dy = (np.array(array((shape[0] + 1, *shape[1:])))[:-1] for _ in range(2))
    if callable(out):
        out = out(x, dy)
    if not backward:
        return layer.forward(x, out=out)
    return layer.backward(dy, layer.forward(x)[1], out=out)


TABLE = [
    *settings(),
    *dtypes(),
    *sizes(),
    *places(),
    *(row(name, what, ValueError, exact(said), **changes) for name, what, changes, said in shapes()),
    *strangers(),
    *mixed_up(),
    *complex_numbers(),
    *outs(),
]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.what) for row in TABLE])
def test_bad_input_is_refused(row):
    with pytest.raises(row.error, match=row.message):
        row.call()


@pytest.mark.parametrize("name", NORMS)
def test_the_same_call_with_nothing_bad_works(name):
    attempt(name)
    attempt(name, everything=strict.asarray)


def test_the_table_has_every_norm_and_no_row_twice():
    assert set(NORMS) == {name for name in norms.__all__ if name[0].isupper()}
    whats = [row.what for row in TABLE]
    assert len(set(whats)) == len(whats)


X = np.random.default_rng(2).standard_normal((4, 6))
IMAGE = np.random.default_rng(3).standard_normal((4, 6, 5))
W, TW = np.ones(6), torch.ones(6, dtype=torch.float64)
TX, TIMAGE = torch.from_numpy(X), torch.from_numpy(IMAGE)


def layer_norm(x=X, weight=W, bias=None, **settings):
    return norms.LayerNorm(weight, bias, **settings).forward(x)[0]


def torch_layer_norm(x=TX, shape=(6,), weight=TW, bias=None, **settings):
    return F.layer_norm(x, shape, weight, bias, **settings)


def batch_norm(x=X, weight=None, **settings):
    return norms.BatchNorm(weight, **settings).forward(x)[0]


def torch_batch_norm(x=TX, mean=None, var=None, weight=None, training=True, **settings):
    return F.batch_norm(x, mean, var, weight, training=training, **settings)


def group_norm(groups=3, x=X, weight=None, **settings):
    return norms.GroupNorm(groups, weight, **settings).forward(x)[0]


def backward(dy):
    return norms.LayerNorm(W).backward(dy, norms.LayerNorm(W).forward(X)[1])[0]


def torch_backward(dy):
    x = TX.clone().requires_grad_()
    return torch.autograd.grad(torch_layer_norm(x), x, dy)[0]


def torch_tracked(x):
    """Return the running mean after a batch."""
    mean = TW.clone()
    torch_batch_norm(x, mean, TW.clone())
    return mean


def nan_row(x):
    x = x.clone() if isinstance(x, torch.Tensor) else x.copy()
    x[0, 0] = np.nan
    return x


def complex64(x):
    return x.astype("complex64") if isinstance(x, np.ndarray) else x.to(torch.complex64)


REFUSED = [
    # what, what npnorm says (its beginning), npnorm, torch (None: there is nothing to compare with), what torch does
    (
        "LayerNorm: x of another width than the weight",
        "ValueError: LayerNorm holds 6 features; x has shape (4, 5). The last axis must be 6.",
        lambda: layer_norm(X[:, :5]),
        lambda: torch_layer_norm(TX[:, :5]),
        "RuntimeError",
    ),
    (
        "LayerNorm: fewer axes than the weight",
        "ValueError: LayerNorm holds features of shape (4, 6); x has shape (6,). The last 2 axes must be (4, 6).",
        lambda: layer_norm(X[0], np.ones((4, 6))),
        lambda: torch_layer_norm(TX[0], (4, 6), None),
        "RuntimeError",
    ),
    (
        "RMSNorm: fewer axes than the weight",
        "ValueError: RMSNorm holds features of shape (4, 6); x has shape (6,).",
        lambda: norms.RMSNorm(np.ones((4, 6))).forward(X[0]),
        lambda: F.rms_norm(TX[0], (4, 6)),
        "ValueError",
    ),
    (
        "LayerNorm: x of no axis",
        "ValueError: LayerNorm needs at least one feature; x has shape (). The last axis must not be empty.",
        lambda: layer_norm(np.array(1.0), None),
        lambda: F.layer_norm(torch.tensor(1.0), (1,)),
        "RuntimeError",
    ),
    (
        "LayerNorm: x of no features",
        "ValueError: LayerNorm needs at least one feature; x has shape (4, 0). The last axis must not be empty.",
        lambda: layer_norm(X[:, :0], None),
        lambda: F.layer_norm(TX[:, :0], (0,)),
        "accepted",
    ),
    (
        "LayerNorm: normalized over no axis",
        "ValueError: LayerNorm: axes is 0. It is how many trailing axes are the features: 1 or more.",
        lambda: norms.LayerNorm(axes=0),
        lambda: F.layer_norm(TX, ()),
        "RuntimeError",
    ),
    (
        "LayerNorm: axes that contradict the weight",
        "ValueError: LayerNorm: axes is 2, and the parameters have 1. Leave axes out.",
        lambda: layer_norm(axes=2),
        lambda: torch_layer_norm(shape=(4, 6)),
        "RuntimeError",
    ),
    (
        "LayerNorm: a weight (1,) for 6 features",
        "ValueError: LayerNorm holds 1 features; x has shape (4, 6). The last axis must be 1.",
        lambda: layer_norm(weight=W[:1]),
        lambda: torch_layer_norm(weight=TW[:1]),
        "RuntimeError",
    ),
    (
        "LayerNorm: a weight (1, 6) for 6 features",
        "ValueError: LayerNorm holds features of shape (1, 6); x has shape (4, 6). The last 2 axes must be (1, 6).",
        lambda: layer_norm(weight=W[None]),
        lambda: torch_layer_norm(weight=TW[None]),
        "RuntimeError",
    ),
    (
        "LayerNorm: weight and bias of two shapes",
        "ValueError: LayerNorm: each parameter must have shape (features,), the same for all; "
        "got weight (6,), bias (5,).",
        lambda: layer_norm(bias=W[:5]),
        lambda: torch_layer_norm(bias=TW[:5]),
        "RuntimeError",
    ),
    (
        "LayerNorm: x of integers",
        "TypeError: LayerNorm works on float16, bfloat16, float32, float64; x is int64. Convert it first,",
        lambda: layer_norm(X.astype(int), None),
        lambda: F.layer_norm(TX.long(), (6,)),
        "NotImplementedError",
    ),
    (
        "BatchNorm: x of booleans",
        "TypeError: BatchNorm works on float16, bfloat16, float32, float64; x is bool. Convert it first,",
        lambda: batch_norm(X > 0),
        lambda: torch_batch_norm(TX > 0),
        "NotImplementedError",
    ),
    (
        "L2Norm: x of integers",
        "TypeError: L2Norm works on float16, bfloat16, float32, float64; x is int64. Convert it first,",
        lambda: norms.L2Norm().forward(X.astype(int)),
        lambda: F.normalize(TX.long()),
        "RuntimeError",
    ),
    (
        "LayerNorm: complex64 x",
        "TypeError: LayerNorm works on float16, bfloat16, float32, float64; x is complex64. Take x.real",
        lambda: layer_norm(complex64(X), None),
        lambda: F.layer_norm(complex64(TX), (6,)),
        "NotImplementedError",
    ),
    (
        "RMSNorm: complex64 x",
        "TypeError: RMSNorm works on float16, bfloat16, float32, float64; x is complex64. Take x.real",
        lambda: norms.RMSNorm().forward(complex64(X)),
        lambda: F.rms_norm(complex64(TX), (6,)),
        "accepted",
    ),
    (
        "LayerNorm: x of Python objects",
        "TypeError: LayerNorm works on float16, bfloat16, float32, float64; x is object. Convert it first,",
        lambda: layer_norm(X.astype(object)),
        None,
        "",
    ),
    (
        "LayerNorm: x is a list",
        "TypeError: LayerNorm: npnorm works on arrays of NumPy, CuPy or the array API standard; got a list.",
        lambda: layer_norm(X.tolist()),
        lambda: torch_layer_norm(X.tolist()),
        "TypeError",
    ),
    (
        "LayerNorm: the weight is a list",
        "TypeError: LayerNorm: weight must be an array of shape (features,); got a list. Turn it into an array first,",
        lambda: layer_norm(weight=W.tolist()),
        lambda: torch_layer_norm(weight=W.tolist()),
        "TypeError",
    ),
    (
        "LayerNorm: a weight of integers",
        "TypeError: LayerNorm works on float16, bfloat16, float32, float64; weight is int64. Convert it first,",
        lambda: layer_norm(weight=W.astype(int)),
        lambda: torch_layer_norm(weight=TW.long()),
        "RuntimeError",
    ),
    (
        "LayerNorm: a weight of another array library",
        "TypeError: LayerNorm: weight is an array of array_api_strict, x one of numpy. Bring both to the same device",
        lambda: layer_norm(weight=strict.asarray(W)),
        lambda: torch_layer_norm(weight=W),
        "TypeError",
    ),
    (
        "LayerNorm: a weight on another device",
        "TypeError: LayerNorm: weight is on array_api_strict.Device('device1'), x on "
        "array_api_strict.Device('CPU_DEVICE'). Bring both to the same device first.",
        lambda: layer_norm(strict.asarray(X), strict.asarray(W, device=ELSEWHERE)),
        lambda: torch_layer_norm(weight=TW.to("meta")),
        "RuntimeError",
    ),
    *(
        (
            f"{name}: eps={eps!r}",
            f"ValueError: {name}: eps is {eps!r}. It must be a finite number, 0 or greater.",
            lambda name=name, eps=eps: attempt(name, eps=eps),
            theirs,
            verdict,
        )
        for name, eps, theirs, verdict in [
            ("LayerNorm", -9.0, lambda: torch_layer_norm(eps=-9.0), "NaN"),
            ("RMSNorm", -9.0, lambda: F.rms_norm(TX, (6,), eps=-9.0), "NaN"),
            ("GroupNorm", -9.0, lambda: F.group_norm(TX, 3, eps=-9.0), "NaN"),
            ("InstanceNorm", -9.0, lambda: F.instance_norm(TIMAGE, eps=-9.0), "NaN"),
            ("BatchNorm", -9.0, lambda: torch_batch_norm(eps=-9.0), "ValueError"),
            ("L2Norm", -9.0, lambda: F.normalize(TX, eps=-9.0), "accepted"),
            ("LayerNorm", np.nan, lambda: torch_layer_norm(eps=np.nan), "NaN"),
            ("LayerNorm", np.inf, lambda: torch_layer_norm(eps=np.inf), "accepted"),
            ("LayerNorm", "1e-5", lambda: torch_layer_norm(eps="1e-5"), "TypeError"),
            ("LayerNorm", None, lambda: torch_layer_norm(eps=None), "TypeError"),
            ("RMSNorm", None, lambda: F.rms_norm(TX, (6,), eps=None), "accepted"),
            ("LayerNorm", True, lambda: torch_layer_norm(eps=True), "accepted"),
        ]
    ),
    (
        "GroupNorm: 4 groups for 6 channels",
        "ValueError: GroupNorm: 4 groups cannot share 6 channels equally. Choose a number of groups that divides",
        lambda: group_norm(4),
        lambda: F.group_norm(TX, 4),
        "RuntimeError",
    ),
    *(
        (
            f"GroupNorm: groups={groups!r}",
            f"ValueError: GroupNorm: groups is {groups!r}. It must be an integer, 1 or more.",
            lambda groups=groups: group_norm(groups),
            lambda groups=groups: F.group_norm(TX, groups),
            verdict,
        )
        for groups, verdict in [
            (0, "ZeroDivisionError"),
            (-3, "RuntimeError"),
            (1.5, "TypeError"),
            (True, "TypeError"),
            (None, "TypeError"),
        ]
    ),
    (
        "GroupNorm: x of one axis",
        "ValueError: GroupNorm needs at least one channel; x has shape (6,). It takes (N, C, ...)",
        lambda: group_norm(x=X[0]),
        lambda: F.group_norm(TX[0], 3),
        "RuntimeError",
    ),
    (
        "GroupNorm: a weight of 3 for 6 channels",
        "ValueError: GroupNorm holds 3 channels; x has shape (4, 6). It takes (N, C, ...) with nothing empty but N;",
        lambda: group_norm(weight=W[:3]),
        lambda: F.group_norm(TX, 3, TW[:3]),
        "RuntimeError",
    ),
    (
        "GroupNorm: space without an element",
        "ValueError: GroupNorm needs at least one channel; x has shape (4, 6, 0). It takes (N, C, ...)",
        lambda: group_norm(x=IMAGE[..., :0]),
        lambda: F.group_norm(TIMAGE[..., :0], 3),
        "accepted",
    ),
    (
        "InstanceNorm: one element of space",
        "ValueError: InstanceNorm takes (N, C, ...) with more than one element of space; x has shape (4, 6, 1).",
        lambda: norms.InstanceNorm().forward(IMAGE[..., :1]),
        lambda: F.instance_norm(TIMAGE[..., :1]),
        "ValueError",
    ),
    (
        "InstanceNorm: no space",
        "ValueError: InstanceNorm takes (N, C, ...) with more than one element of space; x has shape (4, 6).",
        lambda: norms.InstanceNorm().forward(X),
        lambda: F.instance_norm(TX),
        "ValueError",
    ),
    (
        "InstanceNorm: a weight of 3 for 6 channels",
        "ValueError: InstanceNorm holds 3 channels; x has shape (4, 6, 5).",
        lambda: norms.InstanceNorm(W[:3]).forward(IMAGE),
        lambda: F.instance_norm(TIMAGE, weight=TW[:3]),
        "RuntimeError",
    ),
    (
        "BatchNorm, training: one value in a channel",
        "ValueError: BatchNorm: elements in a channel of x over all ranks: 1. Its variance says nothing.",
        lambda: batch_norm(X[:1]),
        lambda: torch_batch_norm(TX[:1]),
        "ValueError",
    ),
    (
        "BatchNorm, training: a batch of 0",
        "ValueError: BatchNorm: elements in a channel of x over all ranks: 0. Its variance says nothing.",
        lambda: batch_norm(X[:0]),
        lambda: torch_batch_norm(TX[:0]),
        "accepted",
    ),
    (
        "BatchNorm: x of one axis",
        "ValueError: BatchNorm needs at least one channel; x has shape (6,). It takes (N, C, ...)",
        lambda: batch_norm(X[0]),
        lambda: torch_batch_norm(TX[0]),
        "IndexError",
    ),
    (
        "BatchNorm: a weight of 3 for 6 channels",
        "ValueError: BatchNorm holds 3 channels; x has shape (4, 6).",
        lambda: batch_norm(weight=W[:3]),
        lambda: torch_batch_norm(weight=TW[:3]),
        "RuntimeError",
    ),
    (
        "BatchNorm: running statistics of 5 and 6",
        "ValueError: BatchNorm: each parameter must have shape (channels,), the same for all; "
        "got running_mean (5,), running_var (6,).",
        lambda: norms.BatchNorm(running_mean=W[:5], running_var=W),
        lambda: torch_batch_norm(mean=TW[:5].clone(), var=TW.clone()),
        "RuntimeError",
    ),
    (
        "BatchNorm: running_mean without running_var",
        "ValueError: BatchNorm: running_mean and running_var come together, or not at all.",
        lambda: norms.BatchNorm(running_mean=W),
        lambda: torch_batch_norm(mean=TW.clone()),
        "ValueError",
    ),
    (
        "BatchNorm: a negative running_var",
        "ValueError: BatchNorm: running_var has a negative number. A variance is 0 or greater.",
        lambda: norms.BatchNorm(running_mean=W, running_var=-W),
        lambda: torch_batch_norm(mean=TW.clone(), var=-TW, training=False),
        "NaN",
    ),
    (
        "BatchNorm: a NaN in running_mean",
        "ValueError: BatchNorm: running_mean has a NaN or infinity. Start from finite numbers.",
        lambda: norms.BatchNorm(running_mean=W * np.nan, running_var=W),
        lambda: torch_batch_norm(mean=TW * np.nan, var=TW.clone(), training=False),
        "NaN",
    ),
    (
        "BatchNorm: track a batch with a NaN",
        "ValueError: BatchNorm: statistics of this batch are not finite in float64; "
        "the running statistics stay as they were.",
        lambda: norms.BatchNorm().track(norms.BatchNorm().forward(nan_row(X))[1]),
        lambda: torch_tracked(nan_row(TX)),
        "NaN",
    ),
    (
        "BatchNorm: inference with running_var + eps = 0",
        "ValueError: BatchNorm: running_var + eps is 0 in some channel. Take an eps above 0 for inference.",
        lambda: norms.BatchNorm(eps=0, running_mean=W, running_var=0 * W).inference(X),
        lambda: torch_batch_norm(mean=TW.clone(), var=0 * TW, training=False, eps=0),
        "NaN",
    ),
    (
        "BatchNorm: inference before any batch",
        "ValueError: BatchNorm: inference needs running statistics, and none are known.",
        lambda: norms.BatchNorm().inference(X),
        lambda: torch_batch_norm(training=False),
        "RuntimeError",
    ),
    *(
        (
            f"BatchNorm: momentum={momentum!r}",
            f"ValueError: BatchNorm: momentum is {momentum!r}. It must be a number from 0 to 1, or None.",
            lambda momentum=momentum: norms.BatchNorm(momentum=momentum),
            lambda momentum=momentum: torch_batch_norm(mean=TW.clone(), var=TW.clone(), momentum=momentum),
            verdict,
        )
        for momentum, verdict in [(-0.1, "accepted"), (1.5, "accepted"), ("0.1", "TypeError")]
    ),
    (
        "dy of another shape",
        "ValueError: LayerNorm: dy has shape (1, 6), and the x that was saved (4, 6). Hand backward the gradient of",
        lambda: backward(X[:1]),
        lambda: torch_backward(TX[:1]),
        "RuntimeError",
    ),
    (
        "dy of integers",
        "TypeError: LayerNorm works on float16, bfloat16, float32, float64; dy is int64. Convert it first,",
        lambda: backward(X.astype(int)),
        lambda: torch_backward(TX.long()),
        "accepted",
    ),
    (
        "dy is a list",
        "TypeError: LayerNorm: npnorm works on arrays of NumPy, CuPy or the array API standard; got a list.",
        lambda: backward(X.tolist()),
        lambda: torch_backward(X.tolist()),
        "TypeError",
    ),
    (
        "What another norm saved",
        "TypeError: LayerNorm.backward takes what LayerNorm.forward saved; got npnorm.norms.rms_norm.Saved.",
        lambda: norms.LayerNorm().backward(X, norms.RMSNorm().forward(X)[1]),
        None,
        "",
    ),
    (
        "AddRMSNorm: x and residual of two shapes",
        "ValueError: AddRMSNorm: residual has shape (1, 6), and x (4, 6). Both must have the same shape.",
        lambda: norms.AddRMSNorm().forward(X, X[:1]),
        lambda: F.rms_norm(TX + TX[:1], (6,)),
        "accepted",
    ),
    (
        "AddRMSNorm: x and residual of two dtypes",
        "TypeError: AddRMSNorm: residual is float32, x is float64. Convert one of them:",
        lambda: norms.AddRMSNorm().forward(X, X.astype("float32")),
        lambda: F.rms_norm(TX + TX.float(), (6,)),
        "accepted",
    ),
    (
        "LayerNorm: out of another shape",
        "ValueError: LayerNorm: out must be an array like x, (4, 6) float64; got (4, 5) float64.",
        lambda: norms.LayerNorm().forward(X, out=np.empty((4, 5))),
        None,
        "",
    ),
    (
        "LayerNorm: out of another dtype",
        "ValueError: LayerNorm: out must be an array like x, (4, 6) float64; got (4, 6) float32.",
        lambda: norms.LayerNorm().forward(X, out=np.empty((4, 6), "float32")),
        None,
        "",
    ),
    (
        "LayerNorm: out column by column",
        "ValueError: LayerNorm: out must be writable, aligned and in C order. "
        "Make it by numpy.empty(x.shape, x.dtype).",
        lambda: norms.LayerNorm().forward(X, out=np.empty((4, 6), order="F")),
        None,
        "",
    ),
    (
        "LayerNorm: out is x",
        "ValueError: LayerNorm: out shares memory with an array that is read, and that backward may need. Take another",
        lambda: norms.LayerNorm().forward(X, out=X),
        None,
        "",
    ),
    (
        "PartialRMSNorm: p=0",
        "ValueError: PartialRMSNorm: p is 0. It must be above 0 and at most 1: k = ceil(n p) must be 1 or more.",
        lambda: norms.PartialRMSNorm(p=0),
        None,
        "",
    ),
]


ACCEPTED = [
    # what, npnorm, what it does, torch, what that does
    ("LayerNorm: a batch of 0", lambda: layer_norm(X[:0]), "works", lambda: torch_layer_norm(TX[:0]), "works"),
    ("GroupNorm: a batch of 0", lambda: group_norm(x=X[:0]), "works", lambda: F.group_norm(TX[:0], 3), "works"),
    (
        "LayerNorm: one feature",
        lambda: layer_norm(X[:, :1], None),
        "works",
        lambda: F.layer_norm(TX[:, :1], (1,)),
        "works",
    ),
    (
        "GroupNorm: one sample, one element in a group",
        lambda: group_norm(6, X[:1]),
        "works",
        lambda: F.group_norm(TX[:1], 6),
        "ValueError",
    ),
    (
        "GroupNorm: four samples, one element in a group",
        lambda: group_norm(6),
        "works",
        lambda: F.group_norm(TX, 6),
        "works",
    ),
    ("LayerNorm: eps=0", lambda: layer_norm(eps=0), "works", lambda: torch_layer_norm(eps=0), "works"),
    (
        "LayerNorm: eps=0, a constant row",
        lambda: layer_norm(np.ones((2, 6)), eps=0),
        "NaN",
        lambda: torch_layer_norm(torch.ones(2, 6).double(), eps=0),
        "NaN",
    ),
    (
        "RMSNorm: eps=0, a row of zeros",
        lambda: norms.RMSNorm(eps=0).forward(np.zeros((2, 6)))[0],
        "NaN",
        lambda: F.rms_norm(torch.zeros(2, 6), (6,), eps=0),
        "NaN",
    ),
    (
        "L2Norm: a row of zeros",
        lambda: norms.L2Norm().forward(np.zeros((2, 6)))[0],
        "works",
        lambda: F.normalize(torch.zeros(2, 6)),
        "works",
    ),
    ("BatchNorm, training: eps=0", lambda: batch_norm(eps=0), "works", lambda: torch_batch_norm(eps=0), "ValueError"),
    (
        "LayerNorm: bfloat16 x, float32 weight",
        lambda: layer_norm(X.astype(BFLOAT16), W.astype("float32")),
        "works",
        lambda: torch_layer_norm(TX.bfloat16(), weight=TW.float()),
        "works",
    ),
    (
        "LayerNorm: float32 x, float64 weight",
        lambda: layer_norm(X.astype("float32")),
        "works",
        lambda: torch_layer_norm(TX.float()),
        "RuntimeError",
    ),
    (
        "LayerNorm: float32 x, float16 weight",
        lambda: layer_norm(X.astype("float32"), W.astype("float16")),
        "works",
        lambda: torch_layer_norm(TX.float(), weight=TW.half()),
        "RuntimeError",
    ),
    (
        "RMSNorm: float32 x, float64 weight",
        lambda: norms.RMSNorm(W).forward(X.astype("float32"))[0],
        "works",
        lambda: F.rms_norm(TX.float(), (6,), TW),
        "works",
    ),
    (
        "LayerNorm: a NaN in a row, seen in the other rows",
        lambda: layer_norm(nan_row(X))[1:],
        "works",
        lambda: torch_layer_norm(nan_row(TX))[1:],
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


@pytest.mark.parametrize(
    ("what", "said", "ours", "theirs", "torch_does"), [pytest.param(*entry, id=entry[0]) for entry in REFUSED]
)
def test_npnorm_refuses_whatever_torch_refuses(what, said, ours, theirs, torch_does):
    with pytest.raises((ValueError, TypeError)) as caught:
        ours()
    assert f"{type(caught.value).__name__}: {caught.value}".startswith(said)
    if theirs is not None:
        assert verdict(theirs, "accepted") == torch_does


@pytest.mark.parametrize(
    ("what", "ours", "npnorm_does", "theirs", "torch_does"), [pytest.param(*entry, id=entry[0]) for entry in ACCEPTED]
)
def test_npnorm_accepts_what_has_a_meaning(what, ours, npnorm_does, theirs, torch_does):
    assert (verdict(ours, "works"), verdict(theirs, "works")) == (npnorm_does, torch_does)


def test_npnorm_accepts_what_torch_refuses_in_four_places():
    assert [what for what, _, _, _, does in ACCEPTED if does.endswith("Error")] == [
        "GroupNorm: one sample, one element in a group",
        "BatchNorm, training: eps=0",
        "LayerNorm: float32 x, float64 weight",
        "LayerNorm: float32 x, float16 weight",
    ]


def test_the_page_for_readers_has_the_same_rows():
    page = DOCS.read_text(encoding="utf-8")
    refused = [f"| {what} | `{said.rstrip(' ,;')}` | {does or 'none'} |" for what, said, _, _, does in REFUSED]
    accepted = [f"| {what} | {ours} | {theirs} |" for what, _, ours, _, theirs in ACCEPTED]
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| input")]
    assert lines == refused + accepted


def everything(layer, x, dy):
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    return {"y": y, "dx": dx, "grads": grads}


def problem(entry, seed, **replaced):
    """Return the parameters, x and dy of a norm of the catalogue."""
    rng = np.random.default_rng(seed)
    params, x = entry._replace(**replaced).draw(rng)
    return params, x, rng.standard_normal(entry.make(params).forward(x)[0].shape)


class Subclass(np.ndarray):
    pass


def on_disk(x, path):
    file = np.memmap(path, x.dtype, "w+", shape=x.shape)
    file[...] = x
    file.flush()
    return np.memmap(path, x.dtype, "r", shape=x.shape)


EACH = pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)


@EACH
@pytest.mark.parametrize("kind", ["a file on disk", "a subclass", "one number, broadcast"])
def test_other_kinds_of_numpy_arrays_give_the_same_values(entry, kind, tmp_path):
    params, x, dy = problem(entry, 1)
    if kind == "one number, broadcast":
        came = np.broadcast_to(x[:1], x.shape), np.broadcast_to(dy[:1], dy.shape)
        x, dy = (np.ascontiguousarray(a) for a in came)
    elif kind == "a subclass":
        came = x.view(Subclass), dy.view(Subclass)
    else:
        came = on_disk(x, tmp_path / "x"), on_disk(dy, tmp_path / "dy")
    expected = everything(entry.make(params), x, dy)
    for (name, a), (_, b) in zip(leaves(everything(entry.make(params), *came)), leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name, strict=kind != "a subclass")


@pytest.mark.filterwarnings("ignore:the matrix subclass")
@pytest.mark.parametrize("make", [np.matrix, lambda x: np.ma.masked_greater(x, 0.5)], ids=["matrix", "masked"])
def test_a_subclass_with_other_operators_is_refused_or_an_array(make):
    x = np.random.default_rng(4).standard_normal((5, 6))
    try:
        y, _ = norms.LayerNorm().forward(make(x))
    except TypeError as problem:
        assert str(problem).startswith("LayerNorm")  # noqa: PT017
    else:
        np.testing.assert_array_equal(np.ma.getdata(y), norms.LayerNorm().forward(x)[0])


REFUSE_BATCH_0 = ("BatchNorm", "BatchNorm without space", "WeightNorm")  # see the table


@pytest.mark.parametrize(
    "entry", [entry for entry in CATALOGUE if entry.name not in REFUSE_BATCH_0], ids=lambda entry: entry.name
)
def test_a_batch_of_0_gives_gradients_of_0(entry):
    inputs = {"residual", "gate", "scale", "shift", "k"} - ({"shift"} if entry.name == "Derf" else set())
    shapes = {name: (0, *shape[1:]) if name in inputs else shape for name, shape in entry.params.items()}
    params, x, dy = problem(entry, 2, params=shapes, x=(0, *entry.x[1:]))
    came = everything(entry.make(params), x, dy)
    assert came["y"].shape == dy.shape
    assert came["dx"].shape == x.shape
    for name, a in params.items():
        same_bits(came["grads"][name], np.zeros_like(a))


W1, B1, X1 = np.array([1.5]), np.array([-0.25]), np.array([[3.0], [-4.0], [0.0], [1e-3]])
RMS1 = np.sqrt(X1**2 + 0.3)
OF_ONE = {
    # the norm, y, and dy/dx
    "LayerNorm": (norms.LayerNorm(W1, B1), B1 + 0 * X1, 0 * X1),
    "GroupNorm": (norms.GroupNorm(1, W1, B1), B1 + 0 * X1, 0 * X1),
    "RMSNorm": (norms.RMSNorm(W1, B1, eps=0.3), X1 / RMS1 * W1 + B1, W1 * 0.3 / RMS1**3),
    "PartialRMSNorm": (norms.PartialRMSNorm(W1, B1, eps=0.3), X1 / RMS1 * W1 + B1, W1 * 0.3 / RMS1**3),
    "ScaleNorm": (norms.ScaleNorm(W1), np.sign(X1) * W1, [[0], [0], [W1[0] / 1e-5], [0]]),
    "L2Norm": (norms.L2Norm(), np.sign(X1), [[0], [0], [1e12], [0]]),
    "DyT": (norms.DyT(np.array(2.0), W1, B1), np.tanh(2 * X1) * W1 + B1, 2 * W1 / np.cosh(2 * X1) ** 2),
}


@pytest.mark.parametrize("name", OF_ONE)
def test_a_row_of_one_number(name):
    norm, y, slope = OF_ONE[name]
    dy = np.array([[2.0], [0.5], [-1.0], [3.0]])
    came = everything(norm, X1, dy)
    close(came["y"], y, 1e-15)
    close(came["dx"], dy * slope, 1e-15)
    if "weight" in came["grads"]:
        close(came["grads"]["weight"], [np.sum(dy * (y - norm.params.get("bias", 0)) / W1)], 1e-15)


@pytest.mark.parametrize("name", ["AddRMSNorm", "AdaptiveNorm", "GatedRMSNorm", "QKNorm", "WeightNorm", "Derf"])
def test_a_row_of_one_number_in_the_other_norms(name):
    norm = NORMS[name]

    def one(shapes):
        return {n: array((*shape[:-1], 1) if shape[-1] == 6 else shape) for n, shape in shapes.items()}

    y, (dx, _) = attempt(name, **one(norm.params), **one(norm.inputs), **one(norm.gradients))
    for a in (*(y if isinstance(y, tuple) else (y,)), *(dx if isinstance(dx, tuple) else (dx,))):
        assert np.all(np.isfinite(a))
    if name == "AdaptiveNorm":
        np.testing.assert_array_equal(y[..., 0], np.broadcast_to(array((3, 1)), (3, 4)))  # the shift
        np.testing.assert_array_equal(dx[0], np.zeros((3, 4, 1)))
    if name == "WeightNorm":
        np.testing.assert_array_equal(y[:, 0], array((4,)))  # the lengths
        np.testing.assert_array_equal(dx, np.zeros((4, 1)))


@EACH
@pytest.mark.parametrize(
    ("narrow", "wide"), [("float16", "float32"), (BFLOAT16, "float32"), ("float32", "float64")], ids=str
)
def test_parameters_may_be_wider_than_x(entry, narrow, wide):
    params, x, dy = problem(entry, 3)
    like_x = {"residual", "k"}  # one of two inputs that must have one dtype, or whose outputs are compared at once
    params = {name: a.astype(narrow if name in like_x else wide) for name, a in params.items()}
    x, dy = x.astype(narrow), dy.astype(narrow)
    came = everything(entry.make(params), x, dy)
    assert came["y"].dtype == came["dx"].dtype == np.dtype(narrow)
    assert {name: g.dtype for name, g in came["grads"].items()} == {name: a.dtype for name, a in params.items()}
    in_float64 = {name: a.astype("float64") for name, a in params.items()}
    expected = everything(entry.make(in_float64), x.astype("float64"), dy.astype("float64"))
    units = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 1e-12}
    for (_, a), (_, b) in zip(leaves(came), leaves(expected), strict=True):
        unit = 1.01 * units[a.dtype.name]
        close(a.astype("float64"), b, 4 * units[np.dtype(narrow).name] if entry.name == "AddRMSNorm" else unit)  # h!


FIVE = {
    "LayerNorm": lambda w: norms.LayerNorm(w, w),
    "RMSNorm": lambda w: norms.RMSNorm(w, w),
    "PartialRMSNorm": lambda w: norms.PartialRMSNorm(w, w, p=0.5),
    "L2Norm": lambda w: norms.L2Norm(),
    "GroupNorm": lambda w: norms.GroupNorm(2, np.ones(6, w.dtype), np.ones(6, w.dtype)),
}


@pytest.mark.parametrize("name", FIVE)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", BFLOAT16], ids=str)
@pytest.mark.parametrize("where", ["x", "dy"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_or_infinity_stays_in_its_row(name, dtype, where, bad):
    rng = np.random.default_rng(5)
    x, dy = rng.standard_normal((2, 3, 6, 8))
    if dtype in ("float64", "float32"):  # some of the rows must be scaled, and some not
        x[1] *= 1e-30 if dtype == "float32" else 1e-250
        x[2, 3:] *= 1e30 if dtype == "float32" else 1e250
    x, dy, norm = x.astype(dtype), dy.astype(dtype), FIVE[name](rng.standard_normal(8).astype(dtype))
    expected = everything(norm, x, dy)
    arrays = {"x": x.copy(), "dy": dy.copy()}
    arrays[where][0, 1, 2] = bad
    came = everything(norm, **arrays)
    clean = np.ones((3, 6), bool)
    clean[0, : 3 if name == "GroupNorm" else 2] = False
    if name != "GroupNorm":
        clean[0, 0] = True
    for part in ("y", "dx"):
        same_bits(came[part][clean], expected[part][clean])
        hit = not (part == "y" and where == "dy")
        assert np.isfinite(came[part][~clean].astype("float64")).all() != hit


# by name, which ml_dtypes has made known to NumPy
HUGE = {"float64": 1e307, "float32": 1e37, "float16": 1e4, "bfloat16": 1e37}
SCALES = {"zeros": [0], "huge and tiny": [1, -1], "not finite": [np.nan, 1, np.inf]}


@EACH
@pytest.mark.parametrize("dtype", HUGE)
@pytest.mark.parametrize("what", SCALES)
def test_the_floating_point_settings_of_the_caller_do_not_matter(entry, dtype, what):
    rng = np.random.default_rng(6)
    params, x = entry.draw(rng, dtype)
    huge = HUGE[dtype]
    scale = [huge**sign for sign in SCALES[what]] if what == "huge and tiny" else SCALES[what]
    with np.errstate(all="ignore"):
        params = {name: (a * scale[-1]).astype(dtype) for name, a in params.items()}
        x = (x * np.resize(scale, x.shape[::-1]).T).astype(dtype)
        dy = (entry.make(params).forward(x)[0] * 0 + 3 * huge).astype(dtype)  # the sum over rows overflows
        expected = everything(entry.make(params), x, dy)
    with np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        same_bits(everything(entry.make(params), x, dy), expected)
    assert np.geterr() == dict.fromkeys(("divide", "over", "invalid"), "warn") | {"under": "ignore"}


@EACH
def test_inputs_are_never_written_to(entry):
    params, x, _ = problem(entry, 7)
    check_protocol(entry.make, params, np.asfortranarray(x), np.random.default_rng(8))


def test_what_is_saved_decides_where_settings_differ():
    x = np.random.default_rng(9).standard_normal((4, 6))
    half = norms.PartialRMSNorm(p=0.5)
    gate_first = norms.GatedRMSNorm(norm_before_gate=False)
    _, saved = half.forward(x)
    same_bits(norms.PartialRMSNorm(p=0.25).backward(x, saved)[0], half.backward(x, saved)[0])
    _, saved = gate_first.forward(x, x)
    same_bits(norms.GatedRMSNorm().backward(x, saved)[0][0], gate_first.backward(x, saved)[0][0])
