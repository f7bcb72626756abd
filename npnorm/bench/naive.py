"""The textbook in NumPy and in float32: what is written first. Whole arrays, one thread."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npnorm.bench.grid import EPS, GROUPS

Saved = tuple[np.ndarray, ...]
Forward = Callable[[np.ndarray], tuple[np.ndarray, Saved]]
Backward = Callable[[np.ndarray, Saved], tuple[np.ndarray, ...]]


def naive(norm: str, w: np.ndarray, b: np.ndarray) -> tuple[Forward, Backward]:
    """Return forward(x) -> y, saved and backward(dy, saved) -> dx, dw, db of a norm; RMSNorm has no bias.

    Examples
    --------
    >>> w, b = np.ones(2, "float32"), np.zeros(2, "float32")
    >>> forward, backward = naive("LayerNorm", w, b)
    >>> y, saved = forward(np.array([[1, 3]], "float32"))
    >>> y.round(3)
    array([[-1.,  1.]], dtype=float32)
    """
    return {"RMSNorm": _rms, "LayerNorm": _layer, "BatchNorm": _batch, "GroupNorm": _group}[norm](w, b)


def _rms(w: np.ndarray, b: np.ndarray) -> tuple[Forward, Backward]:
    def forward(x: np.ndarray) -> tuple[np.ndarray, Saved]:
        rstd = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(EPS))
        z = x * rstd
        return z * w, (z, rstd)

    def backward(dy: np.ndarray, saved: Saved) -> tuple[np.ndarray, ...]:
        z, rstd = saved
        dz = dy * w
        dx = rstd * (dz - z * np.mean(dz * z, axis=-1, keepdims=True))
        return dx, np.sum(dy * z, axis=0)

    return forward, backward


def _layer(w: np.ndarray, b: np.ndarray) -> tuple[Forward, Backward]:
    return _centred(w, b, row=(-1,), samples=(0,))


def _batch(w: np.ndarray, b: np.ndarray) -> tuple[Forward, Backward]:
    return _centred(w[:, None, None], b[:, None, None], row=(0, 2, 3), samples=(0, 2, 3))


def _group(w: np.ndarray, b: np.ndarray) -> tuple[Forward, Backward]:
    shape = (GROUPS, -1, 1, 1)
    forward, backward = _centred(w.reshape(shape), b.reshape(shape), row=(2, 3, 4), samples=(0, 3, 4))

    def groups(x: np.ndarray) -> np.ndarray:
        return x.reshape(len(x), GROUPS, -1, *x.shape[2:])

    def forward_of_groups(x: np.ndarray) -> tuple[np.ndarray, Saved]:
        y, saved = forward(groups(x))
        return y.reshape(x.shape), saved

    def backward_of_groups(dy: np.ndarray, saved: Saved) -> tuple[np.ndarray, ...]:
        dx, dw, db = backward(groups(dy), saved)
        return dx.reshape(dy.shape), dw.ravel(), db.ravel()

    return forward_of_groups, backward_of_groups


def _centred(w: Any, b: Any, row: tuple[int, ...], samples: tuple[int, ...]) -> tuple[Forward, Backward]:
    """Return the norms that subtract a mean; `samples` are the axes over which a parameter's gradient is summed."""

    def mean(a: np.ndarray) -> np.ndarray:
        return np.mean(a, axis=row, keepdims=True)

    def forward(x: np.ndarray) -> tuple[np.ndarray, Saved]:
        c = x - mean(x)
        rstd = 1 / np.sqrt(mean(c * c) + np.float32(EPS))
        z = c * rstd
        return z * w + b, (z, rstd)

    def backward(dy: np.ndarray, saved: Saved) -> tuple[np.ndarray, ...]:
        z, rstd = saved
        dz = dy * w
        dx = rstd * (dz - mean(dz) - z * mean(dz * z))
        return dx, np.sum(dy * z, axis=samples), np.sum(dy, axis=samples)

    return forward, backward
