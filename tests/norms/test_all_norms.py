import inspect

import array_api_strict
import numpy as np
import pytest

from npnorm import norms
from npnorm.arrays import dtype_name, to_numpy
from npnorm.blocked import Rows
from npnorm.tree import leaves, map_tree
from tests.check import BFLOAT16, check_backward, check_finite_differences, close, same_bits
from tests.norms.catalogue import CATALOGUE

EACH = pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)

LAYOUTS = {
    "column by column": lambda x: np.asfortranarray(x),
    "every second of a larger array": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "last feature first in memory": lambda x: x[..., ::-1].copy()[..., ::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "not aligned": lambda x: np.ndarray(x.shape, x.dtype, bytearray(b"\0" + x.tobytes()), offset=1),
}


def run(layer, x, dy):
    """Return everything that comes out, as a tree."""
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    return {"y": y, "dx": dx, "grads": grads}


def problem(entry, rng, dtype="float64"):
    params, x = entry.draw(rng, dtype)
    shape = entry.make(params).forward(x)[0].shape
    return params, x, rng.standard_normal(shape).astype(dtype)


def test_the_catalogue_has_every_norm():
    used = {word for entry in CATALOGUE for word in entry.name.replace(",", " ").split()}
    assert {name for name in norms.__all__ if name[0].isupper()} <= used


@EACH
def test_backward_is_the_derivative(entry):
    rng = np.random.default_rng(1)
    params, x = entry.draw(rng)
    check_backward(entry.make, params, x, rng)


@EACH
def test_backward_agrees_with_finite_differences(entry):
    rng = np.random.default_rng(2)
    small = entry._replace(x=tuple(min(n, 3) if i == 0 else n for i, n in enumerate(entry.x)))
    params, x = (small if not {"gate", "residual", "scale", "k"} & set(entry.params) else entry).draw(rng)
    if "weight_g" in params:
        params["weight_g"] = params["weight_g"][:3]
    check_finite_differences(entry.make, params, x, rng, 1e-8)


@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_any_memory_layout_gives_the_same_bits(entry, layout, dtype):
    params, x, dy = problem(entry, np.random.default_rng(3), dtype)
    expected = run(entry.make(params), x, dy)
    change = LAYOUTS[layout]
    came = run(entry.make(map_tree(lambda a: change(a) if a.ndim else a, params)), change(x), change(dy))
    for (name, a), (_, b) in zip(leaves(came), leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@EACH
def test_inputs_that_may_not_be_written_to_are_fine(entry):
    params, x, dy = problem(entry, np.random.default_rng(4))
    expected = run(entry.make(params), x, dy)
    for _, a in leaves({"params": params, "x": x, "dy": dy}):
        a.flags.writeable = False
    same_bits(run(entry.make(params), x, dy), expected)


@EACH
@pytest.mark.parametrize("dtype", ["float32", "float16", BFLOAT16], ids=str)
def test_narrow_floats_keep_their_dtype_and_are_near_float64(entry, dtype):
    params, x, dy = problem(entry, np.random.default_rng(5), dtype)
    came = run(entry.make(params), x, dy)
    wide = map_tree(lambda a: a.astype("float64"), {"params": params, "x": x, "dy": dy})
    expected = run(entry.make(wide["params"]), wide["x"], wide["dy"])
    eps = {"float32": 2.0**-23, "float16": 2.0**-10}.get(str(dtype), 2.0**-7)
    for (name, a), (_, b) in zip(leaves(came), leaves(expected), strict=True):
        assert a.dtype == np.dtype(dtype), name
        close(a.astype("float64"), b, eps)


@EACH
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_fast_setting_is_near_the_exact_one(entry, dtype, monkeypatch):
    params, x, dy = problem(entry, np.random.default_rng(15), dtype)
    expected = run(entry.make(params), x, dy)
    make = Rows.__init__
    monkeypatch.setattr(Rows, "__init__", lambda rows, axes, eps, _, *group: make(rows, axes, eps, "float32", *group))
    came = run(entry.make(params), x, dy)
    eps = {"float32": 2.0**-20, "float16": 2.0**-10}[dtype]
    for (name, a), (_, b) in zip(leaves(came), leaves(expected), strict=True):
        assert a.dtype == np.dtype(dtype), name
        np.testing.assert_allclose(a, b, rtol=0, atol=eps * abs(b.astype("float64")).max(), err_msg=name)


@EACH
def test_another_module_gives_the_same(entry):
    device = array_api_strict.Device("device1")

    def put(a):
        return array_api_strict.asarray(np.ascontiguousarray(a).reshape(np.shape(a)), device=device)

    params, x, dy = problem(entry, np.random.default_rng(6))
    here = run(entry.make(params), x, dy)
    there = run(entry.make(map_tree(put, params)), put(x), put(dy))
    for (name, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        assert a.device == device, name
        assert dtype_name(a) == "float64", name
        close(to_numpy(a), b)


@EACH
@pytest.mark.parametrize("block", [1, 1 << 8, 1 << 30])
def test_blocks_of_any_size_give_the_same(entry, block, monkeypatch):
    params, x, dy = problem(entry, np.random.default_rng(7))
    expected = run(entry.make(params), x, dy)
    monkeypatch.setattr("npnorm.fast.BLOCK", block)
    monkeypatch.setattr("npnorm.careful.BLOCK", block)
    came = run(entry.make(params), x, dy)
    same_bits({"y": came["y"], "dx": came["dx"]}, {"y": expected["y"], "dx": expected["dx"]})
    for (_, a), (_, b) in zip(leaves(came["grads"]), leaves(expected["grads"]), strict=True):
        close(a, b, 1e-14)


LINEAR = [
    entry for entry in CATALOGUE if entry.name in ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "WeightNorm")
]


@pytest.mark.parametrize("entry", LINEAR, ids=lambda entry: entry.name)
@pytest.mark.parametrize(
    ("of_x", "of_dy", "of_w"), [(150, 120, 200), (-280, -130, -200), (0, 0, -300), (200, -300, 250)]
)
def test_gradients_are_right_though_their_products_leave_the_range(entry, of_x, of_dy, of_w):
    params, x, dy = problem(entry, np.random.default_rng(8))
    powers = [round(power / np.log10(2)) for power in (of_x, of_dy, of_w)]
    name = "weight_g" if "weight_g" in params else "weight"

    def run_at(x_power, dy_power, w_power):
        eps = {"eps": 0} if "weight_g" not in params else {}
        kind = {"GroupNorm": lambda **p: norms.GroupNorm(3, **p)}.get(entry.name) or getattr(norms, entry.name)
        layer = kind(**params | {name: np.ldexp(params[name], w_power)}, **eps)
        _, saved = layer.forward(np.ldexp(x, x_power))
        return layer.backward(np.ldexp(dy, dy_power), saved)

    dx, grads = run_at(*powers)
    plain, plain_grads = run_at(0, 0, 0)
    expected = np.ldexp(plain, powers[1] + powers[2] - powers[0])
    np.testing.assert_allclose(dx, expected, rtol=1e-12, atol=4e-324)
    close(np.ldexp(grads[name], -powers[1]), plain_grads[name], 1e-14)


def takes_out(entry):
    params, _ = entry.draw(np.random.default_rng(0))
    return "out" in inspect.signature(entry.make(params).forward).parameters


TAKE_OUT = [entry for entry in CATALOGUE if takes_out(entry)]


def test_these_norms_take_an_out():
    names = {entry.name.replace(",", "").partition(" ")[0] for entry in TAKE_OUT}
    plain = {"LayerNorm", "RMSNorm", "PartialRMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm", "ScaleNorm", "L2Norm"}
    assert names == plain | {"DyT", "Derf"}


@pytest.mark.parametrize("entry", TAKE_OUT, ids=lambda entry: entry.name)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_what_is_written_to_out_is_what_is_returned_without(entry, dtype):
    params, x, dy = problem(entry, np.random.default_rng(9), dtype)
    layer = entry.make(params)
    expected = run(layer, x, dy)
    y, dx = np.full_like(x, np.nan), np.full_like(x, np.nan)
    before = {"x": x.copy(), "dy": dy.copy()}
    came, saved = layer.forward(x, out=y)
    assert came is y
    came, grads = layer.backward(dy, saved, out=dx)
    assert came is dx
    same_bits({"y": y, "dx": dx, "grads": grads}, expected)
    same_bits({"x": x, "dy": dy}, before)


@pytest.mark.parametrize("entry", TAKE_OUT, ids=lambda entry: entry.name)
def test_out_is_written_to_over_and_over(entry):
    layers = [problem(entry, np.random.default_rng(seed)) for seed in (10, 11)]
    out = np.empty(entry.x)
    for params, x, _ in layers:
        y, _ = entry.make(params).forward(x, out=out)
        same_bits(out, entry.make(params).forward(x)[0])
        assert y is out


def test_inference_takes_an_out():
    params, x, dy = problem(next(e for e in CATALOGUE if e.name == "BatchNorm"), np.random.default_rng(12))
    layer = norms.BatchNorm(**params)
    expected, saved = layer.inference(x)
    y, dx = np.empty_like(x), np.empty_like(x)
    assert layer.inference(x, out=y)[0] is y
    assert layer.backward(dy, saved, out=dx)[0] is dx
    same_bits({"y": y, "dx": dx}, {"y": expected, "dx": layer.backward(dy, saved)[0]})


def test_an_out_of_another_module_is_written_to():
    x = array_api_strict.asarray(np.random.default_rng(13).standard_normal((4, 6)))
    out = array_api_strict.zeros((4, 6))
    y, _ = norms.LayerNorm().forward(x, out=out)
    assert y is out
    same_bits(to_numpy(out), to_numpy(norms.LayerNorm().forward(x)[0]))
