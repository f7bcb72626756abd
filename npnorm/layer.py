"""What a layer is, and helpers over trees of parameters.

A layer is its parameters plus two pure methods. `forward` returns the output and `saved`, everything that `backward`
needs, written down in a NamedTuple; nothing is remembered on the layer. Gradients have the shape of the parameters.
"""

import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from npnorm.arrays import Array, array_module, dtype_name, to_numpy
from npnorm.group import SOLO, Group, everywhere

Tree = Any
"""A leaf, or a dict of names to trees: `{"norm": {"weight": w}, "mlp": {...}}`."""


class Layer(Protocol):
    """The two methods and two trees that every layer has."""

    params: Tree
    """Name to array, or name to the params of a child."""

    shards: Tree
    """The shape of `params`: for each array the axis along which a group splits it, None where it is replicated."""

    def forward(self, x: Array) -> tuple[Array, Any]:
        """Return y, saved."""

    def backward(self, dy: Array, saved: Any) -> tuple[Array, Tree]:
        """Return dx, grads: complete gradients for what this rank holds."""


def map_tree(f: Callable[..., Any], *trees: Tree) -> Tree:
    """Apply `f` to the matching leaves of trees of the same shape.

    Examples
    --------
    >>> map_tree(lambda a, b: a + b, {"x": 1, "y": {"z": 2}}, {"x": 10, "y": {"z": 20}})
    {'x': 11, 'y': {'z': 22}}
    """
    first = trees[0]
    if isinstance(first, dict):
        return {name: map_tree(f, *(tree[name] for tree in trees)) for name in first}
    return f(*trees)


def leaves(tree: Tree, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, leaf) in the order of the tree.

    Examples
    --------
    >>> list(leaves({"x": 1, "y": {"z": 2}}))
    [('x', 1), ('y.z', 2)]
    """
    if isinstance(tree, dict):
        for name, child in tree.items():
            yield from leaves(child, f"{path}.{name}" if path else name)
    else:
        yield path, tree


def checksum(tree: Tree) -> int:
    """Return a checksum of the names, and of the bits of the arrays, of a tree."""
    total = 0
    for name, array in sorted(leaves(tree), key=lambda leaf: leaf[0]):
        total = zlib.crc32(to_numpy(array).tobytes(), zlib.crc32(name.encode(), total))
    return total


def shard(params: Tree, shards: Tree, group: Group) -> Tree:
    """Return copies of the parts of the whole `params` that this rank holds."""
    return map_tree(lambda array, axis: group.shard(array, axis), params, shards)


def take_shards(layer: str, params: Tree, axes: Tree, group: Group) -> tuple[Tree, Tree]:
    """Return this rank's parts of the whole `params`, and the tree of the axes that belong to them.

    `axes` has, for each array that the layer can have, the axis along which it is split. Raises a RankError if the
    whole arrays are not the same on every rank.
    """
    if group.size > 1:
        group.agree(f"{layer} of whole arrays with checksum {checksum(params):08x}")
    shards = {part: {name: axes[part][name] for name in params[part]} for part in axes}
    return shard({part: params[part] for part in axes}, shards, group), shards


def check_names(layer: str, params: Tree, axes: Tree) -> None:
    """Raise one clear error unless `params` has the arrays of `axes`; a "bias" may be left out."""
    known, came = [name for name, _ in leaves(axes)], [name for name, _ in leaves(params)]
    missing = [name for name in known if name not in came and not name.endswith("bias")]
    strange = [name for name in came if name not in known]
    if missing or strange:
        raise ValueError(f"{layer} takes {', '.join(known)}; missing: {missing}, unknown: {strange}.")


def check_module(layer: str, x: Array, params: Tree, called: str = "x") -> None:
    """Raise one clear error unless `x`, in messages `called`, and the parameters are of one module, on one device."""
    try:
        module = array_module(x)
    except TypeError as problem:
        raise TypeError(f"{layer}: {problem}") from None
    for name, param in leaves(params):
        if array_module(param) is module and device(param) != device(x):
            raise TypeError(
                f"{layer}: {name} is on {device(param)}, {called} on {device(x)}. Bring both to the same device first."
            )
        if array_module(param) is not module:
            raise TypeError(
                f"{layer}: {name} is an array of {array_module(param).__name__}, {called} one of {module.__name__}. "
                "Bring both to the same device first."
            )


def device(x: Array) -> str:
    """Return where `x` lies, for a message and a comparison."""
    return str(getattr(x, "device", "host"))


def check_saved(layer: str, saved: Any, kind: type, group: Group = SOLO) -> None:
    """Raise one clear error, on every rank of the group, unless `saved` is what this kind of layer saves."""
    if isinstance(saved, kind):
        return
    with everywhere(group):
        came = f"{type(saved).__module__}.{type(saved).__qualname__}"
        raise TypeError(f"{layer}.backward takes what {layer}.forward saved; a {came} came.")


def check_dtype(layer: str, x: Array, params: Tree) -> None:
    """Raise one clear error unless `x` and the parameters have one dtype; complex128 goes with any."""
    for name, param in leaves(params):
        if dtype_name(param) != dtype_name(x) and "complex128" not in (dtype_name(param), dtype_name(x)):
            raise TypeError(
                f"{layer}: {name} is {dtype_name(param)}, x is {dtype_name(x)}. Convert one of them: "
                "the result would silently have the wider type."
            )


def check_features(layer: str, x: Array, width: int, name: str = "x") -> None:
    """Raise one clear error unless `x`, in messages `name`, is float32 or float64 with `width` features last.

    complex128 is let through for the complex step, which differentiates the very code that runs.
    """
    array_module(x)  # raises, if x is not an array
    if dtype_name(x) not in ("float32", "float64", "complex128"):
        raise TypeError(
            f"{layer} works in float32 or float64; the dtype of {name} is {dtype_name(x)}. "
            f"Convert it first, for example by {name}.astype(numpy.float32); only the norms take 16-bit floats."
        )
    if x.ndim == 0 or x.shape[-1] != width:
        raise ValueError(
            f"{layer} takes {width} features; {name} has shape {tuple(x.shape)}. The last axis must be {width}."
        )


def check_ids(layer: str, ids: Array, below: int, group: Group) -> None:
    """Raise one clear error unless `ids` are integers from 0 to below - 1, the same on every rank."""
    array_module(ids)  # raises, if ids are not an array
    if not dtype_name(ids).startswith(("int", "uint")):
        raise TypeError(f"{layer} takes integers from 0 to {below - 1}; {dtype_name(ids)} came.")
    values = to_numpy(ids)
    if values.size and not (values.min() >= 0 and values.max() < below):
        raise ValueError(
            f"{layer} takes integers from 0 to {below - 1}; they came from {values.min()} to {values.max()}. "
            "Was the text encoded with another vocabulary?"
        )
    if group.size > 1:  # replicated: other ids on one rank would give a wrong result, and no error
        digest = zlib.crc32(values.tobytes())
        group.agree(f"{layer} with integers below {below} of shape {values.shape}, checksum {digest:08x}")
