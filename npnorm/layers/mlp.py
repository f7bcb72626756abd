"""The feed-forward sub-layer, plain and gated.

Plain, Ashish Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, equation 2, with GELU for the ReLU:

    y = down(gelu(up(x)))

Gated, Noam Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202, equation 6:

    y = down(silu(gate(x)) up(x))

On a group the hidden features are split: up and gate are column splits, down is the row split that sums.
Communicated: one sum forward, of y, and one backward, of dx. The sum forward turns partial into replicated (g in
Megatron-LM); the use of the replicated x by every rank costs nothing forward, and its backward is the other sum (f).
"""

from typing import Any, NamedTuple

from npnorm.arrays import Array
from npnorm.group import SOLO, Group, everywhere, part
from npnorm.layer import Tree, check_dtype, check_features, check_module, check_names, check_saved, take_shards
from npnorm.layers.activations import GELU, SiLU
from npnorm.layers.linear import COLUMN, ROW, Linear


class SavedMLP(NamedTuple):
    """What backward needs of forward."""

    up: Any
    gelu: Any
    down: Any


class MLP:
    """Two linear layers with a GELU between them: y = down(gelu(up(x))).

    Parameters
    ----------
    params : {"up_proj": {"weight": (hidden, width), "bias": (hidden,)}, "down_proj": {"weight": (width, hidden), ...}}
        Whole arrays; biases may be left out. A rank keeps copies of its shards.
    group : Group
        The ranks over which the hidden features are split equally.
    """

    def __init__(self, params: Tree, *, group: Group = SOLO) -> None:
        axes = {"up_proj": COLUMN, "down_proj": ROW}
        with everywhere(group):
            check_names("MLP", params, axes)
            hidden = params["up_proj"]["weight"].shape[0]
            part(group, hidden, f"{hidden} hidden features")
            self.params, self.shards = take_shards("MLP", params, axes, group)
        self.up = Linear(**self.params["up_proj"])
        self.gelu = GELU()
        self.down = Linear(**self.params["down_proj"], group=group)
        self.group = group

    def forward(self, x: Array) -> tuple[Array, SavedMLP]:
        """Return y of the shape of x: (..., width)."""
        with everywhere(self.group):
            check_module("MLP", x, self.params)
            check_features("MLP", x, self.up.params["weight"].shape[1])
            check_dtype("MLP", x, self.params)
        h, up = self.up.forward(x)
        a, gelu = self.gelu.forward(h)
        y, down = self.down.forward(a)
        return y, SavedMLP(up, gelu, down)

    def backward(self, dy: Array, saved: SavedMLP) -> tuple[Array, Tree]:
        """Return dx, and the gradients of this rank's shards."""
        check_saved("MLP", saved, SavedMLP)
        da, down = self.down.backward(dy, saved.down)
        dh, _ = self.gelu.backward(da, saved.gelu)
        dx, up = self.up.backward(dh, saved.up)
        return self.group.sum(dx, what="MLP.backward"), {"up_proj": up, "down_proj": down}


class SavedSwiGLU(NamedTuple):
    """What backward needs of forward."""

    gate: Any
    up: Any
    silu: Any
    s: Array  # silu(gate(x))
    h: Array  # up(x)
    down: Any


class SwiGLU:
    """A linear layer gated by another: y = down(silu(gate(x)) up(x)).

    Parameters
    ----------
    params : {"gate_proj": {"weight": (hidden, width)}, "up_proj": ..., "down_proj": {"weight": (width, hidden)}}
        Whole arrays; each may have a "bias". A rank keeps copies of its shards.
    group : Group
        The ranks over which the hidden features are split equally.
    """

    def __init__(self, params: Tree, *, group: Group = SOLO) -> None:
        axes = {"gate_proj": COLUMN, "up_proj": COLUMN, "down_proj": ROW}
        with everywhere(group):
            check_names("SwiGLU", params, axes)
            hidden = params["up_proj"]["weight"].shape[0]
            part(group, hidden, f"{hidden} hidden features")
            self.params, self.shards = take_shards("SwiGLU", params, axes, group)
        self.gate = Linear(**self.params["gate_proj"])
        self.up = Linear(**self.params["up_proj"])
        self.silu = SiLU()
        self.down = Linear(**self.params["down_proj"], group=group)
        self.group = group

    def forward(self, x: Array) -> tuple[Array, SavedSwiGLU]:
        """Return y of the shape of x: (..., width)."""
        with everywhere(self.group):
            check_module("SwiGLU", x, self.params)
            check_features("SwiGLU", x, self.up.params["weight"].shape[1])
            check_dtype("SwiGLU", x, self.params)
        g, gate = self.gate.forward(x)
        s, silu = self.silu.forward(g)
        h, up = self.up.forward(x)
        y, down = self.down.forward(s * h)
        return y, SavedSwiGLU(gate, up, silu, s, h, down)

    def backward(self, dy: Array, saved: SavedSwiGLU) -> tuple[Array, Tree]:
        """Return dx, and the gradients of this rank's shards."""
        check_saved("SwiGLU", saved, SavedSwiGLU)
        dsh, down = self.down.backward(dy, saved.down)
        dx_up, up = self.up.backward(dsh * saved.s, saved.up)
        dg, _ = self.silu.backward(dsh * saved.h, saved.silu)
        dx_gate, gate = self.gate.backward(dg, saved.gate)
        dx = self.group.sum(dx_up + dx_gate, what="SwiGLU.backward")
        return dx, {"gate_proj": gate, "up_proj": up, "down_proj": down}
