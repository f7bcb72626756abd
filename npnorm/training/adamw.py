"""AdamW: Adam with decoupled weight decay.

Ilya Loshchilov and Frank Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv:1711.05101, algorithm 2. At
step t, with the gradient g of the parameter p:

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    p = p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay p)

(the paper multiplies decay by the schedule alone; here, as in torch, by the learning rate).

It works element by element, so that on a group each rank updates what it holds, and nothing is communicated.
"""

import math
from collections.abc import Iterator

import numpy as np

from npnorm.arrays import Array, array_module, sqrt
from npnorm.threads import parallel_for
from npnorm.tree import Tree, leaves, map_tree

BLOCK = 1 << 17
"""Elements of one array in a block: what one operation writes, the next reads from cache."""


class AdamW:
    """Updates a tree of parameters in place, with the moments that it keeps.

    Parameters
    ----------
    params : tree of arrays
        Changed by `step`.
    betas : (float, float)
        b1 and b2: how much of the moments stays at each step. The default is that of language models; torch's is
        (0.9, 0.999), with a weight_decay of 0.01.
    eps : float
    weight_decay : float
        Only for arrays of two axes or more, so not for norms and biases.
    """

    def __init__(
        self, params: Tree, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.1
    ) -> None:
        self.params = params
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.m = map_tree(lambda p: array_module(p).zeros_like(p), params)
        self.v = map_tree(lambda p: array_module(p).zeros_like(p), params)
        self.t = 0

    def step(self, grads: Tree, lr: float) -> None:
        """Update every parameter by its gradient, at the learning rate `lr`."""
        self.t += 1
        b1, b2 = self.betas
        c1, c2 = 1 - b1**self.t, 1 - b2**self.t

        def update(decays: bool, p: Array, g: Array, m: Array, v: Array) -> None:
            m *= b1
            m += (1 - b1) * g
            v *= b2
            square = g * g
            square *= 1 - b2
            v += square
            size = sqrt(v)
            size += self.eps * math.sqrt(c2)
            change = m / size  # times sqrt(c2): numerator and denominator of the formula alike
            change *= lr / c1 * math.sqrt(c2)
            if decays:
                p *= 1 - lr * self.weight_decay
            p -= change

        blocks = list(_blocks(self.params, grads, self.m, self.v))
        parallel_for(lambda i: update(*blocks[i]), len(blocks))


def _blocks(params: Tree, *others: Tree) -> Iterator[tuple[bool, Array, Array, Array, Array]]:
    """Yield whether an array decays, and the matching arrays of the trees; on NumPy in blocks, views of one axis."""
    by_name = [dict(leaves(tree)) for tree in others]
    for name, p in leaves(params):
        g, m, v = (tree[name] for tree in by_name)
        decays = p.ndim > 1
        if all(isinstance(a, np.ndarray) and a.flags.c_contiguous for a in (p, g, m, v)):
            p, g, m, v = (a.reshape(-1) for a in (p, g, m, v))
            for start in range(0, p.size, BLOCK):
                some = slice(start, start + BLOCK)
                yield decays, p[some], g[some], m[some], v[some]
        else:
            yield decays, p, g, m, v
