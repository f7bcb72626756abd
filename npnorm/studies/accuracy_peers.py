"""Whose norms the study of accuracy measures: npnorm, the textbook, torch, and three libraries on JAX.

Each is a function that imports its library and returns a function from a problem to what the library makes of it.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npnorm import norms
from npnorm.conformance.problems import Problem
from npnorm.conformance.textbook import Textbook

Arrays = dict[str, np.ndarray]
"""y and dx in the layout of x, dw and, where the norm has a bias, db; all in the dtype of x."""

Solve = Callable[[Problem], Arrays]
"""It raises what the library raises where that refuses a problem."""


class Peer(NamedTuple):
    """An implementation of norms: what is used of it, its packages, and how it is loaded."""

    about: str
    packages: tuple[str, ...]
    load: Callable[[], Solve]


def own() -> Solve:
    """Return npnorm, as a user calls it."""

    def make(p: Problem) -> Any:
        settings = [p.weight] if p.bias is None else [p.weight, p.bias]
        return getattr(norms, p.norm)(*[p.groups] * (p.norm == "GroupNorm"), *settings, eps=p.eps)

    return partial(_by_hand, make)


def naive() -> Solve:
    """Return the textbook."""
    return partial(_by_hand, lambda p: Textbook(p.norm, p.weight, p.bias, p.eps, p.groups))


def _by_hand(make: Callable[[Problem], Any], problem: Problem) -> Arrays:
    layer = make(problem)
    y, saved = layer.forward(problem.x)
    dx, grads = layer.backward(problem.dy, saved)
    names = {"weight": "dw", "bias": "db"}
    return {"y": y, "dx": dx} | {names[name]: grad for name, grad in grads.items()}


def torch() -> Solve:
    """Return torch on the CPU: its functions, differentiated by its autograd."""
    import torch

    functional = torch.nn.functional

    def tensor(a: np.ndarray) -> Any:
        if a.dtype.name == "bfloat16":  # torch knows it, but not that NumPy does
            return torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(a.copy())

    def array(t: Any) -> np.ndarray:
        t = t.detach().contiguous()
        return t.view(torch.int16).numpy().view("bfloat16") if t.dtype == torch.bfloat16 else t.numpy()

    def forward(p: Problem, x: Any, w: Any, b: Any = None) -> Any:
        if p.norm == "LayerNorm":
            return functional.layer_norm(x, w.shape, w, b, p.eps)
        if p.norm == "RMSNorm":
            return functional.rms_norm(x, w.shape, w, p.eps)
        if p.norm == "GroupNorm":
            return functional.group_norm(x, p.groups, w, b, p.eps)
        return functional.batch_norm(x, None, None, w, b, training=True, eps=p.eps)

    def solve(p: Problem) -> Arrays:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            tensors = [tensor(a).requires_grad_() for a in (p.x, p.weight, p.bias) if a is not None]
            y = forward(p, *tensors)
            found = y, *torch.autograd.grad(y, tensors, tensor(p.dy))
        finally:
            torch.set_num_threads(threads)
        return {name: array(t) for name, t in zip(("y", "dx", "dw", "db"), found, strict=False)}

    return solve


def flax() -> Solve:
    """Return flax.nnx with its default settings."""
    _jax()
    from flax import nnx

    def forward(norm: str, eps: float, groups: int, x: Any, weight: Any, bias: Any) -> Any:
        settings = {"epsilon": eps, "dtype": x.dtype, "param_dtype": x.dtype, "rngs": nnx.Rngs(0)}
        if norm == "GroupNorm":
            settings["num_groups"] = groups
        elif norm == "BatchNorm":
            settings["use_running_average"] = False
        layer = getattr(nnx, norm)(x.shape[-1], **settings)
        layer.scale = nnx.Param(weight)
        if bias is not None:
            layer.bias = nnx.Param(bias)
        return layer(x)

    return _by_jax(forward)


def keras() -> Solve:
    """Return keras on its JAX backend."""
    _jax()
    os.environ["KERAS_BACKEND"] = "jax"  # read once, when keras is first imported
    from keras import layers

    def forward(norm: str, eps: float, groups: int, x: Any, weight: Any, bias: Any) -> Any:
        make = getattr(layers, norm.replace("Norm", "Normalization"))
        layer = make(*[groups] * (norm == "GroupNorm"), epsilon=eps, dtype=x.dtype.name)
        layer.build(x.shape)
        running = [variable.value for variable in layer.non_trainable_variables]
        params = [weight] if bias is None else [weight, bias]
        y, _ = layer.stateless_call(params, running, x, **({"training": True} if norm == "BatchNorm" else {}))
        return y

    return _by_jax(forward)


def equinox() -> Solve:
    """Return equinox, whose layers take one sample and are mapped over the batch."""
    jax = _jax()
    import equinox as eqx

    def make(norm: str, eps: float, groups: int, x: Any) -> Any:
        settings, channels = {"eps": eps, "dtype": x.dtype}, x.shape[-1]
        if norm == "GroupNorm":
            return eqx.nn.GroupNorm(groups, channels, **settings)
        if norm == "BatchNorm":
            return eqx.nn.BatchNorm(channels, axis_name="batch", mode="batch", **settings)
        return getattr(eqx.nn, norm)(channels, **settings, **({"use_bias": False} if norm == "RMSNorm" else {}))

    def forward(norm: str, eps: float, groups: int, x: Any, weight: Any, bias: Any) -> Any:
        layer = make(norm, eps, groups, x)
        layer = eqx.tree_at(lambda layer: layer.weight, layer, weight)
        if bias is not None:
            layer = eqx.tree_at(lambda layer: layer.bias, layer, bias)
        if norm == "BatchNorm":
            y, _ = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, eqx.nn.State(layer))
            return y
        if norm == "GroupNorm":  # of all layers here, the one with the channels first
            return jax.vmap(layer)(x.swapaxes(1, -1)).swapaxes(1, -1)
        return jax.vmap(layer)(x)

    return _by_jax(forward)


def _jax() -> Any:
    """Import JAX, with float64, for the CPU unless JAX_PLATFORMS says otherwise."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax


def _by_jax(forward: Callable) -> Solve:
    """Return the function from a problem to its results: forward and backward as one program, compiled for the CPU.

    `forward(norm, eps, groups, x, weight, bias)` gives y; bias is None for RMSNorm. GroupNorm gets x with the channels
    last, as is JAX's custom.
    """
    jax = _jax()

    @partial(jax.jit, static_argnums=(0, 1, 2))
    def program(norm: str, eps: float, groups: int, dy: Any, x: Any, *params: Any) -> Any:
        def layer(x: Any, weight: Any, bias: Any = None) -> Any:
            return forward(norm, eps, groups, x, weight, bias)

        y, pull_back = jax.vjp(layer, x, *params)
        return y, *pull_back(dy)

    def solve(p: Problem) -> Arrays:
        last = (lambda a: a.swapaxes(1, -1)) if p.norm == "GroupNorm" else (lambda a: a)
        params = [a for a in (p.weight, p.bias) if a is not None]
        came = program(p.norm, p.eps, p.groups, last(p.dy), last(p.x), *params)
        y, dx, *grads = (np.asarray(a) for a in came)
        return {"y": last(y), "dx": last(dx), **dict(zip(("dw", "db"), grads, strict=False))}

    return solve


PEERS = {
    "npnorm": Peer("`npnorm.LayerNorm` and the others", (), own),
    "naive": Peer("the formulas in NumPy, in the dtype of x; the mean is subtracted before squaring", (), naive),
    "torch": Peer("`torch.nn.functional`, eager, with autograd, on one thread", ("torch",), torch),
    "flax": Peer(
        "`flax.nnx`, jitted; its default, `use_fast_variance=True`, is var = mean(x²) - mean(x)²",
        ("flax", "jax"),
        flax,
    ),
    "keras": Peer(
        "`keras.layers` on the JAX backend, jitted; it computes norms of float64 in float32 there",
        ("keras", "jax"),
        keras,
    ),
    "equinox": Peer(
        "`equinox.nn` (BatchNorm with `mode='batch'`), mapped over the batch by `jax.vmap`, jitted",
        ("equinox", "jax"),
        equinox,
    ),
}
"""By name."""
