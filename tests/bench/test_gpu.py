"""The measurement on a GPU, on one that is made of NumPy and of torch's CPU: what it calls exists, and adds up."""

import re
import types

import numpy as np
import pytest
import torch

from npnorm.bench import gpu, needs


class Event:
    """An event of a device on which every call takes 2 ms."""

    now = 0

    def record(self):
        Event.now += 1
        self.at = Event.now

    def synchronize(self):
        pass


@pytest.fixture
def device(monkeypatch):
    xp = types.SimpleNamespace(
        __version__="14.0",
        **{name: getattr(np, name) for name in ("asarray", "copyto", "empty_like", "ones")},
        asnumpy=np.asarray,
        cuda=types.SimpleNamespace(
            Event=Event,
            get_elapsed_time=lambda start, end: 2.0 * (end.at - start.at),
            is_available=lambda: True,
            runtime=types.SimpleNamespace(getDeviceProperties=lambda i: {"name": b"paper", "l2CacheSize": 2**25}),
        ),
    )
    monkeypatch.setattr(gpu, "need", lambda name: xp if name == "cupy.cuda" else needs.need(name))
    monkeypatch.setattr(gpu, "SHAPE", (16, 32))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    return xp


def test_the_tables_of_a_device(device):
    report = gpu.report(quick=True)
    assert report.startswith("paper, L2 cache 32 MiB; CuPy 14.0, torch 2")
    titles = re.findall(r"^(\w+Norm) 16x32 (\w+); largest difference from torch (\S+)$", report, flags=re.MULTILINE)
    assert [title[:2] for title in titles] == [
        (norm, dtype) for norm in ("RMSNorm", "LayerNorm") for dtype in ("float32", "bfloat16")
    ]
    assert all(float(size) < (1e-5 if dtype == "float32" else 0.1) for _, dtype, size in titles)
    rows = [line.split() for line in report.splitlines() if line.startswith("backward float32")]
    assert rows == [["backward", "float32", "2.000", "1.00", "0", "150"]] * 4


def test_without_bfloat16_it_takes_float16(device):
    def ones(shape, dtype):
        raise TypeError("no such dtype")

    device.ones = ones
    assert "RMSNorm 16x32 float16" in gpu.report(quick=True)


@pytest.mark.parametrize("library", ["CuPy", "torch"])
def test_no_gpu_is_one_clear_line(device, monkeypatch, library):
    where = device.cuda if library == "CuPy" else torch.cuda
    monkeypatch.setattr(where, "is_available", lambda: False)
    with pytest.raises(gpu.NoGPU, match=rf"^{library} finds no GPU: .*\.$"):
        gpu.report()
