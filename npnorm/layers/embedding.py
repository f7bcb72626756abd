"""Embeddings: a row of a table for each token, and for each position.

Forward, for a token id:   x = W[id].   Backward: dW[id] = sum of dx over the places where the id stood.

As a formula the lookup is a product with one-hot rows, x = onehot(ids) W; its backward is onehot(ids)^T dx.

On a group the rows of the token table are split. A rank looks up the ids that it holds and takes zeros for the others;
the sum over the ranks is x. Communicated: one sum forward, nothing backward.
"""

from typing import Any, NamedTuple

from npnorm.arrays import Array, array_module
from npnorm.checks import check_ids, check_module, check_saved, check_width, require_same_settings
from npnorm.group import SOLO, Group, Solo, errors_on_all_ranks
from npnorm.layers.inplace import sum_at
from npnorm.tree import show_shapes, summary


@show_shapes
class Saved(NamedTuple):
    """What backward needs of forward."""

    rows: Array  # for each id its row in this rank's shard; outside 0 ... rows - 1 if another rank holds it


class Embedding:
    """Look up a row of a table for each token id: x = W[ids].

    Parameters
    ----------
    weight : array of shape (vocabulary, width)
        On a group, this rank's shard along axis 0.
    group : Group
        The ranks over which the vocabulary is split equally.

    Examples
    --------
    >>> import numpy as np
    >>> x, saved = Embedding(np.array([[1.0, 2.0], [3.0, 4.0]])).forward(np.array([1, 1, 0]))
    >>> x
    array([[3., 4.],
           [3., 4.],
           [1., 2.]])
    """

    def __init__(self, weight: Array, *, group: Group = SOLO) -> None:
        self.params = {"weight": weight}
        self.shards = {"weight": None if isinstance(group, Solo) else 0}
        self.group = group
        with errors_on_all_ranks(group):
            require_same_settings("Embedding", group, self.params)
            if weight.ndim != 2:
                raise ValueError(f"Embedding: weight must have shape (vocabulary, width); got {tuple(weight.shape)}.")

    def __repr__(self) -> str:
        return summary("Embedding", self.params, group=self.group)

    def forward(self, ids: Array) -> tuple[Any, Saved]:
        """Return x of shape (..., width) for integers of shape (...)."""
        w = self.params["weight"]
        held = w.shape[0]
        with errors_on_all_ranks(self.group):
            check_module("Embedding", ids, self.params)
            check_ids("Embedding", ids, held * self.group.size, self.group)
        xp = array_module(ids)
        rows = xp.astype(ids, xp.int64) - self.group.rank * held
        inside = (rows >= 0) & (rows < held)
        found = xp.take(w, xp.reshape(xp.where(inside, rows, xp.zeros_like(rows)), (-1,)), axis=0)
        found = xp.reshape(found, (*ids.shape, w.shape[1]))
        x = xp.where(inside[..., None], found, xp.zeros_like(found))
        return self.group.sum(x, label="Embedding"), Saved(rows)

    def backward(self, dx: Array, saved: Saved) -> tuple[None, dict[str, Array]]:
        """Return None, since ids have no gradient, and the gradient of the table."""
        w = self.params["weight"]
        check_saved("Embedding", saved, Saved)
        with errors_on_all_ranks(self.group):
            check_width("Embedding.backward", dx, w.shape[1], name="dx")
        xp = array_module(dx)
        rows, dx = xp.reshape(saved.rows, (-1,)), xp.reshape(dx, (-1, w.shape[1]))
        return None, {"weight": sum_at(rows, dx, w.shape[0])}


class Positions:
    """Add a learned row for each position: y[t] = x[t] + W[t].

    Alec Radford et al., "Improving Language Understanding by Generative Pre-Training", 2018, section 3.1.

    Parameters
    ----------
    weight : array of shape (context, width)
        Replicated on a group.
    """

    def __init__(self, weight: Array) -> None:
        self.params = {"weight": weight}
        self.shards = {"weight": None}

    def __repr__(self) -> str:
        return summary("Positions", self.params)

    def forward(self, x: Array) -> tuple[Any, None]:
        """Return y of the shape of x: (batch, length, width)."""
        w = self.params["weight"]
        check_width("Positions", x, w.shape[1])
        if x.shape[-2] > w.shape[0]:
            raise ValueError(f"Positions: x has {x.shape[-2]} positions, the table {w.shape[0]}. Shorten the input.")
        return x + w[: x.shape[-2], :], None

    def backward(self, dy: Array, saved: None) -> tuple[Any, dict[str, Array]]:
        """Return dx, and the gradient of the table."""
        xp = array_module(dy)
        length = dy.shape[-2]
        dw = xp.zeros_like(self.params["weight"], dtype=dy.dtype)
        dw[:length, :] = xp.sum(xp.reshape(dy, (-1, length, dy.shape[-1])), axis=0)
        return dy, {"weight": dw}
