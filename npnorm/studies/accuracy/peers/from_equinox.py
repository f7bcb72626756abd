"""equinox: its layers take one sample, and are mapped over the batch."""

from typing import Any

from npnorm.studies.accuracy.needs import need
from npnorm.studies.accuracy.peers.from_jax import differentiated, load_jax
from npnorm.studies.accuracy.peers.peer import Peer


def equinox() -> Peer:
    """Return equinox."""
    jax, eqx = load_jax(), need("equinox")

    def make(norm: str, eps: float, groups: int, x: Any) -> Any:
        channels = x.shape[-1]
        if norm == "layer":
            return eqx.nn.LayerNorm(channels, eps=eps, dtype=x.dtype)
        if norm == "rms":
            return eqx.nn.RMSNorm(channels, eps=eps, use_bias=False, dtype=x.dtype)
        if norm == "group":
            return eqx.nn.GroupNorm(groups, channels, eps=eps, dtype=x.dtype)
        return eqx.nn.BatchNorm(channels, axis_name="batch", eps=eps, dtype=x.dtype, mode="batch")

    def forward(norm: str, eps: float, groups: int, x: Any, weight: Any, bias: Any) -> Any:
        layer = make(norm, eps, groups, x)
        layer = eqx.tree_at(lambda layer: layer.weight, layer, weight)
        if bias is not None:
            layer = eqx.tree_at(lambda layer: layer.bias, layer, bias)
        if norm == "batch":
            y, _ = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, eqx.nn.State(layer))
            return y
        if norm == "group":  # of all layers here, the one with the channels first
            return jax.vmap(layer)(x.swapaxes(1, -1)).swapaxes(1, -1)
        return jax.vmap(layer)(x)

    about = "`equinox.nn` (BatchNorm with `mode='batch'`), mapped over the batch by `jax.vmap`, jitted"
    return Peer("equinox", about, ("equinox", "jax"), differentiated(forward))
