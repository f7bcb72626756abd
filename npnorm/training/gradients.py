"""Loss and gradients of a batch, taken in pieces.

The loss of a batch is the mean over its rows, and so are its gradients: with n_i of the n rows in piece i,

    loss  = sum over i of n_i / n loss_i
    grads = sum over i of n_i / n grads_i

The pieces are computed side by side, each by one thread and one thread of BLAS: that is faster than many threads in
each product, and a piece at a time needs less memory than the batch. The pieces depend on the batch alone, and their
gradients are added in order: any number of threads gives the same bits.
"""

import contextlib
import functools
import itertools
import threading
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module
from npnorm.group import Solo
from npnorm.layers import CrossEntropy
from npnorm.threads import parallel_for
from npnorm.transformer import Transformer
from npnorm.tree import Tree, map_tree

PIECE = 512
"""Tokens of a piece, at least: each piece reads all weights and writes all their gradients again."""


def loss_and_grads(model: Transformer, inputs: Array, targets: Array) -> tuple[Array, Tree]:
    """Return the mean cross entropy of `targets` and its gradients; both arguments are of shape (rows, length).

    The rows are split into pieces where the model is whole (`SOLO`) and its arrays are NumPy's. Its products then use
    one thread of BLAS, if threadpoolctl is installed, and `npnorm.threads` says how many pieces run at a time; without
    it they run one after the other.
    """
    _keep_memory()
    pieces = _pieces(model, inputs)
    if len(pieces) < 2:
        return _piece(model, inputs, targets)
    sums = _Sums()

    def work(i: int) -> None:
        rows = pieces[i]
        weight = (rows.stop - rows.start) / inputs.shape[0]
        loss, grads = _piece(model, inputs[rows], targets[rows], weight)
        sums.add(i, (loss * weight, grads))

    blas = _blas()
    with blas.limit(limits=1, user_api="blas") if blas else contextlib.nullcontext():
        parallel_for(work, len(pieces), None if blas else 1)
    return sums.total


def _piece(model: Transformer, inputs: Array, targets: Array, weight: float = 1.0) -> tuple[Array, Tree]:
    """Return the loss of some rows, and `weight` times its gradients."""
    loss_layer = CrossEntropy(group=model.group)
    logits, saved = model.forward(inputs)
    loss, saved_loss = loss_layer.forward(logits, targets)
    del logits
    return loss, model.backward(loss_layer.backward(weight, saved_loss), saved)[1]


def _pieces(model: Transformer, inputs: Array) -> list[slice]:
    """Return equal parts of the rows, or nearly so; one, where the ranks or another device share the work."""
    rows = inputs.shape[0]
    alone = isinstance(model.group, Solo) and array_module(inputs) is np
    count = max(1, min(rows, inputs.size // PIECE)) if alone else 1
    ends = [rows * i // count for i in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


class _Sums:
    """The sum of the pieces, in their order, whichever is done first."""

    def __init__(self) -> None:
        self.total: Any = None
        self.waiting: dict[int, Any] = {}
        self.next = 0
        self.lock = threading.Lock()

    def add(self, i: int, piece: Any) -> None:
        """Add piece `i` and those that wait for it; the arrays of piece 0 hold the sum."""
        with self.lock:
            self.waiting[i] = piece
            while self.next in self.waiting:
                loss, grads = self.waiting.pop(self.next)
                if self.next == 0:
                    self.total = loss, grads
                else:
                    self.total = self.total[0] + loss, map_tree(_add, self.total[1], grads)
                self.next += 1


def _add(total: Array, part: Array) -> Array:
    total += part
    return total


@functools.cache
def _keep_memory() -> None:
    """Have the C library keep what one step frees for the next; else a tenth of the time goes into fetching it again.

    The GNU library gives memory back beyond twice the largest array that was freed so far, and looks at arrays of up to
    32 MiB for that. This one is never written to, so that it costs nothing.
    """
    np.empty((32 << 20) - 8192, np.uint8)


@functools.cache
def _blas() -> Any:
    """Return threadpoolctl's view of the libraries of this process, or None without it; the search takes 1 ms."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return None
    return ThreadpoolController()
