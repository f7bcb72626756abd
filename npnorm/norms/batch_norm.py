"""Batch normalization.

Sergey Ioffe and Christian Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167, algorithms 1 and 2.

Forward in training, for each channel, a row x of n elements: the batch and all space:

    c    = x - mean(x)
    var  = mean(c^2)
    rstd = 1 / sqrt(var + eps)
    z    = c rstd
    y    = z w + b                        w and b: one number for each channel

Backward, given dy:

    db = sum(dy)
    dw = sum(dy z)
    dx = w rstd (dy - db / n - z dw / n)

In inference the mean and variance are the running ones, constants:

    z  = (x - running_mean) rstd          rstd = 1 / sqrt(running_var + eps)
    y  = z w + b
    dx = dy w rstd

The running statistics are updated by `track`, and by nothing else:

    running_mean = (1 - momentum) running_mean + momentum mean(x)
    running_var  = (1 - momentum) running_var  + momentum n / (n - 1) var(x)

with the unbiased variance, as in torch, though y has the biased one. Without momentum they are the average over all
batches that were tracked: momentum is then 1 / batches.

A group of ranks splits the batch, equally or not: synchronized batch normalization. Counts, means and centred squares
travel in one gather and are merged, see `npnorm.engine.statistics`. Backward, dw and db are one sum, and complete.
"""

from typing import Any, NamedTuple, Unpack

import numpy as np

from npnorm import engine
from npnorm.arrays import Array, sqrt
from npnorm.norms import options, running


class Saved(NamedTuple):
    """What backward, and `track`, need of forward; the statistics are one number for each channel."""

    x: Array
    mean: engine.Mean
    var: Array
    n: Array  # elements of the channel, over all ranks
    rstd: Array
    exponent: Array | None  # channels whose squares overflow were divided by 2^exponent; None: there were none


class SavedInference(NamedTuple):
    """What backward needs of inference: the statistics are constants."""

    x: Array
    mean: Array
    rstd: Array


def forward(row: engine.Row, x: Array, w: Array, b: Array) -> tuple[Array, tuple[engine.Mean, Array, Array, Array]]:
    """Return y, and the statistics to save."""
    c, mean, var = row.centre(x)
    rstd = 1 / sqrt(var + row.eps)
    z = c * rstd
    y = z * w + b
    return y, (mean, var, row.n, rstd)


@engine.accurate_where_dx_cancels
def backward(
    row: engine.Row, dy: Array, x: Array, w: Array, mean: engine.Mean, var: Array, n: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    """Return dx, dw and db; var is there for `track`."""
    z = row.subtract(x, mean) * rstd
    db, dw = row.sum(dy, dy * z)  # together: one message
    dx = w * rstd * (dy - db / n - z * (dw / n))
    return dx, dw, db


def inference(row: engine.Row, x: Array, w: Array, b: Array, mean: Array, rstd: Array) -> tuple[Array, tuple[()]]:
    """Return y by the running statistics, and nothing to save."""
    z = row.difference(x, mean) * rstd
    y = z * w + b
    return y, ()


def inference_backward(
    row: engine.Row, dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    """Return dx, dw and db by the running statistics."""
    z = row.difference(x, mean) * rstd
    db, dw = row.sum(dy, dy * z)
    dx = dy * w * rstd
    return dx, dw, db


class BatchNorm(running.RunningNorm[Saved]):
    """Give each channel mean 0 and variance 1 over the batch and all space.

    Parameters
    ----------
    weight, bias : arrays of shape (channels,), or None
        w and b; None leaves it out. On a group, the same on every rank.
    eps : float
        Added to the variance (that of n, not n - 1), so in units of x squared.
    momentum : float or None
        The share of the newest batch in the running statistics; None: the average over all batches.
    running_mean, running_var : arrays of shape (channels,), or None
        Where the running statistics start; None: at 0 and 1. The norm keeps a copy.
    batches : int
        How many batches the running statistics have seen.
    **settings : group, compute
        As for every `ChannelNorm`. The ranks of the group split the batch, equally or not; a rank may have none of it.
        Communicated: forward one gather of four numbers for each channel; backward one sum of two.

    Attributes
    ----------
    running_mean, running_var : arrays of shape (channels,)
        What `inference` uses; None until the first `track` where nothing says how many channels there are. float64,
        unless they came in another dtype.
    batches : int

    Raises
    ------
    ValueError, TypeError
        On every rank alike, if the parameters are not floats of one shape (channels,), eps is not finite and >= 0, a
        running variance is negative, or, in training, a channel has fewer than two elements.

    Examples
    --------
    >>> norm = BatchNorm(np.ones(1), np.zeros(1), eps=0)
    >>> y, saved = norm.forward(np.array([[1.0], [3.0], [1.0], [3.0]]))  # mean 2, standard deviation 1
    >>> y.T
    array([[-1.,  1., -1.,  1.]])
    >>> norm.track(saved)
    >>> norm.running_mean
    array([0.2])
    """

    formula = engine.Formula(forward, backward, Saved)
    by_running_statistics = engine.Formula(inference, inference_backward, SavedInference)

    def __init__(
        self,
        weight: Array | None = None,
        bias: Array | None = None,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        *,
        running_mean: Array | None = None,
        running_var: Array | None = None,
        batches: int = 0,
        **settings: Unpack[options.Common],
    ) -> None:
        super().__init__(weight, bias, eps, momentum, running_mean, running_var, batches, settings)

    def inference(self, x: options.AnyArray, *, out: Array | None = None) -> tuple[options.AnyArray, SavedInference]:
        """Return y by the running statistics, and what backward needs; nothing is communicated; y goes to `out`."""
        self._check(x=x)
        mean, var = self.known()
        rstd = 1 / sqrt(var + self.eps)
        y, _, _ = self.fixed.forward(x, self.params, constants=(mean, rstd), out=out)
        return y, SavedInference(x, mean, rstd)

    def backward(
        self, dy: options.AnyArray, saved: Saved | SavedInference, *, out: Array | None = None
    ) -> tuple[options.AnyArray, dict[str, Any]]:
        """Return dx, of the shape and dtype of x, and the complete gradients of the parameters; dx goes to `out`."""
        if not isinstance(saved, SavedInference):
            return super().backward(dy, saved, out=out)
        self._check(dy=dy, x=saved.x)
        return self.fixed.backward(dy, saved.x, self.params, (saved.mean, saved.rstd), None, out=out)

    def track(self, saved: Saved) -> None:
        """Update the running statistics by those of a forward in training: the only mutation.

        Raises
        ------
        ValueError
            If the batch had a NaN or infinity; the running statistics stay as they were.
        """
        self._check_saved(saved, "track")
        self._check(x=saved.x)
        with np.errstate(all="ignore"):
            mean, unbiased = saved.mean.high + saved.mean.low, saved.var * (saved.n / (saved.n - 1))
        self.update(mean, unbiased, saved.exponent)
