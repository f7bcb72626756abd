"""flax: its layers in 64 bits, values and gradients, on ordinary data.

flax has the features, or channels, last; its momentum is the share of the old statistics, and its running variance the
biased one.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from npnorm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from tests.check import close

CHANNELS = 6


@pytest.fixture(autouse=True)
def in_64_bits():
    with jax.enable_x64(True):
        yield


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def flax_layer(layer, weight, bias=None):
    """Return the layer with these parameters, of which flax calls the weight scale."""
    layer.scale[...] = jnp.asarray(weight)
    if bias is not None:
        layer.bias[...] = jnp.asarray(bias)
    return layer


def by_flax(layer, x, dy):
    """Return y, dx and the gradients of the parameters."""

    def loss(layer, x):
        y = layer(x)
        return jnp.sum(y * dy), y

    (_, y), (grads, dx) = nnx.jit(nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True))(layer, jnp.asarray(x))
    names = {"weight": "scale", "bias": "bias"}
    return y, dx, {ours: grads[theirs][...] for ours, theirs in names.items() if theirs in grads}


def hold(norm, x, dy, layer, last=False):
    """Hold a norm against a flax layer, whose channels are last, and return what forward saved."""
    y, saved = norm.forward(x)
    dx, grads = norm.backward(dy, saved)
    theirs = by_flax(layer, *((a if last else np.moveaxis(a, 1, -1)) for a in (x, dy)))
    expected_y, expected_dx = (np.asarray(a) if last else np.moveaxis(np.asarray(a), -1, 1) for a in theirs[:2])
    assert expected_y.dtype == np.float64
    close(y, expected_y)
    close(dx, expected_dx)
    assert grads.keys() == theirs[2].keys()
    for name, gradient in theirs[2].items():
        close(grads[name], gradient)
    return saved


@pytest.mark.parametrize("fast", [True, False], ids=["mean of squares", "squares of the centred"])
def test_layer_norm(fast):
    w, b = draw(1, 2, CHANNELS)
    settings = {"param_dtype": jnp.float64, "use_fast_variance": fast, "rngs": nnx.Rngs(0)}
    layer = flax_layer(nnx.LayerNorm(CHANNELS, epsilon=0.1, **settings), w, b)
    hold(LayerNorm(w, b, eps=0.1), draw(2, 2, 5, CHANNELS), draw(3, 2, 5, CHANNELS), layer, last=True)


def test_rms_norm():
    w = draw(7, CHANNELS)
    layer = flax_layer(nnx.RMSNorm(CHANNELS, epsilon=0.1, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), w)
    hold(RMSNorm(w, eps=0.1), draw(8, 2, 5, CHANNELS), draw(9, 2, 5, CHANNELS), layer, last=True)


@pytest.mark.parametrize("groups", [1, 3])
def test_group_norm(groups):
    w, b = draw(10, 2, CHANNELS)
    layer = flax_layer(nnx.GroupNorm(CHANNELS, groups, epsilon=0.1, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), w, b)
    hold(GroupNorm(groups, w, b, eps=0.1), draw(11, 2, CHANNELS, 3, 4), draw(12, 2, CHANNELS, 3, 4), layer)


def test_instance_norm():
    w, b = draw(13, 2, CHANNELS)
    layer = flax_layer(nnx.InstanceNorm(CHANNELS, epsilon=0.1, param_dtype=jnp.float64, rngs=nnx.Rngs(0)), w, b)
    hold(InstanceNorm(w, b, eps=0.1), draw(14, 2, CHANNELS, 3, 4), draw(15, 2, CHANNELS, 3, 4), layer)


def flax_batch_norm(w, b, mean, var, **settings):
    layer = nnx.BatchNorm(CHANNELS, epsilon=0.1, momentum=0.8, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **settings)
    layer.mean, layer.var = nnx.BatchStat(jnp.asarray(mean)), nnx.BatchStat(jnp.asarray(var))  # not in float32
    return flax_layer(layer, w, b)


@pytest.mark.parametrize("shape", [(9, CHANNELS), (2, CHANNELS, 3, 4)])
def test_batch_norm_in_training(shape):
    (w, b, mean), var = draw(16, 3, CHANNELS), draw(17, CHANNELS) ** 2
    x, dy = draw(18, *shape), draw(19, *shape)
    norm = BatchNorm(w, b, 0.1, momentum=0.2, running_mean=mean, running_var=var)
    layer = flax_batch_norm(w, b, mean, var)
    saved = hold(norm, x, dy, layer)
    norm.track(saved)
    n = x.size // CHANNELS
    biased = np.moveaxis(x, 1, 0).reshape(CHANNELS, n).var(axis=1)
    close(norm.running_mean, layer.mean[...])
    close(norm.running_var - 0.2 * biased / (n - 1), layer.var[...])  # ours tracks biased n / (n - 1)


def test_batch_norm_in_inference():
    (w, b, mean), var = draw(20, 3, CHANNELS), draw(21, CHANNELS) ** 2
    norm = BatchNorm(w, b, 0.1, running_mean=mean, running_var=var)
    x, dy = draw(22, 2, CHANNELS, 3, 4), draw(23, 2, CHANNELS, 3, 4)
    y, saved = norm.inference(x)
    dx, grads = norm.backward(dy, saved)
    layer = flax_batch_norm(w, b, mean, var, use_running_average=True)
    expected_y, expected_dx, expected = by_flax(layer, np.moveaxis(x, 1, -1), np.moveaxis(dy, 1, -1))
    close(y, np.moveaxis(expected_y, -1, 1))
    close(dx, np.moveaxis(expected_dx, -1, 1))
    for name, gradient in expected.items():
        close(grads[name], gradient)
