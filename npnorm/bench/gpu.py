"""The same question on a GPU: npnorm on CuPy arrays, torch eager and compiled, and the copy of the device.

Times are those between two events of the default stream, on which CuPy and torch both work here, after warm-up, in
turns, medians. x has 256 MiB in float32 and half of it in 16 bits: more than the L2 cache of the device, which is
printed, so that nothing of a call is left there for the next one.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from npnorm import norms
from npnorm.bench.grid import EPS
from npnorm.bench.needs import Missing, need
from npnorm.bench.peers import torch_norm
from npnorm.bench.table import Table
from npnorm.bench.timing import turns

SHAPE = 8192, 8192
WARM, ROUNDS = 5, 30
ARRAYS = {"forward": 2, "backward": 3}
"""Of the size of x, that must be read or written at least; a copy moves two."""


class NoGPU(Exception):
    """There is no GPU that CuPy can use, or no CuPy."""


def report(quick: bool = False) -> str:
    """Measure, and return the tables.

    Parameters
    ----------
    quick : bool
        Without torch.compile.

    Raises
    ------
    NoGPU
        In one line.
    """
    try:
        xp = need("cupy.cuda")
        torch = need("torch")
    except Missing as missing:
        raise NoGPU(f"{missing}, CuPy with: pip install 'npnorm[gpu]'") from None
    if not xp.cuda.is_available():
        raise NoGPU("CuPy finds no GPU: there is nothing to measure.")
    if not torch.cuda.is_available():
        raise NoGPU("torch finds no GPU: it is built without CUDA, so there is nothing to compare with.")
    device = xp.cuda.runtime.getDeviceProperties(0)
    l2 = device["l2CacheSize"] / 2**20
    head = f"{device['name'].decode()}, L2 cache {l2:.0f} MiB; CuPy {xp.__version__}, torch {torch.__version__}"
    narrow = "bfloat16" if _has_bfloat16(xp) else "float16"
    cases = [(norm, dtype) for norm in ("RMSNorm", "LayerNorm") for dtype in ("float32", narrow)]
    return "\n\n".join([head, *(_table(xp, torch, norm, dtype, quick).text() for norm, dtype in cases)])


def _has_bfloat16(xp: Any) -> bool:
    """Return whether CuPy takes the bfloat16 of ml_dtypes, as it does from version 14 on."""
    try:
        xp.ones(1, need("ml_dtypes").bfloat16) + 1
    except (Missing, TypeError, ValueError):
        return False
    return True


def _table(xp: Any, torch: Any, norm: str, dtype: str, quick: bool) -> Table:
    calls, problem = _calls(xp, torch, norm, dtype, quick)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(WARM + ROUNDS):
        for name in turns(list(calls), i):
            seconds = _seconds(xp.cuda, calls[name])
            if i >= WARM:
                samples[name].append(seconds)
    median = {name: statistics.median(some) for name, some in samples.items()}
    nbytes = SHAPE[0] * SHAPE[1] * (4 if dtype == "float32" else 2)
    rows = []
    for op, arrays in ARRAYS.items():
        for name in (name for name in calls if name.startswith(op)):
            seconds = median[name]
            rows.append(
                [
                    name,
                    f"{seconds * 1e3:.3f}",
                    f"{seconds / median[f'{op} torch']:.2f}",
                    f"{arrays * nbytes / seconds / 1e9:.0f}",
                    f"{100 * median['copy'] * arrays / 2 / seconds:.0f}",
                ]
            )
    rows.append(["copy", f"{median['copy'] * 1e3:.3f}", "", f"{2 * nbytes / median['copy'] / 1e9:.0f}", "100"])
    title = f"{norm} {SHAPE[0]}x{SHAPE[1]} {dtype}; largest difference from torch {problem:.1e}"
    return Table(title, ["call", "ms", "/ torch", "GB/s", "% of copy"], rows)


def _calls(xp: Any, torch: Any, norm: str, dtype: str, quick: bool) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return what is timed by name, and the largest difference between npnorm's y and torch's."""
    rng = np.random.default_rng(0)
    host = [rng.standard_normal(shape, np.float32) for shape in (SHAPE, SHAPE, SHAPE[1:], SHAPE[1:])]
    kind = need("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    x, dy, w, b = (xp.asarray(a).astype(kind) for a in host)
    tx, tdy, tw, tb = (torch.from_numpy(a).cuda().to(getattr(torch, dtype)) for a in host)
    params, inputs = ([w], [tx, tw]) if norm == "RMSNorm" else ([w, b], [tx, tw, tb])
    for tensor in inputs:
        tensor.requires_grad_()
    to = xp.empty_like(x)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: xp.copyto(to, x)}
    for compute in ("float32", "float64"):
        layer = getattr(norms, norm)(*params, eps=EPS, compute=compute)
        y, saved = layer.forward(x)
        calls[f"forward {compute}"] = partial(layer.forward, x)
        calls[f"backward {compute}"] = partial(layer.backward, dy, saved)
    functions = {"torch": torch_norm(norm)}
    if not quick:
        functions["torch.compile"] = torch.compile(torch_norm(norm), dynamic=False)
    for name, function in functions.items():
        ty = function(*inputs)
        calls[f"forward {name}"] = partial(function, *inputs)
        calls[f"backward {name}"] = partial(torch.autograd.grad, ty, inputs, tdy, retain_graph=True)
    difference = np.abs(xp.asnumpy(y.astype("float32")) - ty.detach().float().cpu().numpy()).max()
    return calls, float(difference)


def _seconds(cuda: Any, call: Callable[[], Any]) -> float:
    start, end = cuda.Event(), cuda.Event()
    start.record()
    result = call()
    end.record()
    end.synchronize()
    del result
    return cuda.get_elapsed_time(start, end) / 1e3
