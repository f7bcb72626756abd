"""The small convolutional network of `convolutional` and `batch_size`: its norms, its data, its training.

A ConvPool network, of convolutions and pooling alone, after Springenberg et al., "Striving for Simplicity", 2014,
arXiv:1412.6806, table 2, on the digits of scikit-learn, 1797 images of 8 x 8:

    conv 3 x 3, norm, relu, max pool 2; conv 3 x 3, norm, relu; conv 3 x 3, norm, relu; conv 1 x 1, mean over space

All randomness of a run follows from its seed: the same seed is the same split of the images, the same first weights
and the same batches, whatever the norm.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from npnorm import norms
from npnorm.arrays import Array, array_module
from npnorm.blocks import Chain
from npnorm.group import SOLO, Group
from npnorm.layers import Conv2d, CrossEntropy, MaxPool2d, ReLU
from npnorm.layers.pooling import GlobalAvgPool2d
from npnorm.tree import Layer, Tree, map_tree, show_shapes

SIDE = 8
"""Pixels of an image, in both directions."""

CLASSES = 10
CHANCE = 1 - 1 / CLASSES
"""The error of guessing, which a run that diverges is given."""


# Norms


@show_shapes
class SavedChannels(NamedTuple):
    """What backward needs of forward."""

    norm: Any
    z: Array


class PerChannel:
    """A norm without parameters, and a weight and a bias for each channel: y = norm(x) w + b, for x (N, C, H, W).

    LayerNorm and RMSNorm over the trailing axes have a weight for each of their elements; a convolution wants one for
    each channel.
    """

    def __init__(self, norm: Layer, weight: Array, bias: Array) -> None:
        self.norm = norm
        self.params = {"weight": weight, "bias": bias}
        self.shards = dict.fromkeys(self.params)

    def forward(self, x: Array) -> tuple[Any, SavedChannels]:
        """Return y of the shape of x."""
        z, norm = self.norm.forward(x)
        w, b = self.params["weight"], self.params["bias"]
        return z * w[:, None, None] + b[:, None, None], SavedChannels(norm, z)

    def backward(self, dy: Array, saved: SavedChannels) -> tuple[Any, dict[str, Array]]:
        """Return dx, and the gradients of weight and bias."""
        xp, space = array_module(dy), (0, 2, 3)
        dx, _ = self.norm.backward(dy * self.params["weight"][:, None, None], saved.norm)
        return dx, {"weight": xp.sum(dy * saved.z, axis=space), "bias": xp.sum(dy, axis=space)}


@show_shapes
class SavedWeight(NamedTuple):
    """What the two layers saved."""

    norm: Any
    conv: Any
    weight: Array


class WeightNormConv2d:
    """A convolution whose kernels WeightNorm makes: y = conv(x) with the weights g v / |v|, which start as `weight`."""

    def __init__(self, weight: Array, bias: Array, padding: int) -> None:
        self.norm = norms.WeightNorm.of(weight)
        self.padding = padding
        self.params = {"weight_v": weight, "weight_g": self.norm.params["weight_g"], "bias": bias}
        self.shards = dict.fromkeys(self.params)

    def forward(self, x: Array) -> tuple[Any, SavedWeight]:
        """Return y of shape (N, channels of y, rows, columns) for x of shape (N, channels of x, H, W)."""
        self.norm.params["weight_g"] = self.params["weight_g"]
        weight, norm = self.norm.forward(self.params["weight_v"])
        y, conv = Conv2d(weight, self.params["bias"], padding=self.padding).forward(x)
        return y, SavedWeight(norm, conv, weight)

    def backward(self, dy: Array, saved: SavedWeight) -> tuple[Any, dict[str, Array]]:
        """Return dx, and the gradients of directions, lengths and bias."""
        self.norm.params["weight_g"] = self.params["weight_g"]
        dx, conv = Conv2d(saved.weight, self.params["bias"], padding=self.padding).backward(dy, saved.conv)
        dv, norm = self.norm.backward(conv["weight"], saved.norm)
        return dx, {"weight_v": dv, "weight_g": norm["weight_g"], "bias": conv["bias"]}


def norm_of(name: str, channels: int, side: int, dtype: str, group: Group) -> Layer:
    """Return a new norm of images of side x side; BatchNorm takes its statistics over the group's ranks."""
    if name == "BatchNorm":
        return norms.BatchNorm.init(channels, dtype, group=group)
    if name == "GroupNorm":
        return norms.GroupNorm.init(channels // GROUP, channels, dtype)
    kind, shape = OVER[name]
    features = (channels, side, side)[-shape:]
    return PerChannel(kind(features=features), np.ones(channels, dtype), np.zeros(channels, dtype))


GROUP = 8
"""Channels in a group of GroupNorm."""

OVER: dict[str, tuple[Callable[..., Layer], int]] = {
    "LayerNorm": (norms.LayerNorm, 3),
    "RMSNorm": (norms.RMSNorm, 3),
    "LayerNorm, space": (norms.LayerNorm, 2),
    "RMSNorm, space": (norms.RMSNorm, 2),
}
"""Norms of PerChannel, and over how many axes of an image: channels and space, or the space of each channel."""

NORMS = ("none", "BatchNorm", "WeightNorm", "GroupNorm", *OVER)


# The network


def network(norm: str, rng: np.random.Generator, dtype: str = "float32", group: Group = SOLO) -> Chain:
    """Return the network, its weights drawn as in He et al., 2015, arXiv:1502.01852, equation 10, its biases 0."""
    layers: dict[str, Layer] = {}
    channels, side = 1, SIDE
    for i, width in enumerate(WIDTHS, 1):
        weight = _draw(rng, (width, channels, 3, 3), dtype)
        if norm == "WeightNorm":
            layers[f"conv{i}"] = WeightNormConv2d(weight, np.zeros(width, dtype), padding=1)
        else:  # the bias of a norm is enough
            bias = np.zeros(width, dtype) if norm == "none" else None
            layers[f"conv{i}"] = Conv2d(weight, bias, padding=1)
        if norm not in ("none", "WeightNorm"):
            layers[f"norm{i}"] = norm_of(norm, width, side, dtype, group)
        layers[f"relu{i}"] = ReLU()
        if i == 1:
            layers["pool"], side = MaxPool2d(2), side // 2
        channels = width
    layers["head"] = Conv2d(_draw(rng, (CLASSES, channels, 1, 1), dtype), np.zeros(CLASSES, dtype))
    layers["mean"] = GlobalAvgPool2d()
    return Chain(layers)


WIDTHS = (16, 32, 32)
"""Channels after each convolution of 3 x 3."""


def _draw(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return (rng.standard_normal(shape) * math.sqrt(2 / math.prod(shape[1:]))).astype(dtype)


def infer(model: Chain, images: np.ndarray) -> np.ndarray:
    """Return the logits of shape (N, 10); BatchNorm takes its running statistics."""
    x = images
    for layer in model.layers.values():
        x, _ = layer.inference(x) if isinstance(layer, norms.BatchNorm) else layer.forward(x)
    return x


# Data


class Digits(NamedTuple):
    """Images of shape (N, 1, 8, 8), of mean 0 and variance 1 over those to learn, and their digits."""

    images: np.ndarray
    labels: np.ndarray
    held_out: np.ndarray
    held_out_labels: np.ndarray


def digits(learn: int, held_out: int, rng: np.random.Generator) -> Digits:
    """Return digits drawn at random: so many to learn, and so many that are held out."""
    import sklearn.datasets  # takes seconds, and ranks need no digits

    found = sklearn.datasets.load_digits()
    order = rng.permutation(len(found.target))[: learn + held_out]
    images, labels = found.images[order, None].astype("float32"), found.target[order]
    images = (images - images[:learn].mean()) / images[:learn].std()
    return Digits(images[:learn], labels[:learn], images[learn:], labels[learn:])


# Training


class Optimizer(Protocol):
    """What a step of training asks of it; AdamW has it, too."""

    def step(self, grads: Tree, lr: float) -> None:
        """Update every parameter by its gradient."""


class Momentum:
    """Stochastic gradient descent with momentum and decay: v = momentum v + g + decay p,  p = p - lr v; torch's SGD."""

    def __init__(self, params: Tree, momentum: float, decay: float) -> None:
        self.params, self.momentum, self.decay = params, momentum, decay
        self.v = map_tree(np.zeros_like, params)

    def step(self, grads: Tree, lr: float) -> None:
        """Update every parameter by its gradient."""

        def update(p: np.ndarray, g: np.ndarray, v: np.ndarray) -> None:
            v *= self.momentum
            v += g + self.decay * p
            p -= lr * v

        map_tree(update, self.params, grads, self.v)


def loss_and_grads(model: Chain, images: np.ndarray, labels: np.ndarray, group: Group = SOLO) -> tuple[float, Tree]:
    """Return the mean loss and its gradients, and update running statistics; each rank has an equal part of the batch.

    The gradients of the parts are summed over the ranks, in one message; those of a synchronized norm are complete.
    """
    logits, saved = model.forward(images)
    loss, saved_loss = CrossEntropy().forward(logits, labels)
    _, grads = model.backward(CrossEntropy().backward(1 / group.size, saved_loss), saved)
    partial = []
    for name, layer in model.layers.items():
        if isinstance(layer, norms.BatchNorm) and math.isfinite(loss):
            layer.track(saved[name])
        if not (isinstance(layer, norms.BatchNorm) and layer.group is group):
            partial += [(name, key) for key in grads[name]]
    loss, *sums = group.sum(np.asarray(loss / group.size), *(grads[name][key] for name, key in partial))
    for (name, key), total in zip(partial, sums, strict=True):
        grads[name][key] = total
    return float(loss), grads


def half_constant(lr: float, steps: int) -> list[float]:
    """Return the learning rate of each step: constant for the first half, then falling to 0 on a line.

    So Salimans and Kingma, "Weight Normalization", 2016, arXiv:1602.07868, section 5.1, train this kind of network.

    Examples
    --------
    >>> half_constant(1.0, 4)
    [1.0, 1.0, 1.0, 0.5]
    """
    return [lr * min(1.0, 2 - 2 * step / steps) for step in range(steps)]


def train(
    model: Chain,
    optimizer: Optimizer,
    data: Digits,
    rows: int,
    lrs: Sequence[float],
    rng: np.random.Generator,
    group: Group = SOLO,
) -> Iterator[float]:
    """Take a step for each learning rate, and yield its loss; stop before one whose loss is not finite.

    A batch has `rows` images, over all ranks. Each epoch has the images in another order, and leaves out those that do
    not fill a batch.
    """
    epoch = len(data.images) // rows
    for step, lr in enumerate(lrs):
        if step % epoch == 0:
            order = rng.permutation(len(data.images))
        some = group.shard(order[step % epoch * rows :][:rows], 0)
        with np.errstate(all="ignore"):  # what is not finite is found below
            loss, grads = loss_and_grads(model, data.images[some], data.labels[some], group)
        if not math.isfinite(loss):
            return
        optimizer.step(grads, lr)
        yield loss


def error(model: Chain, data: Digits) -> float:
    """Return the share of the images held out that the network gets wrong."""
    with np.errstate(all="ignore"):
        found = infer(model, data.held_out).argmax(axis=1)
    return float(np.mean(found != data.held_out_labels))
