"""Norms folded into their neighbours: the same function with fewer operations.

The weight and bias of a norm go into the linear layer that reads its output:

    (z w + b) W^T + c = z (W diag(w))^T + (W b + c)

And a LayerNorm becomes an RMSNorm where the rows it reads have mean 0 by themselves: all layers that write to the
residual stream, the embedding among them, are centred once, in their parameters, and mean(x) is then 0 for every x.
Zixuan Jiang, Jiaqi Gu, Hanqing Zhu and David Z. Pan, "Pre-RMSNorm and Pre-CRMSNorm Transformers", NeurIPS 2023,
arXiv:2305.14858, section 3.
"""

from typing import Any

from npnorm.arrays import Array, array_module, round_to, widest
from npnorm.checks import check_float, check_module
from npnorm.group import errors_on_all_ranks


def fold_into(params: dict[str, Array], linear: Any, axes: int = 1) -> Any:
    """Return a copy of `linear` that has taken in the weight and bias of the norm before it.

    Parameters
    ----------
    params : dict
        "weight" and "bias" of the norm, of shape (inputs,), or none of them. On a group that splits the inputs, shards.
    linear : Linear
        With a weight of shape (outputs, inputs). On a group that splits the inputs, this costs one sum, of W b.

    axes : int
        The trailing axes of the norm; a linear layer reads one.

    Returns
    -------
    linear : Linear
        Computed in float64, and rounded once to the dtype of the weight of `linear`.
    """
    matrix, bias = linear.params["weight"], linear.params.get("bias")
    with errors_on_all_ranks(linear.group):
        check_module("fold_into", matrix, params)
        if axes != 1:
            raise ValueError(
                f"fold_into: the norm is over {axes} axes, and a linear layer reads one. Leave them apart."
            )
        for name, array in params.items():
            if tuple(array.shape) != tuple(matrix.shape[1:]):
                raise ValueError(
                    f"fold_into: {name} of the norm has shape {tuple(array.shape)}, the matrix {tuple(matrix.shape)}. "
                    "The linear layer must read the output of the norm: its inputs are the norm's features."
                )
    xp = array_module(matrix)
    wide = getattr(xp, widest(matrix))
    w, b = (xp.astype(params[name], wide) if name in params else None for name in ("weight", "bias"))
    product = xp.astype(matrix, wide)
    if b is not None:
        shift = linear.group.sum(product @ b, label="fold_into")
        bias = round_to(shift if bias is None else shift + xp.astype(bias, wide), matrix.dtype)
    if w is not None:
        product = product * w
    return type(linear)(round_to(product, matrix.dtype), bias, group=linear.group)


def centre_writer(params: dict[str, Array], axis: int = 0) -> dict[str, Array]:
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
    >>> centre_writer({"weight": np.array([[1.0, 5.0], [3.0, 1.0]]), "bias": np.array([4.0, 0.0])})["weight"]
    array([[-1.,  2.],
           [ 1., -2.]])
    """
    centred = {}
    for name, array in params.items():
        check_float("centre_writer", name, array)
        xp = array_module(array)
        wide = xp.astype(array, getattr(xp, widest(array)))
        mean = xp.mean(wide, axis=min(axis, array.ndim - 1), keepdims=True)
        centred[name] = round_to(wide - mean, array.dtype)
    return centred
