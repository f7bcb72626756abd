"""Multi-head self-attention, causal or not, with grouped queries.

Ashish Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.2; Joshua Ainslie et al., "GQA",
2023, arXiv:2305.13245: the heads of one group have a query each and share key and value.

Forward, for each head of d features, position s attending to the positions up to s, or to all:

    q, k, v = x Wq^T, x Wk^T, x Wv^T           q and k turned by the rotary layer, if there is one
    p = softmax(q k^T / sqrt(d) + mask)        mask: 0 up to the diagonal, -infinity above it; 0 where all are read
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

In the code the queries come in blocks: where attention is causal, the keys after the last query of a block need not be
looked at.

On a group the heads are split: q, k and v are column splits, o is the row split that sums. Communicated: one sum
forward, of y, and one backward, of dx.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module, describe, dtype_name, from_numpy, transpose
from npnorm.checks import check_input, check_saved, require_same_settings
from npnorm.group import SOLO, Group, errors_on_all_ranks, shard_slice
from npnorm.layers.inplace import exp, in_blocks
from npnorm.layers.linear import COLUMN, ROW, Linear
from npnorm.layers.rope import Rotary
from npnorm.tree import Tree, check_names, hand_down, show_shapes, summary, take_shards

QKV = ("q_proj", "k_proj", "v_proj")

QUERIES = 64
"""Queries in a block; of half as many the products would be too small."""


@show_shapes
class Saved(NamedTuple):
    """What backward needs of forward."""

    qkv_proj: Any  # of q, k and v together
    turns: tuple[Any, Any] | None  # of q, k
    q: Array  # (batch, kv heads, heads of each, length, d), divided by sqrt(d)
    k: Array  # (batch, kv heads, 1, length, d)
    v: Array
    p: Array  # (batch, kv heads, heads of each, length, length)
    o_proj: Any


class Attention:
    """Let each position read from those up to it: y = softmax(q k^T / sqrt(d) + mask) v Wo^T in each head.

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
    causal : bool
        False: each position reads from all of them.
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
        causal: bool = True,
        group: Group = SOLO,
    ) -> None:
        kv_heads = kv_heads or heads
        axes = {"q_proj": COLUMN, "k_proj": COLUMN, "v_proj": COLUMN, "o_proj": ROW}
        with errors_on_all_ranks(group):
            require_same_settings("Attention", group, heads=heads, kv_heads=kv_heads, rotary=rotary, causal=causal)
            check_names("Attention", params, axes)
            _check_heads({name: tuple(params[name]["weight"].shape) for name in axes}, heads, kv_heads)
            shard_slice(group, heads, f"{heads} heads")
            shard_slice(group, kv_heads, f"{kv_heads} heads of keys and values")
            _check_dtypes(params)
            self.params, self.shards = take_shards("Attention", params, axes, group)
        self.d = self.params["q_proj"]["weight"].shape[0] * group.size // heads
        self.o = Linear(**self.params["o_proj"], group=group)
        self.kv_heads = kv_heads // group.size
        self.features, self.kv_features = heads // group.size * self.d, self.kv_heads * self.d  # of q; of k, and of v
        self.shared_by = heads // kv_heads  # queries of a key
        self.rotary = rotary
        self.causal = causal
        self.group = group

    def __repr__(self) -> str:
        kv_heads = self.kv_heads * self.group.size
        heads = {"heads": kv_heads * self.shared_by, "kv_heads": kv_heads if self.shared_by > 1 else None}
        causal = None if self.causal else False
        return summary("Attention", self.params, **heads, rotary=self.rotary, causal=causal, group=self.group)

    def forward(self, x: Array) -> tuple[Any, Saved]:
        """Return y of the shape of x: (batch, length, width)."""
        hand_down(self.params, {"o_proj": self.o})
        with errors_on_all_ranks(self.group):
            check_input("Attention", x, self.params, self.params["q_proj"]["weight"].shape[1])
            if x.ndim != 3:
                raise ValueError(f"Attention takes x of shape (batch, length, width); got {tuple(x.shape)}.")
        xp = array_module(x)
        qkv, save_qkv = self._qkv().forward(x)
        q, k, v = self._parts(qkv)
        q /= math.sqrt(self.d)
        turns = None
        if self.rotary:
            (q[...], turn_q), (k[...], turn_k) = self.rotary.forward(q), self.rotary.forward(k)
            turns = turn_q, turn_k
        o = xp.empty_like(qkv[..., : self.features])
        p = from_numpy(np.zeros((*q.shape[:-1], q.shape[-2]), dtype_name(o)), x)
        in_blocks(partial(self._read, from_numpy(_triangle(x), x)), p[:1, ...].size, self._split(o), p, q, k, v)
        y, save_o = self.o.forward(o)
        return y, Saved(save_qkv, turns, q, k, v, p, save_o)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, Tree]:
        """Return dx, and the gradients of this rank's shards."""
        hand_down(self.params, {"o_proj": self.o})
        check_saved("Attention", saved, Saved)
        _, turns, q, k, v, p, _ = saved
        do, grads_o = self.o.backward(dy, saved.o_proj)
        shape = (*do.shape[:-1], self.features + 2 * self.kv_features)
        dqkv = from_numpy(np.zeros(shape, dtype_name(do)), do)
        in_blocks(partial(self._read_backward, turns), p[:1, ...].size, *self._parts(dqkv), self._split(do), q, k, v, p)
        dx, grads = self._qkv().backward(dqkv, saved.qkv_proj)
        dx = self.group.sum(dx, label="Attention.backward")
        return dx, {**_cut(grads, self.params), "o_proj": grads_o}

    def _qkv(self) -> Linear:
        """Return one linear layer whose outputs are q, k and v: one product is faster than three.

        It is made anew at each call, since the parameters may have been replaced or changed; the copies take a share of
        about 1 / (batch * length) of the time of the product.
        """
        weights = [self.params[name]["weight"] for name in QKV]
        xp = array_module(weights[0])
        weight, bias = xp.concat(weights, axis=0), None
        if any("bias" in self.params[name] for name in QKV):
            parts = zip(QKV, weights, strict=True)
            bias = xp.concat([self.params[name].get("bias", xp.zeros_like(w[:, 0])) for name, w in parts], axis=0)
        return Linear(weight, bias)

    def _parts(self, qkv: Array) -> Iterator[Array]:
        """Yield the parts of q, k and v, each split into heads: views, to be read or written."""
        start = 0
        for features in (self.features, self.kv_features, self.kv_features):
            yield self._split(qkv[..., start : start + features])
            start += features

    def _read(self, mask: Array, o: Array, p: Array, q: Array, k: Array, v: Array) -> None:
        """Write o, and p where it is not 0, of some sequences; q is divided by sqrt(d)."""
        xp = array_module(q)
        for some, seen in _spans(q.shape[-2], self.causal):
            s = q[..., some, :] @ transpose(k[..., seen, :])
            if self.causal:
                n = some.stop - some.start
                s[..., some] += mask[:n, :n]
            s -= xp.max(s, axis=-1, keepdims=True)
            s = exp(s)
            s /= xp.sum(s, axis=-1, keepdims=True)
            p[..., some, seen] = s
            o[..., some, :] = s @ v[..., seen, :]

    def _read_backward(
        self, turns: Any, dq: Array, dk: Array, dv: Array, do: Array, q: Array, k: Array, v: Array, p: Array
    ) -> None:
        """Write dq, dk and dv, the latter two from zero, of some sequences; q is divided by sqrt(d)."""
        xp = array_module(do)
        for some, seen in _spans(q.shape[-2], self.causal):
            ds = do[..., some, :] @ transpose(v[..., seen, :])  # dp
            ds -= xp.sum(ds * p[..., some, seen], axis=-1, keepdims=True)
            ds *= p[..., some, seen]
            dq[..., some, :] = ds @ k[..., seen, :]
            dk[..., seen, :] += self._over_shared(transpose(ds) @ q[..., some, :])
            dv[..., seen, :] += self._over_shared(transpose(p[..., some, seen]) @ do[..., some, :])
        dq /= math.sqrt(self.d)
        if self.rotary and turns:
            dq[...], _ = self.rotary.backward(dq, turns[0])
            dk[...], _ = self.rotary.backward(dk, turns[1])

    def _over_shared(self, x: Array) -> Array:
        """Return the sum over the heads that share a key: (batch, kv heads, 1, length, d)."""
        return array_module(x).sum(x, axis=2, keepdims=True) if self.shared_by > 1 else x

    def _split(self, x: Array) -> Array:
        """Take (batch, length, heads d) to (batch, kv heads, heads of each, length, d)."""
        xp = array_module(x)
        batch, length, features = x.shape
        each = features // (self.kv_heads * self.d)
        return xp.permute_dims(xp.reshape(x, (batch, length, self.kv_heads, each, self.d)), (0, 2, 3, 1, 4))


def _spans(length: int, causal: bool) -> Iterator[tuple[slice, slice]]:
    """Yield blocks of queries, and the keys that any of them may read: those up to its last, or all."""
    for start in range(0, length, QUERIES):
        stop = min(start + QUERIES, length)
        yield slice(start, stop), slice(stop if causal else length)


def _triangle(x: Array) -> np.ndarray:
    """Return the mask of a block: 0 up to the diagonal, -infinity above it; in the precision of x."""
    n = min(QUERIES, x.shape[1])
    return np.triu(np.full((n, n), -np.inf, "float32" if dtype_name(x) == "float32" else "float64"), 1)


def _check_dtypes(params: Tree) -> None:
    """Raise unless the projections that make one product have one dtype; complex128 goes with any."""
    weights = [params[name]["weight"] for name in QKV]
    if len({dtype_name(w) for w in weights} - {"complex128"}) > 1:
        raise TypeError(f"Attention: q_proj, k_proj and v_proj must have one dtype; got {[*map(describe, weights)]}.")


def _cut(stacked: dict[str, Array], params: Tree) -> Tree:
    """Return the gradients of q, k and v in the names of `params`: views of the gradient of their one product."""
    parts, start = {}, 0
    for name in QKV:
        stop = start + params[name]["weight"].shape[0]
        parts[name] = {key: stacked[key][start:stop, ...] for key in params[name]}
        start = stop
    return parts


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
            f"got {shapes}. The heads must divide the rows of q_proj, and kv_heads must divide heads."
        )
