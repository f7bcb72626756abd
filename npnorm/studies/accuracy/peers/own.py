"""npnorm itself, as a user calls it."""

from typing import Any

from npnorm import norms
from npnorm.studies.accuracy.peers.peer import Peer, Results
from npnorm.studies.accuracy.problems import NORMS, Problem


def own() -> Peer:
    """Return npnorm."""
    return Peer("npnorm", "`npnorm.LayerNorm` and the others", ("numpy",), _results)


def _results(problem: Problem) -> Results:
    norm = _norm(problem)
    y, saved = norm.forward(problem.x)
    dx, grads = norm.backward(problem.dy, saved)
    results = {"y": y, "dx": dx, "dw": grads["weight"]}
    return results if problem.bias is None else {**results, "db": grads["bias"]}


def _norm(problem: Problem) -> Any:
    make = getattr(norms, NORMS[problem.norm], None)
    if make is None:
        raise NotImplementedError
    if problem.norm == "rms":
        return make(problem.weight, eps=problem.eps)
    if problem.norm == "group":
        return make(problem.groups, problem.weight, problem.bias, eps=problem.eps)
    return make(problem.weight, problem.bias, eps=problem.eps)
