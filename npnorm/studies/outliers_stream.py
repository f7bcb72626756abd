"""What `outliers` measures of a model: its residual stream after each block, and the gains of its norms.

Let x be the stream after a block, of so many positions and n features, and s_j^2 the mean square of its feature j over
the positions:

    rms       sqrt(mean_j s_j^2)
    largest   the largest |x_j| / rms(x) of all positions; at most sqrt(n), where one feature has everything
    massive   the largest |x| / the median of |x|           Mingjie Sun et al., 2024, arXiv:2402.17762
    kurtosis  mean_j s_j^4 / (mean_j s_j^2)^2, from 1 to n; 1 if all features are of one size
                                                            Bobby He et al., 2024, arXiv:2405.19279

A direction of x that is large makes features large, too: largest and kurtosis grow with it in any basis. So both are
also taken of x Q, the mean over random orthogonal Q: what x has more than that is due to single features.
"""

from typing import Any

import numpy as np
import scipy.stats

from npnorm.transformer import Transformer


def blocks(model: Transformer) -> list[Any]:
    """Return the blocks of a model: chains of the two placements, of attention and of the MLP."""
    chain: Any = model.stack.layers["blocks"]
    return list(chain.layers.values())


def states(model: Transformer, ids: np.ndarray) -> list[np.ndarray]:
    """Return the stream after the embedding and after each block: arrays of (positions, features), in float64."""
    x, _ = model.embedding.forward(ids)
    found = [x]
    for block in blocks(model):
        x, _ = block.forward(x)
        found.append(x)
    return [x.reshape(-1, x.shape[-1]).astype("float64") for x in found]


def stream(model: Transformer, ids: np.ndarray, rotations: list[np.ndarray]) -> dict[str, list[Any]]:
    """Return what the stream is like, as the top of this file defines it: lists by depth, from the embedding on."""
    found = states(model, ids)
    return {
        "rms": [rounded(np.sqrt(np.mean(x * x))) for x in found],
        "largest": [rounded(largest(x)) for x in found],
        "largest, rotated": [rounded(np.mean([largest(x @ q) for q in rotations])) for x in found],
        "massive": [rounded(np.max(np.abs(x)) / np.median(np.abs(x))) for x in found],
        "kurtosis": [rounded(kurtosis(x)) for x in found],
        "kurtosis, rotated": [rounded(np.mean([kurtosis(x @ q) for q in rotations])) for x in found],
        "feature": [int(np.argmax(np.mean(x * x, axis=0))) for x in found],  # the strongest
    }


def largest(x: np.ndarray) -> float:
    """Return the largest |x_j| / rms(x) of all positions.

    Examples
    --------
    >>> largest(np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, -3.0, 0.0]]))  # sqrt(4)
    2.0
    """
    return float(np.max(np.abs(x) / np.sqrt(np.mean(x * x, axis=-1, keepdims=True))))


def kurtosis(x: np.ndarray) -> float:
    """Return mean_j s_j^4 / (mean_j s_j^2)^2, with s_j^2 the mean square of a feature.

    Examples
    --------
    >>> kurtosis(np.array([[1.0, 1.0], [1.0, -1.0]])), kurtosis(np.array([[1.0, 0.0], [1.0, 0.0]]))
    (1.0, 2.0)
    """
    square = np.mean(x * x, axis=0)
    return float(np.mean(square**2) / np.mean(square) ** 2)


def gains(model: Transformer) -> dict[str, list[float]]:
    """Return the largest and the smallest gain of each block, and how far the largest of a norm stands out."""
    found = []
    for block in blocks(model):
        norms = [norm for place in block.layers.values() for name, norm in place.layers.items() if name != "sublayer"]
        found.append(np.abs([norm.params["weight"] for norm in norms], dtype="float64"))
    return {
        "largest gain": [rounded(w.max()) for w in found],
        "smallest gain": [rounded(w.min()) for w in found],
        "gain stands out": [rounded(np.mean(standing_out(w))) for w in found],
    }


def standing_out(w: np.ndarray) -> np.ndarray:
    """Return how many standard deviations the largest of each row is above the mean of the row; 0 if all are equal."""
    above = w.max(axis=-1) - w.mean(axis=-1)
    return above / np.where(above > 0, w.std(axis=-1), 1)


def alignment(model: Transformer, ids: np.ndarray) -> list[float]:
    """Return for each block the rank correlation of gain and s_j over the features, of the norm next to the stream.

    Where norms stand before the sub-layers, that is the norm that takes the stream, of attention. Else it is the one
    whose output is the stream after the block, or is added to it, of the MLP.
    """
    found, before, correlations = states(model, ids), model.config.placement in ("pre", "sandwich"), []
    for i, block in enumerate(blocks(model)):
        place = block.layers["attention" if before else "mlp"]
        gain = next(norm for name, norm in place.layers.items() if name != "sublayer").params["weight"]
        x = found[i if before else i + 1]
        statistic = scipy.stats.spearmanr(np.abs(gain), np.mean(x * x, axis=0)).statistic
        correlations.append(rounded(statistic))
    return correlations


def rounded(value: Any) -> float:
    """Return a number of 4 digits, so that the files stay small."""
    return float(f"{value:.4g}")
