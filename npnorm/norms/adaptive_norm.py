"""Adaptive normalization: scale and shift come from a condition, for each sample its own.

William Peebles and Saining Xie, "Scalable Diffusion Models with Transformers" (DiT), ICCV 2023, arXiv:2212.09748:
adaLN. The condition's embedding is mapped by a linear layer to scale and shift; the norm itself has no parameters.

Forward, for each row x of sample i, with the scale s and the shift t of that sample:

    y = norm(x, 1 + s, t)                 LayerNorm or RMSNorm, with 1 + s for its weight and t for its bias

Backward, given dy, with norm' the backward pass of norm:

    dx, ds, dt = norm'(dy, x, 1 + s)      d(1 + s) = ds
    ds = sum over the rows of sample i    of dy z
    dt = sum over the rows of sample i    of dy

Where a group splits the features, scale and shift are this rank's shards; what is communicated is what the norm
communicates.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from npnorm import checks, engine
from npnorm.arrays import Array, with_article
from npnorm.group import errors_on_all_ranks
from npnorm.norms.layer_norm import LayerNorm
from npnorm.norms.norm import Norm
from npnorm.norms.rms_norm import RMSNorm


class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array
    scale: Array
    shift: Array
    statistics: tuple[Any, ...]  # what the norm saves, one number for each row
    exponent: Array | None  # rows whose squares overflow were divided by 2^exponent; None: there were none


def forward(norm: Callable[..., Any], row: engine.Row, x: Array, s: Array, t: Array) -> tuple[Array, tuple[Any, ...]]:
    """Return y, and the statistics to save."""
    y, statistics = norm(row, x, 1 + s, t)
    return y, statistics


def backward(
    norm: Callable[..., Any], row: engine.Row, dy: Array, x: Array, s: Array, *statistics: Any
) -> tuple[Array, ...]:
    """Return dx, and ds and dt before their sums over the rows of a sample."""
    dx, ds, dt = norm(row, dy, x, 1 + s, *statistics)
    return dx, ds, dt


class AdaptiveNorm(Norm):
    """Normalize, then scale and shift each sample by its condition: y = norm(x) (1 + scale) + shift.

    Parameters
    ----------
    norm : LayerNorm or RMSNorm
        Without weight and bias, over one axis. Its eps, statistics, group and compute are used.

    Examples
    --------
    >>> import numpy as np
    >>> from npnorm.norms import RMSNorm
    >>> norm = AdaptiveNorm(RMSNorm(eps=0))
    >>> x = np.array([[[1.0, 7.0]], [[1.0, 7.0]]])  # two samples, one position, two features
    >>> scale, shift = np.array([[0.0, 0.0], [9.0, 4.0]]), np.array([[0.0, 0.0], [1.0, 3.0]])
    >>> y, saved = norm.forward(x, scale, shift)
    >>> y
    array([[[ 0.2,  1.4]],
    <BLANKLINE>
           [[ 3. , 10. ]]])
    """

    norm: LayerNorm | RMSNorm
    formula: engine.Formula
    saved = Saved

    def __init__(self, norm: LayerNorm | RMSNorm) -> None:
        if not isinstance(norm, (LayerNorm, RMSNorm)):
            raise TypeError(f"AdaptiveNorm takes a LayerNorm or RMSNorm; got {with_article(norm)}.")
        _check_bare(norm)
        of_norm = norm.formula
        bound = partial(forward, of_norm.forward), partial(backward, of_norm.backward)
        formula = engine.Formula(*bound, Saved, params=("scale", "shift"), read=("scale",))
        self.params = {}
        self._set(norm=norm, group=norm.group, formula=formula, shards={})

    def forward(self, x: Array, scale: Array, shift: Array) -> tuple[Any, Saved]:
        """Return y of the shape and dtype of x, and what backward needs.

        Parameters
        ----------
        x : array of shape (samples, ..., features)
        scale, shift : arrays of shape (samples, features)
        """
        condition = {"scale": scale, "shift": shift}
        y, statistics, exponent = self._rows(condition, x=x).forward(x, condition)
        return y, Saved(x, scale, shift, statistics, exponent)

    def backward(self, dy: Array, saved: Saved) -> tuple[tuple[Any, Any, Any], dict[str, Any]]:
        """Return (dx, dscale, dshift), of the shapes and dtypes of x, scale and shift; there are no parameters."""
        checks.check_saved("AdaptiveNorm", saved, Saved, self.group)
        x, scale, shift, statistics, exponent = saved
        condition = {"scale": scale, "shift": shift}
        rows = self._rows(condition, dy=dy, x=x)
        with errors_on_all_ranks(self.group):
            if len(statistics) != len(self.norm.formula.saved._fields) - 2:  # x and the exponent are none
                raise ValueError(
                    f"AdaptiveNorm: saved has {len(statistics)} statistics, which is not what "
                    f"{type(self.norm).__name__} saves. Hand backward what this very norm saved."
                )
        dx, grads = rows.backward(dy, x, condition, statistics, exponent)
        return (dx, grads["scale"], grads["shift"]), {}

    def _rows(self, condition: dict[str, Array], **arrays: Array) -> engine.Rows:
        """Check the arrays; return their rows."""
        norm, x = self.norm, arrays["x"]
        checks.check_features("AdaptiveNorm", self.params, {}, 1, norm.group, norm.features, **arrays)
        with errors_on_all_ranks(norm.group):
            _check_bare(norm)
            for name, array in condition.items():
                checks.check_module("AdaptiveNorm", array, {"x": x}, name)
                checks.check_float("AdaptiveNorm", name, array)
                if x.ndim < 2 or tuple(array.shape) != (x.shape[0], x.shape[-1]):
                    raise ValueError(
                        f"AdaptiveNorm: x has shape {tuple(x.shape)}, {name} {tuple(array.shape)}. "
                        "They take (samples, ..., features) and (samples, features)."
                    )
        layout = engine.Samples("AdaptiveNorm", norm.group, x)
        return engine.Rows(layout, self.formula, norm.eps, norm.compute, form=getattr(norm, "statistics", "two-pass"))

    def _shown(self) -> dict[str, Any]:
        return {"norm": self.norm}


def _check_bare(norm: LayerNorm | RMSNorm) -> None:
    """Raise unless the norm has no parameters, and one axis."""
    if norm.params or norm.axes != 1:
        raise ValueError(
            f"AdaptiveNorm takes a norm without weight and bias, over one axis; this one has {list(norm.params)} "
            f"and {norm.axes} axes. The scale and shift of a sample stand for weight and bias."
        )
