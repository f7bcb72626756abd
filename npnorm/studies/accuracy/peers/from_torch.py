"""torch on the CPU, on one thread: its functions, differentiated by its autograd."""

from collections.abc import Callable
from typing import Any

import numpy as np

from npnorm.studies.accuracy.needs import need
from npnorm.studies.accuracy.peers.peer import Peer, Results
from npnorm.studies.accuracy.problems import Problem


def torch() -> Peer:
    """Return torch."""
    torch = need("torch")
    functional = torch.nn.functional

    def results(problem: Problem) -> Results:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return _differentiated(torch, problem, lambda *arrays: _forward(functional, problem, *arrays))
        finally:
            torch.set_num_threads(threads)

    return Peer("torch", "`torch.nn.functional`, eager, with autograd, on one thread", ("torch",), results)


def _forward(functional: Any, problem: Problem, x: Any, w: Any, b: Any = None) -> Any:
    if problem.norm == "layer":
        return functional.layer_norm(x, w.shape, w, b, problem.eps)
    if problem.norm == "rms":
        return functional.rms_norm(x, w.shape, w, problem.eps)
    if problem.norm == "group":
        return functional.group_norm(x, problem.groups, w, b, problem.eps)
    return functional.batch_norm(x, None, None, w, b, training=True, eps=problem.eps)


def _differentiated(torch: Any, problem: Problem, forward: Callable) -> Results:
    arrays = [a for a in (problem.x, problem.weight, problem.bias) if a is not None]
    tensors = [_tensor(torch, a).requires_grad_() for a in arrays]
    y = forward(*tensors)
    gradients = torch.autograd.grad(y, tensors, _tensor(torch, problem.dy))
    names = ("y", "dx", "dw", "db")
    return {name: _array(torch, t) for name, t in zip(names, (y, *gradients), strict=False)}


def _tensor(torch: Any, a: np.ndarray) -> Any:
    if a.dtype.name == "bfloat16":  # torch knows it, but not that NumPy does
        return torch.from_numpy(a.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(a.copy())


def _array(torch: Any, t: Any) -> np.ndarray:
    t = t.detach().contiguous()
    return t.view(torch.int16).numpy().view("bfloat16") if t.dtype == torch.bfloat16 else t.numpy()
