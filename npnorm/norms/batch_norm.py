"""Batch normalization.

Sergey Ioffe and Christian Szegedy, "Batch Normalization", ICML 2015, arXiv:1502.03167, algorithms 1 and 2.

Forward in training, for each channel, a row x of n elements: the batch and all space:

    c    = x - mean(x)
    rstd = 1 / sqrt(mean(c^2) + eps)
    z    = c rstd
    y    = z w + b                        w and b: one number for each channel

Backward, given dy:

    db = sum(dy)
    dw = sum(dy c) rstd
    dx = w rstd (dy - db / n - z dw / n)

In inference the mean and variance are the running ones, constants:

    y  = (x - running_mean) rstd w + b    rstd = 1 / sqrt(running_var + eps)
    dx = dy w rstd

The running statistics are updated by `track`, and by nothing else:

    running_mean = (1 - momentum) running_mean + momentum mean(x)
    running_var  = (1 - momentum) running_var  + momentum n / (n - 1) var(x)

with the unbiased variance, as in torch, though y has the biased one. Without momentum they are the average over all
batches that were tracked: momentum is then 1 / batches.

A group of ranks splits the batch, equally or not: synchronized batch normalization. Counts, means and centred squares
travel in one gather and are merged, see `npnorm.norms.statistics`; backward dw and db are one sum, and are complete.
"""

from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module, dtype_name, from_numpy, sqrt, to_numpy
from npnorm.axes import Batch
from npnorm.blocked import Rows
from npnorm.checks import check_channels, check_saved, check_settings, is_count, is_number
from npnorm.group import SOLO, Group, Solo, errors_on_all_ranks
from npnorm.norms.statistics import affine, centre, centred, difference, refine


class Saved(NamedTuple):
    """What backward, and `track`, need of forward; the statistics are one number for each channel."""

    x: Array
    mean: Array
    rest: Array  # what rounding had left of the mean
    var: Array
    n: Array  # elements of the channel, over all ranks
    rstd: Array
    scale: Array | None  # the exponent of two a row was divided by, where its squares leave the range


class SavedInference(NamedTuple):
    """What backward needs of inference: the statistics are constants."""

    x: Array
    mean: Array
    rstd: Array


class BatchNorm:
    """Give each channel mean 0 and variance 1 over the batch and all space.

    Parameters
    ----------
    weight : array of shape (channels,), or None
        The gain w; None leaves it out. On a group, the same on every rank.
    bias : array of shape (channels,), or None
        The shift b; None leaves it out.
    eps : float
        Added to the variance (that of n, not n - 1); in units of x squared.
    momentum : float or None
        The share of the newest batch in the running statistics; None: the average over all batches.
    running_mean, running_var : arrays of shape (channels,), or None
        Where the running statistics start; None: at 0 and 1. The norm keeps a copy.
    batches : int
        How many batches the running statistics have seen.
    group : Group
        The ranks over which the batch is split, equally or not; a rank may have none of it. Communicated: forward one
        gather of four numbers for each channel; backward one sum of two.
    compute : "float64", "float32" or None
        The working precision: float64 (None), or float32, which is faster and less exact: see docs/precision.md.

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
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        self.params = {name: a for name, a in (("weight", weight), ("bias", bias)) if a is not None}
        self.shards: dict[str, int | None] = dict.fromkeys(self.params)  # replicated
        running = {"running_mean": running_mean, "running_var": running_var}
        arrays = self.params | {name: a for name, a in running.items() if a is not None}
        check_settings(
            "BatchNorm",
            arrays,
            eps,
            group,
            "(channels,)",
            replicated=arrays,
            momentum=momentum,
            batches=batches,
            compute=compute,
        )
        self.axes = Batch("BatchNorm", group)
        self.rows = Rows(self.axes, eps, compute)
        self.eps = float(eps)
        with errors_on_all_ranks(group):
            if momentum is not None and not (is_number(momentum) and 0 <= momentum <= 1):
                raise ValueError(f"BatchNorm: momentum is {momentum!r}. It must be a number from 0 to 1, or None.")
            if (running_mean is None) != (running_var is None):
                raise ValueError("BatchNorm: running_mean and running_var come together, or not at all.")
            for name, array in running.items():
                if array is not None and not np.all(np.isfinite(to_numpy(array))):
                    raise ValueError(f"BatchNorm: {name} has a NaN or infinity. Start from finite numbers.")
            if running_var is not None and not np.all(to_numpy(running_var) >= 0):
                raise ValueError("BatchNorm: running_var has a negative number. A variance is 0 or greater.")
            if batches != 0 and not is_count(batches):
                raise ValueError(f"BatchNorm: batches is {batches!r}. It must be an integer, 0 or greater.")
        self.momentum, self.batches = momentum, int(batches)
        self.running_mean = None if running_mean is None else SOLO.shard(running_mean, None)
        self.running_var = None if running_var is None else SOLO.shard(running_var, None)
        if running_mean is None and self.params:
            param = next(iter(self.params.values()))
            self.running_mean = from_numpy(np.zeros(param.shape), param)
            self.running_var = from_numpy(np.ones(param.shape), param)

    @classmethod
    def init(cls, channels: int, dtype: str = "float32", **settings: Any) -> "BatchNorm":
        """Return the norm with a weight of ones and a bias of zeros."""
        return cls(np.ones(channels, dtype), np.zeros(channels, dtype), **settings)

    def forward(self, x: Array, out: Array | None = None) -> tuple[Array, Saved]:
        """Return y, of the shape and dtype of x: (N, C, ...), and what backward needs: training; y goes to `out`."""
        self._check(x=x)
        axes = self.axes

        def formula(x: Array, w: Array, b: Array, eps: Array) -> tuple[Array, tuple[Array, ...]]:
            c, mean, rest, var, n = centre(axes, x, "gathered", eps)
            rstd = 1 / sqrt(var + eps)
            z = c * rstd
            y = affine(z, w, b)
            return y, (mean, rest, var, array_module(x).zeros_like(abs(var)) + n, rstd)

        y, (mean, rest, var, n, rstd), scale = self.rows.forward(formula, x, self.params, out=out)
        counted = int(to_numpy(abs(n)).max())
        if counted < 2:
            raise ValueError(
                f"BatchNorm: elements in a channel of x over all ranks: {counted}. Its variance says nothing. "
                "Train with at least two, or call inference."
            )
        return y, Saved(x, mean, rest, var, n, rstd, scale)

    def inference(self, x: Array, out: Array | None = None) -> tuple[Array, SavedInference]:
        """Return y by the running statistics, and what backward needs; nothing is communicated; y goes to `out`."""
        self._check(x=x)
        with errors_on_all_ranks(self.axes.group):
            if self.running_mean is None or self.running_var is None:
                raise ValueError(
                    "BatchNorm: inference needs running statistics, and none are known. Track a batch first: "
                    "norm.track(saved), or pass running_mean and running_var."
                )
        xp = array_module(x)
        mean, var = (xp.astype(a, xp.float64)[:, None, None] for a in (self.running_mean, self.running_var))
        if not bool(xp.all(var + self.eps > 0)):
            raise ValueError("BatchNorm: running_var + eps is 0 in some channel. Take an eps above 0 for inference.")
        rstd = 1 / sqrt(var + self.eps)

        def formula(x: Array, w: Array, b: Array, mean: Array, rstd: Array, eps: Array) -> tuple[Array, tuple[()]]:
            z = difference(x, mean) * rstd
            y = affine(z, w, b)
            return y, ()

        y, _, _ = self.rows.forward(formula, x, self.params, constants=(mean, rstd), out=out)
        return y, SavedInference(x, mean, rstd)

    def backward(
        self, dy: Array, saved: Saved | SavedInference, out: Array | None = None
    ) -> tuple[Array, dict[str, Array]]:
        """Return dx, of the shape and dtype of x, and the complete gradients of the parameters; dx goes to `out`."""
        if isinstance(saved, SavedInference):
            return self._backward_inference(dy, saved, out)
        check_saved("BatchNorm", saved, Saved, self.axes.group)
        self._check(dy=dy, x=saved.x)
        axes = self.axes

        def formula(
            dy: Array, x: Array, w: Array, mean: Array, rest: Array, n: Array, rstd: Array, eps: Array
        ) -> tuple[Array, dict[str, Array]]:
            c = centred(x, mean, rest)
            z = c * rstd
            alone = isinstance(axes.group, Solo)  # see times_z
            db, dw = axes.sum(dy, dy * c if alone else dy * z)
            dw = dw * rstd if alone else dw
            d = dy - db / n - z * (dw / n)
            dx = affine(rstd * refine(axes, d, (dy, None), x, eps * rstd * rstd, (mean, rest)), w)
            return dx, {"weight": dw, "bias": db}

        statistics = (saved.mean, saved.rest, saved.n, saved.rstd)
        return self.rows.backward(formula, dy, saved.x, self.params, statistics, saved.scale, out=out)

    def _backward_inference(
        self, dy: Array, saved: SavedInference, out: Array | None
    ) -> tuple[Array, dict[str, Array]]:
        self._check(dy=dy, x=saved.x)
        axes, params = self.axes, self.params

        def formula(
            dy: Array, x: Array, w: Array, mean: Array, rstd: Array, eps: Array
        ) -> tuple[Array, dict[str, Array]]:
            z = difference(x, mean) * rstd
            db, dw = axes.sum(dy, dy * z) if params else (dy, dy)
            return affine(dy * rstd, w), {"weight": dw, "bias": db}

        return self.rows.backward(formula, dy, saved.x, self.params, (saved.mean, saved.rstd), None, out=out)

    def track(self, saved: Saved) -> None:
        """Update the running statistics by those of a forward in training: the only mutation.

        Raises
        ------
        ValueError
            If the batch had a NaN or infinity; the running statistics stay as they were.
        """
        check_saved("BatchNorm", saved, Saved, self.axes.group)
        self._check(x=saved.x)
        xp = array_module(saved.mean)
        mean, var, n = saved.mean + saved.rest, saved.var, saved.n
        like = mean[:, 0, 0]
        old_mean = xp.zeros_like(like) if self.running_mean is None else self.running_mean
        old_var = xp.ones_like(like) if self.running_var is None else self.running_var
        batches = self.batches + 1
        momentum = 1 / batches if self.momentum is None else self.momentum
        with np.errstate(all="ignore"):
            if saved.scale is not None:
                half = 2.0 ** (saved.scale / 2)  # 2^scale and 4^scale themselves may be out of range
                mean, var = mean * half * half, var * half * half * half * half
            unbiased = var * (n / (n - 1))
            new_mean, new_var = (
                xp.astype((1 - momentum) * xp.astype(old, new.dtype) + momentum * new[:, 0, 0], old.dtype)
                for old, new in ((old_mean, mean), (old_var, unbiased))
            )
        if not (bool(xp.all(xp.isfinite(new_mean))) and bool(xp.all(xp.isfinite(new_var)))):
            raise ValueError(
                f"BatchNorm: statistics of this batch are not finite in {dtype_name(old_var)}; "
                "the running statistics stay as they were. Look for a NaN, an infinity or huge numbers in x."
            )
        self.running_mean, self.running_var, self.batches = new_mean, new_var, batches

    def _check(self, **arrays: Array) -> None:
        known = self.params or ({} if self.running_mean is None else {"running_mean": self.running_mean})
        check_channels("BatchNorm", known, self.axes.group, **arrays)
