"""keras on its JAX backend."""

import os
from typing import Any

from npnorm.studies.accuracy.needs import need
from npnorm.studies.accuracy.peers.from_jax import differentiated, load_jax
from npnorm.studies.accuracy.peers.peer import Peer


def keras() -> Peer:
    """Return keras."""
    load_jax()
    os.environ["KERAS_BACKEND"] = "jax"  # read once, when keras is first imported
    layers = need("keras").layers

    def forward(norm: str, eps: float, groups: int, x: Any, weight: Any, bias: Any) -> Any:
        settings, call = {"epsilon": eps, "dtype": x.dtype.name}, {}
        if norm == "layer":
            layer = layers.LayerNormalization(**settings)
        elif norm == "rms":
            layer = layers.RMSNormalization(**settings)
        elif norm == "group":
            layer = layers.GroupNormalization(groups, **settings)
        else:
            layer, call = layers.BatchNormalization(**settings), {"training": True}
        layer.build(x.shape)
        running = [variable.value for variable in layer.non_trainable_variables]
        params = [weight] if bias is None else [weight, bias]
        y, _ = layer.stateless_call(params, running, x, **call)
        return y

    return Peer(
        "keras",
        "`keras.layers` on the JAX backend, jitted; it computes norms of float64 in float32 there",
        ("keras", "jax"),
        differentiated(forward),
    )
