"""Adaptive normalization: scale and shift come from a condition, for each sample its own.

William Peebles and Saining Xie, "Scalable Diffusion Models with Transformers" (DiT), ICCV 2023, arXiv:2212.09748:
adaLN. The condition's embedding is mapped by a linear layer to scale and shift; the norm itself has no
parameters.

Forward, for each row x of sample i, with the scale s and the shift t of that sample:

    z = norm(x)                           LayerNorm or RMSNorm without weight and bias
    y = z (1 + s) + t

Backward, given dy:

    dz = dy (1 + s)
    dx = norm'(dz)
    ds = sum over the rows of sample i of dy z
    dt = sum over the rows of sample i of dy

Split over the ranks of a group, scale and shift are this rank's shards; what is communicated is what the norm
communicates.
"""

from typing import Any, NamedTuple

from npnorm.arrays import Array, with_article
from npnorm.axes import Samples
from npnorm.blocked import Rows
from npnorm.checks import check_features, check_float, check_module, check_saved
from npnorm.group import errors_on_all_ranks
from npnorm.norms import layer_norm, rms_norm


class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array
    condition: dict[str, Array]  # the scale is the weight, the shift the bias
    statistics: tuple[Array, ...]  # what the norm saves, one number for each row, of the scaled rows
    scale: Array | None  # the exponent of two a row was divided by, where its squares leave the range


class AdaptiveNorm:
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

    def __init__(self, norm: layer_norm.LayerNorm | rms_norm.RMSNorm) -> None:
        if not isinstance(norm, (layer_norm.LayerNorm, rms_norm.RMSNorm)):
            raise TypeError(f"AdaptiveNorm takes a LayerNorm or RMSNorm; got {with_article(norm)}.")
        if norm.params or norm.axes.count != 1:
            raise ValueError(
                f"AdaptiveNorm takes a norm without weight and bias, over one axis; this one has {list(norm.params)} "
                f"and {norm.axes.count} axes. The scale and shift of a sample stand for weight and bias."
            )
        self.norm = norm
        self.params: dict[str, Array] = {}
        self.shards: dict[str, int | None] = {}

    def forward(self, x: Array, scale: Array, shift: Array) -> tuple[Array, Saved]:
        """Return y of the shape and dtype of x, and what backward needs.

        Parameters
        ----------
        x : array of shape (samples, ..., features)
        scale, shift : arrays of shape (samples, features)
        """
        condition = {"weight": scale, "bias": shift}
        rows = self._rows(condition, x=x)
        norm, axes = self.norm, rows.axes

        def formula(x_: Array, w: Array, b: Array, eps: Array) -> tuple[Array, tuple[Array, ...]]:
            if isinstance(norm, layer_norm.LayerNorm):
                return layer_norm.normalize(axes, norm.statistics, x_, 1 + w, b, eps)
            return rms_norm.normalize(axes, norm.gain, x, x_, 1 + w, b, eps)

        y, statistics, exponents = rows.forward(formula, x, condition)
        return y, Saved(x, condition, statistics, exponents)

    def backward(self, dy: Array, saved: Saved) -> tuple[tuple[Array, Array, Array], dict[str, Any]]:
        """Return (dx, dscale, dshift), of the shapes and dtypes of x, scale and shift; there are no parameters."""
        check_saved("AdaptiveNorm", saved, Saved, self.norm.axes.group)
        x, condition, statistics, exponents = saved
        rows = self._rows(condition, dy=dy, x=x)
        norm, axes = self.norm, rows.axes
        centred = isinstance(norm, layer_norm.LayerNorm)
        with errors_on_all_ranks(axes.group):
            if len(statistics) != (3 if centred else 1):
                raise ValueError(
                    f"AdaptiveNorm: saved has {len(statistics)} statistics, which is not what {type(norm).__name__} "
                    "saves. Hand backward what this very norm saved."
                )

        def formula(dy: Array, x_: Array, w: Array, *rest: Array) -> tuple[Array, dict[str, Array]]:
            if isinstance(norm, layer_norm.LayerNorm):
                return layer_norm.normalize_backward(axes, dy, x_, 1 + w, *rest)
            return rms_norm.normalize_backward(axes, norm.gain, x, dy, x_, 1 + w, *rest)

        dx, grads = rows.backward(formula, dy, x, condition, statistics, exponents)
        return (dx, grads["weight"], grads["bias"]), {}

    def _rows(self, condition: dict[str, Array], **arrays: Array) -> Rows:
        group, x = self.norm.axes.group, arrays["x"]
        check_features("AdaptiveNorm", {}, 1, group, **arrays)
        with errors_on_all_ranks(group):
            expected = (x.shape[0], x.shape[-1])
            for name, array in zip(("scale", "shift"), condition.values(), strict=True):
                check_module("AdaptiveNorm", array, {"x": x})
                check_float("AdaptiveNorm", name, array)
                if x.ndim < 2 or tuple(array.shape) != expected:
                    raise ValueError(
                        f"AdaptiveNorm: x has shape {tuple(x.shape)}, {name} {tuple(array.shape)}. "
                        "They take (samples, ..., features) and (samples, features)."
                    )
        return Rows(Samples("AdaptiveNorm", group, x), self.norm.rows.eps, self.norm.rows.compute)
