"""What a layer is, and helpers over trees of parameters.

A layer is its parameters plus two pure methods. `forward` returns the output and `saved`, everything that `backward`
needs, written down in a NamedTuple; nothing is remembered on the layer. Gradients have the shape of the parameters.
"""

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from npnorm.arrays import Array, describe, to_numpy, with_article
from npnorm.group import Group, Solo

Tree = Any
"""A leaf, or a dict of names to trees: `{"norm": {"weight": w}, "mlp": {...}}`."""


class Layer(Protocol):
    """The two methods and two trees that every layer has.

    Both methods use the arrays that `params` holds when they are called: an array, a dict or the whole tree may be
    replaced between two calls, by one of the same shape, and arrays may be changed in place. What is replaced between
    forward and backward counts for backward, which is then no derivative of that forward.
    """

    params: Tree
    """Name to array, or name to the params of a child."""

    shards: Tree
    """The shape of `params`: for each array the axis along which a group splits it, None where it is replicated."""

    def forward(self, x: Array) -> tuple[Any, Any]:
        """Return y, saved."""

    def backward(self, dy: Array, saved: Any) -> tuple[Any, Tree]:
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


def hand_down(params: Tree, children: Mapping[str, Layer]) -> None:
    """Let each child use what stands under its name in the parent's `params`, also after it was replaced there."""
    for name, child in children.items():
        if child.params is not params[name]:
            child.params = params[name]


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


def summary(layer: str, params: Tree = None, /, **settings: Any) -> str:
    """Return a layer in one line, as its `repr`: shapes and dtypes for arrays, and settings that are not None or SOLO.

    Examples
    --------
    >>> import numpy as np
    >>> summary("Linear", {"weight": np.ones((4, 5)), "bias": np.ones(4)}, group=Solo())
    'Linear(weight=(4, 5) float64, bias=(4,) float64)'
    """
    parts = [f"{name}={show(array)}" for name, array in leaves({} if params is None else params)]
    known = {name: value for name, value in settings.items() if value is not None and not isinstance(value, Solo)}
    return f"{layer}({', '.join([*parts, *(f'{name}={value!r}' for name, value in known.items())])})"


def show(value: Any) -> str:
    """Return shape and dtype of an array, for a `repr`, which never raises; of anything else its type.

    Examples
    --------
    >>> show([1.0])
    'a list'
    """
    try:
        return describe(value)
    except TypeError:
        return with_article(value)


def show_shapes(saved: type) -> type:
    """Let the `repr` of a NamedTuple say the shapes and dtypes of its arrays, in place of their numbers.

    Examples
    --------
    >>> import numpy as np
    >>> from typing import NamedTuple
    >>> @show_shapes
    ... class Saved(NamedTuple):
    ...     x: np.ndarray
    ...     scale: float
    >>> Saved(np.ones((2, 3)), 0.5)
    Saved(x=(2, 3) float64, scale=0.5)
    """

    def shown(value: Any) -> str:
        if hasattr(value, "shape"):
            return describe(value)
        if type(value) in (tuple, list):
            return f"({', '.join(map(shown, value))})"
        return repr(value)

    def __repr__(self: Any) -> str:
        fields = zip(self._fields, self, strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={shown(value)}' for name, value in fields)})"

    setattr(saved, "__repr__", __repr__)  # noqa: B010
    return saved


def checksum(tree: Tree) -> int:
    """Return a checksum of the names, shapes, dtypes and bits of the arrays of a tree."""
    total = 0
    for name, array in sorted(leaves(tree), key=lambda leaf: leaf[0]):
        total = zlib.crc32(to_numpy(array).tobytes(), zlib.crc32(f"{name} {describe(array)}".encode(), total))
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
        group.require_same(f"{layer} of whole arrays, checksum {checksum(params):08x}")
    shards = {part: {name: axes[part][name] for name in params[part]} for part in axes}
    return shard({part: params[part] for part in axes}, shards, group), shards


def check_names(layer: str, params: Tree, axes: Tree) -> None:
    """Raise one clear error unless `params` has the arrays of `axes`; a "bias" may be left out."""
    known, given = [name for name, _ in leaves(axes)], [name for name, _ in leaves(params)]
    missing = [name for name in known if name not in given and not name.endswith("bias")]
    strange = [name for name in given if name not in known]
    if missing or strange:
        raise ValueError(f"{layer} takes {', '.join(known)}; missing: {missing}, unknown: {strange}.")
