"""The measurement on a GPU, on one that is made of NumPy and of torch's CPU: what it calls exists, and adds up."""

import re
import sys
import types

import numpy as np
import pytest
import torch

from npnorm.bench import gpu


def benchmark(call, n_repeat, n_warmup):
    """Return what cupyx.profiler.benchmark does on a device where every call takes 2 ms, and the copy 1 ms."""
    call()
    seconds = 1e-3 if call.__name__ == "<lambda>" else 2e-3
    return types.SimpleNamespace(gpu_times=np.full((1, n_repeat), seconds))


@pytest.fixture
def device(monkeypatch):
    xp = types.SimpleNamespace(
        __version__="14.0",
        **{name: getattr(np, name) for name in ("asarray", "copyto", "empty_like")},
        asnumpy=np.asarray,
        cuda=types.SimpleNamespace(
            runtime=types.SimpleNamespace(getDeviceProperties=lambda i: {"name": b"paper"}),
        ),
    )
    monkeypatch.setattr(gpu, "empty_on", lambda device: device)
    monkeypatch.setattr(gpu, "array_module", lambda like: xp)
    monkeypatch.setitem(sys.modules, "cupyx", types.ModuleType("cupyx"))
    monkeypatch.setitem(sys.modules, "cupyx.profiler", types.SimpleNamespace(benchmark=benchmark))
    monkeypatch.setattr(gpu, "SHAPE", (16, 32))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)


@pytest.fixture
def named(monkeypatch):
    """A partial has no name of its own."""

    class Named(gpu.partial):
        __name__ = "partial"

    monkeypatch.setattr(gpu, "partial", Named)


def test_the_tables_of_a_device(device, named):
    report = gpu.report(quick=True)
    assert report.startswith("paper; CuPy 14.0, torch 2")
    titles = re.findall(r"^(\w+Norm) 16x32 (\w+); largest difference from torch (\S+)$", report, flags=re.MULTILINE)
    assert [title[:2] for title in titles] == [
        (norm, dtype) for norm in ("RMSNorm", "LayerNorm") for dtype in ("float32", "bfloat16")
    ]
    assert all(float(size) < (1e-5 if dtype == "float32" else 0.1) for _, dtype, size in titles)
    rows = [line.replace("|", " ").split() for line in report.splitlines() if line.startswith("| backward float32")]
    mebibytes = 16 * 32 * 3 * 4 / 2e-3 / 1e9
    assert [row[:4] for row in rows] == [["backward", "float32", "2", "1"]] * 4
    assert float(rows[0][4]) == pytest.approx(mebibytes, rel=1e-2)
    assert {row[5] for row in rows} == {"0.75"}  # three arrays in twice the time of two


def test_no_gpu_for_torch_is_one_clear_line(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(OSError, match=r"^torch finds no GPU: .*\.$"):
        gpu.report()
