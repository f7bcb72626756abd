"""RMSNorm with a gate, as in Mamba-2, Gated DeltaNet and Qwen3-Next.

The two orders, and the groups of features, are those of the reference code of Mamba-2 (Tri Dao and Albert Gu,
"Transformers are SSMs", ICML 2024, arXiv:2405.21060), mamba_ssm/ops/triton/layernorm_gated.py. Here is the norm before
the gate, which Qwen3-Next has; the other order is in `npnorm.norms.gate_before_norm`.

Forward, for each row x of n features (of one group of them) with its gate g, and the norm of `npnorm.norms.rms_norm`:

    silu = g sigmoid(g)                   sigmoid(g) = 1 / (1 + exp(-g))
    v = norm(x, w)
    y = v silu

Backward, given dy, with norm' the backward pass of norm:

    s = sigmoid(g)
    silu = g s
    dsilu = s + g s (1 - s)               the derivative of silu by g
    v = x rstd w
    dv = dy silu
    dx, dw = norm'(dv, x, w)
    dg = dy v dsilu

A row that is split over the ranks of a group costs one sum over the ranks forward and one backward, as for RMSNorm;
with several groups of features each rank holds whole groups, and nothing is communicated.
"""

from typing import Any, NamedTuple, Self, Unpack

from numpy.typing import DTypeLike

from npnorm import checks, engine
from npnorm.arrays import Array, sigmoid
from npnorm.norms import gate_before_norm, norm, options, rms_norm


@norm.show_shapes
class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array
    gate: Array
    norm_before_gate: bool
    rstd: Array  # one number for each row
    exponent: Array | None  # rows whose squares overflow were divided by 2^exponent; None: there were none


def forward(row: engine.Row, x: Array, g: Array, w: Array) -> tuple[Array, tuple[Array]]:
    """Return y, and the statistics to save."""
    silu = g * sigmoid(g)
    v, statistics = rms_norm.forward(row, x, w, row.without_bias(x))
    y = v * silu
    return y, statistics


def backward(row: engine.Row, dy: Array, x: Array, g: Array, w: Array, rstd: Array) -> tuple[Array, Array, Array]:
    """Return dx and dg, and dw before its sum over the rows."""
    s = sigmoid(g)
    silu = g * s
    dsilu = s + g * s * (1 - s)
    v = x * rstd * w
    dv = dy * silu
    dx, dw, _ = rms_norm.backward(row, dv, x, w, rstd)
    dg = dy * v * dsilu
    return dx, dg, dw


NORM_FIRST = engine.Formula(forward, backward, Saved, ("weight",))
"""The formula of this page."""

GATE_FIRST = engine.Formula(
    gate_before_norm.forward, gate_before_norm.backward, Saved, ("weight",), measured=gate_before_norm.measured
)
"""The formula of the other order."""


class GatedRMSNorm(norm.Norm):
    """Normalize by the root mean square, and multiply by a gate: y = N(x) w silu(g), or N(x silu(g)) w.

    Parameters
    ----------
    weight : array of shape (features,), or None
        w; None leaves it out. On a group, this rank's shard.
    eps : float
        Added to the mean square, so in units of x squared.
    groups : int
        Groups of neighbouring features, over all ranks, that are normalized apart.
    norm_before_gate : bool
        The first of the two orders, or the second.
    **settings : group, compute
        As for every `FeatureNorm`. With several groups of features, the ranks must divide them.

    Examples
    --------
    >>> import numpy as np
    >>> norm = GatedRMSNorm(np.ones(2), eps=0)
    >>> y, saved = norm.forward(np.array([[1.0, 7.0]]), np.array([[0.0, 100.0]]))  # silu(0) = 0, silu(100) = 100
    >>> y
    array([[  0., 140.]])
    """

    groups: options.Fixed[int]
    norm_before_gate: options.Fixed[bool]
    _shapes = {"weight": "(features,), one axis"}

    def __init__(
        self,
        weight: Array | None = None,
        eps: float = 1e-6,
        *,
        groups: int = 1,
        norm_before_gate: bool = True,
        **settings: Unpack[options.Common],
    ) -> None:
        group = self._set_common(settings)
        self.params = {} if weight is None else {"weight": weight}
        told: dict[str, Any] = {"groups": groups, "norm_before_gate": norm_before_gate, "compute": self.compute}
        checks.check_settings("GatedRMSNorm", self.params, eps, group, self._shapes, **told)
        checks.check_feature_groups("GatedRMSNorm", groups, group, *(a.shape[0] for a in self.params.values()))
        layout = engine.Groups("GatedRMSNorm", group, groups)
        formulas = {True: NORM_FIRST, False: GATE_FIRST}
        rows = {first: engine.Rows(layout, formula, eps, self.compute) for first, formula in formulas.items()}
        self._set(eps=float(eps), groups=groups, norm_before_gate=bool(norm_before_gate), rows=rows)
        self._set(shards=dict.fromkeys(self.params, self._axis(0)))

    @classmethod
    def init(cls, features: int, dtype: DTypeLike = "float32", **settings: Unpack[options.OfGates]) -> Self:
        """Return the norm with a weight of ones, on a group for this rank's shard of the features."""
        return cls(cls._ones(features, dtype, settings), **settings)

    def forward(self, x: options.AnyArray, gate: Array) -> tuple[options.AnyArray, Saved]:
        """Return y, of the shape and dtype of x: (..., features), and what backward needs."""
        self._check(gate=gate, x=x)
        y, (rstd,), exponent = self.rows[self.norm_before_gate].forward(x, self.params, gate)
        return y, Saved(x, gate, self.norm_before_gate, rstd, exponent)

    def backward(self, dy: options.AnyArray, saved: Saved) -> tuple[tuple[options.AnyArray, Any], dict[str, Any]]:
        """Return (dx, dgate), of the shapes and dtypes of x and gate, and the gradient of the weight, in its dtype."""
        checks.check_saved("GatedRMSNorm", saved, Saved, self.group)
        x, gate, norm_before_gate, rstd, exponent = saved
        self._check(dy=dy, x=x)
        return self.rows[norm_before_gate].backward(dy, x, self.params, (rstd,), exponent, gate)

    def _check(self, **arrays: Array) -> None:
        checks.check_features("GatedRMSNorm", self.params, self._shapes, 1, self.group, **arrays)
        checks.check_feature_groups("GatedRMSNorm", self.groups, self.group, arrays["x"].shape[-1])

    def _shown(self) -> dict[str, Any]:
        shown = {"groups": self.groups} if self.groups > 1 else {}
        return super()._shown() | shown | ({} if self.norm_before_gate else {"norm_before_gate": False})
