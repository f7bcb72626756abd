import math

import numpy as np
import pytest
import torch

from npnorm.layers import Attention, Rotary
from npnorm.layers.attention import QUERIES
from npnorm.threads import set_threads
from npnorm.tree import leaves, map_tree
from tests.check import check_backward, check_finite_differences, close, same_bits

HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (6, 3), (6, 2), (3, 1)])
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "without a mask"])
ROTARY = pytest.mark.parametrize("rotary", [None, Rotary()], ids=["no positions", "rotary"])


def draw(rng, width, heads, kv_heads, d, bias=False):
    """Return parameters; the heads together need not be as wide as x."""
    shapes = {"q_proj": (heads * d, width), "k_proj": (kv_heads * d, width), "v_proj": (kv_heads * d, width)}
    shapes["o_proj"] = (width, heads * d)
    params = {name: {"weight": rng.standard_normal(shape) / 2} for name, shape in shapes.items()}
    if bias:
        params = {name: {**p, "bias": rng.standard_normal(shapes[name][0])} for name, p in params.items()}
    return params


def one_feature(q, k, v, o):
    """Return the parameters of a single head of a single feature."""
    values = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": o}
    return {name: {"weight": np.array([[float(value)]])} for name, value in values.items()}


def test_two_positions_worked_by_hand():
    # x = (0, a), a^2 = log 3: the second position scores 0 and log 3, so it reads with 1/4 and p = 3/4
    # y1 = 4 x1, y2 = 4 (x1 + p (x2 - x1)), p = sigmoid(x2^2 - x1 x2)
    # dy2/dx1 = 4 (1 - p - x2 p (1 - p) (x2 - x1)), dy2/dx2 = 4 (p + (2 x2 - x1) p (1 - p) (x2 - x1))
    log3 = math.log(3)
    a = math.sqrt(log3)
    layer = Attention(one_feature(1, 1, 1, 4), heads=1)
    y, saved = layer.forward(np.array([[[0.0], [a]]]))
    close(y, [[[0.0], [3 * a]]], 1e-15)
    dx, grads = layer.backward(np.array([[[5.0], [7.0]]]), saved)
    close(dx, [[[20 + 28 * (1 / 4 - 3 / 16 * log3)], [28 * (3 / 4 + 3 / 8 * log3)]]], 1e-14)
    # by wq, at 1: dy2/dwq = 4 a p (1 - p) log 3; by wv: y2; by wo: y2 / 4
    close(grads["q_proj"]["weight"], [[7 * 4 * a * 3 / 16 * log3]], 1e-14)
    close(grads["k_proj"]["weight"], [[7 * 4 * a * 3 / 16 * log3]], 1e-14)
    close(grads["v_proj"]["weight"], [[7 * 3 * a]], 1e-14)
    close(grads["o_proj"]["weight"], [[7 * 3 * a / 4]], 1e-14)


def test_without_scores_each_position_reads_the_mean_of_those_before():
    x = np.random.default_rng(1).standard_normal((2, 6, 1))
    y, _ = Attention(one_feature(0, 1, 1, 2), heads=1).forward(x)
    close(y, 2 * np.cumsum(x, axis=1) / np.arange(1, 7)[:, None], 1e-15)


def test_two_positions_without_a_mask_worked_by_hand():
    # x = (0, a), a^2 = log 3: the first position scores 0 and 0, and reads with 1/2 and 1/2; the second as above
    a = math.sqrt(math.log(3))
    layer = Attention(one_feature(1, 1, 1, 4), heads=1, causal=False)
    y, saved = layer.forward(np.array([[[0.0], [a]]]))
    close(y, [[[2 * a], [3 * a]]], 1e-15)
    close(saved.p, [[[[[1 / 2, 1 / 2], [1 / 4, 3 / 4]]]]], 1e-15)
    # by wv: y1 and y2; by wo: a quarter of that; by x1: y1 = 4 (x1 + p1 (x2 - x1)), p1 = sigmoid(x1 x2 - x1^2)
    dx, grads = layer.backward(np.array([[[5.0], [0.0]]]), saved)
    close(dx, [[[20 * (1 / 2 + a * a / 4)], [20 * (1 / 2)]]], 1e-14)
    close(grads["v_proj"]["weight"], [[5 * 2 * a]], 1e-14)
    close(grads["o_proj"]["weight"], [[5 * 2 * a / 4]], 1e-14)


@HEADS
@ROTARY
@CAUSAL
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_backward_is_the_derivative(heads, kv_heads, rotary, causal, bias):
    rng = np.random.default_rng(2)
    params, x = draw(rng, 7, heads, kv_heads, 4, bias), rng.standard_normal((3, 5, 7))
    check_backward(lambda p: Attention(p, heads, kv_heads, rotary, causal=causal), params, x, rng)


@ROTARY
@CAUSAL
def test_backward_agrees_with_finite_differences(rotary, causal):
    rng = np.random.default_rng(3)
    params, x = draw(rng, 3, 2, 1, 2, bias=True), rng.standard_normal((2, 4, 3))
    check_finite_differences(lambda p: Attention(p, 2, 1, rotary, causal=causal), params, x, rng)


@HEADS
@CAUSAL
def test_torch_gives_the_same(heads, kv_heads, causal):
    rng = np.random.default_rng(4)
    x, dy, params = (
        rng.standard_normal((3, 5, 7)),
        rng.standard_normal((3, 5, 7)),
        draw(rng, 7, heads, kv_heads, 4, True),
    )
    tensor = torch.tensor(x, requires_grad=True)
    tensors = map_tree(lambda a: torch.tensor(a, requires_grad=True), params)

    def project(name, x):
        return torch.nn.functional.linear(x, **tensors[name])

    q, k, v = (project(name, tensor).unflatten(-1, (-1, 4)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
    o = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    expected = project("o_proj", o.transpose(1, 2).flatten(-2))
    expected.backward(torch.tensor(dy))
    layer = Attention(params, heads, kv_heads, causal=causal)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    close(y, expected.detach())
    close(dx, tensor.grad)
    for (_, came), (name, theirs) in zip(leaves(grads), leaves(tensors), strict=True):
        if name == "k_proj.bias":  # a softmax does not see a shift: zero, up to rounding
            close(came + 1, np.ones(came.shape), 1e-14)
        else:
            close(came, theirs.grad)


@ROTARY
def test_a_later_position_does_not_change_a_bit_before_it(rotary):
    rng = np.random.default_rng(5)
    layer = Attention(draw(rng, 7, 6, 2, 4), 6, 2, rotary)
    x = rng.standard_normal((2, 9, 7))
    other = x.copy()
    other[:, 5:] = 100 * rng.standard_normal((2, 4, 7))
    y, y_other = layer.forward(x)[0], layer.forward(other)[0]
    same_bits(y[:, :5], y_other[:, :5])
    assert np.all(np.any(y[:, 5:] != y_other[:, 5:], axis=-1))


def test_the_gradient_of_an_early_position_does_not_reach_a_later_one():
    rng = np.random.default_rng(6)
    layer = Attention(draw(rng, 7, 6, 2, 4), 6, 2, Rotary())
    dy = rng.standard_normal((2, 9, 7))
    dy[:, 5:] = 0
    dx, _ = layer.backward(dy, layer.forward(rng.standard_normal((2, 9, 7)))[1])
    np.testing.assert_array_equal(dx[:, 5:], 0)
    assert np.all(np.any(dx[:, :5] != 0, axis=-1))


@pytest.mark.parametrize("length", [5, QUERIES + 3])
def test_without_positions_and_mask_permuted_positions_give_permuted_results(length):
    rng = np.random.default_rng(24)
    layer, order = Attention(draw(rng, 7, 6, 2, 4), 6, 2, causal=False), rng.permutation(length)
    x, dy = rng.standard_normal((2, length, 7)), rng.standard_normal((2, length, 7))
    y, saved = layer.forward(x)
    y_permuted, saved_permuted = layer.forward(x[:, order])
    close(y_permuted, y[:, order], 1e-13)
    close(layer.backward(dy[:, order], saved_permuted)[0], layer.backward(dy, saved)[0][:, order], 1e-13)


def test_sequences_of_a_batch_do_not_see_each_other():
    rng = np.random.default_rng(7)
    layer, x = Attention(draw(rng, 7, 6, 2, 4), 6, 2, Rotary()), rng.standard_normal((3, 5, 7))
    close(layer.forward(x)[0][1:2], layer.forward(x[1:2])[0], 1e-14)


@ROTARY
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
def test_grouped_queries_are_full_attention_with_repeated_keys_and_values(rotary, kv_heads):
    rng = np.random.default_rng(8)
    params, x, dy = draw(rng, 7, 6, kv_heads, 4), rng.standard_normal((2, 5, 7)), rng.standard_normal((2, 5, 7))
    each = 6 // kv_heads
    full = dict(params)
    for name in ("k_proj", "v_proj"):
        full[name] = {"weight": params[name]["weight"].reshape(kv_heads, 4, 7).repeat(each, axis=0).reshape(24, 7)}
    layer, repeated = Attention(params, 6, kv_heads, rotary), Attention(full, 6, 6, rotary)
    y, saved = layer.forward(x)
    y_full, saved_full = repeated.forward(x)
    close(y, y_full, 1e-14)
    dx, grads = layer.backward(dy, saved)
    dx_full, grads_full = repeated.backward(dy, saved_full)
    close(dx, dx_full, 1e-13)
    close(grads["q_proj"]["weight"], grads_full["q_proj"]["weight"], 1e-13)
    for name in ("k_proj", "v_proj"):
        summed = grads_full[name]["weight"].reshape(kv_heads, each, 4, 7).sum(axis=1).reshape(-1, 7)
        close(grads[name]["weight"], summed, 1e-13)


def test_a_single_position_reads_itself():
    rng = np.random.default_rng(9)
    params, x = draw(rng, 7, 3, 3, 4), rng.standard_normal((2, 1, 7))
    y, _ = Attention(params, 3, rotary=Rotary()).forward(x)
    close(y, x @ params["v_proj"]["weight"].T @ params["o_proj"]["weight"].T, 1e-14)


def test_an_empty_batch_gives_empty_results_and_zero_gradients():
    layer = Attention(draw(np.random.default_rng(17), 7, 6, 2, 4), 6, 2, Rotary())
    y, saved = layer.forward(np.zeros((0, 5, 7)))
    dx, grads = layer.backward(y, saved)
    assert y.shape == dx.shape == (0, 5, 7)
    same_bits(grads, map_tree(np.zeros_like, layer.params))


def test_large_scores_do_not_overflow():
    rng = np.random.default_rng(10)
    layer = Attention(draw(rng, 7, 3, 3, 4), 3)
    y, saved = layer.forward(1e4 * rng.standard_normal((2, 5, 7)))
    dx, _ = layer.backward(rng.standard_normal((2, 5, 7)), saved)
    assert np.all(np.isfinite(y))
    assert np.all(np.isfinite(dx))
    close(saved.p.sum(axis=-1), np.ones(saved.p.shape[:-1]), 1e-15)


def test_float32_stays_float32():
    rng = np.random.default_rng(11)
    params = map_tree(lambda a: a.astype("float32"), draw(rng, 7, 6, 2, 4, True))
    layer, x = Attention(params, 6, 2, Rotary()), rng.standard_normal((2, 5, 7)).astype("float32")
    y, saved = layer.forward(x)
    dx, grads = layer.backward(y, saved)
    assert {a.dtype for a in (y, dx, *(g for _, g in leaves(grads)))} == {np.dtype("float32")}


def test_parameters_are_copies():
    params = draw(np.random.default_rng(12), 7, 6, 2, 4)
    held = Attention(params, 6, 2).params
    same_bits(held, params)
    assert not any(np.shares_memory(a, b) for (_, a), (_, b) in zip(leaves(held), leaves(params), strict=True))


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 5, 7)])
def test_an_input_without_batch_and_length_is_refused(shape):
    layer = Attention(draw(np.random.default_rng(13), 7, 2, 1, 4), 2, 1)
    with pytest.raises(ValueError, match=r"Attention takes x of shape \(batch, length, width\); got \(.*5, 7\)"):
        layer.forward(np.ones(shape))


def test_an_input_of_another_width_or_dtype_is_refused():
    layer = Attention(draw(np.random.default_rng(14), 7, 2, 1, 4), 2, 1)
    with pytest.raises(ValueError, match=r"Attention takes 7 features; x has shape \(2, 5, 8\)"):
        layer.forward(np.ones((2, 5, 8)))
    with pytest.raises(TypeError, match="Attention works in float32 or float64; the dtype of x is int64"):
        layer.forward(np.ones((2, 5, 7), "int64"))


@pytest.mark.parametrize(("heads", "kv_heads"), [(5, 5), (6, 4), (3, 3), (6, 3)])
def test_heads_that_do_not_fit_the_weights_are_refused(heads, kv_heads):
    params = draw(np.random.default_rng(15), 7, 6, 2, 4)
    with pytest.raises(ValueError, match=f"Attention with {heads} heads and {kv_heads} heads of keys and values needs"):
        Attention(params, heads, kv_heads)


@pytest.mark.parametrize("name", ["k_proj", "v_proj", "o_proj"])
def test_a_missing_or_misshapen_projection_is_refused(name):
    params = draw(np.random.default_rng(16), 7, 6, 2, 4)
    with pytest.raises(ValueError, match=rf"missing: \['{name}\.weight'\]"):
        Attention({key: p for key, p in params.items() if key != name}, 6, 2)
    with pytest.raises(ValueError, match=r"needs weights of shapes .*; got"):
        Attention({**params, name: {"weight": np.ones((3, 7))}}, 6, 2)


def plain(layer, x):
    """Return y by the formula, with whole matrices of scores."""

    def project(name):
        p = layer.params[name]
        return (x @ p["weight"].T + p.get("bias", 0)).reshape(*x.shape[:2], -1, layer.d).swapaxes(1, 2)

    q, k, v = (project(name) for name in ("q_proj", "k_proj", "v_proj"))
    if layer.rotary:
        q, k = layer.rotary.forward(q)[0], layer.rotary.forward(k)[0]
    k, v = (np.repeat(a, layer.shared_by, axis=1) for a in (k, v))
    s = q @ k.swapaxes(-1, -2) / math.sqrt(layer.d)
    p = np.exp(s + np.triu(np.full(s.shape[-2:], -np.inf), 1) if layer.causal else s)
    o = p / p.sum(axis=-1, keepdims=True) @ v
    return o.swapaxes(1, 2).reshape(*x.shape[:2], -1) @ layer.params["o_proj"]["weight"].T


@ROTARY
@pytest.mark.parametrize("length", [QUERIES - 1, QUERIES, QUERIES + 1, 2 * QUERIES + 3])
@pytest.mark.parametrize("kv_heads", [2, 4])
@CAUSAL
def test_queries_in_blocks_give_what_whole_matrices_give(rotary, length, kv_heads, causal):
    rng = np.random.default_rng(18)
    layer = Attention(draw(rng, 7, 4, kv_heads, 4), 4, kv_heads, rotary, causal=causal)
    x = rng.standard_normal((2, length, 7))
    y, saved = layer.forward(x)
    close(y, plain(layer, x), 1e-13)
    assert np.any(np.triu(saved.p, 1)) != causal


@CAUSAL
def test_backward_of_several_blocks_of_queries_is_the_derivative(causal):
    rng = np.random.default_rng(19)
    params, x = draw(rng, 5, 4, 2, 2, bias=True), rng.standard_normal((2, 2 * QUERIES + 3, 5))
    check_backward(lambda p: Attention(p, 4, 2, Rotary(), causal=causal), params, x, rng)


@ROTARY
def test_any_number_of_threads_gives_the_same_bits(rotary):
    rng = np.random.default_rng(20)
    layer = Attention(map_tree(lambda a: a.astype("float32"), draw(rng, 7, 4, 2, 4)), 4, 2, rotary)
    x, dy = (rng.standard_normal((9, 2 * QUERIES, 7)).astype("float32") for _ in range(2))
    results = []
    for threads in (1, 2, 3):
        set_threads(threads)
        try:
            y, saved = layer.forward(x)
            results.append({"y": y, "backward": dict(enumerate(layer.backward(dy, saved)))})
        finally:
            set_threads(None)
    same_bits(results[1], results[0])
    same_bits(results[2], results[0])


@pytest.mark.parametrize("with_bias", [("q_proj",), ("k_proj", "v_proj"), ("v_proj", "o_proj")])
def test_some_projections_may_have_a_bias(with_bias):
    rng = np.random.default_rng(21)
    params = draw(rng, 5, 4, 2, 2)
    params = {
        n: {**p, "bias": rng.standard_normal(len(p["weight"]))} if n in with_bias else p for n, p in params.items()
    }
    check_backward(lambda p: Attention(p, 4, 2), params, rng.standard_normal((2, 3, 5)), rng)


def test_a_parameter_changed_in_place_changes_the_output():
    rng = np.random.default_rng(22)
    params, x = draw(rng, 5, 4, 2, 2, bias=True), rng.standard_normal((2, 3, 5))
    for name, array in leaves(params):
        layer = Attention(params, 4, 2)
        held = dict(leaves(layer.params))[name]
        held += rng.standard_normal(held.shape)
        part, key = name.split(".")
        changed = {**params, part: {**params[part], key: held.copy()}}
        same_bits(layer.forward(x)[0], Attention(changed, 4, 2).forward(x)[0])
        assert not np.array_equal(held, array)


def test_projections_of_two_precisions_are_refused():
    params = draw(np.random.default_rng(23), 7, 2, 1, 4)
    params["k_proj"]["weight"] = params["k_proj"]["weight"].astype("float32")
    with pytest.raises(TypeError, match="q_proj, k_proj and v_proj must have one dtype"):
        Attention(params, 2, 1)
