"""The learning rate over a run: linear warm-up, then half a cosine.

Ilya Loshchilov and Frank Hutter, "SGDR", ICLR 2017, arXiv:1608.03983, equation 5, without restarts; the warm-up is
that of Priya Goyal et al., 2017, arXiv:1706.02677, section 2.2.
"""

import math


def warmup_cosine(step: int, steps: int, warmup: int, peak: float, last: float = 0.1) -> float:
    """Return the learning rate of `step` (0 ... steps - 1): up to `peak` in `warmup` steps, down to `last` times peak.

    Examples
    --------
    >>> [round(warmup_cosine(step, 6, 2, peak=1.0), 2) for step in range(6)]
    [0.5, 1.0, 0.87, 0.55, 0.23, 0.1]
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step + 1 - warmup) / max(1, steps - warmup)
    return peak * (last + (1 - last) * (1 + math.cos(math.pi * done)) / 2)
