"""Composites: where the norm stands relative to the residual connection, and layers in a row.

    Residual:      y = x + f(x)                  He et al., "Deep Residual Learning for Image Recognition", 2015,
                                                 arXiv:1512.03385, equation 1
    PostNorm:      y = norm(x + f(x))            Vaswani et al., "Attention Is All You Need", 2017, arXiv:1706.03762,
                                                 section 3.1
    PreNorm:       y = x + f(norm(x))            Xiong et al., "On Layer Normalization in the Transformer Architecture",
                                                 2020, arXiv:2002.04745, figure 1
    ResPostNorm:   y = x + norm(f(x))            Liu et al., "Swin Transformer V2", 2021, arXiv:2111.09883, figure 1;
                                                 "reordered norm" in "2 OLMo 2 Furious", 2024, arXiv:2501.00656
    SandwichNorm:  y = x + norm2(f(norm1(x)))    Ding et al., "CogView", 2021, arXiv:2105.13290, section 2.4; Gemma 2;
                                                 "Peri-LN" in Kim et al., 2025, arXiv:2502.02732
    DeepNorm:      y = norm(alpha x + f(x))      Wang et al., "DeepNet", 2022, arXiv:2203.00555, figure 2

Backward, an input that is used twice gets the sum of two gradients. With f'(d) for the backward pass of f, s for what
PostNorm and DeepNorm normalize, z = norm(x) and z1 = norm1(x):

    Residual:      dx = dy + f'(dy)
    PostNorm:      ds = norm'(dy),  dx = ds + f'(ds)
    PreNorm:       dz = f'(dy),  dx = dy + norm'(dz)
    ResPostNorm:   df = norm'(dy),  dx = dy + f'(df)
    SandwichNorm:  df = norm2'(dy),  dz1 = f'(df),  dx = dy + norm1'(dz1)
    DeepNorm:      ds = norm'(dy),  dx = alpha ds + f'(ds)
"""

from typing import Any, NamedTuple

from npnorm.arrays import Array
from npnorm.tree import Layer, Tree, hand_down, show_shapes, summary


class Composite:
    """Layers by name, with the parameters of all of them in one tree."""

    def __init__(self, layers: dict[str, Layer]) -> None:
        self.layers = layers
        self.params = {name: layer.params for name, layer in layers.items()}
        self.shards = {name: layer.shards for name, layer in layers.items()}

    def __repr__(self) -> str:
        return summary(type(self).__name__, **self.layers)


@show_shapes
class SavedResidual(NamedTuple):
    """What the layer saved."""

    sublayer: Any


class Residual(Composite):
    """Add what the sub-layer makes of x, without a norm: y = x + f(x)."""

    def __init__(self, sublayer: Layer) -> None:
        super().__init__({"sublayer": sublayer})
        self.sublayer = sublayer

    def forward(self, x: Array) -> tuple[Any, SavedResidual]:
        """Return y of the shape of x."""
        hand_down(self.params, self.layers)
        f, sublayer = self.sublayer.forward(x)
        return x + f, SavedResidual(sublayer)

    def backward(self, dy: Array, saved: SavedResidual) -> tuple[Any, Tree]:
        """Return dx, and the gradients of the layer."""
        hand_down(self.params, self.layers)
        dx, sublayer = self.sublayer.backward(dy, saved.sublayer)
        return dy + dx, {"sublayer": sublayer}


@show_shapes
class Saved(NamedTuple):
    """What the two layers saved."""

    norm: Any
    sublayer: Any


class OneNorm(Composite):
    """What the placements of one norm have in common: the two layers."""

    def __init__(self, norm: Layer, sublayer: Layer) -> None:
        super().__init__({"norm": norm, "sublayer": sublayer})
        self.norm, self.sublayer = norm, sublayer


class PostNorm(OneNorm):
    """Normalize after the residual connection: y = norm(x + f(x))."""

    def forward(self, x: Array) -> tuple[Any, Saved]:
        """Return y of the shape of x."""
        hand_down(self.params, self.layers)
        f, sublayer = self.sublayer.forward(x)
        y, norm = self.norm.forward(x + f)
        return y, Saved(norm, sublayer)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, Tree]:
        """Return dx, and the gradients of both layers."""
        hand_down(self.params, self.layers)
        ds, norm = self.norm.backward(dy, saved.norm)
        dx, sublayer = self.sublayer.backward(ds, saved.sublayer)
        return ds + dx, {"norm": norm, "sublayer": sublayer}


class PreNorm(OneNorm):
    """Normalize before the sub-layer, and leave the residual connection alone: y = x + f(norm(x))."""

    def forward(self, x: Array) -> tuple[Any, Saved]:
        """Return y of the shape of x."""
        hand_down(self.params, self.layers)
        z, norm = self.norm.forward(x)
        f, sublayer = self.sublayer.forward(z)
        return x + f, Saved(norm, sublayer)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, Tree]:
        """Return dx, and the gradients of both layers."""
        hand_down(self.params, self.layers)
        dz, sublayer = self.sublayer.backward(dy, saved.sublayer)
        dx, norm = self.norm.backward(dz, saved.norm)
        return dy + dx, {"norm": norm, "sublayer": sublayer}


class ResPostNorm(OneNorm):
    """Normalize what the sub-layer adds, and leave the residual connection alone: y = x + norm(f(x))."""

    def forward(self, x: Array) -> tuple[Any, Saved]:
        """Return y of the shape of x."""
        hand_down(self.params, self.layers)
        f, sublayer = self.sublayer.forward(x)
        z, norm = self.norm.forward(f)
        return x + z, Saved(norm, sublayer)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, Tree]:
        """Return dx, and the gradients of both layers."""
        hand_down(self.params, self.layers)
        df, norm = self.norm.backward(dy, saved.norm)
        dx, sublayer = self.sublayer.backward(df, saved.sublayer)
        return dy + dx, {"norm": norm, "sublayer": sublayer}


@show_shapes
class SavedSandwich(NamedTuple):
    """What the three layers saved."""

    norm1: Any
    norm2: Any
    sublayer: Any


class SandwichNorm(Composite):
    """Normalize before and after the sub-layer, and leave the residual connection alone: y = x + norm2(f(norm1(x)))."""

    def __init__(self, norm1: Layer, norm2: Layer, sublayer: Layer) -> None:
        super().__init__({"norm1": norm1, "norm2": norm2, "sublayer": sublayer})
        self.norm1, self.norm2, self.sublayer = norm1, norm2, sublayer

    def forward(self, x: Array) -> tuple[Any, SavedSandwich]:
        """Return y of the shape of x."""
        hand_down(self.params, self.layers)
        z1, norm1 = self.norm1.forward(x)
        f, sublayer = self.sublayer.forward(z1)
        z2, norm2 = self.norm2.forward(f)
        return x + z2, SavedSandwich(norm1, norm2, sublayer)

    def backward(self, dy: Array, saved: SavedSandwich) -> tuple[Any, Tree]:
        """Return dx, and the gradients of the three layers."""
        hand_down(self.params, self.layers)
        df, norm2 = self.norm2.backward(dy, saved.norm2)
        dz1, sublayer = self.sublayer.backward(df, saved.sublayer)
        dx, norm1 = self.norm1.backward(dz1, saved.norm1)
        return dy + dx, {"norm1": norm1, "norm2": norm2, "sublayer": sublayer}


class DeepNorm(OneNorm):
    """Normalize after a residual connection of weight alpha: y = norm(alpha x + f(x)).

    Parameters
    ----------
    norm, sublayer : layers
    alpha : float
        For the M blocks of a decoder, (2 M)^(1/4); 1 is `PostNorm`. The matrices of the sub-layers then start smaller,
        too: see `npnorm.config.layout`.
    """

    def __init__(self, norm: Layer, sublayer: Layer, alpha: float) -> None:
        super().__init__(norm, sublayer)
        self.alpha = float(alpha)

    def __repr__(self) -> str:
        return summary("DeepNorm", **self.layers, alpha=self.alpha)

    def forward(self, x: Array) -> tuple[Any, Saved]:
        """Return y of the shape of x."""
        hand_down(self.params, self.layers)
        f, sublayer = self.sublayer.forward(x)
        y, norm = self.norm.forward(self.alpha * x + f)
        return y, Saved(norm, sublayer)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, Tree]:
        """Return dx, and the gradients of both layers."""
        hand_down(self.params, self.layers)
        ds, norm = self.norm.backward(dy, saved.norm)
        dx, sublayer = self.sublayer.backward(ds, saved.sublayer)
        return self.alpha * ds + dx, {"norm": norm, "sublayer": sublayer}


class Chain(Composite):
    """Named layers, one after the other."""

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
