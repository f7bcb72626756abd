"""The same question on a GPU: npnorm on CuPy arrays, torch eager and compiled, and the copy of the device.

x has 256 MiB in float32 and half of it in bfloat16: more than the L2 cache of the device, so that nothing of a call is
left there for the next one. Times are those of the device, medians, in turns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import pandas as pd
import torch

from npnorm import norms
from npnorm.arrays import array_module, empty_on
from npnorm.bench.grid import EPS
from npnorm.bench.peers import torch_norm
from npnorm.bench.timing import turns

SHAPE = 8192, 8192
ROUNDS, REPEAT, WARM = 4, 10, 3
ARRAYS = {"copy": 2, "forward": 2, "backward": 3}
"""Of the size of x, that must be read or written at least."""


def report(quick: bool = False) -> str:
    """Measure, and return the tables; `quick` leaves out torch.compile.

    Raises
    ------
    ImportError, OSError
        Without CuPy, or a GPU for it or for torch.
    """
    xp = array_module(empty_on("gpu"))
    if not torch.cuda.is_available():
        raise OSError("torch finds no GPU: it is built without CUDA, so there is nothing to compare with.")
    name = xp.cuda.runtime.getDeviceProperties(0)["name"].decode()
    parts = [f"{name}; CuPy {xp.__version__}, torch {torch.__version__}"]
    for norm in ("RMSNorm", "LayerNorm"):
        for dtype in ("float32", "bfloat16"):
            calls, off = _calls(xp, norm, dtype, quick)
            title = f"{norm} {SHAPE[0]}x{SHAPE[1]} {dtype}; largest difference from torch {off:.1e}"
            nbytes = SHAPE[0] * SHAPE[1] * np.dtype(dtype).itemsize
            parts.append(f"{title}\n\n{_table(calls, nbytes).to_markdown(floatfmt='.3g')}")
    return "\n\n".join(parts)


def _table(calls: dict[str, Callable[[], Any]], nbytes: int) -> pd.DataFrame:
    from cupyx.profiler import benchmark

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(ROUNDS):
        for name in turns(list(calls), i):
            samples[name] += benchmark(calls[name], n_repeat=REPEAT, n_warmup=WARM).gpu_times[0].tolist()
    seconds = pd.Series({name: np.median(some) for name, some in samples.items()})
    op = seconds.index.str.split().str[0]
    moved = nbytes * op.map(ARRAYS).to_numpy()
    base = [seconds.get(f"{name} torch", np.nan) for name in op]
    rate, copied = moved / seconds, 2 * nbytes / seconds["copy"]
    return pd.DataFrame({"ms": seconds * 1e3, "/ torch": seconds / base, "GB/s": rate / 1e9, "of copy": rate / copied})


def _calls(xp: Any, norm: str, dtype: str, quick: bool) -> tuple[dict[str, Callable[[], Any]], float]:
    """Return what is timed by name, and the largest difference between npnorm's y and torch's."""
    rng = np.random.default_rng(0)
    host = [rng.standard_normal(shape, np.float32) for shape in (SHAPE, SHAPE, SHAPE[1:], SHAPE[1:])]
    kind = {"bfloat16": ml_dtypes.bfloat16}.get(dtype, dtype)
    x, dy, *params = (xp.asarray(a).astype(kind) for a in host)
    tx, tdy, *tparams = (torch.from_numpy(a).cuda().to(getattr(torch, dtype)) for a in host)
    count = 1 if norm == "RMSNorm" else 2
    inputs = [tensor.requires_grad_() for tensor in (tx, *tparams[:count])]
    to = xp.empty_like(x)
    calls: dict[str, Callable[[], Any]] = {"copy": lambda: xp.copyto(to, x)}
    for compute in ("float32", "float64"):
        layer = getattr(norms, norm)(*params[:count], eps=EPS, compute=compute)
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
