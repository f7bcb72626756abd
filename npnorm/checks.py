"""The checks of what enters a layer: one clear error, the same on every rank, before anything is computed.

What norms ask comes first, then what the other layers ask.
"""

import math
import zlib
from collections.abc import Callable, Collection, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, describe, dtype_name, to_numpy, turn_into_array, with_article
from npnorm.group import SOLO, Group, errors_on_all_ranks
from npnorm.tree import Tree, checksum, leaves

NUMBER = "() or (1,)"
"""The shape of a parameter that is one number for all features."""

SHAPES: dict[str, Callable[[tuple[int, ...]], bool]] = {
    "(features,)": lambda shape: len(shape) > 0,  # or several axes
    "(features,), one axis": lambda shape: len(shape) == 1,
    "(channels,)": lambda shape: len(shape) == 1,
    NUMBER: lambda shape: shape in ((), (1,)),
    "(outputs,) or (outputs, 1, ...)": lambda shape: len(shape) > 0 and set(shape[1:]) <= {1},
}
"""What the shape of a parameter may be, as messages say it."""

FLOATS = ("float16", "bfloat16", "float32", "float64")
"""What norms take."""

TAKEN = (*FLOATS, "complex128")
"""What norms let through, for the complex step."""

USUAL = (np.dtype("float32"), np.dtype("float64"))
"""What other layers take."""


def is_number(value: Any) -> bool:
    """Return whether `value` is a finite real number, also as a float."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def is_count(value: Any) -> bool:
    """Return whether `value` is an integer, 1 or more."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


def _is_size(value: Any) -> bool:
    """Return whether `value` is a number of features, or a shape: what torch takes where npnorm takes a weight."""
    return is_count(value) or (isinstance(value, (tuple, list)) and len(value) > 0 and all(map(is_count, value)))


def _size(value: Any) -> Any:
    """Return the shape of an array, for a message; of anything else its type."""
    return tuple(value.shape) if hasattr(value, "shape") else with_article(value)


def place(x: Array) -> str:
    """Return where `x` lies, for a message and a comparison."""
    return str(getattr(x, "device", "host"))


def check_array(
    layer: str, name: str, x: Any, kind: str = "of NumPy, CuPy or the array API standard", remedy: str | None = None
) -> Any:
    """Return the module of `x`, in messages `name`; raise one clear error if it is not an array."""
    try:
        return array_module(x)
    except TypeError:
        remedy = remedy or turn_into_array(name, x)
        raise TypeError(f"{layer}: {name} must be an array {kind}; got {with_article(x)}. {remedy}") from None


def check_module(layer: str, x: Array, params: Tree, called: str = "x") -> None:
    """Raise one clear error unless `x`, in messages `called`, and the parameters are of one module, on one device."""
    module = check_array(layer, called, x)
    if type(x) is np.ndarray and isinstance(params, dict) and all(type(a) is np.ndarray for a in params.values()):
        return  # the usual case, told in no time
    for name, param in leaves(params):
        other = check_array(layer, name, param)
        if other is module and place(param) != place(x):
            raise TypeError(
                f"{layer}: {name} is on {place(param)}, {called} on {place(x)}. Bring both to the same device first."
            )
        if other is not module:
            raise TypeError(
                f"{layer}: {name} is an array of {other.__name__}, {called} one of {module.__name__}. "
                "Bring both to the same device first."
            )


def check_float(layer: str, name: str, x: Array) -> None:
    """Raise unless `x` holds floats; complex128 is let through for the complex step, formulas being analytic."""
    if dtype_name(x) not in TAKEN:
        raise TypeError(f"{layer} works on {', '.join(FLOATS)}; {name} is {dtype_name(x)}. {_conversion(name, x)}.")


def _conversion(name: str, x: Array) -> str:
    """Return what to do about a dtype that is not taken; no digits must be lost by following the advice."""
    dtype = dtype_name(x)
    if dtype.startswith(("complex", "clongdouble")):
        return f"Take {name}.real; the only complex dtype that is taken is complex128, for the complex step"
    wide = dtype in ("longdouble", "float96", "float128")
    return f"Convert it first, for example by {name}.astype(numpy.{'float64' if wide else 'float32'})"


def require_same_settings(
    layer: str, group: Group, params: Tree = None, replicated: Collection[str] = (), **settings: Any
) -> None:
    """Raise on every rank unless all ranks build the same layer: one comparison, of one text.

    Parameters
    ----------
    params : tree of arrays, or None
        What the layer holds on this rank; shapes and dtypes are compared.
    replicated : names in params
        The arrays that are the same on every rank; their bits are compared, by checksum.
    **settings
        Everything else that the constructor was given, but the group. The text has str() of each that is not None.
    """
    parts = [f"{name}={value}" for name, value in settings.items() if value is not None]
    for name, array in leaves({} if params is None else params):
        bits = f", checksum {checksum(array):08x}" if name in replicated and group.size > 1 else ""
        parts.append(f"{name} {describe(array)}{bits}")
    group.require_same(f"{layer} with {', '.join(parts) or 'no settings'}")


def message_label(layer: str, /, **arrays: Array) -> str:
    """Return the label of a message: what it is for, and the dtypes of the arrays as the user passed them.

    A norm sends float64 whatever it was given, so that without them float16 on one rank would cost the others digits.

    Examples
    --------
    >>> message_label("LayerNorm of 16 features", dy=np.ones(3), x=np.ones(3, "float16"))
    'LayerNorm of 16 features, dy float64, x float16'
    """
    return ", ".join([layer, *(f"{name} {dtype_name(array)}" for name, array in arrays.items())])


def check_settings(
    layer: str,
    params: dict[str, Array],
    eps: float,
    group: Group,
    shapes: dict[str, str],
    sizes: str = "{}",
    replicated: Collection[str] = (),
    **settings: Any,
) -> None:
    """Raise unless eps is finite and not negative, the parameters pass `check_params`, and the ranks have the same.

    Parameters
    ----------
    shapes : dict
        What the shape of each parameter should be: name to a key of `SHAPES`.
    sizes : str
        The arguments of the layer's `init`, for a message, with {} for the number of features or channels.
    replicated, **settings
        What `require_same_settings` compares over the ranks besides eps, shapes and dtypes.
    """
    with errors_on_all_ranks(group):
        for name, array in params.items():
            is_size = _is_size(array) and shapes[name].startswith(("(features", "(channels"))
            remedy = f"{layer}.init({sizes.format(array)}) makes the {name}." if is_size else None
            if isinstance(array, float) and 0 < array < 0.01 and is_number(eps) and eps > 0:  # without eps it is 0
                remedy = f"Did you mean eps={array}?"
            check_array(layer, name, array, f"of shape {shapes[name]}", remedy)
        require_same_settings(layer, group, params, replicated, eps=eps, **settings)
        if not is_number(eps) or eps < 0:
            raise ValueError(f"{layer}: eps is {eps!r}. It must be a finite number, 0 or greater.")
        check_params(layer, params, shapes)


def check_init(
    layer: str,
    name: str,
    size: Any,
    dtype: Any,
    settings: Mapping[str, Any],
    weights: Collection[str],
    axes: bool = False,
) -> None:
    """Raise unless `init` can make the parameters: of a size, called `name`, of a dtype, and of nothing in `settings`.

    Parameters
    ----------
    weights : names
        What `init` makes.
    axes : bool
        Whether the size may be a tuple, for several axes.
    """
    given = [weight for weight in weights if weight in settings]
    if given:
        raise TypeError(f"{layer}.init makes {given[0]} itself. Leave it out, or pass your own arrays to {layer}.")
    check_group(layer, settings.get("group", SOLO))
    with errors_on_all_ranks(settings.get("group", SOLO)):
        sizes = size if axes and isinstance(size, tuple) else (size,)
        if not sizes or not all(map(is_count, sizes)):
            got = f"an array of shape {tuple(size.shape)}" if getattr(size, "shape", ()) else repr(size)
            more = ", or a tuple of such" if axes else ""
            raise ValueError(f"{layer}.init: {name} is {got}. It must be an integer, 1 or more{more}.")
        try:
            known = np.dtype(dtype).name in TAKEN
        except (TypeError, ValueError, SyntaxError):
            known = False
        if not known:
            meant = f" Did you mean eps={dtype}?" if isinstance(dtype, float) else ""
            raise TypeError(f"{layer}.init: dtype is {dtype!r}. It must be one of {', '.join(FLOATS)}.{meant}")


def check_entries(layer: str, params: Any, known: Collection[str], optional: Collection[str] = ()) -> None:
    """Raise unless `params` is a dict with entries that are known, and all of them but the optional ones."""
    if not isinstance(params, dict):
        raise TypeError(
            f"{layer}: params must be a dict of arrays by name; got {with_article(params)}. "
            "Assign arrays to its entries instead."
        )
    strange = [name for name in params if name not in known]
    missing = [name for name in known if name not in params and name not in optional]
    if strange or missing:
        problem = f"params has {strange[0]!r}, which means nothing" if strange else f"params lacks {missing[0]!r}"
        raise ValueError(f"{layer}: {problem}. It takes {', '.join(known) or 'no parameters'}.")


def check_params(
    layer: str, params: Any, shapes: dict[str, str], optional: Collection[str] = ("weight", "bias")
) -> None:
    """Raise unless `params` has float arrays of one module with the right names and shapes.

    Parameters
    ----------
    shapes : dict
        The names that the layer knows, and what the shape of each should be: a key of `SHAPES`. Those of one kind must
        have one shape, but for single numbers.
    optional : names
        What may be left out.
    """
    check_entries(layer, params, shapes, optional)
    first: dict[str, tuple[int, ...]] = {}  # the shape of the first parameter of each kind
    for name, array in params.items():
        kind = shapes[name]
        if type(array) is not np.ndarray:
            remedy = f"To leave it out, delete it from params: params.pop({name!r})." if array is None else None
            check_array(layer, name, array, f"of shape {kind}", remedy)
        check_float(layer, name, array)
        shape = tuple(array.shape)
        fits = SHAPES[kind](shape) and 0 not in shape
        if not fits or (kind != NUMBER and first.setdefault(kind, shape) != shape):
            same = [other for other in params if other == name or (kind != NUMBER and shapes[other] == kind)]
            got = ", ".join(f"{other} {_size(params[other])}" for other in same)
            raise ValueError(f"{layer}: each parameter must have shape {kind}, the same for all; got {got}.")
    if len(params) > 1:
        name, array = next(iter(params.items()))
        check_module(layer, array, params, name)


def count_axes(layer: str, params: dict[str, Array], axes: int | None, group: Group) -> int:
    """Return how many trailing axes are the features: those of the parameters; without parameters `axes`, or 1."""
    held = next((a.ndim for a in params.values()), None)
    with errors_on_all_ranks(group):
        if axes is not None and not is_count(axes):
            raise ValueError(f"{layer}: axes is {axes!r}. It is how many trailing axes are the features: 1 or more.")
        if None not in (axes, held) and axes != held:
            raise ValueError(f"{layer}: axes is {axes}, and the parameters have {held}. Leave axes out.")
    return held or axes or 1


def check_features(
    layer: str,
    params: dict[str, Array],
    shapes: dict[str, str],
    axes: int,
    group: Group,
    features: tuple[int, ...] | None = None,
    /,
    **arrays: Array,
) -> None:
    """Raise unless the arrays are floats of one shape (..., features): those of the parameters, or `features`.

    The parameters must pass `check_params`, and have so many axes.
    """
    with errors_on_all_ranks(group):
        check_params(layer, params, shapes)
        expected = features
        for name, a in params.items():
            if shapes[name] != NUMBER:
                expected = tuple(a.shape)
                if len(expected) != axes or features not in (None, expected):
                    made = f"features of {axes} {'axis' if axes == 1 else 'axes'}"
                    made = made if features is None else f"features of shape {features}"
                    raise ValueError(
                        f"{layer} was made for {made}; {name} has shape {expected}. Make another {layer} for others."
                    )
        for name, x in arrays.items():
            check_module(layer, x, params, name)
            check_float(layer, name, x)
            width = tuple(x.shape[max(x.ndim - axes, 0) :])
            if x.ndim < axes or 0 in width or (expected and width != expected):
                if expected is None:
                    held, last = "needs at least one feature", "must not be empty"
                elif len(expected) == 1:
                    held, last = f"holds {expected[0]} features{_on_each(group)}", f"must be {expected[0]}"
                else:
                    held, last = f"holds features of shape {expected}{_on_each(group)}", f"must be {expected}"
                plural = "axis" if axes == 1 else f"{axes} axes"
                raise ValueError(f"{layer} {held}; {name} has shape {tuple(x.shape)}. The last {plural} {last}.")
        check_same_shape(layer, arrays)


def _on_each(group: Group) -> str:
    """Return where so many features are held, for a message."""
    return f" on each of {group.size} ranks" if group.size > 1 else ""


def check_channels(
    layer: str, params: dict[str, Array], shapes: dict[str, str], group: Group, /, **arrays: Array
) -> None:
    """Raise unless the arrays are floats of one shape (N, C, ...) with the channels C of the parameters.

    The parameters must pass `check_params`.
    """
    with errors_on_all_ranks(group):
        check_params(layer, params, shapes, optional=shapes)
        expected = next((a.shape[0] for a in params.values()), None)
        for name, x in arrays.items():
            check_module(layer, x, params, name)
            check_float(layer, name, x)
            if x.ndim < 2 or 0 in x.shape[1:] or (expected and x.shape[1] != expected):
                held = f"holds {expected} channels{_on_each(group)}" if expected else "needs at least one channel"
                axis = f"must be {expected}" if expected else "is the channels"
                raise ValueError(
                    f"{layer} {held}; {name} has shape {tuple(x.shape)}. "
                    f"It takes (N, C, ...) with nothing empty but N; axis 1 {axis}."
                )
        check_same_shape(layer, arrays)


def check_group(layer: str, group: Any) -> None:
    """Raise unless `group` is a group, on this rank alone: without a group there are no others to tell."""
    if not hasattr(group, "require_same"):
        raise TypeError(f"{layer}: group is {with_article(group)}. Wrap a communicator first: npnorm.mpi.Ranks(comm).")


def check_offset(layer: str, params: Collection[str], offset: float, group: Group) -> None:
    """Raise unless `offset` is a finite number, and 0 where there is no weight to add it to."""
    with errors_on_all_ranks(group):
        if not is_number(offset):
            raise ValueError(f"{layer}: offset is {offset!r}. It must be a finite number, usually 0 or 1.")
        if offset and "weight" not in params:
            raise ValueError(f"{layer}: offset is {offset}, and there is no weight to add it to. Leave it out.")


def check_number_of_groups(layer: str, groups: Any) -> None:
    """Raise unless so many groups can be."""
    if not is_count(groups):
        got = f"an array of shape {tuple(groups.shape)}" if hasattr(groups, "shape") else repr(groups)
        raise ValueError(f"{layer}: groups is {got}. It must be an integer, 1 or more.")


def check_feature_groups(layer: str, groups: int, group: Group, *sizes: int) -> None:
    """Raise unless the ranks divide the groups of features, and these the features, of which this rank has a size."""
    with errors_on_all_ranks(group):
        check_number_of_groups(layer, groups)
        if groups > 1 and groups % group.size:
            raise ValueError(f"{layer}: {group.size} ranks cannot share {groups} groups. The ranks must divide them.")
        for size in sizes:
            if size * group.size % groups:
                raise ValueError(
                    f"{layer}: {groups} groups cannot share {size * group.size} features equally. "
                    "Choose a number of groups that divides the features."
                )


def check_pair(layer: str, params: Any, shapes: dict[str, str], per_head: bool, group: Group) -> None:
    """Raise unless there are the weights of queries and keys, per head of one shape."""
    with errors_on_all_ranks(group):
        check_entries(layer, params, shapes)
        for name, shape in shapes.items():
            check_params(layer, params[name], {"weight": shape}, optional=())
        q, k = (tuple(params[name]["weight"].shape) for name in shapes)
        if per_head and q != k:
            raise ValueError(
                f"{layer}: the weight of the queries has shape {q}, of the keys {k}. "
                "Per head both have shape (head_dim,)."
            )


def check_square(layer: str, eps: float, compute: str | None, group: Group) -> None:
    """Raise unless the square of eps is in the range of the working precision."""
    with errors_on_all_ranks(group):
        end = 1e18 if compute == "float32" else 1e150
        if eps and not 1 / end <= eps <= end:
            raise ValueError(
                f"{layer}: eps is {eps}. Its square leaves the working precision; choose 0, or {1 / end:.0e} "
                f"to {end:.0e}."
            )


def check_choice(layer: str, name: str, value: str, choices: Collection[str], group: Group) -> None:
    """Raise unless a setting is one of the choices."""
    with errors_on_all_ranks(group):
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"{layer}: {name} is {value!r}. Choose one of {', '.join(choices)}.")


def check_part(layer: str, p: float, group: Group) -> None:
    """Raise unless p is a part: above 0, and at most 1."""
    with errors_on_all_ranks(group):
        group.require_same(f"{layer} with p={p}")
        if not is_number(p) or not 0 < p <= 1:
            raise ValueError(f"{layer}: p is {p!r}. It must be above 0 and at most 1: k = ceil(n p) must be 1 or more.")


def check_generator(layer: str, rng: Any, group: Group) -> None:
    """Raise unless rng is a generator of random numbers."""
    with errors_on_all_ranks(group):
        if not isinstance(rng, np.random.Generator):
            raise TypeError(
                f"{layer}: rng is a {type(rng).__name__}. Pass a generator: numpy.random.default_rng(seed)."
            )


def check_groups(layer: str, groups: int, group: Group) -> None:
    """Raise unless the ranks can share so many groups of channels."""
    with errors_on_all_ranks(group):
        check_number_of_groups(layer, groups)
        if groups % group.size and group.size % groups:
            raise ValueError(
                f"{layer}: {group.size} ranks cannot share {groups} groups. "
                "The ranks must divide the groups, or the groups the ranks."
            )


def check_divides(layer: str, groups: int, channels: int, group: Group) -> None:
    """Raise unless the groups divide the channels, of which this rank has so many."""
    with errors_on_all_ranks(group):
        if channels * group.size % groups:
            raise ValueError(
                f"{layer}: {groups} groups cannot share {channels * group.size} channels equally. "
                "Choose a number of groups that divides the channels."
            )


def check_space(layer: str, x: Array, group: Group) -> None:
    """Raise unless each channel of x has more than one element of space."""
    with errors_on_all_ranks(group):
        if x.ndim < 3 or (math.prod(x.shape[2:]) == 1 and x.shape[0]):
            raise ValueError(
                f"{layer} takes (N, C, ...) with more than one element of space; x has shape {tuple(x.shape)}."
                " The variance of a single element is 0."
            )


def check_running(
    layer: str, running: dict[str, Array | None], momentum: float | None, batches: int, group: Group
) -> None:
    """Raise unless running statistics are a mean and a variance, and momentum and batches are numbers of their kind."""
    with errors_on_all_ranks(group):
        if momentum is not None and not (is_number(momentum) and 0 <= momentum <= 1):
            raise ValueError(f"{layer}: momentum is {momentum!r}. It must be a number from 0 to 1, or None.")
        mean, var = running.values()
        if (mean is None) != (var is None):
            raise ValueError(f"{layer}: running_mean and running_var come together, or not at all.")
        for name, array in running.items():
            if array is not None and not np.all(np.isfinite(to_numpy(array))):
                raise ValueError(f"{layer}: {name} has a NaN or infinity. Start from finite numbers.")
        if var is not None and not np.all(to_numpy(var) >= 0):
            raise ValueError(f"{layer}: running_var has a negative number. A variance is 0 or greater.")
        if batches != 0 and not is_count(batches):
            raise ValueError(f"{layer}: batches is {batches!r}. It must be an integer, 0 or greater.")


def check_counted(layer: str, n: Array) -> None:
    """Raise unless each channel has two elements or more; n is the same on every rank."""
    counted = int(to_numpy(abs(n)).max())
    if counted < 2:
        raise ValueError(
            f"{layer}: elements in a channel of x over all ranks: {counted}. Its variance says nothing. "
            "Train with at least two, or call inference."
        )


def check_known(layer: str, mean: Array | None, var: Array | None, eps: float, group: Group) -> None:
    """Raise unless there are running statistics with which inference can divide."""
    with errors_on_all_ranks(group):
        if mean is None or var is None:
            raise ValueError(
                f"{layer}: inference needs running statistics, and none are known. Track a batch first: "
                "norm.track(saved), or pass running_mean and running_var."
            )
        if not bool(array_module(var).all(var + eps > 0)):
            raise ValueError(f"{layer}: running_var + eps is 0 in some channel. Take an eps above 0 for inference.")


def check_tracked(layer: str, mean: Array, var: Array) -> None:
    """Raise unless running statistics that are about to be kept are finite."""
    xp = array_module(mean)
    if not (bool(xp.all(xp.isfinite(mean))) and bool(xp.all(xp.isfinite(var)))):
        raise ValueError(
            f"{layer}: statistics of this batch are not finite in {dtype_name(var)}; "
            "the running statistics stay as they were. Look for a NaN, an infinity or huge numbers in x."
        )


def check_same_shape(layer: str, arrays: dict[str, Array]) -> None:
    """Raise unless all arrays have the place and shape of the last: of the x that was saved, where there is a dy."""
    *others, reference = arrays
    for name in others:
        check_module(layer, arrays[reference], {name: arrays[name]}, reference)
        if tuple(arrays[name].shape) != tuple(arrays[reference].shape):
            said = f"{layer}: {name} has shape {tuple(arrays[name].shape)}, and"
            if name == "dy":
                raise ValueError(
                    f"{said} the {reference} that was saved {tuple(arrays[reference].shape)}. "
                    "Hand backward the gradient of the y that belongs to this saved."
                )
            raise ValueError(f"{said} {reference} {tuple(arrays[reference].shape)}. Both must have the same shape.")


def check_saved(layer: str, saved: Any, kind: type, group: Group = SOLO, method: str = "backward") -> None:
    """Raise one clear error, on every rank of the group, unless `saved` is what this kind of layer saves."""
    if isinstance(saved, kind):
        return
    with errors_on_all_ranks(group):
        kind_of_saved = f"{type(saved).__module__}.{type(saved).__qualname__}"
        raise TypeError(f"{layer}.{method} takes what {layer}.forward saved; got {kind_of_saved}.")


def check_input(layer: str, x: Array, params: Tree, width: int) -> None:
    """Raise one clear error unless `x` has `width` features last, and the module, device and dtype of the parameters.

    The usual case, plain NumPy arrays of one dtype, is told by comparisons that take no time.
    """
    usual = type(x) is np.ndarray and x.dtype in USUAL and x.ndim > 0 and x.shape[-1] == width
    if usual and all(type(a) is np.ndarray and a.dtype == x.dtype for _, a in leaves(params)):
        return
    check_module(layer, x, params)
    check_width(layer, x, width)
    check_dtype(layer, x, params)


def check_width(layer: str, x: Array, width: int, name: str = "x") -> None:
    """Raise one clear error unless `x`, in messages `name`, is float32 or float64 with `width` features last.

    complex128 is let through for the complex step, which differentiates the very code that runs.
    """
    array_module(x)  # raises, if x is not an array
    if dtype_name(x) not in ("float32", "float64", "complex128"):
        raise TypeError(
            f"{layer} works in float32 or float64; the dtype of {name} is {dtype_name(x)}. "
            f"{_conversion(name, x)}; only the norms take 16-bit floats."
        )
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(
            f"{layer} takes {width} features; {name} has shape {tuple(x.shape)}. The last axis must be {width}."
        )


def check_dtype(layer: str, x: Array, params: Tree) -> None:
    """Raise one clear error unless `x` and the parameters have one dtype; complex128 goes with any."""
    for name, param in leaves(params):
        if dtype_name(param) != dtype_name(x) and "complex128" not in (dtype_name(param), dtype_name(x)):
            raise TypeError(
                f"{layer}: {name} is {dtype_name(param)}, x is {dtype_name(x)}. Convert one of them: "
                "the result would silently have the wider type."
            )


def check_ids(layer: str, ids: Array, below: int, group: Group) -> None:
    """Raise one clear error unless `ids` are integers from 0 to below - 1, the same on every rank."""
    array_module(ids)  # raises, if ids are not an array
    if not dtype_name(ids).startswith(("int", "uint")):
        raise TypeError(f"{layer} takes integers from 0 to {below - 1}; got {dtype_name(ids)}.")
    values = to_numpy(ids)
    if values.size and not (values.min() >= 0 and values.max() < below):
        raise ValueError(
            f"{layer} takes integers from 0 to {below - 1}; got {values.min()} to {values.max()}. "
            "Was the text encoded with another vocabulary?"
        )
    if group.size > 1:  # replicated: other ids on one rank would give a wrong result, and no error
        digest = zlib.crc32(values.tobytes())
        group.require_same(f"{layer} with integers below {below} of shape {values.shape}, checksum {digest:08x}")
