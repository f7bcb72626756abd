"""What a type checker makes of scripts that use npnorm: mistakes are found before they run, and correct code passes."""

from pathlib import Path

import pytest
from mypy import api

import npnorm

WRONG = """
import numpy as np
from npnorm import BatchNorm, CastRMSNorm, GroupNorm, LayerNorm, RMSNorm

x, w = np.ones((4, 8)), np.ones(8)
norm = RMSNorm(w)
y, saved = norm.forward(x)
norm.forward("hello")  # type-var: "AnyArray" of "forward" of "RowNorm" cannot be "str"
norm.backward(y, y)  # arg-type: expected "Saved"
RMSNorm(768)  # arg-type: incompatible type "int"; expected "Array | None"
CastRMSNorm(w, cast="lama")  # arg-type: expected "Literal['llama', 'olmo2', 'gemma'] | None"
RMSNorm(w, compute="float16")  # arg-type: expected "Literal['float64', 'float32'] | None"
RMSNorm.init(8, epsilon=1e-5)  # call-arg: Unexpected keyword argument "epsilon" for "init" of "RMSNorm"
BatchNorm.init(3).inference(y, 3)  # call-arg: Too many positional arguments for "inference" of "BatchNorm"
LayerNorm.init(8, statistics="gather")  # arg-type: expected "Literal['two-pass', 'packed', 'gathered']"
GroupNorm.init(2, 8, momentum=0.5)  # call-arg: Unexpected keyword argument "momentum" for "init" of "GroupNorm"
RMSNorm.init(8, p=0.5)  # call-arg: Unexpected keyword argument "p" for "init" of "RMSNorm"
LayerNorm.init(8, offset=1)  # call-arg: Unexpected keyword argument "offset" for "init" of "LayerNorm"
LayerNorm(w, offset=1)  # call-arg: Unexpected keyword argument "offset" for "LayerNorm"
CastRMSNorm.init(8)  # call-arg: Missing named argument "cast" for "init" of "CastRMSNorm"
norm.eps = 3.0  # assignment: expression has type "float", variable has type "Never"
norm.group = norm.group  # misc: Cannot assign to final attribute "group"
GroupNorm(2).groups = 4  # assignment: expression has type "int", variable has type "Never"
BatchNorm.init(3).running_mean = w  # assignment: variable has type "Never"
print(norm.weight)  # attr-defined: "RMSNorm" has no attribute "weight"
LayerNorm(w).backward(y, saved)  # arg-type: expected "npnorm.norms.layer_norm.Saved"
"""

RIGHT = """
import numpy as np
from npnorm import SOLO, AddRMSNorm, BatchNorm, CastRMSNorm, DyT, GatedRMSNorm, GroupNorm, InstanceNorm, L2Norm
from npnorm import LayerNorm, PartialRMSNorm, QKNorm, RMSNorm, ScaleNorm
from npnorm.group import Group
from npnorm.norms.rms_norm import Saved


def step(x: np.ndarray, target: np.ndarray, group: Group = SOLO) -> np.ndarray:
    norm = RMSNorm.init(8, eps=1e-5, offset=1, group=group)
    y, saved = norm.forward(x)
    error: np.ndarray = (y - target) / y.size
    loss = 0.5 * (error * error).sum() + y[0, 1:].mean()
    dx, grads = norm.backward(error, saved)
    norm.params["weight"] -= 1e-3 * grads["weight"]
    print(loss, y.shape, saved.rstd, norm, norm.eps, norm.params)
    return dx


def again(norm: LayerNorm, x: np.ndarray) -> np.ndarray:
    y, saved = norm.forward(x, out=np.empty_like(x))
    dx, grads = norm.backward(y, saved, out=np.empty(x.shape, x.dtype))
    print(x + y * dx + np.abs(grads["bias"]))
    return y


x = np.random.default_rng(0).standard_normal((4, 8)).astype("float32")
single = x.astype(np.float32)
again(LayerNorm.init(8, statistics="gathered"), step(x, np.zeros((4, 8))))
y, saved = CastRMSNorm.init(8, cast="gemma", offset=1).forward(x)
of_rms_norm: Saved = saved
LayerNorm(single[0], None, 1e-5, compute="float32", axes=1).forward(single)
RMSNorm.init((4, 8), np.float64, axes=2).forward(x)
GroupNorm.init(2, 4, np.dtype("float16"))
DyT.init(8, np.float32)
PartialRMSNorm.init(8, p=0.5).forward(x, np.random.default_rng(1))
ScaleNorm.init(8, eps=1e-3).forward(x)
L2Norm(features=8).forward(x)
DyT.init(8).forward(x)
GatedRMSNorm.init(8, groups=2).forward(x, x)
(y, h), of_sum = AddRMSNorm.init(8, cast="llama").forward(x, x)
(q, k), of_pair = QKNorm.init(8, full_width=True).forward(x, x)
images = np.ones((2, 4, 3, 3))
GroupNorm.init(2, 4, eps=1e-3).forward(images)
InstanceNorm(eps=0.1).forward(images)
batch = BatchNorm.init(4, momentum=None)
z, of_batch = batch.forward(images)
batch.track(of_batch)
z, of_inference = batch.inference(images)
batch.backward(z, of_inference)
batch.backward(z, of_batch)
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Return what mypy says of both scripts: by script, line number to message."""
    folder = tmp_path_factory.mktemp("scripts")
    scripts = {name: folder / f"{name}.py" for name in ("wrong", "right")}
    for name, script in {"wrong": WRONG, "right": RIGHT}.items():
        scripts[name].write_text(script.replace("", ""), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MYPYPATH", str(Path(npnorm.__file__).parent.parent))
        settings = ["--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={folder / 'cache'}"]
        printed, problem, _ = api.run([*settings, "--no-error-summary", *map(str, scripts.values())])
    assert not problem
    messages = {name: {} for name in scripts}
    for line in printed.splitlines():
        if ": note: " not in line:
            place, message = line.split(": error: ")
            file, number = place.rsplit(":", 1)
            messages[Path(file).stem].setdefault(int(number), message)
    return messages


def test_mistakes_are_found_and_nothing_else(found):
    lines = enumerate(WRONG.splitlines(), 1)
    expected = {i: line.split("  # ")[1].split(": ", 1) for i, line in lines if "  # " in line}
    assert found["wrong"].keys() == expected.keys(), found["wrong"]
    for i, (code, words) in expected.items():
        assert found["wrong"][i].endswith(f"[{code}]")
        assert words in found["wrong"][i]


def test_correct_code_passes_a_strict_check(found):
    assert found["right"] == {}


def test_correct_code_runs():
    exec(compile(RIGHT, "right.py", "exec"), {"__name__": "right"})
