"""A step of training a small transformer: loss, gradients, clipping, AdamW. The same in npnorm and in torch.

torch's is written for speed as one writes it in eager torch: one matrix for queries, keys and values, attention by
`scaled_dot_product_attention`, the fused AdamW.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from npnorm import Config, Transformer
from npnorm.bench.grid import Sizes
from npnorm.bench.timing import Contender
from npnorm.config import init
from npnorm.training import AdamW, clip, global_norm, loss_and_grads
from npnorm.tree import Tree, leaves, map_tree

LR, BETAS, ADAM_EPS, DECAY, MAX_NORM = 1e-3, (0.9, 0.95), 1e-8, 0.1, 1.0
CHECKED, DIGITS = 3, 5
"""Steps whose losses are compared before anything is timed, and the digits to which they must agree."""

MODELS = ("LayerNorm, GELU", "RMSNorm, SwiGLU")
"""Two transformers, both with the norm before each sub-layer: that of 2019, and `Config.modern`."""


def config_of(model: str, sizes: Sizes) -> Config:
    """Return the settings of one of MODELS.

    Examples
    --------
    >>> config_of("RMSNorm, SwiGLU", Sizes()).norm
    'rms'
    """
    chosen: dict[str, Any] = {name: getattr(sizes, name) for name in ("depth", "width", "heads")}
    if model == MODELS[0]:
        return Config.original(sizes.vocabulary, placement="pre", tied=False, context=sizes.length, **chosen)
    return Config.modern(sizes.vocabulary, context=sizes.length, **chosen)


def steps(model: str, sizes: Sizes, peers: Sequence[str]) -> dict[str, Contender]:
    """Return the contenders of a training step by name, after a few steps that hold their losses together.

    Raises
    ------
    RuntimeError
        If the losses do not agree.
    """
    config, rng = config_of(model, sizes), np.random.default_rng(0)
    params = init(config, rng)
    ids = rng.integers(0, sizes.vocabulary, (sizes.batch, sizes.length + 1))
    found = {"npnorm": own_step(config, params, ids)}
    for name in ("torch", "compile"):
        if name in peers:
            found[name] = torch_step(config, params, ids, compiled=name == "compile")
    agree({name: [step() for _ in range(CHECKED)] for name, step in found.items()})
    return {name: Contender(step) for name, step in found.items()}


def agree(losses: dict[str, list[float]]) -> None:
    """Raise unless all sequences of losses are the same to DIGITS digits.

    Examples
    --------
    >>> agree({"ours": [3.0, 2.0], "theirs": [3.000001, 2.0]})
    """
    (first, ours), *others = losses.items()
    for name, theirs in others:
        if not np.allclose(ours, theirs, rtol=10.0**-DIGITS, atol=0):
            raise RuntimeError(f"The training steps of {first} and {name} do not agree; losses: {ours} and {theirs}.")


def own_step(config: Config, params: Tree, ids: np.ndarray) -> Callable[[], float]:
    """Return a function that takes a step of training on ids of shape (batch, length + 1), and returns the loss."""
    model = Transformer(config, map_tree(np.copy, params))
    optimizer = AdamW(model.params, betas=BETAS, eps=ADAM_EPS, weight_decay=DECAY)

    def step() -> float:
        loss, grads = loss_and_grads(model, ids[:, :-1], ids[:, 1:])
        norm = global_norm(grads, model.shards, model.group)
        optimizer.step(clip(grads, norm, MAX_NORM), LR)
        return float(loss)

    return step


def torch_step(config: Config, params: Tree, ids: np.ndarray, compiled: bool = False) -> Callable[[], float]:
    """Return the same of torch, from a copy of the same parameters."""
    import torch

    loss, tensors = torch_loss(config, params)
    if compiled:
        torch.compiler.reset()
        loss = torch.compile(loss, dynamic=False)
    matrices, vectors = ([t for t in tensors if (t.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, eps=ADAM_EPS, fused=True)
    inputs, targets = (torch.tensor(a) for a in (ids[:, :-1], ids[:, 1:]))

    def step() -> float:
        optimizer.zero_grad()
        value = loss(inputs, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(tensors, MAX_NORM)
        optimizer.step()
        return float(value.detach())

    return step


def torch_loss(config: Config, params: Tree) -> tuple[Callable[[Any, Any], Any], list[Any]]:
    """Return loss(ids, targets) of one of MODELS with the parameters of `npnorm.config.init`, and its tensors."""
    import torch
    from torch.nn import functional

    tree = map_tree(lambda a: torch.tensor(a, requires_grad=True), _joined(params))
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
            for p, f in ((block["attention"], attention), (block["mlp"], mlp)):
                x = x + f(norm(x, p["norm"]), p["sublayer"])
        logits = linear(norm(x, tree["norm"]), tree["head"])
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    return loss, [tensor for _, tensor in leaves(tree)]


def _joined(params: Tree) -> Tree:
    """Return the tree with the projections of queries, keys and values as one."""
    blocks = {}
    for name, block in params["blocks"].items():
        parts = dict(block["attention"]["sublayer"])
        three = [parts.pop(part) for part in ("q_proj", "k_proj", "v_proj")]
        parts["qkv_proj"] = {key: np.concatenate([part[key] for part in three]) for key in three[0]}
        blocks[name] = block | {"attention": block["attention"] | {"sublayer": parts}}
    return params | {"blocks": blocks}
