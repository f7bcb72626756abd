"""The networks of `npnorm.studies.speed_networks` in torch: eager, differentiated by autograd.

Their norms are torch's own modules, or written out: the lines of the formula, an operation of torch for each, as the
implementations were that Zhang and Sennrich compared. torch has no module for pRMSNorm.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from npnorm.studies.speed_networks import EPS, NORMS, PARTS, Passes, Sizes, input_of


class LayerNorm(nn.Module):
    """LayerNorm, written out.

    Parameters
    ----------
    features : int
    affine : bool
        Whether it has a weight and a bias.
    """

    def __init__(self, features: int, affine: bool) -> None:
        super().__init__()
        self.affine = affine
        if affine:
            self.weight, self.bias = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        """Return y of the shape of x."""
        c = x - x.mean(-1, keepdim=True)
        z = c * torch.rsqrt((c * c).mean(-1, keepdim=True) + EPS)
        return z * self.weight + self.bias if self.affine else z


class RMSNorm(nn.Module):
    """RMSNorm or pRMSNorm, written out.

    Parameters
    ----------
    features : int
    affine : bool
        Whether it has a weight.
    p : float
        The part of the features that is measured.
    """

    def __init__(self, features: int, affine: bool, p: float = 1.0) -> None:
        super().__init__()
        self.affine, self.k = affine, math.ceil(features * p)
        if affine:
            self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        """Return y of the shape of x."""
        m = x if self.k == x.shape[-1] else x[..., : self.k]
        z = x * torch.rsqrt((m * m).mean(-1, keepdim=True) + EPS)
        return z * self.weight if self.affine else z


def norm_of(name: str, own: bool, features: int, affine: bool = True) -> nn.Module:
    """Return a norm: torch's own, or written out; without a norm what leaves x as it is."""
    if name == "none":
        return nn.Identity()
    if own:
        kind = nn.LayerNorm if name == "LayerNorm" else nn.RMSNorm
        return kind(features, EPS, elementwise_affine=affine)
    return LayerNorm(features, affine) if name == "LayerNorm" else RMSNorm(features, affine, PARTS.get(name, 1.0))


Make = Callable[..., nn.Module]
"""Makes a norm of the number of its features."""


def normed(inputs: int, outputs: int, norm: Make) -> nn.Module:
    """Return a linear layer with a norm after it."""
    return nn.Sequential(nn.Linear(inputs, outputs), norm(outputs))


class GRU(nn.Module):
    """A GRU with norms, as `npnorm.layers.GRU`."""

    def __init__(self, sizes: Sizes, norm: Make) -> None:
        super().__init__()
        inputs, self.dim = sizes["x"][-1], sizes["dim"]
        self.ih_gates, self.ih_candidate = normed(inputs, 2 * self.dim, norm), normed(inputs, self.dim, norm)
        self.hh_gates, self.hh_candidate = normed(self.dim, 2 * self.dim, norm), normed(self.dim, self.dim, norm)

    def forward(self, x: Tensor) -> Tensor:
        """Return h of every step, of shape (batch, length, dim)."""
        ag, an = self.ih_gates(x), self.ih_candidate(x)
        h, steps = x.new_zeros(x.shape[0], self.dim), []
        for t in range(x.shape[1]):
            r, z = torch.sigmoid(ag[:, t] + self.hh_gates(h)).chunk(2, dim=-1)
            n = torch.tanh(an[:, t] + r * self.hh_candidate(h))
            h = (1 - z) * n + z * h
            steps.append(h)
        return torch.stack(steps, dim=1)


class Attention(nn.Module):
    """Causal attention of several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return y of the shape of x: (batch, length, width)."""
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).flatten(-2))


class Transformer(nn.Module):
    """A transformer with a norm after each residual connection."""

    def __init__(self, sizes: Sizes, norm: Make) -> None:
        super().__init__()
        width, hidden = sizes["width"], 4 * sizes["width"]
        self.embedding, self.positions = nn.Embedding(sizes["vocabulary"], width), nn.Embedding(sizes["x"][1], width)
        self.sublayers, self.norms = nn.ModuleList(), nn.ModuleList()
        for _ in range(sizes["depth"]):
            mlp = nn.Sequential(nn.Linear(width, hidden, False), nn.ReLU(), nn.Linear(hidden, width, False))
            self.sublayers.extend([Attention(width, sizes["heads"]), mlp])
            self.norms.extend([norm(width), norm(width)])
        self.head = nn.Linear(width, sizes["vocabulary"], bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits for ids of shape (batch, length)."""
        x = self.embedding(ids) + self.positions.weight
        for sublayer, norm in zip(self.sublayers, self.norms, strict=True):
            x = norm(x + sublayer(x))
        return self.head(x)


class OverSpace(nn.Module):
    """A norm of the numbers of each sample and channel of (samples, channels, height, width)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """Return y of the shape of x."""
        return self.norm(x.flatten(2)).view_as(x)


def convolution(sizes: Sizes, norm: Make) -> nn.Module:
    """Return a convolutional network."""
    layers: list[nn.Module] = []
    inputs, side = sizes["x"][1:3]
    for outputs in sizes["channels"]:
        convolved = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        layers += [convolved, OverSpace(norm(side * side, affine=False)), nn.ReLU(), nn.MaxPool2d(2)]
        inputs, side = outputs, side // 2
    return nn.Sequential(*layers, nn.AvgPool2d(side))


KINDS: dict[str, Callable[[Sizes, Make], nn.Module]] = {
    "norm": lambda sizes, norm: norm(sizes["x"][-1]),
    "GRU": GRU,
    "transformer": Transformer,
    "convolution": convolution,
}


def networks(sizes: Sizes, seed: int, own: bool) -> dict[str, Passes]:
    """Return both passes of a network with each norm that there is, and without one."""
    x = torch.from_numpy(input_of(sizes, np.random.default_rng([seed, 0])))
    x = x.requires_grad_(x.is_floating_point())

    def passes(name: str) -> Passes:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = KINDS[sizes["kind"]](sizes, partial(norm_of, name, own))
        inputs = [a for a in (x, *network.parameters()) if a.requires_grad]
        dy = torch.from_numpy(np.random.default_rng([seed, 2]).standard_normal(network(x).shape, np.float32))
        return lambda: torch.autograd.grad(network(x), inputs, dy)

    left_out = {*PARTS} if own else set()
    return {name: passes(name) for name in NORMS if name not in left_out and (name, sizes["kind"]) != ("none", "norm")}
