"""The textbook in NumPy, in the dtype of x: what is written first."""

import numpy as np

from npnorm.studies.accuracy.peers.peer import Peer, Results
from npnorm.studies.accuracy.problems import Problem


def naive() -> Peer:
    """Return the textbook."""
    return Peer(
        "naive", "the formulas in NumPy, in the dtype of x; the mean is subtracted before squaring", (), _results
    )


def _results(problem: Problem) -> Results:
    x, dy, w, b, row, samples = _in_layout(problem)
    eps = x.dtype.type(problem.eps)

    def mean(a: np.ndarray) -> np.ndarray:
        return a.mean(row, keepdims=True)

    centred = problem.norm != "rms"
    c = x - mean(x) if centred else x
    rstd = 1 / np.sqrt(mean(c * c) + eps)
    z = c * rstd
    y = z * w if b is None else z * w + b
    dz = dy * w
    dx = rstd * (dz - mean(dz) - z * mean(dz * z)) if centred else rstd * (dz - z * mean(dz * z))
    results = {"y": y.reshape(problem.x.shape), "dx": dx.reshape(problem.x.shape)}
    results["dw"] = (dy * z).sum(samples).ravel()
    return results if b is None else {**results, "db": dy.sum(samples).ravel()}


def _in_layout(problem: Problem) -> tuple:
    """Return the arrays, the axes of a row, and those over which a parameter's gradient is summed."""
    x, dy, w, b = problem.x, problem.dy, problem.weight, problem.bias
    if problem.norm != "group":
        return x, dy, w, b, 0 if problem.norm == "batch" else -1, 0
    four, three = problem.four_axes, problem.three_axes
    return four(x), four(dy), three(w), None if b is None else three(b), (2, 3), (0, 3)
