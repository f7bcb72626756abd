"""Norms folded into their neighbours: the same function with fewer operations.

The weight and bias of a norm go into the linear layer that reads its output:

    (z w + b) W^T + c = z (W diag(w))^T + (W b + c)

And a LayerNorm becomes an RMSNorm where the rows it reads have mean 0 by themselves: all layers that write to the
residual stream, the embedding among them, are centred once, in their parameters, and mean(x) is then 0 for every x.
Zixuan Jiang, Jiaqi Gu, Hanqing Zhu and David Z. Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers", NeurIPS 2023,
arXiv:2305.14858, section 3.
"""

from typing import Any

from npnorm import arrays, checks
from npnorm.arrays import Array
from npnorm.group import errors_on_all_ranks
from npnorm.norms.layer_norm import LayerNorm
from npnorm.norms.rms_norm import RMSNorm


def fold(norm: LayerNorm | RMSNorm, linear: Any) -> tuple[Any, Any]:
    """Return the norm without weight and bias, and a copy of the linear layer that has taken them in.

    Parameters
    ----------
    norm : LayerNorm or RMSNorm
        Over one axis.
    linear : Linear
        The layer that reads y: its inputs are the features of the norm. On a group that splits the inputs, a bias of
        the norm costs one sum, of W b.

    Returns
    -------
    norm : LayerNorm or RMSNorm
        With the same settings.
    linear : Linear
        Computed in float64, and rounded once to the dtype of the weight of `linear`.

    Examples
    --------
    >>> import numpy as np
    >>> from npnorm.layers import Linear
    >>> norm = LayerNorm(np.array([2.0, 0.5]), np.array([1.0, -1.0]))
    >>> bare, linear = fold(norm, Linear(np.array([[1.0, 2.0], [3.0, 4.0]])))
    >>> bare.params, linear.params["weight"], linear.params["bias"]
    ({}, array([[2., 1.],
           [6., 2.]]), array([-1., -1.]))
    """
    if not isinstance(norm, (LayerNorm, RMSNorm)):
        raise TypeError(f"fold takes a LayerNorm or RMSNorm; got {arrays.with_article(norm)}.")
    if not isinstance(getattr(linear, "params", None), dict) or "weight" not in linear.params:
        got = arrays.with_article(linear)
        raise TypeError(f"fold takes a Linear after the norm; got {got}. Make one: npnorm.layers.Linear(weight, bias).")
    matrix, bias = linear.params["weight"], linear.params.get("bias")
    with errors_on_all_ranks(linear.group):
        checks.check_module("fold", matrix, norm.params)
        if norm.axes != 1:
            raise ValueError(
                f"fold: the norm is over {norm.axes} axes, and a linear layer reads one. Leave them apart."
            )
        for name, array in norm.params.items():
            if tuple(array.shape) != tuple(matrix.shape[1:]):
                raise ValueError(
                    f"fold: {name} of the norm has shape {tuple(array.shape)}, the matrix {tuple(matrix.shape)}. "
                    "The linear layer must read the output of the norm: its inputs are the norm's features."
                )
    xp, dtype = arrays.array_module(matrix), arrays.widest(matrix)
    product = xp.astype(matrix, getattr(xp, dtype))
    if "bias" in norm.params:
        shift = linear.group.sum(product @ xp.astype(norm.params["bias"], getattr(xp, dtype)), label="fold")
        shift = shift if bias is None else shift + xp.astype(bias, getattr(xp, dtype))
        bias = arrays.round_to(shift, matrix.dtype)
    if "weight" in norm.params:
        product = product * xp.astype(norm.rows.with_offset(norm.params["weight"]), getattr(xp, dtype))
    settings: Any = {"eps": norm.eps, "group": norm.group, "compute": norm.compute}
    if isinstance(norm, LayerNorm):
        settings["statistics"] = norm.statistics
    return type(norm)(**settings), type(linear)(arrays.round_to(product, matrix.dtype), bias, group=linear.group)


def to_rms_norm(norm: LayerNorm) -> RMSNorm:
    """Return the RMSNorm that equals a LayerNorm on rows with mean 0: see `centre_outputs`.

    Examples
    --------
    >>> import numpy as np
    >>> to_rms_norm(LayerNorm(np.ones(4), np.zeros(4), eps=0.5))
    RMSNorm(weight=(4,) float64, bias=(4,) float64, eps=0.5)
    """
    settings: Any = {"group": norm.group, "compute": norm.compute}
    shape = {"axes": norm.axes} if norm.features is None else {"features": norm.features}
    return RMSNorm(**norm.params, eps=norm.eps, **shape, **settings)


def centre_outputs(params: dict[str, Array], axis: int = 0) -> dict[str, Array]:
    """Return the parameters of a layer that writes to the residual stream so that its rows have mean 0.

    Parameters
    ----------
    params : dict of whole arrays
        Of a linear layer, with the outputs along axis 0 of weight and bias; or of an embedding, with axis=1.
    axis : int
        The axis along which the features of the residual stream lie.

    Examples
    --------
    >>> import numpy as np
    >>> centre_outputs({"weight": np.array([[1.0, 5.0], [3.0, 1.0]]), "bias": np.array([4.0, 0.0])})["weight"]
    array([[-1.,  2.],
           [ 1., -2.]])
    """
    centred = {}
    for name, array in params.items():
        checks.check_float("centre_outputs", name, array)
        xp = arrays.array_module(array)
        wide = xp.astype(array, getattr(xp, arrays.widest(array)))
        mean = xp.mean(wide, axis=min(axis, array.ndim - 1), keepdims=True)
        centred[name] = arrays.round_to(wide - mean, array.dtype)
    return centred
