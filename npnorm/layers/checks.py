"""What every layer asks of its input, in one step, since a model asks it hundreds of times."""

import numpy as np

from npnorm.arrays import Array
from npnorm.layer import Tree, check_dtype, check_features, check_module, leaves

FLOATS = (np.dtype("float32"), np.dtype("float64"))


def check_input(layer: str, x: Array, params: Tree, width: int) -> None:
    """Raise one clear error unless `x` has `width` features last, and the module, device and dtype of the parameters.

    The usual case, plain NumPy arrays of one dtype, is told by comparisons that take no time.
    """
    usual = type(x) is np.ndarray and x.dtype in FLOATS and x.ndim > 0 and x.shape[-1] == width
    if usual and all(type(a) is np.ndarray and a.dtype == x.dtype for _, a in leaves(params)):
        return
    check_module(layer, x, params)
    check_features(layer, x, width)
    check_dtype(layer, x, params)
