import re

import numpy as np
import pytest
import torch

from npnorm import WeightNorm
from tests.check import BFLOAT16, close, rounded, run, same_bits

SHAPES = pytest.mark.parametrize("shape", [(5, 7), (5, 3, 4), (5, 2, 3, 4), (1, 6)])
SIZES = {"float32": [1e-45, 1e-30, 1e-20, 1.0, 1e30, 1e38], "float16": [1e-7, 1.0, 2e4], "bfloat16": [1e-40, 1.0, 1e38]}


def formula(v, g, dw):
    """Return w, dv, dg in float64, of two axes."""
    length = np.sqrt(np.sum(v * v, axis=1, keepdims=True))
    z, g = v / length, g.reshape(-1, 1)
    dg = np.sum(dw * z, axis=1, keepdims=True)
    return g * z, g / length * (dw - z * dg), dg[:, 0]


def test_rows_worked_by_hand():
    # lengths 8 and 4, z = (1, 1, 1, 5, 6) / 8 and (0, 0, 0, -4, 0) / 4
    v = np.array([[1.0, 1.0, 1.0, 5.0, 6.0], [0.0, 0.0, 0.0, -4.0, 0.0]])
    dw = np.array([[8.0, 0.0, 0.0, 0.0, 8.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    w, dv, dg = run(WeightNorm(np.array([16.0, -2.0])), v, dw).values()
    np.testing.assert_array_equal(w, [[2, 2, 2, 10, 12], [0, 0, 0, 2, 0]])
    # dg = 1 + 6 and -4; dv = 16/8 (dw - 7 z) and -2/4 (dw + 4 z)
    np.testing.assert_array_equal(dg, [7, -4])
    np.testing.assert_array_equal(dv[0], [57 / 4, -7 / 4, -7 / 4, -35 / 4, 11 / 2])
    np.testing.assert_array_equal(dv[1], [-1 / 2, -1, -3 / 2, 0, -5 / 2])


@SHAPES
def test_torch_gives_the_same(shape):
    rng = np.random.default_rng(1)
    v, dw = rng.standard_normal(shape), rng.standard_normal(shape)
    g = rng.standard_normal((shape[0], *[1] * (len(shape) - 1)))
    at = [torch.tensor(a, requires_grad=True) for a in (v, g)]
    expected = torch._weight_norm(*at, 0)
    expected.backward(torch.tensor(dw))
    w, dv, dg = run(WeightNorm(g), v, dw).values()
    close(w, expected.detach())
    close(dv, at[0].grad)
    close(dg, at[1].grad)


def test_the_parametrization_of_a_torch_layer_is_taken_over():
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(6, 4, dtype=torch.float64))
    given = layer.parametrizations.weight
    with torch.no_grad():
        given.original0.mul_(torch.tensor([[2.0], [-1.0], [0.5], [3.0]]))
    layer(torch.ones(3, 6, dtype=torch.float64)).square().sum().backward()
    dw = 2 * np.outer((layer(torch.ones(1, 6, dtype=torch.float64)) * 3).detach().numpy(), np.ones(6))
    w, dv, dg = run(WeightNorm(given.original0.detach().numpy()), given.original1.detach().numpy(), dw).values()
    close(w, layer.weight.detach())
    close(dv, given.original1.grad)
    close(dg, given.original0.grad)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_torch_in_float32_is_wrong_where_squares_leave_the_range(size):
    v, g = np.array([[3.0, 4.0]], "float32") * np.float32(size), np.array([[10.0]], "float32")
    theirs = torch._weight_norm(torch.tensor(v), torch.tensor(g), 0).numpy()
    assert not np.allclose(theirs, [[6, 8]])
    same_bits(WeightNorm(g).forward(v)[0], np.array([[6, 8]], "float32"))


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)
def test_narrow_floats_are_rounded_once_over_their_whole_range(dtype):
    for size in SIZES[dtype.name]:
        rng = np.random.default_rng(2)
        with np.errstate(under="ignore"):
            v = (rng.uniform(1, 3, (5, 12)) * rng.choice((-1.0, 1.0), (5, 12)) * size).astype(dtype)
        dw = (rng.standard_normal((5, 12)) * min(size, 1.0)).astype(dtype)  # so that dv is in range
        g = rng.standard_normal(5).astype(dtype)
        expected = formula(*(a.astype("float64") for a in (v, g, dw)))
        for a, b in zip(run(WeightNorm(g), v, dw).values(), expected, strict=True):
            normal = (np.abs(b) >= 2.0**-126) | (dtype != BFLOAT16)  # `rounded` leaves subnormal bfloat16 alone
            same_bits(a[normal], rounded(b[normal], dtype))


@pytest.mark.parametrize("power", [-997, -600, 600, 997])
def test_the_whole_range_of_float64(power):
    rng = np.random.default_rng(3)
    v, dw, g = rng.uniform(-3, 3, (5, 12)), rng.standard_normal((5, 12)), rng.standard_normal(5)
    w, dv, dg = run(WeightNorm(g), np.ldexp(v, power), dw).values()
    expected = formula(v, g, dw)
    close(w, expected[0], 1e-15)
    close(np.ldexp(dv, power), expected[1], 1e-15)
    close(dg, expected[2], 1e-15)


def test_rows_of_very_different_size_share_a_matrix():
    v = np.array([[3e-300, 4e-300], [3.0, 4.0], [3e300, 4e300]])
    w, dv, dg = run(WeightNorm(np.array([5.0, 10.0, 15.0])), v, np.ones((3, 2))).values()
    close(w, [[3, 4], [6, 8], [9, 12]], 1e-15)
    close(dg, np.full(3, 7 / 5), 1e-15)
    close(dv[0] * 1e-300, [4 / 25, -3 / 25], 1e-14)
    close(dv[1], [8 / 25, -6 / 25], 1e-14)
    close(dv[2] * 1e300, [12 / 25, -9 / 25], 1e-14)


def test_every_row_has_its_length_and_a_gradient_upright_on_it():
    rng = np.random.default_rng(4)
    v, dw, g = rng.standard_normal((5, 9)), rng.standard_normal((5, 9)), rng.standard_normal(5)
    w, dv, _ = run(WeightNorm(g), v, dw).values()
    close(np.linalg.norm(w, axis=1), np.abs(g), 1e-15)
    assert np.all(np.abs(np.sum(v * dv, axis=1)) < 1e-15 * np.sum(np.abs(v * dv), axis=1))


def test_the_size_of_v_is_not_seen():
    rng = np.random.default_rng(5)
    v, g = rng.standard_normal((5, 9)), rng.standard_normal(5)
    same_bits(WeightNorm(g).forward(v * 2.0 ** np.arange(-2, 3)[:, None])[0], WeightNorm(g).forward(v)[0])


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 1, 1)])
def test_the_lengths_keep_the_shape_in_which_they_came(shape):
    rng = np.random.default_rng(6)
    v, dw, g = rng.standard_normal((5, 3, 4)), rng.standard_normal((5, 3, 4)), rng.standard_normal(shape)
    w, dv, dg = run(WeightNorm(g), v, dw).values()
    flat_w, flat_dv, flat_dg = run(WeightNorm(g.ravel()), v.reshape(5, 12), dw.reshape(5, 12)).values()
    assert dg.shape == shape
    same_bits(
        {"w": w.reshape(5, 12), "dv": dv.reshape(5, 12), "dg": dg.ravel()},
        {"w": flat_w, "dv": flat_dv, "dg": flat_dg},
    )


@pytest.mark.parametrize("size", [1e-300, 1e-10, 1.0, 1e300])
@SHAPES
def test_of_takes_over_a_weight(shape, size):
    weight = size * np.random.default_rng(7).standard_normal(shape)
    layer = WeightNorm.of(weight)
    assert layer.params["weight_g"].shape == shape[:1]
    close(layer.forward(weight)[0], weight, 1e-15)


@pytest.mark.parametrize("dtype", ["float32", "float16", BFLOAT16], ids=str)
def test_of_keeps_the_dtype(dtype):
    weight = np.random.default_rng(8).standard_normal((5, 9)).astype(dtype)
    layer = WeightNorm.of(weight)
    assert layer.params["weight_g"].dtype == weight.dtype
    close(layer.params["weight_g"].astype("float64"), np.linalg.norm(weight.astype("float64"), axis=1), 2.0**-8)


def test_a_row_of_zeros_has_no_direction():
    w, _ = WeightNorm(np.array([1.0, 5.0])).forward(np.array([[0.0, 0.0], [3.0, 4.0]]))
    assert np.all(np.isnan(w[0]))
    close(w[1], [3, 4], 1e-15)
    np.testing.assert_array_equal(WeightNorm.of(np.array([[0.0, 0.0], [3.0, 4.0]])).params["weight_g"], [0, 5])


@pytest.mark.parametrize("shape", [(3,), (), (3, 0), (0, 4)])
def test_the_lengths_of_what_is_no_weight_are_refused(shape):
    with pytest.raises(ValueError, match=rf"WeightNorm: weight has shape {re.escape(str(shape))}\. It takes \(outputs"):
        WeightNorm.of(np.ones(shape))


@pytest.mark.parametrize(("weight", "message"), [([[1.0]], "got a list"), (np.ones((2, 3), int), "weight is int64")])
def test_the_lengths_of_what_is_not_of_floats_are_refused(weight, message):
    with pytest.raises(TypeError, match=rf"WeightNorm.*{message}"):
        WeightNorm.of(weight)
