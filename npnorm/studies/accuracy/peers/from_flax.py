"""flax.nnx, with its default settings."""

from typing import Any

from npnorm.studies.accuracy.needs import need
from npnorm.studies.accuracy.peers.from_jax import differentiated, load_jax
from npnorm.studies.accuracy.peers.peer import Peer
from npnorm.studies.accuracy.problems import NORMS


def flax() -> Peer:
    """Return flax."""
    load_jax()
    nnx = need("flax.nnx")

    def forward(norm: str, eps: float, groups: int, x: Any, weight: Any, bias: Any) -> Any:
        settings = {"epsilon": eps, "dtype": x.dtype, "param_dtype": x.dtype, "rngs": nnx.Rngs(0)}
        if norm == "group":
            settings["num_groups"] = groups
        elif norm == "batch":
            settings["use_running_average"] = False
        layer = getattr(nnx, NORMS[norm])(x.shape[-1], **settings)
        layer.scale = nnx.Param(weight)
        if bias is not None:
            layer.bias = nnx.Param(bias)
        return layer(x)

    about = "`flax.nnx`, jitted; its default, `use_fast_variance=True`, is var = mean(x²) - mean(x)²"
    return Peer("flax", about, ("flax", "jax"), differentiated(forward))
