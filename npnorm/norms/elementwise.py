"""What DyT and Derf share: parameters, checks, and a gradient that the ranks of a group add. No mathematics."""

from typing import Any, NamedTuple

from npnorm import checks, engine
from npnorm.arrays import Array, round_to
from npnorm.norms.norm import Norm
from npnorm.norms.options import AnyArray, Common, Fixed


class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array


def shapes(*numbers: str) -> dict[str, str]:
    """Return what the shapes of the parameters should be: of these numbers, a weight and a bias."""
    return dict.fromkeys(numbers, checks.NUMBER) | dict.fromkeys(("weight", "bias"), "(features,)")


class Elementwise(Norm):
    """A layer y = z w + b, where z is a function of each element by itself, and of a few numbers for all of them.

    Parameters
    ----------
    numbers : dict of arrays of shape () or (1,)
        The parameters that all elements share. On a group, the same on every rank.
    weight, bias : arrays of the shape of the features, or None
        w and b; None leaves it out. On a group, this rank's shard of the last axis.
    settings : group, compute
        As for every `FeatureNorm`.
    """

    formula: engine.Formula
    axes: Fixed[int]
    numbers: Fixed[tuple[str, ...]]

    def __init__(
        self,
        numbers: dict[str, Array],
        weight: Array | None,
        bias: Array | None,
        settings: Common,
    ) -> None:
        layer, group = type(self).__name__, self._set_common(settings)
        affine = {name: a for name, a in (("weight", weight), ("bias", bias)) if a is not None}
        self.params = numbers | affine
        checks.check_settings(layer, self.params, 0, group, self._shapes, replicated=numbers, compute=self.compute)
        axes = max((a.ndim for a in affine.values()), default=1)
        rows = engine.Rows(engine.Features(layer, group, axes), self.formula, 0, self.compute)
        shards = dict.fromkeys(numbers) | dict.fromkeys(affine, self._axis(axes - 1))
        self._set(axes=axes, numbers=tuple(numbers), shards=shards, rows=rows)

    def forward(self, x: AnyArray, *, out: Array | None = None) -> tuple[AnyArray, Saved]:
        """Return y, of the shape and dtype of x: (..., features), and what backward needs; y is written to `out`."""
        y, _, _ = self.rows.forward(x, self.params, out=out, check=self._check)
        return y, Saved(x)

    def backward(self, dy: AnyArray, saved: Saved, *, out: Array | None = None) -> tuple[AnyArray, dict[str, Any]]:
        """Return dx, of the shape and dtype of x, and the complete gradients of the parameters; dx goes to `out`."""
        layer, params = type(self).__name__, self.params
        checks.check_saved(layer, saved, Saved, self.group)
        dx, grads = self.rows.backward(dy, saved.x, params, (), None, rounded=False, out=out, check=self._check)
        label = checks.message_label(f"the gradients of {', '.join(self.numbers)} of {layer}", dy=dy, x=saved.x)
        total = self.group.sum(*(grads[name] for name in self.numbers), label=label)
        grads |= zip(self.numbers, total if len(self.numbers) > 1 else [total], strict=True)
        return dx, {name: round_to(grads[name], param.dtype) for name, param in params.items()}

    def _check(self, **arrays: Array) -> None:
        checks.check_features(type(self).__name__, self.params, self._shapes, self.axes, self.group, **arrays)
