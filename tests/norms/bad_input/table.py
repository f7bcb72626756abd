"""Bad inputs as data: TABLE has each argument and setting of each norm, with the message that refuses it."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import array_api_strict as strict
import numpy as np
import torch

from npnorm import norms
from npnorm.arrays import with_article

MODULES = "NumPy, CuPy or the array API standard"
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
    "CastRMSNorm": Norm(lambda cast="llama", **rest: norms.CastRMSNorm(cast=cast, **rest), WB, *ROWS),
    "PartialRMSNorm": Norm(norms.PartialRMSNorm, WB, *ROWS, "(features,), one axis"),
    "AddRMSNorm": Norm(
        norms.AddRMSNorm,
        WB,
        {"x": (4, 6), "residual": (4, 6)},
        {"dy": (4, 6), "dh": (4, 6)},
        layers=IN_RMS_NORM | {"cast": "CastRMSNorm"},
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
        for eps in (-1e-9, -9.0, np.nan, np.inf, -np.inf, "1e-5", None, True, 1j, [1e-5]):
            message = f"{layer_of(name, 'eps')}: eps is {eps!r}. It must be a finite number, 0 or greater."
            yield row(name, f"eps={eps!r}", ValueError, exact(message), eps=eps)
    for name in ("GroupNorm", "GatedRMSNorm"):
        for groups in (0, -3, 1.5, 2.0, True, "2", None, np.ones(2)):
            got = "an array of shape (2,)" if isinstance(groups, np.ndarray) else repr(groups)
            message = f"{name}: groups is {got}. It must be an integer, 1 or more."
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
    for p in (0, -0.5, 1.0000001, 1.5, np.nan, np.inf, "0.5", None, True):
        message = f"PartialRMSNorm: p is {p!r}. It must be above 0 and at most 1: k = ceil(n p) must be 1 or more."
        yield row("PartialRMSNorm", f"p={p!r}", ValueError, exact(message), p=p)
    message = "LayerNorm: statistics is 'fast'. Choose one of two-pass, packed, gathered."
    yield row("LayerNorm", "statistics='fast'", ValueError, exact(message), statistics="fast")
    message = "LayerNorm: statistics is []. Choose one of two-pass, packed, gathered."
    yield row("LayerNorm", "statistics=[]", ValueError, exact(message), statistics=[])
    message = r"^LayerNorm: eps is 10{400}\. It must be a finite number, 0 or greater\.$"
    yield row("LayerNorm", "eps=1000...", ValueError, message, eps=10**400)
    for name in ("AddRMSNorm", "CastRMSNorm", "QKNorm"):
        for cast in ("Llama", "bf16", "", 1):
            message = f"{layer_of(name, 'cast')}: cast is {cast!r}. Choose None, 'llama', 'olmo2' or 'gemma'."
            yield row(name, f"cast={cast!r}", ValueError, exact(message), cast=cast)
    common = "group, compute"
    takes = {
        "LayerNorm": f"weight, bias, eps, statistics, {common}, axes, features",
        "RMSNorm": f"weight, bias, eps, offset, {common}, axes, features",
        "CastRMSNorm": f"weight, bias, eps, cast, offset, {common}, axes, features",
        "PartialRMSNorm": f"weight, bias, p, eps, {common}, axes, features",
        "AddRMSNorm": f"weight, bias, eps, offset, {common}, axes, features",
        "GatedRMSNorm": f"weight, eps, groups, norm_before_gate, {common}",
        "QKNorm": f"q_weight, k_weight, eps, full_width, offset, cast, {common}",
        "BatchNorm": f"weight, bias, eps, momentum, running_mean, running_var, batches, {common}",
        "GroupNorm": f"groups, weight, bias, eps, {common}",
        "InstanceNorm": f"weight, bias, eps, {common}",
        "ScaleNorm": f"weight, eps, {common}, axes, features",
        "L2Norm": f"eps, {common}, axes, features",
        "WeightNorm": f"weight_g, {common}",
        "DyT": f"alpha, weight, bias, {common}",
        "Derf": f"alpha, shift, weight, bias, {common}",
    }
    for name, said in takes.items():
        message = exact(f"{layer_of(name, 'eps')} has no 'epsilon'. It takes {said}.")
        yield row(name, "epsilon=1e-5", TypeError, message, epsilon=1e-5)
    for name, argument, value in (
        ("RMSNorm", "cast", "llama"),
        ("RMSNorm", "statistics", "packed"),
        ("CastRMSNorm", "statistics", "packed"),
        ("PartialRMSNorm", "statistics", "packed"),
        ("PartialRMSNorm", "offset", 1),
        ("LayerNorm", "offset", 1),
        ("L2Norm", "weight", np.ones(1)),
        ("DyT", "eps", 1e-5),
    ):
        message = exact(f"{name} has no {argument!r}. It takes {takes[name]}.")
        yield row(name, f"{argument}, which it has no use for", TypeError, message, **{argument: value})
    for name in ("RMSNorm", "CastRMSNorm", "QKNorm"):
        for offset in (np.nan, np.inf, "1", None, True, 1j):
            message = f"{name}: offset is {offset!r}. It must be a finite number, usually 0 or 1."
            yield row(name, f"offset={offset!r}", ValueError, exact(message), offset=offset)
    message = "RMSNorm: offset is 1, and there is no weight to add it to. Leave it out."
    yield row("RMSNorm", "offset without a weight", ValueError, exact(message), weight=None, offset=1)
    for name in [name for name in NORMS if name != "AdaptiveNorm"]:
        message = r"compute is 'float16'\. Choose None, 'float64' or 'float32'\.$"
        yield row(name, "compute='float16'", ValueError, message, compute="float16")
        message = r"compute='float32' would cut float64 arrays short\. Leave compute out for them\.$"
        yield row(name, "compute='float32' of float64", TypeError, message, compute="float32")
        message = (
            rf"^{layer_of(name, 'eps')}: group is an \w+\. Wrap a communicator first: npnorm\.mpi\.Ranks\(comm\)\.$"
        )
        yield row(name, "a communicator that is not wrapped", TypeError, message, group=object())
        yield row(name, "group=4", TypeError, message, group=4)


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
            masked = np.ma.masked_greater(array(shape), 1)
            message = exact(
                f"{layer}: {said} must be an array "
                f"of {f'shape {SHAPES.get(argument, norm.shape)}' if argument in norm.params else MODULES}; "
                f"got a MaskedArray. Its mask would be ignored. Replace what is masked first, for example by "
                f"{said}.filled(0)."
            )
            yield row(name, f"{argument} is masked", TypeError, message, **{argument: masked})
            for bad in ([1.0], 1.0, "1.0", torch.ones(shape)):
                kind = type(bad).__name__
                if argument in norm.params and not hasattr(bad, "shape"):
                    message = exact(
                        f"{layer}: {said} must be an array of shape {SHAPES.get(argument, norm.shape)}; got a {kind}."
                        " Turn it into an array first, for example by numpy.asarray."
                    )
                else:
                    remedy = rf"{said}\.numpy\(force=True\)" if kind == "Tensor" else r"numpy\.asarray"
                    message = rf"^{layer}: {said} must be an array of .*; got a {kind}\. .*, for example by {remedy}\.$"
                yield row(name, f"{argument} is a {kind}", TypeError, message, **{argument: bad})
            if argument in norm.inputs:
                message = (
                    rf"^{layer}: {said} must be an array of .*; got a NoneType\. .*, for example by numpy\.asarray\.$"
                )
                yield row(name, f"{argument} is None", TypeError, message, **{argument: None})


def sizes():
    """Return rows for a size where the weight belongs, as torch takes it."""
    for name in ("LayerNorm", "RMSNorm", "PartialRMSNorm", "BatchNorm", "GroupNorm", "InstanceNorm", "GatedRMSNorm"):
        made = re.escape(f"{name}.init(3, 768)" if name == "GroupNorm" else f"{name}.init(768)")
        message = rf"^{name}: weight must be an array of shape .*; got an int\. {made} makes the weight\.$"
        yield row(name, "a number of features for weight", TypeError, message, weight=768)
    message = "LayerNorm: weight must be an array of shape (features,); got a list. LayerNorm.init([4, 6]) makes the"
    yield row("LayerNorm", "a shape for weight", TypeError, "^" + re.escape(message), weight=[4, 6])
    message = "DyT: alpha must be an array of shape () or (1,); got an int. Turn it into an array first, for example by"
    yield row("DyT", "an int for alpha", TypeError, "^" + re.escape(message), alpha=1)


def floats():
    """Return rows for an eps where the weight or bias belongs, as torch's functions take it."""
    for name, norm in NORMS.items():
        for argument in norm.params:
            layer, said, shape = layer_of(name, argument), called(name, argument), SHAPES.get(argument, norm.shape)
            message = f"{layer}: {said} must be an array of shape {shape}; got a float. Did you mean eps=1e-06?"
            if name not in ("WeightNorm", "DyT", "Derf"):
                yield row(name, f"an eps for {argument}", TypeError, exact(message), **{argument: 1e-6})
    message = exact(
        "RMSNorm: weight must be an array of shape (features,); got a float. "
        "Turn it into an array first, for example by numpy.asarray."
    )
    yield row("RMSNorm", "an eps for weight and an array for eps", TypeError, message, weight=1e-6, eps=np.ones(6))
    message = exact("GroupNorm: groups is an array of shape (6,). It must be an integer, 1 or more.")
    yield Row("GroupNorm: groups and weight swapped", lambda: norms.GroupNorm(np.ones(6), 3), ValueError, message)


def inits():
    """Return rows for what init cannot make."""
    several = ("LayerNorm", "RMSNorm", "CastRMSNorm", "AddRMSNorm", "DyT", "Derf")
    one = ("PartialRMSNorm", "GatedRMSNorm", "QKNorm", "ScaleNorm", "BatchNorm", "GroupNorm", "InstanceNorm")
    for name in (*several, *one):
        first = (3,) if name == "GroupNorm" else ()
        init = partial(getattr(norms, name).init, *first, **{"cast": "llama"} if name == "CastRMSNorm" else {})
        argument = "head_dim" if name == "QKNorm" else "channels" if NORMS[name].shape == "(channels,)" else "features"
        end = "It must be an integer, 1 or more" + (", or a tuple of such." if name in several else ".")
        sizes = [8.0, -3, 0, "8", None, True, (), (3, 4.0), np.ones(8)] + ([] if name in several else [(3, 4)])
        for size in sizes:
            got = "an array of shape (8,)" if isinstance(size, np.ndarray) else repr(size)
            message = exact(f"{name}.init: {argument} is {got}. {end}")
            yield Row(f"{name}: init of {got}", partial(init, size), ValueError, message)
        for dtype in ("flaot32", "(2", "int64", "complex64", 1e-5, [1]):
            meant = " Did you mean eps=1e-05?" if isinstance(dtype, float) else ""
            message = f"{name}.init: dtype is {dtype!r}. It must be one of float16, bfloat16, float32, float64.{meant}"
            yield Row(f"{name}: init of dtype {dtype!r}", partial(init, 6, dtype), TypeError, exact(message))
        weight = list(NORMS[name].params)[-1]
        message = exact(f"{name}.init makes {weight} itself. Leave it out, or pass your own arrays to {name}.")
        if name != "QKNorm":
            yield Row(f"{name}: init with {weight}", partial(init, 6, **{weight: None}), TypeError, message)
        message = rf"^({name}|RMSNorm) has no 'epsilon'\. It takes "
        yield Row(f"{name}: init with epsilon", partial(init, 6, epsilon=1e-5), TypeError, message)
        message = rf"^{name}: group is an int\. Wrap a communicator first: "
        yield Row(f"{name}: init with group=4", partial(init, 6, group=4), TypeError, message)
    for name in ("RMSNorm", "AddRMSNorm", "QKNorm"):
        message = exact(f"{name}: offset is '1'. It must be a finite number, usually 0 or 1.")
        yield Row(
            f"{name}: init with offset='1'", partial(getattr(norms, name).init, 6, offset="1"), ValueError, message
        )


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
    for bad in (-1e-30, -1.0):
        variances = np.array([1.0, 2, 3, 4, 5, bad])
        said = "BatchNorm: running_var has a negative number. A variance is 0 or greater."
        yield "BatchNorm", f"running_var with {bad}", {"running_mean": (6,), "running_var": variances}, said
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
            f"{bad.axes} axes. The scale and shift of a sample stand for weight and bias."
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
    message = exact("BatchNorm.track takes what BatchNorm.forward saved; got npnorm.norms.layer_norm.Saved.")
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


def replaced(name, argument, value, used, backward):
    """Run a norm after an entry of its params was replaced; a function of the params changes them as a whole."""
    norm, layer = NORMS[name], built(name)
    inputs, gradients = (tuple(map(array, shapes.values())) for shapes in (norm.inputs, norm.gradients))
    _, saved = layer.forward(*inputs)
    if used:
        layer.backward(*gradients, saved)
    else:
        layer = built(name)
    if callable(value):
        value(layer)
    else:
        holder = layer.params if name != "QKNorm" else layer.params[f"{argument[0]}_norm"]
        holder[called(name, argument)] = array(value)
    return layer.backward(*gradients, saved) if backward else layer.forward(*inputs)


def after(name, argument, what, value, error, message):
    """Return rows for params that were changed before the first call, and after others."""
    first = partial(replaced, name, argument, value, used=False, backward=False)
    yield Row(f"{name}: {argument} {what}, before the first forward", first, error, message)
    later = partial(replaced, name, argument, value, used=True, backward=True)
    yield Row(f"{name}: {argument} {what}, before a later backward", later, error, message)


def replacements():
    """Return rows for parameters that the constructor would refuse, put into params later."""
    for name, norm in NORMS.items():
        for argument in norm.params:
            said, shape = called(name, argument), SHAPES.get(argument, norm.shape)
            message = f"{name} works on float16, bfloat16, float32, float64; {said} is int64."
            whole = array(norm.params[argument]).astype("int64")
            yield from after(name, argument, "replaced by integers", whole, TypeError, f"^{re.escape(message)}")
            for bad in ([1.0], 1.0, None):
                message = f"{name}: {said} must be an array of shape {shape}; got {with_article(bad)}."
                what = f"replaced by {with_article(bad)}"
                yield from after(name, argument, what, bad, TypeError, f"^{re.escape(message)}")
            for bad in {(7, 1), (2, 4), (7,), (1,), (), (0,)} - {norm.params[argument]}:
                if (shape == "() or (1,)" and bad == ()) or (shape.startswith("(outputs") and bad[1:] == (1,)):
                    continue
                alone = len([other for other in norm.params if SHAPES.get(other) == SHAPES.get(argument)]) == 1
                if alone and bad in ((1,), (7,)) and shape != "() or (1,)":
                    message = rf"^{name} holds \d (features|lengths); "
                elif name == "QKNorm" and bad in ((1,), (7,)):
                    message = "^QKNorm: the weight of the queries has shape"
                else:
                    message = "^" + re.escape(f"{name}: each parameter must have shape {shape}, the same for all; got ")
                yield from after(name, argument, f"replaced by {bad}", bad, ValueError, message)
        params = " nothing" if name in ("AdaptiveNorm", "L2Norm") else ""
        message = rf"^{name}: params has 'wieght', which means nothing\. It takes "
        misspelled = partial(misspell, "wieght")
        yield from after(name, "params", f"with a misspelled name{params}", misspelled, ValueError, message)
        for bad in (None, [np.ones(6)]):
            message = rf"^{name}: params must be a dict of arrays by name; got {with_article(bad)}\. "
            what = f"replaced by {with_article(bad)}"
            yield from after(name, "params", what, partial(assign, bad), TypeError, message)
    for name in ("DyT", "Derf", "WeightNorm", "QKNorm"):
        message = rf"^{name}: params lacks '\w+'\. It takes "
        yield from after(name, "params", "without what it needs", partial(assign, {}), ValueError, message)
    for name in ("LayerNorm", "RMSNorm", "CastRMSNorm", "AddRMSNorm", "DyT"):
        wide = {n: array((4, 6)) for n in ("weight", "bias")} | ({"alpha": np.ones(1)} if name == "DyT" else {})
        message = exact(
            f"{name} was made for features of 1 axis; weight has shape (4, 6). Make another {name} for others."
        )
        yield from after(name, "params", "of two axes", partial(assign, wide), ValueError, message)
    message = exact(
        "LayerNorm was made for features of shape (6,); weight has shape (5,). Make another LayerNorm for others."
    )
    other = norms.LayerNorm(features=6)
    other.params["weight"] = np.ones(5)
    yield Row("LayerNorm: a weight of 5 after features=6", lambda: other.forward(np.ones((4, 6))), ValueError, message)
    five = {"weight": np.ones(5), "bias": np.ones(5)}
    message = "^BatchNorm: each parameter must have shape .channels,., the same for all; got .* running_var .6,.[.]$"
    yield from after(
        "BatchNorm", "params", "of 5 channels beside statistics of 6", partial(assign, five), ValueError, message
    )
    bare = norms.AdaptiveNorm(norms.RMSNorm())
    bare.norm.params["weight"] = np.ones(6)
    message = "^AdaptiveNorm takes a norm without weight and bias, over one axis; this one has .'weight'. and 1 axes"
    yield Row("AdaptiveNorm: a weight of its norm", lambda: bare.forward(*[np.ones((6, 6))] * 3), ValueError, message)
    gain = norms.RMSNorm(np.ones(6), offset=1)
    gain.params.clear()
    message = exact("RMSNorm: offset is 1, and there is no weight to add it to. Leave it out.")
    yield Row(
        "RMSNorm: offset after the weight was removed", lambda: gain.forward(np.ones((4, 6))), ValueError, message
    )


def misspell(name, layer):
    """Rename the first parameter, or add one."""
    params = layer.params
    first = next(iter(params), None)
    layer.params = (
        {name: np.ones(6)} if first is None else {name: params[first], **{n: params[n] for n in list(params)[1:]}}
    )


def assign(value, layer):
    layer.params = value


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
        for bad in ([1.0], 1.0, torch.ones(shape), np.ma.ones(shape)):
            for backward in (False, True):
                what = f"{name}: {'dx' if backward else 'y'} to an out that is a {type(bad).__name__}"
                message = exact(f"{like_x} got {with_article(bad)}. {fresh}")
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
    *floats(),
    *inits(),
    *places(),
    *(row(name, what, ValueError, exact(said), **changes) for name, what, changes, said in shapes()),
    *strangers(),
    *mixed_up(),
    *replacements(),
    *complex_numbers(),
    *outs(),
]
