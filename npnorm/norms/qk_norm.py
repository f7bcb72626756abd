"""QK normalization: the queries and keys of attention, each divided by its root mean square.

Alex Henry et al., "Query-Key Normalization for Transformers", Findings of EMNLP 2020, arXiv:2010.04245, has the idea
(with L2 norms); models take RMSNorm, before the rotary positions.

Forward, with the norm of `npnorm.norms.rms_norm`, and for each of queries and keys a weight of its own:

    q = norm(q)
    k = norm(k)

Backward, given dq and dk, with norm' the backward pass of norm:

    dq = norm'(dq)
    dk = norm'(dk)

There are two ways, which differ under tensor parallelism:

    per head      a row is one head of one position, the weight of shape (head_dim,) is the same for all heads (Qwen3,
                  Gemma 3). Ranks that split the heads hold whole rows: nothing is communicated forward. Backward, each
                  rank has a part of the two weights' gradients: one sum
    full width    a row is all heads of one position, the weight of shape (heads head_dim,) (OLMo-2). Ranks that split
                  the heads split the rows: one sum forward and one backward for each of queries and keys
"""

from typing import Any, NamedTuple, Self, Unpack

from numpy.typing import DTypeLike

from npnorm import checks, engine
from npnorm.arrays import Array, round_to
from npnorm.norms import cast_rms_norm, norm, options, rms_norm

WEIGHT = {"weight": "(features,), one axis"}
"""The shape of either weight, as messages say it."""


@norm.show_shapes
class Saved(NamedTuple):
    """What RMSNorm saved for the queries and for the keys."""

    q: rms_norm.Saved
    k: rms_norm.Saved


class QKNorm(norm.Norm):
    """Normalize queries and keys by their root mean square, before attention.

    Parameters
    ----------
    q_weight, k_weight : arrays of shape (head_dim,); with full_width of shape (heads head_dim,)
        The weights. On a group, per head: the same on every rank; full width: this rank's shard.
    eps : float
        Added to the mean square, so in units of x squared.
    full_width : bool
        Whether a row is all heads of a position, or each head by itself.
    offset, cast
        As `CastRMSNorm` has them; cast is None unless it is given.
    **settings : group, compute
        As for every `FeatureNorm`. The ranks of the group split the heads equally.

    Examples
    --------
    >>> import numpy as np
    >>> norm = QKNorm(np.ones(2), np.ones(2), eps=0)
    >>> q = np.array([[[1.0, 7.0]], [[-7.0, 1.0]]])  # two heads, one position, head_dim 2
    >>> (q, k), saved = norm.forward(q, q)
    >>> q
    array([[[ 0.2,  1.4]],
    <BLANKLINE>
           [[-1.4,  0.2]]])
    """

    full_width: options.Fixed[bool]
    offset: options.Fixed[float]
    cast: options.Fixed[options.Cast]
    _shapes = dict.fromkeys(("q_norm", "k_norm"), WEIGHT["weight"])

    def __init__(
        self,
        q_weight: Array,
        k_weight: Array,
        eps: float = 1e-6,
        *,
        full_width: bool = False,
        offset: float = 0,
        cast: options.Cast = None,
        **settings: Unpack[options.Common],
    ) -> None:
        ranks = self._set_common(settings)
        self.params = {"q_norm": {"weight": q_weight}, "k_norm": {"weight": k_weight}}
        told: dict[str, Any] = {"full_width": full_width, "offset": offset, "compute": self.compute}
        for params in self.params.values():
            replicated = () if full_width else params
            checks.check_settings("QKNorm", params, eps, ranks, WEIGHT, replicated=replicated, **told)
            checks.check_offset("QKNorm", params, offset, ranks)
        checks.check_pair("QKNorm", self.params, self._shapes, not full_width, ranks)
        formula = cast_rms_norm.order("QKNorm", cast, ranks)
        layout = engine.Features("QKNorm", ranks) if full_width else engine.Features("QKNorm")
        rows = {
            name: engine.Rows(layout, formula, eps, self.compute, offset=offset, group=ranks) for name in ("q", "k")
        }
        axis = 0 if not layout.local else None
        self._set(eps=float(eps), full_width=full_width, offset=offset, cast=cast, rows=rows)
        self._set(shards={"q_norm": {"weight": axis}, "k_norm": {"weight": axis}})

    @classmethod
    def init(cls, head_dim: int, dtype: DTypeLike = "float32", **settings: Unpack[options.OfHeads]) -> Self:
        """Return the norm with weights of ones, less the offset; settings: those of the constructor."""
        ones = cls._ones(head_dim, dtype, settings, "head_dim")
        return cls(ones, ones.copy(), **settings)

    def forward(self, q: Array, k: Array) -> tuple[tuple[Any, Any], Saved]:
        """Return (q, k), normalized, and what backward needs: per head of shape (..., head_dim)."""
        checks.check_pair("QKNorm", self.params, self._shapes, not self.full_width, self.group)
        q, saved_q = self._forward("q", q)
        k, saved_k = self._forward("k", k)
        return (q, k), Saved(saved_q, saved_k)

    def backward(self, dq: Array, dk: Array, saved: Saved) -> tuple[tuple[Any, Any], dict[str, Any]]:
        """Return (dq, dk), and the complete gradients of the weights."""
        checks.check_saved("QKNorm", saved, Saved, self.group)
        checks.check_pair("QKNorm", self.params, self._shapes, not self.full_width, self.group)
        dq, dw_q = self._backward("q", dq, saved.q)
        dk, dw_k = self._backward("k", dk, saved.k)
        if not self.full_width:
            dw_q, dw_k = self.group.sum(dw_q, dw_k, label="the weight gradients of QKNorm")
        grads = {
            name: {"weight": round_to(dw, self.params[name]["weight"].dtype)}
            for name, dw in (("q_norm", dw_q), ("k_norm", dw_k))
        }
        return (dq, dk), grads

    def _forward(self, name: str, x: Array) -> tuple[Any, rms_norm.Saved]:
        params = self.params[f"{name}_norm"]
        checks.check_features("QKNorm", params, WEIGHT, 1, self.group, **{name: x})
        y, (rstd,), exponent = self.rows[name].forward(x, params)
        return y, rms_norm.Saved(x, rstd, exponent)

    def _backward(self, name: str, dy: Array, saved: rms_norm.Saved) -> tuple[Any, Any]:
        """Return dx, and the unrounded gradient of this rank's heads."""
        (x, rstd, exponent), params = saved, self.params[f"{name}_norm"]
        checks.check_features("QKNorm", params, WEIGHT, 1, self.group, dy=dy, **{name: x})
        dx, grads = self.rows[name].backward(dy, x, params, (rstd,), exponent, rounded=False)
        return dx, grads["weight"]

    def _shown(self) -> dict[str, Any]:
        shown: dict[str, Any] = {"full_width": True} if self.full_width else {}
        shown |= {"offset": self.offset} if self.offset else {}
        return super()._shown() | shown | ({"cast": self.cast} if self.cast else {})
