"""Who is measured on a norm, on the same arrays: npnorm, the textbook, torch, JAX; and the copy that none can beat."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from npnorm import norms
from npnorm.bench.grid import EPS, GROUPS, Case
from npnorm.bench.timing import Contender
from npnorm.conformance import textbook
from npnorm.conformance.textbook import Textbook, layout
from npnorm.threads import get_threads, parallel_for

PIECE = 1 << 20
"""Bytes that a thread copies at least."""


class Problem(NamedTuple):
    """A case and its float32 arrays: x, dy, weight and bias (none for RMSNorm); results may go to `out` and `dout`."""

    case: Case
    x: np.ndarray
    dy: np.ndarray
    params: list[np.ndarray]
    out: np.ndarray
    dout: np.ndarray


def pose(case: Case) -> Problem:
    """Draw the arrays of a case, the same in every process.

    Examples
    --------
    >>> [a.shape for a in pose(Case("LayerNorm", (3, 8))).params]
    [(8,), (8,)]
    """
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(case.shape, np.float32) for _ in range(2))
    params = [rng.standard_normal(case.shape[1], np.float32) for _ in range(1 + (case.norm != "RMSNorm"))]
    return Problem(case, x, dy, params, np.zeros_like(x), np.zeros_like(x))


def own(problem: Problem, compute: str) -> Any:
    """Return the norm of npnorm that a problem asks for, computing in "float32" or "float64"."""
    groups = [GROUPS] * (problem.case.norm == "GroupNorm")
    return getattr(norms, problem.case.norm)(*groups, *problem.params, eps=EPS, compute=compute)


def _fresh(compute: str, problem: Problem) -> Contender:
    return _by_hand(own(problem, compute), problem)


def _out(problem: Problem) -> Contender:
    norm, x, dy, out, dout = own(problem, "float32"), problem.x, problem.dy, problem.out, problem.dout
    return Contender(lambda: norm.forward(x, out=out), lambda state: norm.backward(dy, state[1], out=dout))


def _naive(problem: Problem) -> Contender:
    weight, *bias = problem.params
    return _by_hand(Textbook(problem.case.norm, weight, bias[0] if bias else None, EPS, GROUPS), problem)


def _by_hand(norm: Any, problem: Problem) -> Contender:
    return Contender(lambda: norm.forward(problem.x), lambda state: norm.backward(problem.dy, state[1]))


def _torch(problem: Problem) -> Contender:
    return _differentiated(problem, torch_norm(problem.case.norm))


def _compiled(problem: Problem) -> Contender:
    import torch

    torch.compiler.reset()  # of the last case
    return _differentiated(problem, torch.compile(torch_norm(problem.case.norm), dynamic=False))


def torch_norm(norm: str) -> Callable:
    """Return torch's function of a norm: of x and weight, and bias if there is one."""
    from torch.nn import functional

    functions: dict[str, Callable] = {
        "RMSNorm": lambda x, w: functional.rms_norm(x, w.shape, w, EPS),
        "LayerNorm": lambda x, w, b: functional.layer_norm(x, w.shape, w, b, EPS),
        "GroupNorm": lambda x, w, b: functional.group_norm(x, GROUPS, w, b, EPS),
        "BatchNorm": lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True, eps=EPS),
    }
    return functions[norm]


def _differentiated(problem: Problem, function: Callable) -> Contender:
    import torch

    inputs = [torch.from_numpy(a).requires_grad_() for a in (problem.x, *problem.params)]
    dy = torch.from_numpy(problem.dy)
    return Contender(lambda: function(*inputs), lambda y: torch.autograd.grad(y, inputs, dy))


def _jax(problem: Problem) -> Contender:
    """Jit the textbook; what is saved travels from forward to backward, as JAX's vjp chooses it."""
    import jax

    shape, weight, row, _ = layout(problem.case.norm, problem.case.shape, GROUPS)

    def function(x: Any, w: Any, b: Any = None) -> Any:
        w, b = w.reshape(weight), b if b is None else b.reshape(weight)
        return textbook.forward(x.reshape(shape), w, b, EPS, row, b is not None, jax.numpy.sqrt)[0].reshape(x.shape)

    forward = jax.jit(lambda *inputs: jax.vjp(function, *inputs))
    backward = jax.jit(lambda vjp, dy: vjp(dy))
    inputs, dy = [jax.numpy.asarray(a) for a in (problem.x, *problem.params)], jax.numpy.asarray(problem.dy)
    wait = jax.block_until_ready
    return Contender(lambda: wait(forward(*inputs)), lambda state: wait(backward(state[1], dy)))


def _pieces(move: Callable, problem: Problem) -> Contender:
    """Move x into `out`, a piece for each thread, but none below PIECE: to hand it over would cost more."""
    pieces = max(1, min(get_threads(), problem.x.nbytes // PIECE))
    to, of = (np.array_split(a.ravel(), pieces) for a in (problem.out, problem.x))
    return Contender(lambda: parallel_for(lambda i: move(to[i], of[i]), pieces))


PEERS: dict[str, Callable[[Problem], Contender]] = {
    "f64": partial(_fresh, "float64"),
    "f32": partial(_fresh, "float32"),
    "out": _out,
    "naive": _naive,
    "torch": _torch,
    "compile": _compiled,
    "jax": _jax,
}
"""By name: a contender made of a problem."""

ABOUT = {
    "f64": 'npnorm, compute="float64": computed in float64, rounded once',
    "f32": 'npnorm, compute="float32", with fresh outputs',
    "out": "the same, with outputs that are there already",
    "naive": "the formulas on whole NumPy arrays in float32, on one thread",
    "torch": "torch.nn.functional, eager, with autograd",
    "compile": "the same by torch.compile (Inductor)",
    "jax": "the formulas in JAX, jitted",
}
"""What the names of the columns mean."""

COPIES: dict[str, Callable[[Problem], Contender]] = {
    "copyto": partial(_pieces, np.copyto),
    "multiply": partial(_pieces, lambda out, x: np.multiply(x, np.float32(2), out=out)),
}
"""Two ways to read x and write as much; the faster one is the limit."""

PACKAGES = {"torch": "torch", "compile": "torch", "jax": "jax"}
"""What a peer needs to be installed."""


def contenders(case: Case, peers: Sequence[str], copies: bool = True) -> dict[str, Contender]:
    """Return the contenders of a case by name, and the copies after them."""
    problem = pose(case)
    found = {name: PEERS[name](problem) for name in peers}
    return found | {name: make(problem) for name, make in COPIES.items()} if copies else found
