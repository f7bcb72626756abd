import re

import numpy as np
import pytest

from npnorm import Config, LayerNorm, RMSNorm, Transformer
from npnorm.blocks import Chain, PreNorm
from npnorm.config import init
from npnorm.layers import Linear
from npnorm.norms import centre_outputs, fold, to_rms_norm
from npnorm.tree import leaves, map_tree
from tests.check import BFLOAT16, close, draw, rounded, same_bits

NORMS = {
    "LayerNorm": lambda w, b: LayerNorm(w, b, eps=0.3),
    "LayerNorm without bias": lambda w, b: LayerNorm(w, eps=0.3),
    "LayerNorm without weight": lambda w, b: LayerNorm(None, b, eps=0.3),
    "LayerNorm alone": lambda w, b: LayerNorm(eps=0.3),
    "RMSNorm": lambda w, b: RMSNorm(w, b, eps=0.3),
    "RMSNorm without bias": lambda w, b: RMSNorm(w, eps=0.3),
    "RMSNorm with offset": lambda w, b: RMSNorm(w, b, eps=0.3, offset=1),
}


def arrays(rng, dtype="float64"):
    """Return weight and bias of a norm of 7 features, and matrix and bias of a linear layer that reads it."""
    return draw(rng, dtype, weight=7, bias=7, matrix=(5, 7), c=5).values()


def in_a_row(norm, linear):
    return Chain({"norm": norm, "linear": linear})


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("biased", [False, True], ids=["linear without bias", "linear with bias"])
def test_folded_in_the_function_is_the_same(name, biased):
    rng = np.random.default_rng(1)
    w, b, matrix, c = arrays(rng)
    norm, linear = NORMS[name](w, b), Linear(matrix, c if biased else None)
    before = map_tree(np.copy, {"norm": norm.params, "linear": linear.params})
    bare, folded = fold(norm, linear)
    assert type(bare) is type(norm)
    assert bare.params == {}
    assert ("bias" in folded.params) == (biased or "bias" in norm.params)
    x, dy = rng.standard_normal((4, 3, 7)), rng.standard_normal((4, 3, 5))
    y, saved = in_a_row(norm, linear).forward(x)
    dx, _ = in_a_row(norm, linear).backward(dy, saved)
    y_folded, saved = in_a_row(bare, folded).forward(x)
    dx_folded, _ = in_a_row(bare, folded).backward(dy, saved)
    close(y_folded, y)
    close(dx_folded, dx)
    same_bits({"norm": norm.params, "linear": linear.params}, before)


def test_a_matrix_folded_by_hand():
    # W diag(w) and W b + c
    norm = LayerNorm(np.array([2.0, 0.5]), np.array([1.0, -1.0]))
    _, linear = fold(norm, Linear(np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([0.0, 1.0])))
    same_bits(linear.params, {"weight": np.array([[2.0, 1.0], [6.0, 2.0]]), "bias": np.array([-1.0, 0.0])})


def test_the_gradient_of_the_weight_comes_from_that_of_the_folded_matrix():
    rng = np.random.default_rng(2)
    w, b, matrix, c = arrays(rng)
    norm, linear = LayerNorm(w, b, eps=0.3), Linear(matrix, c)
    x, dy = rng.standard_normal((4, 7)), rng.standard_normal((4, 5))
    two, one = in_a_row(norm, linear), in_a_row(*fold(norm, linear))
    _, grads = two.backward(dy, two.forward(x)[1])
    _, folded = one.backward(dy, one.forward(x)[1])
    dm, dc = folded["linear"]["weight"], folded["linear"]["bias"]
    close(grads["norm"]["weight"], np.sum(dm * matrix, axis=0))
    close(grads["norm"]["bias"], dc @ matrix)
    close(grads["linear"]["weight"], dm * w + np.outer(dc, b))
    close(grads["linear"]["bias"], dc)


def test_settings_stay_with_the_norm():
    linear = Linear(np.ones((2, 3)))
    layer, _ = fold(LayerNorm(np.ones(3), eps=0.7, statistics="gathered", compute="float32"), linear)
    assert (layer.eps, layer.statistics, layer.compute) == (0.7, "gathered", "float32")
    layer, _ = fold(RMSNorm(np.ones(3), eps=0.7, compute="float32"), linear)
    assert (layer.eps, layer.compute) == (0.7, "float32")


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)
def test_the_folded_matrix_is_rounded_once(dtype):
    w, b, matrix, c = arrays(np.random.default_rng(3), dtype)
    _, linear = fold(RMSNorm(w, b), Linear(matrix, c))
    wide_w, wide_b, wide_matrix, wide_c = (a.astype("float64") for a in (w, b, matrix, c))
    same_bits(linear.params["weight"], rounded(wide_matrix * wide_w, dtype))
    same_bits(linear.params["bias"], rounded(wide_matrix @ wide_b + wide_c, dtype))


@pytest.mark.parametrize("bad", [np.ones((2, 3)), LayerNorm(), None])
def test_what_is_not_a_linear_layer_is_refused(bad):
    with pytest.raises(
        TypeError, match=r"^fold takes a Linear after the norm; got .*\. Make one: npnorm\.layers\.Linear"
    ):
        fold(LayerNorm.init(3), bad)


def test_the_offset_is_added_in_float32_before_folding():
    w = np.full(2, 0.00390625, BFLOAT16)  # 1 + w is 1 in bfloat16
    _, linear = fold(RMSNorm(w, offset=1), Linear(np.ones((1, 2), "float32")))
    same_bits(linear.params["weight"], np.full((1, 2), 1.00390625, "float32"))
    _, linear = fold(RMSNorm(np.full(2, 1e-9, "float32"), offset=1), Linear(np.ones((1, 2))))
    same_bits(linear.params["weight"], np.ones((1, 2)))


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("shape", [(5, 6), (7, 5)])
def test_a_matrix_that_does_not_read_the_norm_is_refused(kind, shape):
    message = f"fold: weight of the norm has shape (7,), the matrix {shape}. The linear layer must read"
    with pytest.raises(ValueError, match=re.escape(message)):
        fold(kind(np.ones(7)), Linear(np.ones(shape)))


def test_a_bias_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"fold: bias of the norm has shape \(7,\), the matrix \(7, 6\)"):
        fold(RMSNorm(None, np.ones(7)), Linear(np.ones((7, 6))))


def test_a_norm_over_two_axes_is_refused():
    for norm in (LayerNorm(np.ones((2, 7))), LayerNorm(axes=2), RMSNorm(axes=2)):
        with pytest.raises(ValueError, match=r"fold: the norm is over 2 axes, and a linear layer reads one"):
            fold(norm, Linear(np.ones((5, 7))))


def test_a_centred_writer_writes_rows_of_mean_0():
    rng = np.random.default_rng(4)
    params = {"weight": rng.standard_normal((7, 5)) + 3, "bias": rng.standard_normal(7) - 2}
    before = map_tree(np.copy, params)
    centred = centre_outputs(params)
    x = rng.standard_normal((4, 3, 5))
    y, expected = (Linear(**p).forward(x)[0] for p in (centred, params))
    assert np.all(np.abs(np.mean(y, axis=-1)) < 1e-15 * np.max(np.abs(expected)))
    close(y, expected - np.mean(expected, axis=-1, keepdims=True), 1e-14)
    same_bits(params, before)


def test_a_centred_embedding_has_rows_of_mean_0():
    table = np.random.default_rng(5).standard_normal((11, 7)) + 3
    centred = centre_outputs({"weight": table}, axis=1)["weight"]
    assert np.all(np.abs(np.mean(centred, axis=1)) < 1e-15)
    close(centred, table - np.mean(table, axis=1, keepdims=True), 1e-15)


def test_centred_twice_is_centred_once():
    params = {"weight": np.array([[1.0, 5.0], [3.0, 1.0]]), "bias": np.array([4.0, 0.0])}
    once = centre_outputs(params)
    same_bits(once, {"weight": np.array([[-1.0, 2.0], [1.0, -2.0]]), "bias": np.array([2.0, -2.0])})
    same_bits(centre_outputs(once), once)


@pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)
def test_centred_parameters_keep_their_dtype(dtype):
    weight = np.random.default_rng(6).standard_normal((7, 5)).astype(dtype)
    wide = weight.astype("float64")
    same_bits(centre_outputs({"weight": weight})["weight"], rounded(wide - np.mean(wide, axis=0), dtype))


@pytest.mark.parametrize("names", [(), ("weight",), ("bias",), ("weight", "bias")], ids="+".join)
def test_on_centred_rows_a_layer_norm_is_its_rms_norm(names):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((4, 3, 7))
    x -= np.mean(x, axis=-1, keepdims=True)
    norm = LayerNorm(**{name: rng.standard_normal(7) for name in names}, eps=0.3)
    other = to_rms_norm(norm)
    assert type(other) is RMSNorm
    assert other.params == norm.params
    assert other.eps == 0.3
    y, saved = norm.forward(x)
    y_other, saved_other = other.forward(x)
    close(y_other, y)
    dy = rng.standard_normal(x.shape)
    (dx, grads), (dx_other, grads_other) = norm.backward(dy, saved), other.backward(dy, saved_other)
    close(dx_other - np.mean(dx_other, axis=-1, keepdims=True), dx)  # a centred writer takes the mean out
    for name in names:
        close(grads_other[name], grads[name])
    assert np.abs(norm.forward(x + 1)[0] - other.forward(x + 1)[0]).max() > 0.1


def test_to_rms_norm_keeps_axes_and_precision():
    other = to_rms_norm(LayerNorm(axes=2, compute="float32"))
    assert (other.axes, other.compute, other.rows.compute) == (2, "float32", "float32")


SIZES = {"width": 24, "depth": 2, "heads": 4, "hidden": 20, "context": 9}
PRE_LAYER_NORM = Config.original(13, placement="pre", tied=False, **SIZES)


def model(rng, norm_bias=True):
    """Return parameters of a pre-norm transformer, away from their first values and from mean 0, and ids."""
    params = map_tree(lambda a: a + 0.3 * rng.standard_normal(a.shape) + 0.1, init(PRE_LAYER_NORM, rng, "float64"))
    if not norm_bias:
        for name, a in leaves(params):
            if name.endswith("norm.bias"):
                a[:] = 0
    return params, rng.integers(0, 13, (3, 8))


def centred(params):
    """Return the parameters with all writers to the residual stream centred."""
    blocks = {
        i: {
            "attention": {
                "norm": block["attention"]["norm"],
                "sublayer": block["attention"]["sublayer"]
                | {"o_proj": centre_outputs(block["attention"]["sublayer"]["o_proj"])},
            },
            "mlp": {
                "norm": block["mlp"]["norm"],
                "sublayer": block["mlp"]["sublayer"]
                | {"down_proj": centre_outputs(block["mlp"]["sublayer"]["down_proj"])},
            },
        }
        for i, block in params["blocks"].items()
    }
    writers = {name: centre_outputs(params[name], axis=1) for name in ("embedding", "positions")}
    return params | writers | {"blocks": blocks}


def with_rms_norms(transformer):
    """Return the stack of a transformer with the RMSNorm of each LayerNorm in its place, bias and all."""

    def replaced(part):
        if isinstance(part, Chain):
            return Chain({name: replaced(layer) for name, layer in part.layers.items()})
        if isinstance(part, PreNorm):
            return PreNorm(to_rms_norm(part.norm), part.sublayer)
        return to_rms_norm(part) if isinstance(part, LayerNorm) else part

    return replaced(transformer.stack)


def test_centred_writers_leave_the_logits_of_a_pre_layer_norm_transformer_alone():
    params, ids = model(np.random.default_rng(8))
    logits, _ = Transformer(PRE_LAYER_NORM, params).forward(ids)
    close(Transformer(PRE_LAYER_NORM, centred(params)).forward(ids)[0], logits)


def test_with_centred_writers_a_pre_layer_norm_transformer_is_a_pre_rms_norm_transformer():
    rng = np.random.default_rng(9)
    params, ids = model(rng)
    layers = Transformer(PRE_LAYER_NORM, centred(params))
    stack = with_rms_norms(layers)
    h, _ = layers.embedding.forward(ids)
    z, saved = stack.forward(h)
    logits, _ = layers.head.forward(z)
    expected, expected_saved = Transformer(PRE_LAYER_NORM, params).forward(ids)
    close(logits, expected)
    # the gradients of all that reads the residual stream are the same, too
    dlogits = rng.standard_normal(logits.shape)
    _, grads = stack.backward(layers.head.backward(dlogits, layers.head.forward(z)[1])[0], saved)
    _, expected_grads = Transformer(PRE_LAYER_NORM, params).backward(dlogits, expected_saved)
    readers = [
        (name, a)
        for name, a in leaves(grads)
        if not name.startswith("positions") and "o_proj" not in name and "down_proj" not in name
    ]
    assert len(readers) == 2 * (4 + 6 + 2) + 2  # norms; q, k, v; up; the last norm
    by_name = dict(leaves(expected_grads))
    for name, a in readers:
        if not name.endswith("k_proj.bias"):  # shifts all scores of a query: 0 but for rounding
            close(a, by_name[name], 1e-11)


def test_a_config_has_it_where_the_norms_have_no_bias():
    params, ids = model(np.random.default_rng(10), norm_bias=False)
    rms = Config.original(13, placement="pre", tied=False, norm="rms", **SIZES)

    def without_bias(tree, path=""):
        if not isinstance(tree, dict):
            return tree
        return {name: without_bias(child, name) for name, child in tree.items() if (path, name) != ("norm", "bias")}

    logits, _ = Transformer(PRE_LAYER_NORM, params).forward(ids)
    close(Transformer(rms, without_bias(centred(params))).forward(ids)[0], logits)
    assert np.abs(Transformer(rms, without_bias(params)).forward(ids)[0] - logits).max() > 0.1


@pytest.mark.parametrize("forgotten", ["embedding", "positions", "o_proj", "down_proj"])
def test_one_forgotten_writer_is_another_function(forgotten):
    params, ids = model(np.random.default_rng(11))
    some = centred(params)
    if forgotten in params:
        some[forgotten] = params[forgotten]
    else:
        part = "attention" if forgotten == "o_proj" else "mlp"
        some["blocks"]["0"][part]["sublayer"][forgotten] = params["blocks"]["0"][part]["sublayer"][forgotten]
    layers = Transformer(PRE_LAYER_NORM, some)
    logits, _ = layers.head.forward(with_rms_norms(layers).forward(layers.embedding.forward(ids)[0])[0])
    assert np.abs(logits - Transformer(PRE_LAYER_NORM, params).forward(ids)[0]).max() > 0.01


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_offset_is_added_before_the_weight_is_rounded(dtype):
    norm = RMSNorm(np.full(2, 2.0**-12, dtype), eps=0, offset=1)
    x = np.array([[3.0, 4.0]])
    bare, linear = fold(norm, Linear(np.eye(2)))
    close(linear.forward(bare.forward(x)[0])[0], norm.forward(x)[0], 1e-15)


def test_only_floats_are_centred():
    with pytest.raises(TypeError, match=r"centre_outputs works on float16.*; weight is int64\. Convert it first"):
        centre_outputs({"weight": np.array([[1, 2], [2, 2]])})
