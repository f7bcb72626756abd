"""What holds for every norm, on every norm of the catalogue."""

import inspect
import itertools

import array_api_strict
import numpy as np
import pytest
import torch

from npnorm import norms
from npnorm.arrays import dtype_name, to_numpy
from npnorm.tree import leaves, map_tree
from tests.check import BFLOAT16, check_backward, check_finite_differences, close, draw, rounded, run, same_bits
from tests.norms.by_torch import BY_TORCH
from tests.norms.catalogue import CATALOGUE, EACH, each, named

NARROW = pytest.mark.parametrize("dtype", ["float32", "float16", BFLOAT16], ids=str)

LAYOUTS = {
    "column by column": lambda x: np.asfortranarray(x),
    "every second of a larger array": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "last feature first in memory": lambda x: x[..., ::-1].copy()[..., ::-1],
    "big-endian": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "not aligned": lambda x: np.ndarray(x.shape, x.dtype, bytearray(b"\0" + x.tobytes()), offset=1),
}


def has_eps(entry):
    return "eps" in inspect.signature(entry.make).parameters


def with_and_without():
    """Return each norm, in each shape of x, with each choice of a weight and a bias."""
    for entry in CATALOGUE:
        plain = {"weight", "bias"} & set(entry.params) if entry.more else set()
        fixed = {name: shape for name, shape in entry.params.items() if name not in plain}
        for x in (entry.x, *entry.more):
            for names in itertools.chain.from_iterable(itertools.combinations(sorted(plain), n) for n in range(3)):
                params = fixed | {name: entry.params[name] for name in names}
                id = f"{entry.name}, x {x}, {'+'.join(params) or 'no parameters'}"
                yield pytest.param(entry._replace(x=x, params=params), id=id)


FORMS = pytest.mark.parametrize("entry", list(with_and_without()))
EXACT = [entry for entry in CATALOGUE if entry.rows]
CENTRED = [entry for entry in EXACT if not entry.name.startswith("RMSNorm")]


def test_the_catalogue_has_every_norm():
    used = {word for entry in CATALOGUE for word in entry.name.replace(",", " ").split()}
    assert {name for name in norms.__all__ if name[0].isupper()} <= used


# Right.


@FORMS
def test_backward_is_the_derivative(entry):
    rng = np.random.default_rng(1)
    params, x = entry.draw(rng)
    check_backward(entry.make, params, x, rng)


@each([entry for entry in CATALOGUE if has_eps(entry)])
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.9])
@pytest.mark.parametrize("spread", [1e-3, 1e-2, 1.0, 1e3])
def test_backward_is_the_derivative_where_eps_is_near_or_far(entry, eps, spread):
    rng = np.random.default_rng(17)
    params, x = entry.draw(rng)
    mean = 0 if entry.name.startswith(("ScaleNorm", "L2Norm")) else 1  # rows longer and shorter than eps
    check_backward(lambda p: entry.make(p, eps=eps), params, mean + spread * x, rng, 1e-11)


@EACH
def test_backward_agrees_with_finite_differences(entry):
    rng = np.random.default_rng(2)
    params, x = entry.draw(rng)
    check_finite_differences(entry.make, params, x, rng, 1e-8)


@FORMS
def test_torch_gives_the_same(entry):
    params, x, dy = entry.problem(18)
    x, eps = x + 0.5, inspect.signature(entry.make).parameters["eps"].default if has_eps(entry) else None
    at, tensors = (map_tree(lambda a: torch.tensor(a, requires_grad=True), tree) for tree in (x, params))
    y = BY_TORCH[entry.name](at, eps, **tensors)
    y.backward(torch.tensor(dy))
    came = run(entry.make(params), x, dy)
    close(came["y"], y.detach())
    close(came["dx"], at.grad)
    for name, tensor in tensors.items():
        close(came[name], tensor.grad)


DEFAULTS = {
    "LayerNorm": norms.LayerNorm,
    "RMSNorm": norms.RMSNorm,
    "GroupNorm": lambda **p: norms.GroupNorm(3, **p),
    "InstanceNorm": norms.InstanceNorm,
    "BatchNorm": norms.BatchNorm,
    "L2Norm": norms.L2Norm,
}


@each(named(*DEFAULTS))
def test_the_default_eps_is_that_of_torch(entry):
    params, x, _ = entry.problem(19)
    x *= 1e-12 if entry.name == "L2Norm" else 1e-3
    y, _ = DEFAULTS[entry.name](**params).forward(x)
    close(y, BY_TORCH[entry.name](torch.tensor(x), None, **map_tree(torch.tensor, params)))


@each(EXACT)
@NARROW
@pytest.mark.parametrize("size", [1e-4, 0.01, 1.0, 300.0])
def test_narrow_floats_are_the_exact_result_rounded_once(entry, dtype, size):
    rng = np.random.default_rng(20)
    x, dy = (size * (rng.standard_normal(entry.x) + 1)).astype(dtype), rng.standard_normal(entry.x).astype(dtype)
    params = draw(rng, dtype, **entry.params)
    came = run(entry.make(params, eps=1e-5), x, dy)
    same_bits(came, map_tree(lambda a: rounded(a, dtype), entry.exact(params, x, dy, 1e-5)))


@each(EXACT)
@pytest.mark.parametrize(
    ("dtype", "size", "eps"),
    [("float32", size, 1e-5) for size in (1e-45, 1e-38, 1e-20, 1e20, 1e37)]
    + [("float64", size, 0.0) for size in (1e-200, 1e200, 1e300)]
    + [("float16", size, eps) for size in (6e-8, 2e4) for eps in (1e-5, 1e-20)],
)
def test_the_whole_range_is_right(entry, dtype, size, eps):
    rng = np.random.default_rng(21)
    x, dy = (rng.uniform(-3, 3, entry.x) * size).astype(dtype), rng.standard_normal(entry.x).astype(dtype)
    params = draw(rng, dtype, **entry.params)
    came = run(entry.make(params, eps=eps), x, dy)
    expected = entry.exact(params, x, dy, eps)
    for name, a in came.items():
        with np.errstate(over="ignore"):
            close(a, expected[name], 1e-14) if dtype == "float64" else same_bits(a, expected[name].astype(dtype))


@each(CENTRED)
@pytest.mark.parametrize(("dtype", "mean"), [("float32", 1e7), ("float32", 1e4), ("float64", 1e7), ("float64", 1e15)])
@pytest.mark.parametrize("seed", range(22, 26))
def test_a_mean_far_from_zero_loses_nothing(entry, dtype, mean, seed):
    rng = np.random.default_rng(seed)
    x, dy = (4 * rng.standard_normal(entry.x) + mean).astype(dtype), rng.standard_normal(entry.x).astype(dtype)
    params = draw(rng, dtype, **entry.params)
    expected = entry.exact(params, x, dy, 1e-5)
    for name, a in run(entry.make(params, eps=1e-5), x, dy).items():
        close(a, expected[name], 1e-14) if dtype == "float64" else same_bits(a, expected[name].astype(dtype))


@each(EXACT)
def test_float32_is_nearer_to_the_truth_than_torch(entry):
    params, x, _ = entry.problem(23, "float32")
    x = x + np.float32(10 if entry in CENTRED else 0)
    truth = entry.exact(params, x, x, 1e-5)["y"]
    theirs = BY_TORCH[entry.name](torch.tensor(x), 1e-5, **map_tree(torch.tensor, params)).numpy()
    y, _ = entry.make(params, eps=1e-5).forward(x)
    assert np.abs(y - truth).mean() < np.abs(theirs - truth).mean()


@each(CENTRED)
@pytest.mark.parametrize("value", [0.0, 0.1, -1.1e7, 1.1e30, -1.1e200, 1.1e284, 1.1e-300])
def test_a_constant_row_gives_the_bias(entry, value):
    params, x, dy = entry.problem(24)
    came = run(entry.make(params, eps=1e-5), np.full_like(x, value), dy)
    expected = entry.exact(params, np.zeros_like(x), dy, 1e-5)
    np.testing.assert_array_equal(came["y"], expected["y"])
    for name, a in came.items():
        close(a, expected[name])


@each([entry for entry in EXACT if "bias" in entry.params] + named("PartialRMSNorm"))
def test_bfloat16_is_not_rounded_twice(entry):
    near_a_tie = 1 + 2**-8 + 2**-40  # by way of float32 it would become a tie, and then 1
    params, x, dy = entry.problem(25)
    x, dy, params["bias"] = np.zeros(x.shape, BFLOAT16), np.zeros_like(dy), np.full_like(params["bias"], near_a_tie)
    same_bits(entry.make(params).forward(x)[0], np.full(x.shape, 1 + 2**-7, BFLOAT16))
    dy.ravel()[0] = near_a_tie
    params = map_tree(lambda a: a.astype(BFLOAT16), params)
    assert run(entry.make(params), x, dy)["bias"].astype("float64")[0] == 1 + 2**-7


@each([entry for entry in CATALOGUE if entry not in EXACT])
@NARROW
def test_narrow_floats_are_float64_rounded(entry, dtype):
    params, x, dy = entry.problem(5, dtype)
    came = run(entry.make(params), x, dy)
    wide = map_tree(lambda a: a.astype("float64"), {"params": params, "x": x, "dy": dy})
    expected = run(entry.make(wide["params"]), wide["x"], wide["dy"])
    if not entry.name.startswith(("AddRMSNorm", "CastRMSNorm", "RMSNorm with offset")):
        same_bits(came, map_tree(lambda a: rounded(a, dtype), expected))
        return
    eps = {"float32": 2.0**-23, "float16": 2.0**-10}.get(str(dtype), 2.0**-7)  # h, z or w + 1 is rounded, too
    for (name, a), (_, b) in zip(leaves(came), leaves(expected), strict=True):
        assert a.dtype == np.dtype(dtype), name
        close(a.astype("float64"), b, eps)


FREE = [  # entries whose features may change places
    entry
    for entry in CATALOGUE
    if not entry.rows
    and "over" not in entry.name
    and "groups" not in entry.name
    and not entry.name.startswith(("PartialRMSNorm", "BatchNorm", "WeightNorm"))
] + named("LayerNorm", "RMSNorm", "PartialRMSNorm of all")


@each(FREE)
def test_a_permutation_of_features_permutes_the_result(entry):
    params, x, dy = entry.problem(26)
    order = np.random.default_rng(27).permutation(6)

    def permuted(tree):
        return map_tree(lambda a: a[..., order] if a.ndim and a.shape[-1] == 6 else a, tree)

    came = run(entry.make(permuted(params)), permuted(x), permuted(dy))
    for (_, a), (_, b) in zip(leaves(came), leaves(permuted(run(entry.make(params), x, dy))), strict=True):
        close(a, b, 1e-14)


# However it is handed in.


@EACH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_any_memory_layout_gives_the_same_bits(entry, layout, dtype):
    params, x, dy = entry.problem(3, dtype)
    expected = run(entry.make(params), x, dy)
    change = LAYOUTS[layout]
    came = run(entry.make(map_tree(lambda a: change(a) if a.ndim else a, params)), change(x), change(dy))
    for (name, a), (_, b) in zip(leaves(came), leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=name)


@EACH
def test_inputs_that_may_not_be_written_to_are_fine(entry):
    params, x, dy = entry.problem(4)
    expected = run(entry.make(params), x, dy)
    for _, a in leaves({"params": params, "x": x, "dy": dy}):
        a.flags.writeable = False
    same_bits(run(entry.make(params), x, dy), expected)


@EACH
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_fast_setting_is_near_the_exact_one(entry, dtype):
    params, x, dy = entry.problem(15, dtype)
    expected = run(entry.make(params), x, dy)
    came = run(entry.make(params, compute="float32"), x, dy)
    eps = {"float32": 2.0**-20, "float16": 2.0**-10}[dtype]
    for (name, a), (_, b) in zip(leaves(came), leaves(expected), strict=True):
        assert a.dtype == np.dtype(dtype), name
        np.testing.assert_allclose(a, b, rtol=0, atol=eps * abs(b.astype("float64")).max(), err_msg=name)


@EACH
def test_another_module_gives_the_same(entry):
    device = array_api_strict.Device("device1")

    def put(a):
        return array_api_strict.asarray(np.ascontiguousarray(a).reshape(np.shape(a)), device=device)

    params, x, dy = entry.problem(6)
    here = run(entry.make(params), x, dy)
    there = run(entry.make(map_tree(put, params)), put(x), put(dy))
    for (name, a), (_, b) in zip(leaves(there), leaves(here), strict=True):
        assert a.device == device, name
        assert dtype_name(a) == "float64", name
        close(to_numpy(a), b)


@EACH
@pytest.mark.parametrize("block", [1, 1 << 8, 1 << 30])
def test_blocks_of_any_size_give_the_same(entry, block, monkeypatch):
    params, x, dy = entry.problem(7)
    expected = run(entry.make(params), x, dy)
    monkeypatch.setattr("npnorm.engine.rows.BLOCK", block)
    monkeypatch.setattr("npnorm.engine.rows.EXACT_BLOCK", block)
    came = run(entry.make(params), x, dy)
    for name, a in expected.items():
        same_bits(came[name], a) if name in ("y", "dx") else close(came[name], a, 1e-14)


LINEAR = named("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm", "WeightNorm")


@each(LINEAR)
@pytest.mark.parametrize(
    ("of_x", "of_dy", "of_w"), [(150, 120, 200), (-280, -130, -200), (0, 0, -300), (200, -300, 250)]
)
def test_gradients_are_right_though_their_products_leave_the_range(entry, of_x, of_dy, of_w):
    params, x, dy = entry.problem(8)
    powers = [round(power / np.log10(2)) for power in (of_x, of_dy, of_w)]
    name = "weight_g" if "weight_g" in params else "weight"

    def run_at(x_power, dy_power, w_power):
        layer = entry.make(params | {name: np.ldexp(params[name], w_power)}, **{"eps": 0} if has_eps(entry) else {})
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


@each(TAKE_OUT)
def test_out_is_only_a_keyword(entry):
    params, x, dy = entry.problem(28)
    layer = entry.make(params)
    with pytest.raises(TypeError, match="positional argument"):
        layer.forward(x, None, np.empty_like(x))  # the second one is a generator for PartialRMSNorm
    with pytest.raises(TypeError, match="positional argument"):
        layer.backward(dy, layer.forward(x)[1], np.empty_like(x))


def test_these_norms_take_an_out():
    names = {entry.name.replace(",", "").partition(" ")[0] for entry in TAKE_OUT}
    plain = {"LayerNorm", "RMSNorm", "PartialRMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm", "ScaleNorm", "L2Norm"}
    assert names == plain | {"CastRMSNorm", "DyT", "Derf"}


@each(TAKE_OUT)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_what_is_written_to_out_is_what_is_returned_without(entry, dtype):
    params, x, dy = entry.problem(9, dtype)
    layer = entry.make(params)
    expected = run(layer, x, dy)
    y, dx = np.full_like(x, np.nan), np.full_like(x, np.nan)
    before = {"x": x.copy(), "dy": dy.copy()}
    came, saved = layer.forward(x, out=y)
    assert came is y
    came, grads = layer.backward(dy, saved, out=dx)
    assert came is dx
    same_bits({"y": y, "dx": dx, **grads}, expected)
    same_bits({"x": x, "dy": dy}, before)


@each(TAKE_OUT)
def test_out_is_written_to_over_and_over(entry):
    layers = [entry.problem(seed) for seed in (10, 11)]
    out = np.empty(entry.x)
    for params, x, _ in layers:
        y, _ = entry.make(params).forward(x, out=out)
        same_bits(out, entry.make(params).forward(x)[0])
        assert y is out


def test_inference_takes_an_out():
    params, x, dy = named("BatchNorm")[0].problem(12)
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
