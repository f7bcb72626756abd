"""RMSNorm with a gate, as in Mamba-2 and Gated DeltaNet.

Tri Dao and Albert Gu, "Transformers are SSMs", ICML 2024, arXiv:2405.21060; the two orders, and the groups,
are those of the reference code, mamba_ssm/ops/triton/layernorm_gated.py. Qwen3-Next norms before the gate.

Forward, for each row x of n features (of one group of them) with its gate g, and silu(g) = g / (1 + exp(-g)):

    norm before gate:   z = x / sqrt(mean(x^2) + eps)         y = z w silu(g)
    gate before norm:   u = x silu(g)
                        z = u / sqrt(mean(u^2) + eps)         y = z w

Backward, given dy, with silu'(g) = s + g s (1 - s), s = 1 / (1 + exp(-g)):

    norm before gate:   dz = dy silu(g) w                     dg = dy z w silu'(g)
                        dx = rstd (dz - z mean(dz z))         dw = sum over rows of dy silu(g) z
    gate before norm:   dz = dy w                             dg = du x silu'(g)
                        du = rstd (dz - z mean(dz z))         dw = sum over rows of dy z
                        dx = du silu(g)

Split over the ranks of a group, a row costs one all-reduce forward and one backward, as for RMSNorm; with several
groups of features each rank holds whole groups, and nothing is communicated.
"""

from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module, exp, sqrt
from npnorm.axes import Groups
from npnorm.blocked import Rows
from npnorm.checks import check_features, check_saved, check_settings, is_count
from npnorm.group import SOLO, Group, Solo, errors_on_all_ranks
from npnorm.norms.statistics import affine, refine


def sigmoid(g: Array) -> Array:
    """Return 1 / (1 + exp(-g)), without overflow."""
    xp = array_module(g)
    e = exp(xp.where(g > 0, -g, g))
    return xp.where(g > 0, 1 / (1 + e), e / (1 + e))


class Gated(Groups):
    """The groups of x silu(g): what is measured where the gate comes first."""

    extends = True

    def measured(self, x: Array, *others: Array) -> Array:
        """Return x silu(g)."""
        (g,) = others
        return x * (g * sigmoid(g))


class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array
    gate: Array
    norm_before_gate: bool
    rstd: Array  # one number for each row, of the scaled rows
    scale: Array | None  # the exponent of two a row was divided by, where its squares leave the range


class GatedRMSNorm:
    """Normalize by the root mean square, and multiply by a gate: y = N(x) w silu(g), or N(x silu(g)) w.

    Parameters
    ----------
    weight : array of shape (features,), or None
        The gain w; None leaves it out. On a group, this rank's shard.
    eps : float
        Added to the mean square; in units of x squared.
    groups : int
        Groups of neighbouring features, over all ranks, that are normalized apart.
    norm_before_gate : bool
        The first of the two orders, or the second.
    group : Group
        The ranks over which the features are split equally. Communicated: with one group of features one sum of a
        number for each row forward, one backward; with more groups nothing, and the ranks must divide them.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if the weight is not floats of shape (features,), the groups do not divide the features, or
        eps is not finite and >= 0.

    Examples
    --------
    >>> norm = GatedRMSNorm(np.ones(2), eps=0)
    >>> y, saved = norm.forward(np.array([[1.0, 7.0]]), np.array([[0.0, 100.0]]))  # silu(0) = 0, silu(100) = 100
    >>> y
    array([[  0., 140.]])
    """

    def __init__(
        self,
        weight: Array | None = None,
        eps: float = 1e-6,
        *,
        groups: int = 1,
        norm_before_gate: bool = True,
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        self.params = {} if weight is None else {"weight": weight}
        check_settings(
            "GatedRMSNorm",
            self.params,
            eps,
            group,
            "(features,), one axis",
            groups=groups,
            norm_before_gate=norm_before_gate,
            compute=compute,
        )
        self.shards = dict.fromkeys(self.params, None if isinstance(group, Solo) else 0)
        with errors_on_all_ranks(group):
            if not is_count(groups):
                raise ValueError(f"GatedRMSNorm: groups is {groups!r}. It must be an integer, 1 or more.")
            if groups > 1 and groups % group.size:
                raise ValueError(
                    f"GatedRMSNorm: {group.size} ranks cannot share {groups} groups. The ranks must divide them."
                )
        self.group, self.groups, self.norm_before_gate = group, groups, norm_before_gate
        self.axes = (Groups if norm_before_gate else Gated)("GatedRMSNorm", group, groups)
        self.rows = Rows(self.axes, eps, compute)
        for array in self.params.values():
            self._check_groups(array.shape[0])

    @classmethod
    def init(cls, features: int, dtype: str = "float32", **settings: Any) -> "GatedRMSNorm":
        """Return the norm with a weight of ones."""
        return cls(np.ones(features, dtype), **settings)

    def forward(self, x: Array, gate: Array) -> tuple[Array, Saved]:
        """Return y, of the shape and dtype of x: (..., features), and what backward needs."""
        self._check(gate=gate, x=x)
        axes, norm_before_gate = self.axes, self.norm_before_gate

        def formula(x: Array, g: Array, w: Array, b: None, eps: Array) -> tuple[Array, tuple[Array]]:
            silu = g * sigmoid(g)
            u = axes.measured(x, g)  # x, or x silu
            rstd = 1 / sqrt(axes.mean(u * u) + eps)
            z = u * rstd
            y = affine(z, w) * silu if norm_before_gate else affine(z, w)
            return y, (rstd,)

        y, (rstd,), scale = self.rows.forward(formula, x, self.params, gate)
        return y, Saved(x, gate, norm_before_gate, rstd, scale)

    def backward(self, dy: Array, saved: Saved) -> tuple[tuple[Array, Array], dict[str, Array]]:
        """Return (dx, dgate), of the shapes and dtypes of x and gate, and the gradient of the weight, in its dtype."""
        check_saved("GatedRMSNorm", saved, Saved, self.group)
        x, gate, norm_before_gate, rstd, scale = saved
        self._check(dy=dy, x=x)
        axes = self.axes

        def formula(
            dy: Array, x: Array, g: Array, w: Array, rstd: Array, eps: Array
        ) -> tuple[tuple[Array, Array], dict[str, Array]]:
            s = sigmoid(g)
            silu, dsilu = g * s, s + g * s * (1 - s)
            u = x if norm_before_gate else x * silu
            z = u * rstd
            dn = dy * silu if norm_before_gate else dy  # n = z w
            dz = affine(dn, w)
            d = dz - z * axes.mean(dz * z)
            du = rstd * refine(axes, d, (dn, w), u, eps * rstd * rstd)
            if norm_before_gate:
                return (du, dy * affine(z, w) * dsilu), {"weight": dn * z}
            return (du * silu, du * x * dsilu), {"weight": dn * z}

        return self.rows.backward(formula, dy, x, self.params, (rstd,), scale, gate)

    def _check(self, **arrays: Array) -> None:
        check_features("GatedRMSNorm", self.params, 1, self.group, **arrays)
        self._check_groups(arrays["x"].shape[-1])

    def _check_groups(self, held: int) -> None:
        with errors_on_all_ranks(self.group):
            if held * self.group.size % self.groups:
                raise ValueError(
                    f"GatedRMSNorm: {self.groups} groups cannot share {held * self.group.size} features equally. "
                    "Choose a number of groups that divides the features."
                )
