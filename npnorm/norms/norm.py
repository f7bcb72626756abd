"""What norms have in common: parameters, checks, what is saved, and the two public methods. No mathematics.

A page brings the formula: `forward(row, x, w, b) -> y, statistics` and `backward(row, dy, x, w, *statistics) -> dx, dw,
db`, where dw and db are still to be summed over the rows; and `Saved`, whose fields are x, the statistics, exponent.
"""

import inspect
from typing import Any, Final, Generic, NoReturn, Self, TypeVar, Unpack

import numpy as np
from numpy.typing import DTypeLike

from npnorm import checks
from npnorm.arrays import Array
from npnorm.engine import FORMS, Features, Formula, Rows
from npnorm.group import SOLO, Group, Solo, errors_on_all_ranks
from npnorm.norms.options import AnyArray, Common, Compute, Fixed, Settings, Sizes, Statistics, WithEps
from npnorm.tree import leaves, show, show_shapes

Saved = TypeVar("Saved")
"""What forward saves for backward."""


class Norm:
    """A layer with parameters and settings. The arrays in `params` may be replaced; settings are fixed.

    Attributes
    ----------
    params : dict
        Name to array. A call uses what it holds at that time, forward and backward.
    shards : dict
        For each parameter the axis along which a group splits it; None where it is replicated.
    """

    params: dict[str, Any]
    shards: Fixed[dict[str, Any]]
    rows: Any  # `Rows`, or several
    eps: Fixed[float]
    group: Final[Group] = SOLO
    compute: Final[Compute] = None
    _shapes: dict[str, str] = {}  # of the parameters, as messages say it

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        for value in vars(cls).values():
            saved = value.saved if isinstance(value, Formula) else value
            if isinstance(saved, type) and issubclass(saved, tuple):
                show_shapes(saved)
        for name in cls._shapes:
            setattr(cls, name, _absent(name))

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "params":
            self._refuse(name)
        if not isinstance(value, dict):  # a call must find a dict, also one that skips the checks
            with errors_on_all_ranks(self.group):
                checks.check_entries(type(self).__name__, value, self._shapes)
        object.__setattr__(self, name, value)

    def _refuse(self, name: str) -> NoReturn:
        """Raise, and say what to do in place of this attribute."""
        layer = type(self).__name__
        if name in self._shapes:
            raise AttributeError(f"{layer}: {name} is in params. Read or assign norm.params[{name!r}].")
        if name not in vars(self) and isinstance(getattr(type(self), name, _absent(name)), property):
            raise AttributeError(f"{layer} has no setting {name!r}, and nothing is added after it is made.")
        raise AttributeError(
            f"{layer}: {name} is fixed when the norm is made. Make another {layer}; only the arrays in params change."
        )

    def _set(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def _set_common(self, settings: Common | Settings, kind: type = Common) -> Group:
        """Set `group` and `compute`, if they are given; return the group. Raise if `kind` does not have a setting."""
        for name in settings:
            if name not in kind.__annotations__:
                taken = inspect.signature(type(self)).parameters.values()
                named = [p.name for p in taken if p.kind is not p.VAR_KEYWORD]
                raise TypeError(
                    f"{type(self).__name__} has no {name!r}. It takes {', '.join([*named, *kind.__annotations__])}."
                )
        self._set(**{name: value for name, value in settings.items() if name in Common.__annotations__})
        checks.check_group(type(self).__name__, self.group)
        return self.group

    @classmethod
    def _check_init(cls, size: Sizes, dtype: DTypeLike, settings: Any, called: str = "features") -> None:
        """Raise unless `init` can make parameters of this size, in messages `called`."""
        several = "(features,)" in cls._shapes.values()
        checks.check_init(cls.__name__, called, size, dtype, settings, cls._shapes, several)

    @classmethod
    def _ones(cls, size: Sizes, dtype: DTypeLike, settings: Any, called: str = "features") -> np.ndarray:
        """Return the weight that multiplies by 1."""
        offset = settings.get("offset", 0)
        cls._check_init(size, dtype, settings, called)
        checks.check_offset(cls.__name__, ("weight",), offset, settings.get("group", SOLO))
        return np.full(size, 1 - offset, dtype)

    def _axis(self, axis: int) -> int | None:
        """Return the axis along which the group splits a parameter: on one rank none."""
        return None if isinstance(self.group, Solo) else axis

    def _shown(self) -> dict[str, Any]:
        """Return the settings that repr shows."""
        shown: dict[str, Any] = {"eps": self.eps} if "eps" in self.__dict__ else {}
        if not isinstance(self.group, Solo):
            shown["group"] = self.group
        return shown | ({} if self.compute is None else {"compute": self.compute})

    def __repr__(self) -> str:
        arrays = [f"{name}={show(a)}" for name, a in leaves(self.params)]
        settings = [f"{name}={value!r}" for name, value in self._shown().items()]
        return f"{type(self).__name__}({', '.join(arrays + settings)})"


def _absent(name: str) -> property:
    """Return an attribute that no norm has, since it is in `params`; whoever reads it is told so."""

    def get(norm: Norm) -> NoReturn:
        norm._refuse(name)

    return property(get)


class RowNorm(Norm, Generic[Saved]):
    """A norm of the rows of one array: the two public methods.

    A class sets `params`, `shards`, `rows` and its settings, and has the formula and `_check`.
    """

    formula: Formula
    axes: Fixed[int]
    features: Fixed[tuple[int, ...] | None]

    def forward(self, x: AnyArray, *, out: Array | None = None) -> tuple[AnyArray, Saved]:
        """Return y, of the shape and dtype of x: (..., features), and what backward needs; y is written to `out`."""
        y, statistics, exponent = self.rows.forward(x, self.params, out=out, check=self._check)
        return y, self.formula.saved(x, *statistics, exponent)

    def backward(self, dy: AnyArray, saved: Saved, *, out: Array | None = None) -> tuple[AnyArray, dict[str, Any]]:
        """Return dx, of the shape and dtype of x, and the gradients of the parameters; dx is written to `out`."""
        self._check_saved(saved)
        of_x: Any = saved
        x, *statistics, exponent = of_x
        return self.rows.backward(dy, x, self.params, tuple(statistics), exponent, out=out, check=self._check)

    def _check_saved(self, saved: Any, method: str = "backward") -> None:
        """Raise, on every rank of the group, unless it is what forward saves; `method` takes it."""
        checks.check_saved(type(self).__name__, saved, self.formula.saved, self.group, method)

    def _check(self, **arrays: Array) -> None:
        """Raise, on every rank of the group, unless the arrays suit the norm."""
        raise NotImplementedError


class FeatureNorm(RowNorm[Saved]):
    """A norm over the trailing axes of (..., features), with a weight and a bias.

    Parameters
    ----------
    weight, bias : arrays of the shape of the features, or None
        What z is multiplied by, and what is added; None leaves it out. On a group, this rank's shard of the last axis.
        They are held, not copied.
    eps : float
        Added to the mean square, so in units of x squared.
    axes : int or None
        How many trailing axes are the features. None: as many as the parameters, or `features`, have; else 1.
    features : int, tuple of int or None
        The shape of the features of a norm without parameters, which x is then checked against.
    offset : float
        Added to the weight, in float32 for weights of 32 bits or fewer.
    group : Group
        The ranks over which the last axis is split equally.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if the parameters are not floats of one shape, or eps is not finite and >= 0.
    """

    offset: Fixed[float]
    statistics: Fixed[Statistics]
    layout: Fixed[Features]
    _shapes = dict.fromkeys(("weight", "bias"), "(features,)")

    def __init__(
        self,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        settings: Settings,
        *,
        offset: float = 0,
        statistics: Statistics = "two-pass",
    ) -> None:
        layer, group = type(self).__name__, self._set_common(settings, Settings)
        self.params = {name: a for name, a in (("weight", weight), ("bias", bias)) if a is not None}
        told = {"offset": offset or None, "statistics": statistics, **_told(settings)}
        checks.check_settings(layer, self.params, eps, group, self._shapes, **told)
        checks.check_offset(layer, self.params, offset, group)
        checks.check_choice(layer, "statistics", statistics, FORMS, group)
        axes, features = _shape_of(layer, self.params, settings, group)
        layout = Features(layer, group, axes)
        rows = Rows(layout, self.formula, eps, self.compute, form=statistics, offset=offset)
        self._set(eps=float(eps), axes=axes, features=features, offset=offset, statistics=statistics)
        self._set(shards=dict.fromkeys(self.params, self._axis(axes - 1)), layout=layout, rows=rows)

    @classmethod
    def _init(cls, features: Sizes, dtype: DTypeLike, settings: Any, with_bias: bool = False) -> Self:
        """Return the norm that multiplies by 1."""
        weight = cls._ones(features, dtype, settings)
        return cls(weight, np.zeros_like(weight) if with_bias else None, **settings)

    def _check(self, **arrays: Array) -> None:
        layer, group = type(self).__name__, self.group
        checks.check_features(layer, self.params, self._shapes, self.axes, group, self.features, **arrays)
        checks.check_offset(layer, self.params, self.offset, group)

    def _shown(self) -> dict[str, Any]:
        shown: dict[str, Any] = {} if self.params or self.features is None else {"features": self.features}
        shown |= {"eps": self.eps} | ({"offset": self.offset} if self.offset else {})
        shown |= {} if self.statistics == "two-pass" else {"statistics": self.statistics}
        return shown | {name: value for name, value in super()._shown().items() if name != "eps"}


class LengthNorm(RowNorm[Saved]):
    """A norm over the trailing axes of (..., features) that divides by a length, with one number as its weight.

    Parameters
    ----------
    weight : array of shape () or (1,), or None
        What z is multiplied by; None leaves it out. On a group, the same on every rank.
    eps : float
        The least length that is divided by, so in units of x. The formula is given its square.
    **settings : axes, features, group, compute
        As for `FeatureNorm`; here axes is 1 unless it is given.

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if the weight is not one float, or eps is not finite and >= 0.
    """

    _shapes = {"weight": checks.NUMBER}

    def __init__(self, weight: Array | None = None, eps: float = 1e-5, **settings: Unpack[Settings]) -> None:
        layer, group = type(self).__name__, self._set_common(settings, Settings)
        self.params = {} if weight is None else {"weight": weight}
        checks.check_settings(layer, self.params, eps, group, self._shapes, replicated=self.params, **_told(settings))
        checks.check_square(layer, eps, self.compute, group)
        axes, features = _shape_of(layer, {}, settings, group)
        rows = Rows(Features(layer, group, axes), self.formula, eps * eps, self.compute)
        self._set(eps=float(eps), axes=axes, features=features, shards=dict.fromkeys(self.params), rows=rows)

    def _check(self, **arrays: Array) -> None:
        layer, group = type(self).__name__, self.group
        checks.check_features(layer, self.params, self._shapes, self.axes, group, self.features, **arrays)

    def _shown(self) -> dict[str, Any]:
        shape = {"features": self.features} if self.features else {"axes": self.axes} if self.axes > 1 else {}
        return shape | super()._shown()


class ChannelNorm(RowNorm[Saved]):
    """A norm of channels, over (N, C, ...), with a weight and a bias for each channel.

    Parameters
    ----------
    weight, bias : arrays of shape (channels,), or None
        What z is multiplied by, and what is added; None leaves it out. They are held, not copied.
    eps : float
        Added to the variance (that of n, not n - 1), so in units of x squared.
    group : Group
        The ranks that share the norm.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if the parameters are not floats of one shape (channels,), or eps is not finite and >= 0.
    """

    _shapes = dict.fromkeys(("weight", "bias"), "(channels,)")

    def _set_channels(
        self,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        settings: Common,
        replicated: dict[str, Array] | None = None,
        sizes: str = "{}",
        **told: Any,
    ) -> Group:
        """Set parameters and settings, checked; return the group.

        replicated : more arrays to check; with them all arrays are the same on each rank
        """
        group = self._set_common(settings)
        self.params = {name: a for name, a in (("weight", weight), ("bias", bias)) if a is not None}
        arrays, told = self.params | (replicated or {}), told | {"compute": self.compute}
        same = () if replicated is None else tuple(arrays)
        checks.check_settings(
            type(self).__name__, arrays, eps, group, dict.fromkeys(arrays, "(channels,)"), sizes, same, **told
        )
        shards = dict.fromkeys(self.params, self._axis(0) if replicated is None else None)
        self._set(eps=float(eps), shards=shards)
        return group

    @classmethod
    def init(cls, channels: int, dtype: DTypeLike = "float32", **settings: Unpack[WithEps]) -> Self:
        """Return the norm with a weight of ones and a bias of zeros; settings: eps, group, compute."""
        return cls._init(channels, dtype, settings)

    @classmethod
    def _init(cls, channels: int, dtype: DTypeLike, settings: Any, *first: int) -> Self:
        """Return the norm with a weight of ones and a bias of zeros; `first` is what stands before them."""
        weight = cls._ones(channels, dtype, settings, "channels")
        return cls(*first, weight, np.zeros_like(weight), **settings)  # type: ignore[call-arg]

    def _check(self, **arrays: Array) -> None:
        checks.check_channels(type(self).__name__, self.params, self._shapes, self.group, **arrays)


def _told(settings: Settings) -> dict[str, Any]:
    """Return the settings that the ranks of a group compare."""
    return {name: value for name, value in settings.items() if name != "group"}


def _shape_of(
    layer: str, params: dict[str, Array], settings: Settings, group: Group
) -> tuple[int, tuple[int, ...] | None]:
    """Return how many trailing axes are the features, and their shape if a setting says it."""
    axes, features = settings.get("axes"), settings.get("features")
    if features is None:
        return checks.count_axes(layer, params, axes, group), None
    with errors_on_all_ranks(group):
        shape = features if isinstance(features, tuple) else (features,)
        if not shape or not all(checks.is_count(n) for n in shape):
            raise ValueError(
                f"{layer}: features is {features!r}. It must be an integer, 1 or more, or a tuple of such."
            )
        if params or axes is not None:
            raise ValueError(f"{layer}: features is for a norm without parameters, instead of axes. Leave it out.")
    return len(shape), shape
