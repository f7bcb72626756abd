"""What type checkers see of norms: the settings that constructors and `init` take, and that nothing is assigned."""

from typing import Any, Literal, Never, Protocol, Required, TypedDict, TypeVar

from npnorm.arrays import Array
from npnorm.group import Group

AnyArray = TypeVar("AnyArray", bound=Array)
"""An array of some module, which goes in and comes out."""

Compute = Literal["float64", "float32"] | None
"""The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md."""


Statistics = Literal["two-pass", "packed", "gathered"]
"""How the ranks of a group find mean and variance: see `npnorm.engine.statistics`."""

Sizes = int | tuple[int, ...]
"""A number of features, or the shape of several axes."""

Cast = Literal["llama", "olmo2", "gemma"] | None
"""Where a product with a weight is rounded: see `npnorm.norms.cast_rms_norm`."""


class Common(TypedDict, total=False):
    """The settings that every norm has."""

    group: Group
    compute: Compute


class Settings(Common, total=False):
    """The settings that every norm over features has."""

    axes: int | None
    features: Sizes | None


class WithEps(Common, total=False):
    """What the `init` of every norm hands on."""

    eps: float


class OfRows(WithEps, total=False):
    """What `init` of a norm over features hands on."""

    axes: int | None


class OfMeans(OfRows, total=False):
    """The same, for `LayerNorm`."""

    statistics: Statistics


class OfParts(WithEps, total=False):
    """The same, for `PartialRMSNorm`."""

    p: float


class OfWeights(OfRows, total=False):
    """The same, for `RMSNorm`."""

    offset: float


class OfCasts(OfWeights, total=False):
    """The same, for `CastRMSNorm`."""

    cast: Required[Cast]


class OfSums(OfWeights, total=False):
    """The same, for `AddRMSNorm`."""

    cast: Cast


class OfHeads(WithEps, total=False):
    """The same, for `QKNorm`."""

    full_width: bool
    offset: float
    cast: Cast


class OfGates(WithEps, total=False):
    """The same, for `GatedRMSNorm`."""

    groups: int
    norm_before_gate: bool


class OfBatches(WithEps, total=False):
    """The same, for `BatchNorm`."""

    momentum: float | None
    running_mean: Array | None
    running_var: Array | None
    batches: int


Held = TypeVar("Held", covariant=True)
"""What a setting holds."""


class Fixed(Protocol[Held]):
    """A setting as type checkers see it: it can be read, and nothing can be assigned."""

    def __get__(self, norm: Any, kind: Any = None) -> Held:
        """Return what it holds."""

    def __set__(self, norm: Any, value: Never) -> None:
        """Take nothing: there is no value of this type."""
