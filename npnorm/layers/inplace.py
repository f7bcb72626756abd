"""How the formulas of the layers are driven on NumPy: in place, and in blocks that stay in cache. No mathematics.

An array that a layer has just made may be written over; one that came in, or is saved, may not. On other array modules
each function here is the plain operation: on a GPU a block would be a launch, and memory is not the limit.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from npnorm.arrays import Array, array_module, from_numpy
from npnorm.threads import parallel_for

BLOCK = 1 << 17
"""Elements of one operand in a block: with fewer the calls cost time, with more the arrays of a formula leave cache."""


def exp(x: Array) -> Array:
    """Return the exponential; NumPy writes it over `x`, which spares an array that would have to be fetched."""
    return np.exp(x, out=x) if isinstance(x, np.ndarray) else array_module(x).exp(x)


def tanh(x: Array) -> Array:
    """Return the hyperbolic tangent; NumPy writes it over `x`, as `exp` does."""
    return np.tanh(x, out=x) if isinstance(x, np.ndarray) else array_module(x).tanh(x)


def add_into(a: Array, b: Array) -> Array:
    """Return a + b; written over `a`, where `a` can hold it: a complex b, of the complex step, makes a new array."""
    if array_module(a).result_type(a, b) != a.dtype:
        return a + b
    a += b
    return a


def elementwise(formula: Callable[..., tuple[Array, ...]], *arrays: Any) -> tuple[Any, ...]:
    """Evaluate `formula(*arrays) -> tuple`, which treats each element by itself, on arrays of one shape.

    Examples
    --------
    >>> elementwise(lambda a, b: (a + b, a * b), np.ones(2), np.ones(2))
    (array([2., 2.]), array([1., 1.]))
    """
    first = arrays[0]
    if array_module(first) is not np or first.size <= BLOCK:
        return formula(*arrays)
    flat = [a.reshape(-1) for a in arrays]
    outs = tuple(np.empty(first.size, a.dtype) for a in formula(*(a[:1] for a in flat)))

    def write(*block: Array) -> None:
        for out, values in zip(block, formula(*block[len(outs) :]), strict=False):
            out[...] = values

    in_blocks(write, 1, *outs, *flat)
    return tuple(out.reshape(first.shape) for out in outs)


def in_blocks(work: Callable[..., None], size: int, *arrays: Array) -> None:
    """Call `work(*arrays)`, which treats each index of the first axis by itself and writes into some of the arrays.

    NumPy does so in blocks of that axis, over threads: what one operation of `work` writes, the next reads from cache.
    The blocks do not depend on the number of threads.

    Parameters
    ----------
    work : callable
    size : int
        The elements of the largest array that belongs to one index.
    arrays : arrays with the same first axis
    """
    count, step = arrays[0].shape[0], max(1, BLOCK // max(1, size))
    if array_module(arrays[0]) is not np or count <= step:
        work(*arrays)
    else:
        parallel_for(lambda i: work(*(a[i * step : (i + 1) * step] for a in arrays)), -(-count // step))


def sum_at(rows: Any, x: Any, count: int) -> Array:
    """Return, for each number below `count`, the sum of the rows of `x` where `rows` has it; others are passed over.

    `rows` is of one axis. The sum is the product with one-hot rows. NumPy sorts and adds instead: the one-hot rows are
    as large as the logits, and their product takes as long as the head's.
    """
    xp = array_module(x)
    if xp is np:
        inside = (rows >= 0) & (rows < count)
        if not inside.all():
            rows, x = rows[inside], x[inside]
        order = np.argsort(rows, kind="stable")
        present, starts = np.unique(rows[order], return_index=True)
        total = np.zeros((count, *x.shape[1:]), x.dtype)
        if present.size:
            total[present] = np.add.reduceat(x[order], starts, axis=0)
        return total
    onehot = rows[:, None] == from_numpy(np.arange(count), rows)
    return xp.astype(onehot, x.dtype).T @ x
