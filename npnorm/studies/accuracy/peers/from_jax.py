"""What the peers that run on JAX share: forward and backward as one program, compiled for the CPU."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npnorm.studies.accuracy.needs import need
from npnorm.studies.accuracy.peers.peer import Results
from npnorm.studies.accuracy.problems import Problem


def load_jax() -> Any:
    """Import JAX, with float64, for the CPU unless JAX_PLATFORMS says otherwise."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    jax = need("jax")
    jax.config.update("jax_enable_x64", True)
    return jax


def differentiated(forward: Callable) -> Callable[[Problem], Results]:
    """Return the function from a problem to its results.

    `forward(norm, eps, groups, x, weight, bias)` gives y; bias is None for RMSNorm. GroupNorm gets x with the channels
    last, as is JAX's custom.
    """
    jax = load_jax()

    @partial(jax.jit, static_argnums=(0, 1, 2))
    def program(norm: str, eps: float, groups: int, dy: Any, x: Any, *params: Any) -> Any:
        def layer(x: Any, weight: Any, bias: Any = None) -> Any:
            return forward(norm, eps, groups, x, weight, bias)

        y, pull_back = jax.vjp(layer, x, *params)
        return y, *pull_back(dy)

    def results(problem: Problem) -> Results:
        last = (lambda a: a.swapaxes(1, -1)) if problem.norm == "group" else (lambda a: a)
        params = [a for a in (problem.weight, problem.bias) if a is not None]
        came = program(problem.norm, problem.eps, problem.groups, last(problem.dy), last(problem.x), *params)
        y, dx, *grads = (np.asarray(a) for a in came)
        return {"y": last(y), "dx": last(dx), **dict(zip(("dw", "db"), grads, strict=False))}

    return results
