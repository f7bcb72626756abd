"""What DyT and Derf share: a squashing function of alpha x + s, element by element, in place of a norm."""

from typing import Any, NamedTuple

from npnorm.arrays import Array, round_to
from npnorm.axes import Features
from npnorm.blocked import Rows
from npnorm.checks import check_features, check_place, check_saved, check_settings
from npnorm.group import SOLO, Group, Solo
from npnorm.norms.statistics import affine


class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array


class Elementwise:
    """A layer y = squash(alpha x + s) w + b; the scalars are alpha and, where there is one, the shift s."""

    layer: str
    squash: Any
    slope: Any

    def __init__(
        self,
        scalars: dict[str, Array],
        weight: Array | None = None,
        bias: Array | None = None,
        group: Group = SOLO,
        compute: str | None = None,
    ) -> None:
        self.affine = {name: a for name, a in (("weight", weight), ("bias", bias)) if a is not None}
        self.scalars = scalars
        self.params = scalars | self.affine
        for name, scalar in scalars.items():
            check_settings(self.layer, {name: scalar}, 0, group, "() or (1,)", replicated=[name])
        check_settings(self.layer, self.affine, 0, group, compute=compute)
        self.axes = Features(self.layer, group, max((a.ndim for a in self.affine.values()), default=1))
        split = None if isinstance(group, Solo) else self.axes.count - 1
        self.shards = dict.fromkeys(scalars) | dict.fromkeys(self.affine, split)
        self.rows = Rows(self.axes, 0, compute)

    def forward(self, x: Array, out: Array | None = None) -> tuple[Array, Saved]:
        """Return y, of the shape and dtype of x: (..., features), and what backward needs; y is written to `out`."""
        self._check(x=x)

        def formula(x: Array, w: Array, b: Array, alpha: Array, *more: Array) -> tuple[Array, tuple[()]]:
            *shift, _ = more
            z = self.squash(alpha * x + (shift[0] if shift else 0))
            y = affine(z, w, b)
            return y, ()

        y, _, _ = self.rows.forward(formula, x, self.params, out=out)
        return y, Saved(x)

    def backward(self, dy: Array, saved: Saved, out: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """Return dx, of the shape and dtype of x, and the complete gradients of the parameters; dx goes to `out`."""
        check_saved(self.layer, saved, Saved, self.axes.group)
        self._check(dy=dy, x=saved.x)
        held_sum = self.axes.held_sum

        def formula(dy: Array, x: Array, w: Array, alpha: Array, *more: Array) -> tuple[Array, dict[str, Array]]:
            *shift, _ = more
            u = alpha * x + (shift[0] if shift else 0)
            z = self.squash(u)
            dz = affine(dy, w)
            du = dz * self.slope(u, z)
            dx = alpha * du
            return dx, {"weight": dy * z, "bias": dy, "alpha": held_sum(x * du), "shift": held_sum(du)}

        widened = self.params | {name: self.rows.widened(a) for name, a in self.scalars.items()}
        dx, grads = self.rows.backward(formula, dy, saved.x, widened, (), None, out=out)
        mine = [grads[name] for name in self.scalars]
        sums = self.axes.group.sum(*mine, label=f"the gradients of {', '.join(self.scalars)} of {self.layer}")
        for (name, a), total in zip(self.scalars.items(), sums if len(mine) > 1 else [sums], strict=True):
            grads[name] = round_to(total, a.dtype)
        return dx, {name: grads[name] for name in self.params}

    def _check(self, **arrays: Array) -> None:
        check_place(self.layer, self.params, self.axes.group, **arrays)
        check_features(self.layer, self.affine, self.axes.count, self.axes.group, **arrays)
