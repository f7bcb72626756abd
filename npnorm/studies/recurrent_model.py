"""The recurrent language model of `recurrent`: an embedding, a GRU with the norms before its gates, and a head.

A small copy of the translation model of Biao Zhang and Rico Sennrich, "Root Mean Square Layer Normalization", NeurIPS
2019, arXiv:1910.07467, appendix A.1; the norms stand where their code has them, and the gains start at one. There are
four starts, which differ in the matrices alone:

    paper            orthogonal where a matrix is square (the three that take h), N(0, 0.01^2) elsewhere
    larger           N(0, 1) for the embedding, N(0, 1 / inputs) for the matrices into the GRU and of the head
    centre 0.2       those of the paper with 0.2 added to all, as for its figure 4
    centre 0.2, GRU  with 0.2 added to the two of the GRU alone, which are those that the norms act on
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from npnorm import norms
from npnorm.blocks import Chain
from npnorm.layers import GRU, CrossEntropy, Embedding, Linear
from npnorm.studies.study import Settings
from npnorm.training import AdamW, batch, clip, global_norm
from npnorm.tree import Layer

NORMS: dict[str, Callable[..., Layer]] = {
    "LayerNorm": norms.LayerNorm.init,
    "RMSNorm": norms.RMSNorm.init,
    "pRMSNorm": norms.PartialRMSNorm.init,
}

OFF_CENTRE = {"centre 0.2": ("embedding", "ih", "hh", "head"), "centre 0.2, GRU": ("ih", "hh")}
CENTRE = 0.2


def language_model(start: str, norm: str, vocabulary: int, dim: int, rng: np.random.Generator) -> Chain:
    """Return the model with its first weights; those of one `rng` are the same for every norm."""
    inputs = dim // 2  # 512 and 1024 in the paper
    sizes = {"embedding": 1.0, "ih": inputs**-0.5, "head": dim**-0.5} if start == "larger" else {}
    shapes = {"embedding": (vocabulary, inputs), "ih": (3 * dim, inputs), "head": (vocabulary, dim)}
    w = {name: sizes.get(name, 0.01) * rng.standard_normal(shape) for name, shape in shapes.items()}
    w["hh"] = np.linalg.svd(rng.standard_normal((3, dim, dim)))[0].reshape(3 * dim, dim)  # orthogonal
    shift = dict.fromkeys(OFF_CENTRE.get(start, ()), CENTRE)
    w = {name: (a + shift.get(name, 0.0)).astype("float32") for name, a in w.items()}
    gru = {"weight_ih": w["ih"], "weight_hh": w["hh"], "bias_ih": np.zeros(3 * dim, "float32")}
    return Chain(
        {
            "embedding": Embedding(w["embedding"]),
            "gru": GRU(gru, norms_of_gru(norm, dim)),
            "head": Linear(w["head"], np.zeros(vocabulary, "float32")),
        }
    )


def norms_of_gru(norm: str, dim: int) -> dict[str, Layer]:
    """Return the four norms before the gates, with the eps of the paper's code."""
    if norm == "none":
        return {}
    features = {"ih_gates": 2 * dim, "ih_candidate": dim, "hh_gates": 2 * dim, "hh_candidate": dim}
    return {name: NORMS[norm](n, eps=1e-5, compute="float32") for name, n in features.items()}


def hidden_to_hidden(gru: GRU, h: np.ndarray) -> dict[str, np.ndarray]:
    """Return what the hidden state gives to the gates and to the candidate: norm(h U^T), or h U^T without a norm."""
    c = h @ gru.params["weight_hh"].T
    parts = {"hh_gates": c[..., : 2 * gru.dim], "hh_candidate": c[..., 2 * gru.dim :]}
    return {name: gru.norms[name].forward(part)[0] if gru.norms else part for name, part in parts.items()}


def train(model: Chain, ids: np.ndarray, settings: Settings, lr: float, rng: np.random.Generator) -> Iterator[Chain]:
    """Yield the model before the first step and after each, until one whose loss or gradient is not finite."""
    optimizer, loss_layer = AdamW(model.params, betas=(0.9, 0.999), weight_decay=0.0), CrossEntropy()
    yield model
    for _ in range(settings["steps"]):
        inputs, targets = batch(ids, settings["rows"], settings["length"], rng)
        logits, saved = model.forward(inputs)
        loss, saved_loss = loss_layer.forward(logits, targets)
        _, grads = model.backward(loss_layer.backward(1.0, saved_loss), saved)
        norm = global_norm(grads, model.shards)
        if not math.isfinite(norm + float(loss)):
            return
        optimizer.step(clip(grads, norm, 1.0), lr)
        yield model
