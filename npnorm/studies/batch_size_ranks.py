"""What each rank does in the study of batches: train, with statistics over all ranks or over its own images.

The images are noise: what is compared is arithmetic, and no digit is needed for it.
"""

import numpy as np

from npnorm.blocks import Chain
from npnorm.group import SOLO, Group
from npnorm.studies import small_convnets as small
from npnorm.tree import leaves

IMAGES = 64
"""Of noise, which are learned."""


def rate(images: int) -> float:
    """Return the learning rate for a batch: 0.1 for 32 images, and in proportion.

    Examples
    --------
    >>> rate(32), rate(2)
    (0.1, 0.00625)
    """
    return 0.1 * images / 32


def train(model: Chain, data: small.Digits, images: int, steps: int, seed: int, group: Group = SOLO) -> int:
    """Train the model with batches of so many images, over all ranks, and return how many steps had a finite loss."""
    lrs, batches = small.half_constant(rate(images), steps), np.random.default_rng([seed, 2])
    optimizer = small.Momentum(model.params, 0.9, 1e-4)
    return sum(1 for _ in small.train(model, optimizer, data, images, lrs, batches, group))


def rank_main(group: Group, images: int, steps: int, seeds: int) -> dict[str, list[float]]:
    """Train with statistics over the ranks, and over each rank's images alone: return how far both are from one rank.

    The distance is that of the parameters from those of one process with the whole batch, over the length of the way
    that these went; one for each seed.
    """

    def trained(seed: int, steps: int, norm_group: Group = SOLO, group: Group = SOLO) -> np.ndarray:
        rng = np.random.default_rng([seed, 0])
        noise, labels = rng.standard_normal((IMAGES, 1, small.SIDE, small.SIDE)), rng.integers(0, small.CLASSES, IMAGES)
        model = small.network("BatchNorm", np.random.default_rng([seed, 1]), "float64", norm_group)
        train(model, small.Digits(noise, labels, noise[:0], labels[:0]), images, steps, seed, group)
        return np.concatenate([p.ravel() for _, p in leaves(model.params)])

    found: dict[str, list[float]] = {"synchronized": [], "apart": []}
    for seed in range(seeds):
        start, whole = trained(seed, 0), trained(seed, steps)
        for name, norm_group in (("synchronized", group), ("apart", SOLO)):
            distance = np.linalg.norm(trained(seed, steps, norm_group, group) - whole)
            found[name].append(float(distance / np.linalg.norm(whole - start)))
    return found
