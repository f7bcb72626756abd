"""The transformer of npnorm in torch: the same parameters, the same loss, the same optimizer.

It is written for speed as one writes it in eager torch: one matrix for queries, keys and values, attention by
`scaled_dot_product_attention`, the fused AdamW.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from npnorm.bench.needs import need
from npnorm.config import Config
from npnorm.tree import Tree, leaves, map_tree

BETAS, ADAM_EPS, DECAY, MAX_NORM = (0.9, 0.95), 1e-8, 0.1, 1.0
"""The settings of the optimizer, of which these are npnorm's defaults, and the norm to which gradients are clipped."""


def torch_loss(config: Config, params: Tree) -> tuple[Callable[[Any, Any], Any], list[Any]]:
    """Return loss(ids, targets) of a transformer of these parameters, and its tensors, which are copies.

    Parameters
    ----------
    config : Config
        With as many heads of keys and values as heads.
    params : tree of arrays
        As `npnorm.config.init` returns them.
    """
    torch = need("torch")
    if config.kv_heads not in (None, config.heads):
        raise ValueError(f"torch_loss: {config.kv_heads} heads of keys and values for {config.heads} heads.")
    functional, tree = torch.nn.functional, map_tree(lambda a: torch.tensor(a, requires_grad=True), _joined(params))
    d = config.width // config.heads
    angle = np.outer(np.arange(config.context), 10000.0 ** (-np.arange(0, d, 2) / d))
    cos, sin = (torch.tensor(f(angle), dtype=torch.float32) for f in (np.cos, np.sin))

    def linear(x: Any, p: Tree) -> Any:
        return functional.linear(x, p["weight"], p.get("bias"))

    def norm(x: Any, p: Tree) -> Any:
        if config.norm == "rms":
            return functional.rms_norm(x, (config.width,), p["weight"], config.eps)
        return functional.layer_norm(x, (config.width,), p["weight"], p["bias"], config.eps)

    def turn(x: Any) -> Any:
        first, second = x.chunk(2, dim=-1)
        c, s = cos[: x.shape[-2]], sin[: x.shape[-2]]
        return torch.cat([first * c - second * s, first * s + second * c], dim=-1)

    def attention(x: Any, p: Tree) -> Any:
        batch, length, _ = x.shape
        q, k, v = linear(x, p["qkv_proj"]).view(batch, length, 3, config.heads, d).permute(2, 0, 3, 1, 4)
        if config.positions == "rotary":
            q, k = turn(q), turn(k)
        o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return linear(o.transpose(1, 2).reshape(batch, length, -1), p["o_proj"])

    def mlp(x: Any, p: Tree) -> Any:
        up = linear(x, p["up_proj"])
        if config.mlp == "swiglu":
            return linear(functional.silu(linear(x, p["gate_proj"])) * up, p["down_proj"])
        return linear(functional.gelu(up, approximate="tanh"), p["down_proj"])

    def loss(ids: Any, targets: Any) -> Any:
        x = functional.embedding(ids, tree["embedding"]["weight"])
        if config.positions == "learned":
            x = x + tree["positions"]["weight"][: ids.shape[1]]
        for block in tree["blocks"].values():
            for name, f in (("attention", attention), ("mlp", mlp)):
                p = block[name]
                if config.placement == "pre":
                    x = x + f(norm(x, p["norm"]), p["sublayer"])
                else:
                    x = norm(x + f(x, p["sublayer"]), p["norm"])
        if config.placement == "pre":
            x = norm(x, tree["norm"])
        logits = linear(x, tree["embedding" if config.tied else "head"])
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return loss, [tensor for _, tensor in leaves(tree)]


def torch_step(config: Config, params: Tree, ids: np.ndarray, lr: float, compiled: bool = False) -> Callable[[], float]:
    """Return a function that takes a step of training on ids of shape (batch, length + 1), and returns the loss."""
    torch = need("torch")
    loss, tensors = torch_loss(config, params)
    if compiled:
        torch.compiler.reset()
        loss = torch.compile(loss, dynamic=False)
    groups = [
        {"params": [t for t in tensors if t.ndim > 1], "weight_decay": DECAY},
        {"params": [t for t in tensors if t.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=ADAM_EPS, fused=True)
    inputs, targets = (torch.tensor(a) for a in (ids[:, :-1], ids[:, 1:]))

    def step() -> float:
        optimizer.zero_grad()
        value = loss(inputs, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(tensors, MAX_NORM)
        optimizer.step()
        return float(value.detach())

    return step


def _joined(params: Tree) -> Tree:
    """Return the tree with the projections of queries, keys and values as one."""
    blocks = {}
    for name, block in params["blocks"].items():
        three = [block["attention"]["sublayer"][part] for part in ("q_proj", "k_proj", "v_proj")]
        sublayer = {
            "qkv_proj": {key: np.concatenate([part[key] for part in three]) for key in three[0]},
            "o_proj": block["attention"]["sublayer"]["o_proj"],
        }
        blocks[name] = block | {"attention": block["attention"] | {"sublayer": sublayer}}
    return params | {"blocks": blocks}
