"""AdamW: Adam with decoupled weight decay.

Ilya Loshchilov and Frank Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv:1711.05101, algorithm 2. At
step t, with the gradient g of the parameter p:

    m = b1 m + (1 - b1) g
    v = b2 v + (1 - b2) g^2
    p = p - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay p)

(the paper multiplies decay by the schedule alone; here, as in torch, by the learning rate).

It works element by element, so that on a group each rank updates what it holds, and nothing is communicated.
"""

from npnorm.arrays import Array, array_module, sqrt
from npnorm.layer import Tree, map_tree


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

        def update(p: Array, g: Array, m: Array, v: Array) -> None:
            m *= b1
            m += (1 - b1) * g
            v *= b2
            v += (1 - b2) * (g * g)
            decay = self.weight_decay if p.ndim > 1 else 0.0
            p *= 1 - lr * decay
            p -= (lr / c1) * m / (sqrt(v / c2) + self.eps)

        map_tree(update, self.params, grads, self.m, self.v)
