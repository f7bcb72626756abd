"""QK normalization: the queries and keys of attention, each divided by its root mean square.

Alex Henry et al., "Query-Key Normalization for Transformers", Findings of EMNLP 2020, arXiv:2010.04245, has the idea
(with L2 norms); models take RMSNorm, before the rotary positions, in two ways that differ under tensor parallelism:

    per head      a row is one head of one position, the weight of shape (head_dim,) is the same for all heads (Qwen3,
                  Gemma 3). Ranks that split the heads hold whole rows: nothing is communicated forward. Backward, each
                  rank has a part of the two weights' gradients: one sum
    full width    a row is all heads of one position, the weight of shape (heads head_dim,) (OLMo-2). Ranks that split
                  the heads split the rows: one sum forward and one backward for each of queries and keys

Forward and backward are the formulas of `npnorm.norms.rms_norm`.
"""

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, round_to
from npnorm.axes import Features
from npnorm.blocked import Rows
from npnorm.checks import check_features, check_saved, check_settings
from npnorm.group import SOLO, Group, Solo, errors_on_all_ranks
from npnorm.norms.rms_norm import Saved as SavedRMSNorm
from npnorm.norms.rms_norm import normalize, normalize_backward
from npnorm.norms.weight import Gain


class Saved(NamedTuple):
    """What RMSNorm saved for the queries and for the keys."""

    q: SavedRMSNorm
    k: SavedRMSNorm


class QKNorm:
    """Normalize queries and keys by their root mean square, before attention.

    Parameters
    ----------
    q_weight, k_weight : arrays of shape (head_dim,); with full_width of shape (heads head_dim,)
        The gains. On a group, per head: the same on every rank; full width: this rank's shard.
    eps : float
        Added to the mean square.
    full_width : bool
        Whether a row is all heads of a position, or each head by itself.
    offset, cast
        As `RMSNorm` has them.
    group : Group
        The ranks over which the heads are split equally. Communicated per head: nothing forward, backward one sum of
        both gradients; full width: one sum forward and one backward for each of queries and keys.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

    Examples
    --------
    >>> norm = QKNorm(np.ones(2), np.ones(2), eps=0)
    >>> q = np.array([[[1.0, 7.0]], [[-7.0, 1.0]]])  # two heads, one position, head_dim 2
    >>> (q, k), saved = norm.forward(q, q)
    >>> q
    array([[[ 0.2,  1.4]],
    <BLANKLINE>
           [[-1.4,  0.2]]])
    """

    def __init__(
        self,
        q_weight: Array,
        k_weight: Array,
        eps: float = 1e-6,
        *,
        full_width: bool = False,
        offset: float = 0,
        cast: str | None = None,
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        self.params = {"q_norm": {"weight": q_weight}, "k_norm": {"weight": k_weight}}
        self.axes = Features("QKNorm", group if full_width else SOLO)
        self.group, self.full_width = group, full_width
        axis = 0 if full_width and not isinstance(group, Solo) else None
        self.shards = {"q_norm": {"weight": axis}, "k_norm": {"weight": axis}}
        replicated, shape = () if full_width else ("weight",), "(features,), one axis"
        for params in self.params.values():
            check_settings(
                "QKNorm", params, eps, group, shape, replicated=replicated, full_width=full_width, compute=compute
            )
        if not full_width:
            with errors_on_all_ranks(group):
                if q_weight.shape != k_weight.shape:
                    raise ValueError(
                        f"QKNorm: the weight of the queries has shape {tuple(q_weight.shape)}, of the keys "
                        f"{tuple(k_weight.shape)}. Per head both have shape (head_dim,)."
                    )
        weights = {"q": q_weight, "k": k_weight}
        self.gains = {name: Gain("QKNorm", weight, offset, cast, group) for name, weight in weights.items()}
        self.rows = Rows(self.axes, eps, compute, group)

    @classmethod
    def init(cls, head_dim: int, dtype: str = "float32", **settings: Any) -> "QKNorm":
        """Return the norm per head with gains of ones."""
        ones = np.full(head_dim, 1 - settings.get("offset", 0), dtype)
        return cls(ones, ones.copy(), **settings)

    def forward(self, q: Array, k: Array) -> tuple[tuple[Array, Array], Saved]:
        """Return (q, k), normalized, and what backward needs: per head of shape (..., head_dim)."""
        y_q, saved_q = self._forward("q", q)
        y_k, saved_k = self._forward("k", k)
        return (y_q, y_k), Saved(saved_q, saved_k)

    def backward(self, dq: Array, dk: Array, saved: Saved) -> tuple[tuple[Array, Array], dict[str, Any]]:
        """Return (dq, dk), and the complete gradients of the weights."""
        check_saved("QKNorm", saved, Saved, self.group)
        dx_q, dw_q = self._backward("q", dq, saved.q)
        dx_k, dw_k = self._backward("k", dk, saved.k)
        if not self.full_width:
            dw_q, dw_k = self.group.sum(dw_q, dw_k, label="the weight gradients of QKNorm")
        grads = {
            name: {"weight": round_to(dw, self.params[name]["weight"].dtype)}
            for name, dw in (("q_norm", dw_q), ("k_norm", dw_k))
        }
        return (dx_q, dx_k), grads

    def _forward(self, name: str, x: Array) -> tuple[Array, SavedRMSNorm]:
        params = self.params[f"{name}_norm"]
        check_features("QKNorm", params, 1, self.group, **{name: x})
        y, (rstd,), scale = self.rows.forward(partial(normalize, self.axes, self.gains[name], x), x, params)
        return y, SavedRMSNorm(x, rstd, scale)

    def _backward(self, name: str, dy: Array, saved: SavedRMSNorm) -> tuple[Array, Array]:
        """Return dx, and the unrounded gradient of this rank's heads."""
        params = self.params[f"{name}_norm"]
        check_features("QKNorm", params, 1, self.group, dy=dy, **{name: saved.x})
        weight = {"weight": self.rows.widened(params["weight"])}
        formula = partial(normalize_backward, self.axes, self.gains[name], saved.x)
        dx, grads = self.rows.backward(formula, dy, saved.x, weight, (saved.rstd,), saved.scale)
        return dx, grads["weight"]
