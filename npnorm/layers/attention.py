"""Multi-head causal self-attention, with grouped queries.

Ashish Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.2; Joshua Ainslie et al., "GQA",
2023, arXiv:2305.13245: the heads of one group have a query each and share key and value.

Forward, for each head of d features, position s attending to the positions up to s:

    q, k, v = x Wq^T, x Wk^T, x Wv^T           q and k turned by the rotary layer, if there is one
    p = softmax(q k^T / sqrt(d) + mask)        mask: 0 up to the diagonal, -infinity above it
    o = p v
    y = o Wo^T

Backward, given dy:

    do = dy Wo
    dv = p^T do
    dp = do v^T
    ds = p (dp - sum over keys of dp p)        softmax
    dq = ds k / sqrt(d)                        turned back, if they were turned
    dk = ds^T q / sqrt(d)
    dx = dq Wq + dk Wk + dv Wv

and dW of each matrix is the sum over positions of the gradient of its output times its input (see `Linear`).

In the code the queries of the heads that share a key stand below each other in one matrix: the products over the
heads of a key, and the sums over them in dk and dv, are then ordinary matrix products.

On a group the heads are split: q, k and v are column splits, o is the row split that sums. Communicated: one sum
forward, of y, and one backward, of dx.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module, dtype_name, exp, from_numpy, transpose
from npnorm.group import SOLO, Group, everywhere, part
from npnorm.layer import Tree, check_dtype, check_features, check_module, check_names, check_saved, take_shards
from npnorm.layers.linear import COLUMN, ROW, Linear
from npnorm.layers.rope import Rotary


class Saved(NamedTuple):
    """What backward needs of forward."""

    projections: tuple[Any, Any, Any]  # of q, k, v
    turns: tuple[Any, Any] | None  # of q, k
    q: Array  # (batch, kv heads, queries of a kv head x length, d)
    k: Array  # (batch, kv heads, length, d)
    v: Array
    p: Array  # (batch, kv heads, queries of a kv head x length, length)
    o_proj: Any


class Attention:
    """Let each position read from those before it: y = softmax(q k^T / sqrt(d) + mask) v Wo^T in each head.

    Parameters
    ----------
    params : {"q_proj": {"weight": (heads d, width)}, "k_proj": {"weight": (kv heads d, width)}, "v_proj": ...,
              "o_proj": {"weight": (width, heads d)}}
        Whole arrays; each may have a "bias". A rank keeps copies of its shards.
    heads : int
    kv_heads : int or None
        The heads of keys and values, a divisor of heads; None: as many as heads.
    rotary : Rotary or None
        Turns queries and keys by their position.
    group : Group
        The ranks over which heads and kv_heads are split equally.
    """

    def __init__(
        self,
        params: Tree,
        heads: int,
        kv_heads: int | None = None,
        rotary: Rotary | None = None,
        *,
        group: Group = SOLO,
    ) -> None:
        kv_heads = kv_heads or heads
        axes = {"q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "o_proj": ROW}
        with everywhere(group):
            group.agree(f"Attention with {heads} heads, {kv_heads} of keys and values")
            check_names("Attention", params, axes)
            _check_heads({name: tuple(params[name]["weight"].shape) for name in axes}, heads, kv_heads)
            part(group, heads, f"{heads} heads")
            part(group, kv_heads, f"{kv_heads} heads of keys and values")
            self.params, self.shards = take_shards("Attention", params, axes, group)
        self.d = params["q_proj"]["weight"].shape[0] // heads
        self.q, self.k, self.v = (Linear(**self.params[name]) for name in ("q_proj", "k_proj", "v_proj"))
        self.o = Linear(**self.params["o_proj"], group=group)
        self.kv_heads = kv_heads // group.size
        self.shared_by = heads // kv_heads  # queries of a key
        self.rotary = rotary
        self.group = group

    def forward(self, x: Array) -> tuple[Array, Saved]:
        """Return y of the shape of x: (batch, length, width)."""
        with everywhere(self.group):
            check_module("Attention", x, self.params)
            check_features("Attention", x, self.q.params["weight"].shape[1])
            check_dtype("Attention", x, self.params)
            if x.ndim != 3:
                raise ValueError(f"Attention takes x of shape (batch, length, width); {tuple(x.shape)} came.")
        (q, save_q), (k, save_k), (v, save_v) = (layer.forward(x) for layer in (self.q, self.k, self.v))
        q, k, v = self._split(q), self._split(k), self._split(v)
        turns = None
        if self.rotary:
            (q, turn_q), (k, turn_k) = self.rotary.forward(q), self.rotary.forward(k)
            turns = turn_q, turn_k
        q, k, v = self._stack(q), self._stack(k), self._stack(v)
        p = self._softmax(q @ transpose(k) / math.sqrt(self.d))
        o = p @ v
        y, save_o = self.o.forward(self._merge(self._unstack(o, x.shape[1])))
        return y, Saved((save_q, save_k, save_v), turns, q, k, v, p, save_o)

    def backward(self, dy: Array, saved: Saved) -> tuple[Array, Tree]:
        """Return dx, and the gradients of this rank's shards."""
        check_saved("Attention", saved, Saved)
        xp = array_module(dy)
        _, turns, q, k, v, p, _ = saved
        do, grads_o = self.o.backward(dy, saved.o_proj)
        do = self._stack(self._split(do))
        dv = transpose(p) @ do
        dp = do @ transpose(v)
        ds = p * (dp - xp.sum(dp * p, axis=-1, keepdims=True))
        ds = ds / math.sqrt(self.d)
        length = k.shape[-2]
        dq, dk, dv = (self._unstack(a, length) for a in (ds @ k, transpose(ds) @ q, dv))
        if self.rotary and turns:
            dq, _ = self.rotary.backward(dq, turns[0])
            dk, _ = self.rotary.backward(dk, turns[1])
        backwards = [
            layer.backward(self._merge(d), save)
            for layer, d, save in zip((self.q, self.k, self.v), (dq, dk, dv), saved.projections, strict=True)
        ]
        dx = self.group.sum(sum(dx for dx, _ in backwards), what="Attention.backward")
        grads_q, grads_k, grads_v = (grads for _, grads in backwards)
        return dx, {"q_proj": grads_q, "k_proj": grads_k, "v_proj": grads_v, "o_proj": grads_o}

    def _split(self, x: Array) -> Array:
        """Take (batch, length, heads d) to (batch, kv heads, heads of each, length, d)."""
        xp = array_module(x)
        batch, length, features = x.shape
        each = features // (self.kv_heads * self.d)
        return xp.permute_dims(xp.reshape(x, (batch, length, self.kv_heads, each, self.d)), (0, 2, 3, 1, 4))

    def _merge(self, x: Array) -> Array:
        """Undo `_split`."""
        xp = array_module(x)
        batch, kv_heads, each, length, d = x.shape
        return xp.reshape(xp.permute_dims(x, (0, 3, 1, 2, 4)), (batch, length, kv_heads * each * d))

    def _stack(self, x: Array) -> Array:
        """Take (batch, kv heads, heads of each, length, d) to (batch, kv heads, heads of each x length, d)."""
        batch, kv_heads, each, length, d = x.shape
        return array_module(x).reshape(x, (batch, kv_heads, each * length, d))

    def _unstack(self, x: Array, length: int) -> Array:
        """Undo `_stack`."""
        batch, kv_heads, rows, d = x.shape
        return array_module(x).reshape(x, (batch, kv_heads, rows // length, length, d))

    def _softmax(self, s: Array) -> Array:
        """Return the softmax of the scores over the keys that come no later than the query."""
        xp = array_module(s)
        batch, kv_heads, rows, length = s.shape
        mask = np.triu(np.full((length, length), -np.inf, "float32" if dtype_name(s) == "float32" else "float64"), 1)
        s = xp.reshape(s, (batch, kv_heads, self.shared_by, length, length)) + from_numpy(mask, s)
        s -= xp.max(s, axis=-1, keepdims=True)
        p = exp(s)
        p /= xp.sum(p, axis=-1, keepdims=True)
        return xp.reshape(p, (batch, kv_heads, rows, length))


def _check_heads(shapes: dict[str, tuple[int, ...]], heads: int, kv_heads: int) -> None:
    if heads < 1 or kv_heads < 1:
        raise ValueError(f"Attention: heads is {heads}, kv_heads {kv_heads}. Both must be at least 1.")
    d, width = shapes["q_proj"][0] // heads, shapes["q_proj"][-1]
    expected = {
        "q_proj": (heads * d, width),
        "k_proj": (kv_heads * d, width),
        "v_proj": (kv_heads * d, width),
        "o_proj": (width, heads * d),
    }
    if heads % kv_heads or shapes != expected:
        raise ValueError(
            f"Attention with {heads} heads and {kv_heads} heads of keys and values needs weights of shapes {expected}; "
            f"there came {shapes}. The heads must divide the rows of q_proj, and kv_heads must divide heads."
        )
