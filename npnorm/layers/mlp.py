"""The feed-forward sub-layer, plain and gated.

Plain, Ashish Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, equation 2. The
activation there is ReLU; here it is GELU unless another is given:

    y = down(activation(up(x)))

Gated, Noam Shazeer, "GLU Variants Improve Transformer", 2020, arXiv:2002.05202, equation 6:

    y = down(silu(gate(x)) up(x))

On a group the hidden features are split: up and gate are column splits, down is the row split that sums.
Communicated: one sum forward, of y, and one backward, of dx. The sum forward turns partial into replicated (g in
Megatron-LM); the use of the replicated x by every rank costs nothing forward, and its backward is the other sum (f).
"""

from typing import Any, NamedTuple

from npnorm.arrays import Array
from npnorm.checks import check_input, check_saved, require_same_settings
from npnorm.group import SOLO, Group, errors_on_all_ranks, shard_slice
from npnorm.layers.activations import GELU, silu, silu_backward
from npnorm.layers.inplace import add_into, elementwise
from npnorm.layers.linear import COLUMN, ROW, Linear
from npnorm.tree import Layer, Tree, check_names, hand_down, show_shapes, summary, take_shards


@show_shapes
class SavedMLP(NamedTuple):
    """What backward needs of forward."""

    up: Any
    activation: Any
    down: Any


class MLP:
    """Two linear layers with an activation between them: y = down(activation(up(x))).

    Parameters
    ----------
    params : {"up_proj": {"weight": (hidden, width), "bias": (hidden,)}, "down_proj": {"weight": (width, hidden), ...}}
        Whole arrays; biases may be left out. A rank keeps copies of its shards.
    activation : Layer or None
        A layer of each element, without parameters, such as ReLU(); None: GELU().
    group : Group
        The ranks over which the hidden features are split equally.
    """

    def __init__(self, params: Tree, *, activation: Layer | None = None, group: Group = SOLO) -> None:
        axes = {"up_proj": COLUMN, "down_proj": ROW}
        self.activation = GELU() if activation is None else activation
        with errors_on_all_ranks(group):
            require_same_settings("MLP", group, activation=type(self.activation).__name__)
            check_names("MLP", params, axes)
            hidden = params["up_proj"]["weight"].shape[0]
            shard_slice(group, hidden, f"{hidden} hidden features")
            self.params, self.shards = take_shards("MLP", params, axes, group)
        self.up = Linear(**self.params["up_proj"])
        self.down = Linear(**self.params["down_proj"], group=group)
        self.linears = {"up_proj": self.up, "down_proj": self.down}
        self.group = group

    def __repr__(self) -> str:
        return summary("MLP", self.params, activation=self.activation, group=self.group)

    def forward(self, x: Array) -> tuple[Any, SavedMLP]:
        """Return y of the shape of x: (..., width)."""
        hand_down(self.params, self.linears)
        with errors_on_all_ranks(self.group):
            check_input("MLP", x, self.params, self.up.params["weight"].shape[1])
        h, up = self.up.forward(x)
        a, activation = self.activation.forward(h)
        y, down = self.down.forward(a)
        return y, SavedMLP(up, activation, down)

    def backward(self, dy: Array, saved: SavedMLP) -> tuple[Any, Tree]:
        """Return dx, and the gradients of this rank's shards."""
        hand_down(self.params, self.linears)
        check_saved("MLP", saved, SavedMLP)
        da, down = self.down.backward(dy, saved.down)
        dh, _ = self.activation.backward(da, saved.activation)
        dx, up = self.up.backward(dh, saved.up)
        return self.group.sum(dx, label="MLP.backward"), {"up_proj": up, "down_proj": down}


@show_shapes
class SavedSwiGLU(NamedTuple):
    """What backward needs of forward."""

    gate: Any
    up: Any
    down: Any
    g: Array  # gate(x)
    s: Array  # the sigmoid of g
    h: Array  # up(x)


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
        with errors_on_all_ranks(group):
            check_names("SwiGLU", params, axes)
            hidden = params["up_proj"]["weight"].shape[0]
            shard_slice(group, hidden, f"{hidden} hidden features")
            self.params, self.shards = take_shards("SwiGLU", params, axes, group)
        self.gate = Linear(**self.params["gate_proj"])
        self.up = Linear(**self.params["up_proj"])
        self.down = Linear(**self.params["down_proj"], group=group)
        self.linears = {"gate_proj": self.gate, "up_proj": self.up, "down_proj": self.down}
        self.group = group

    def __repr__(self) -> str:
        return summary("SwiGLU", self.params, group=self.group)

    def forward(self, x: Array) -> tuple[Any, SavedSwiGLU]:
        """Return y of the shape of x: (..., width)."""
        hand_down(self.params, self.linears)
        with errors_on_all_ranks(self.group):
            check_input("SwiGLU", x, self.params, self.up.params["weight"].shape[1])
        g, gate = self.gate.forward(x)
        h, up = self.up.forward(x)
        a, s = elementwise(_gate, g, h)
        y, down = self.down.forward(a)
        return y, SavedSwiGLU(gate, up, down, g, s, h)

    def backward(self, dy: Array, saved: SavedSwiGLU) -> tuple[Any, Tree]:
        """Return dx, and the gradients of this rank's shards."""
        hand_down(self.params, self.linears)
        check_saved("SwiGLU", saved, SavedSwiGLU)
        da, down = self.down.backward(dy, saved.down)
        dg, dh = elementwise(_gate_backward, da, saved.g, saved.s, saved.h)
        dx_up, up = self.up.backward(dh, saved.up)
        dx_gate, gate = self.gate.backward(dg, saved.gate)
        dx = self.group.sum(add_into(dx_up, dx_gate), label="SwiGLU.backward")
        return dx, {"gate_proj": gate, "up_proj": up, "down_proj": down}


def _gate(g: Array, h: Array) -> tuple[Array, Array]:
    """Return silu(g) h, and the sigmoid of g, element by element."""
    a, s = silu(g)
    return a * h, s


def _gate_backward(da: Array, g: Array, s: Array, h: Array) -> tuple[Array, Array]:
    """Return dg and dh, element by element."""
    dh = g * s
    dh *= da
    (dg,) = silu_backward(da * h, g, s)
    return dg, dh
