"""Who is measured on a norm, on the same arrays: npnorm, the textbook, torch, JAX; and the copy that none can beat."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from npnorm import norms
from npnorm.bench.grid import EPS, GROUPS, Case
from npnorm.bench.naive import naive
from npnorm.bench.needs import need
from npnorm.bench.timing import Contender
from npnorm.threads import get_threads, parallel_for

PIECE = 1 << 20
"""Bytes that a thread copies at least."""


class Problem(NamedTuple):
    """A case and its float32 arrays: x, dy, weight and bias; `out` and `dout` are there to be written to."""

    case: Case
    x: np.ndarray
    dy: np.ndarray
    w: np.ndarray
    b: np.ndarray
    out: np.ndarray
    dout: np.ndarray


def pose(case: Case) -> Problem:
    """Draw the arrays of a case, the same in every process.

    Examples
    --------
    >>> pose(Case("RMSNorm", (3, 8))).w.shape
    (8,)
    """
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(case.shape, np.float32) for _ in range(2))
    w, b = (rng.standard_normal(case.params, np.float32) for _ in range(2))
    return Problem(case, x, dy, w, b, np.zeros_like(x), np.zeros_like(x))


def own(problem: Problem, compute: str) -> Any:
    """Return the norm of npnorm that a problem asks for, computing in "float32" or "float64"."""
    kind, w, b = getattr(norms, problem.case.norm), problem.w, problem.b
    if problem.case.norm == "RMSNorm":
        return kind(w, eps=EPS, compute=compute)
    if problem.case.norm == "GroupNorm":
        return kind(GROUPS, w, b, eps=EPS, compute=compute)
    return kind(w, b, eps=EPS, compute=compute)


def _float64(problem: Problem) -> Contender:
    return _fresh(problem, "float64")


def _float32(problem: Problem) -> Contender:
    return _fresh(problem, "float32")


def _fresh(problem: Problem, compute: str) -> Contender:
    norm, x, dy = own(problem, compute), problem.x, problem.dy
    return Contender(lambda: norm.forward(x), lambda state: norm.backward(dy, state[1]))


def _out(problem: Problem) -> Contender:
    norm, x, dy, out, dout = own(problem, "float32"), problem.x, problem.dy, problem.out, problem.dout
    return Contender(lambda: norm.forward(x, out=out), lambda state: norm.backward(dy, state[1], out=dout))


def _naive(problem: Problem) -> Contender:
    forward, backward = naive(problem.case.norm, problem.w, problem.b)
    return Contender(lambda: forward(problem.x), lambda state: backward(problem.dy, state[1]))


def _torch(problem: Problem) -> Contender:
    return _differentiated(problem, torch_norm(problem.case.norm))


def _compiled(problem: Problem) -> Contender:
    torch = need("torch")
    torch.compiler.reset()  # of the last case
    return _differentiated(problem, torch.compile(torch_norm(problem.case.norm), dynamic=False))


def torch_norm(norm: str) -> Callable:
    """Return torch's function of a norm: of x and weight, and bias if there is one."""
    functional = need("torch").nn.functional
    functions: dict[str, Callable] = {
        "RMSNorm": lambda x, w: functional.rms_norm(x, w.shape, w, EPS),
        "LayerNorm": lambda x, w, b: functional.layer_norm(x, w.shape, w, b, EPS),
        "GroupNorm": lambda x, w, b: functional.group_norm(x, GROUPS, w, b, EPS),
        "BatchNorm": lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True, eps=EPS),
    }
    return functions[norm]


def _differentiated(problem: Problem, function: Callable) -> Contender:
    torch = need("torch")
    arrays = problem.x, problem.w, problem.b
    inputs = [torch.from_numpy(a).requires_grad_() for a in (arrays[:2] if problem.case.norm == "RMSNorm" else arrays)]
    dy = torch.from_numpy(problem.dy)
    return Contender(lambda: function(*inputs), lambda y: torch.autograd.grad(y, inputs, dy))


def _jax(problem: Problem) -> Contender:
    """Jitted; what is saved travels from forward to backward, as JAX's vjp chooses it."""
    jax = need("jax.numpy")
    function = _jax_norm(jax.numpy, problem.case.norm)
    forward = jax.jit(lambda *inputs: jax.vjp(function, *inputs))
    backward = jax.jit(lambda vjp, dy: vjp(dy))
    arrays = problem.x, problem.w, problem.b
    inputs = [jax.numpy.asarray(a) for a in (arrays[:2] if problem.case.norm == "RMSNorm" else arrays)]
    dy = jax.numpy.asarray(problem.dy)
    wait = jax.block_until_ready
    return Contender(lambda: wait(forward(*inputs)), lambda state: wait(backward(state[1], dy)))


def _jax_norm(xp: Any, norm: str) -> Callable:
    def centred(x: Any, w: Any, b: Any, row: tuple[int, ...]) -> Any:
        c = x - xp.mean(x, row, keepdims=True)
        return c / xp.sqrt(xp.mean(c * c, row, keepdims=True) + EPS) * w + b

    def groups(x: Any, w: Any, b: Any) -> Any:
        w, b = (a.reshape(GROUPS, -1, 1, 1) for a in (w, b))
        return centred(x.reshape(len(x), GROUPS, -1, *x.shape[2:]), w, b, (2, 3, 4)).reshape(x.shape)

    functions: dict[str, Callable] = {
        "RMSNorm": lambda x, w: x / xp.sqrt(xp.mean(x * x, -1, keepdims=True) + EPS) * w,
        "LayerNorm": lambda x, w, b: centred(x, w, b, (-1,)),
        "BatchNorm": lambda x, w, b: centred(x, w[:, None, None], b[:, None, None], (0, 2, 3)),
        "GroupNorm": groups,
    }
    return functions[norm]


def _copyto(problem: Problem) -> Contender:
    return _pieces(problem, np.copyto)


def _multiply(problem: Problem) -> Contender:
    return _pieces(problem, lambda out, x: np.multiply(x, np.float32(2), out=out))


def _pieces(problem: Problem, move: Callable) -> Contender:
    """Move x into `out`, a piece for each thread, but none below PIECE: to hand it over would cost more."""
    pieces = max(1, min(get_threads(), problem.x.nbytes // PIECE))
    to, of = (np.array_split(a.ravel(), pieces) for a in (problem.out, problem.x))
    return Contender(lambda: parallel_for(lambda i: move(to[i], of[i]), pieces))


PEERS: dict[str, Callable[[Problem], Contender]] = {
    "f64": _float64,
    "f32": _float32,
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

COPIES: dict[str, Callable[[Problem], Contender]] = {"copyto": _copyto, "multiply": _multiply}
"""Two ways to read x and write as much; the faster one is the limit."""

PACKAGES = {"torch": "torch", "compile": "torch", "jax": "jax"}
"""What a peer needs to be installed."""


def contenders(case: Case, peers: Sequence[str], copies: bool = True) -> dict[str, Contender]:
    """Return the contenders of a case by name, and the copies after them."""
    problem = pose(case)
    found = {name: PEERS[name](problem) for name in peers}
    return found | {name: make(problem) for name, make in COPIES.items()} if copies else found
