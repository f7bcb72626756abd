"""The running statistics of batch normalization: where they start, how they are updated, what inference takes."""

from typing import Any, NoReturn, Self, Unpack

import numpy as np
from numpy.typing import DTypeLike

from npnorm import checks
from npnorm.arrays import Array, array_module, from_numpy
from npnorm.engine import Batch, Formula, Rows
from npnorm.group import SOLO
from npnorm.norms.norm import ChannelNorm, Saved
from npnorm.norms.options import AnyArray, Common, Fixed, OfBatches

RUNNING = ("running_mean", "running_var", "batches")
"""What `track` changes."""


class RunningNorm(ChannelNorm[Saved]):
    """A norm of channels over the batch, which keeps running statistics.

    Attributes
    ----------
    running_mean, running_var : arrays of shape (channels,), or None
    batches : int
        How many batches they have seen.
    """

    by_running_statistics: Formula
    fixed: Rows
    momentum: Fixed[float | None]
    running_mean: Fixed[Array | None]
    running_var: Fixed[Array | None]
    batches: Fixed[int]

    def __init__(
        self,
        weight: Array | None,
        bias: Array | None,
        eps: float,
        momentum: float | None,
        running_mean: Array | None,
        running_var: Array | None,
        batches: int,
        settings: Common,
    ) -> None:
        layer, running = type(self).__name__, {"running_mean": running_mean, "running_var": running_var}
        given = {name: a for name, a in running.items() if a is not None}
        group = self._set_channels(weight, bias, eps, settings, given, momentum=momentum, batches=batches)
        checks.check_running(layer, running, momentum, batches, group)
        layout = Batch(layer, group)
        self._set(
            rows=Rows(layout, self.formula, eps, self.compute, form="gathered"), momentum=momentum, batches=int(batches)
        )
        self._set(fixed=Rows(layout, self.by_running_statistics, eps, self.compute))
        self._set(running_mean=self._start(running_mean, 0.0), running_var=self._start(running_var, 1.0))

    def _refuse(self, name: str) -> NoReturn:
        if name in RUNNING:
            raise AttributeError(
                f"{type(self).__name__}: {name} changes by track alone. "
                f"Pass {', '.join(f'{given}=' for given in RUNNING)} to the {type(self).__name__} that you make."
            )
        super()._refuse(name)

    @classmethod
    def init(cls, channels: int, dtype: DTypeLike = "float32", **settings: Unpack[OfBatches]) -> Self:
        """Return the norm with a weight of ones and a bias of zeros; settings: those of the constructor."""
        return cls._init(channels, dtype, settings)

    def forward(self, x: AnyArray, *, out: Array | None = None) -> tuple[AnyArray, Saved]:
        """Return y, of the shape and dtype of x: (N, C, ...), and what backward needs: training; y goes to `out`."""
        y, saved = super().forward(x, out=out)
        of_batch: Any = saved
        checks.check_counted(type(self).__name__, of_batch.n)
        return y, saved

    def _start(self, given: Array | None, number: float) -> Array | None:
        """Return a copy of what is given, or the number for each channel, if the parameters tell how many there are."""
        if given is not None:
            return SOLO.shard(given, None)
        like = next(iter(self.params.values()), None)
        return None if like is None else from_numpy(np.full(like.shape, number), like)

    def known(self) -> tuple[Array, Array]:
        """Return mean and variance in float64, of shape (channels, 1, 1)."""
        mean: Any = self.running_mean
        var: Any = self.running_var
        checks.check_known(type(self).__name__, mean, var, self.eps, self.group)
        xp: Any = array_module(mean)
        return xp.astype(mean, xp.float64)[:, None, None], xp.astype(var, xp.float64)[:, None, None]

    def update(self, mean: Array, var: Array, exponent: Array | None) -> None:
        """Take in the mean and unbiased variance, of shape (channels, 1, 1), of channels divided by 2^exponent."""
        xp, batches = array_module(mean), self.batches + 1
        momentum = 1 / batches if self.momentum is None else self.momentum
        with np.errstate(all="ignore"):
            if exponent is not None:
                half = 2.0 ** (exponent / 2)  # 2^exponent and 4^exponent themselves may be out of range
                mean, var = mean * half * half, var * half * half * half * half

            def updated(old: Array | None, start: float, new: Array) -> Array:
                old = xp.full_like(new, start) if old is None else old
                return xp.astype((1 - momentum) * xp.astype(old, new.dtype) + momentum * new, old.dtype)

            running_mean = updated(self.running_mean, 0.0, mean[:, 0, 0])
            running_var = updated(self.running_var, 1.0, var[:, 0, 0])
        checks.check_tracked(type(self).__name__, running_mean, running_var)
        self._set(running_mean=running_mean, running_var=running_var, batches=batches)

    def _check(self, **arrays: Array) -> None:
        running = {"running_mean": self.running_mean, "running_var": self.running_var}
        known = self.params | {name: a for name, a in running.items() if a is not None}
        shapes = self._shapes | dict.fromkeys(running, "(channels,)")
        checks.check_channels(type(self).__name__, known, shapes, self.group, **arrays)

    def _shown(self) -> dict[str, Any]:
        return {**super()._shown(), "momentum": self.momentum, "batches": self.batches}
