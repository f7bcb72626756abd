"""Composites: where the norm stands relative to the residual connection, and layers in a row.

    PostNorm:  y = norm(x + f(x))    Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762, section 3.1
    PreNorm:   y = x + f(norm(x))    Xiong et al., "On Layer Normalization in the Transformer Architecture", 2020,
                                     arXiv:2002.04745, figure 1

Backward, an input that is used twice gets the sum of two gradients: with s = x + f(x) or z = norm(x),

    PostNorm:  ds = norm'(dy),  dx = ds + f'(ds)
    PreNorm:   dx = dy + norm'(f'(dy))

where f'(d) stands for the backward pass of f.
"""

from typing import Any, NamedTuple

from npnorm.arrays import Array
from npnorm.tree import Layer, Tree, hand_down, show_shapes, summary


@show_shapes
class Saved(NamedTuple):
    """What the two layers saved."""

    norm: Any
    sublayer: Any


class PostNorm:
    """Normalize after the residual connection: y = norm(x + f(x))."""

    def __init__(self, norm: Layer, sublayer: Layer) -> None:
        self.norm, self.sublayer = norm, sublayer
        self.params = {"norm": norm.params, "sublayer": sublayer.params}
        self.shards = {"norm": norm.shards, "sublayer": sublayer.shards}

    def __repr__(self) -> str:
        return summary("PostNorm", norm=self.norm, sublayer=self.sublayer)

    def forward(self, x: Array) -> tuple[Any, Saved]:
        """Return y of the shape of x."""
        hand_down(self.params, {"norm": self.norm, "sublayer": self.sublayer})
        f, sublayer = self.sublayer.forward(x)
        y, norm = self.norm.forward(x + f)
        return y, Saved(norm, sublayer)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, Tree]:
        """Return dx, and the gradients of both layers."""
        hand_down(self.params, {"norm": self.norm, "sublayer": self.sublayer})
        ds, norm = self.norm.backward(dy, saved.norm)
        df, sublayer = self.sublayer.backward(ds, saved.sublayer)
        return ds + df, {"norm": norm, "sublayer": sublayer}


class PreNorm:
    """Normalize before the sub-layer, and leave the residual connection alone: y = x + f(norm(x))."""

    def __init__(self, norm: Layer, sublayer: Layer) -> None:
        self.norm, self.sublayer = norm, sublayer
        self.params = {"norm": norm.params, "sublayer": sublayer.params}
        self.shards = {"norm": norm.shards, "sublayer": sublayer.shards}

    def __repr__(self) -> str:
        return summary("PreNorm", norm=self.norm, sublayer=self.sublayer)

    def forward(self, x: Array) -> tuple[Any, Saved]:
        """Return y of the shape of x."""
        hand_down(self.params, {"norm": self.norm, "sublayer": self.sublayer})
        z, norm = self.norm.forward(x)
        f, sublayer = self.sublayer.forward(z)
        return x + f, Saved(norm, sublayer)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, Tree]:
        """Return dx, and the gradients of both layers."""
        hand_down(self.params, {"norm": self.norm, "sublayer": self.sublayer})
        dz, sublayer = self.sublayer.backward(dy, saved.sublayer)
        dx, norm = self.norm.backward(dz, saved.norm)
        return dy + dx, {"norm": norm, "sublayer": sublayer}


class Chain:
    """Named layers, one after the other."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        self.layers = layers
        self.params = {name: layer.params for name, layer in layers.items()}
        self.shards = {name: layer.shards for name, layer in layers.items()}

    def __repr__(self) -> str:
        return summary("Chain", **self.layers)

    def forward(self, x: Array) -> tuple[Any, dict[str, Any]]:
        """Return the last layer's y, and what each layer saved."""
        hand_down(self.params, self.layers)
        saved = {}
        for name, layer in self.layers.items():
            x, saved[name] = layer.forward(x)
        return x, saved

    def backward(self, dy: Array, saved: dict[str, Any]) -> tuple[Any, Tree]:
        """Return dx, and the gradients of each layer."""
        hand_down(self.params, self.layers)
        grads = {}
        for name, layer in reversed(self.layers.items()):
            dy, grads[name] = layer.backward(dy, saved[name])
        return dy, {name: grads[name] for name in self.layers}
