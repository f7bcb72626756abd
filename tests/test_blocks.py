import numpy as np
import pytest

from npnorm import LayerNorm, RMSNorm
from npnorm.blocks import Chain, PostNorm, PreNorm
from npnorm.layers import GELU, MLP, Attention, Linear, SwiGLU
from tests.check import check_backward, check_central_difference, close, draw, same_bits

PLACES = pytest.mark.parametrize("place", [PreNorm, PostNorm])
WIDTH = 6


def linear(rng, outputs, inputs):
    return {"weight": rng.standard_normal((outputs, inputs)), "bias": rng.standard_normal(outputs)}


def mlp(rng):
    return {"up_proj": linear(rng, 9, WIDTH), "down_proj": linear(rng, WIDTH, 9)}


def swiglu(rng):
    return mlp(rng) | {"gate_proj": linear(rng, 9, WIDTH)}


def attention(rng):
    return {name: linear(rng, WIDTH, WIDTH) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}


SUBLAYERS = pytest.mark.parametrize(
    ("sublayer", "params_of"), [(MLP, mlp), (SwiGLU, swiglu), (lambda p: Attention(p, 3), attention)]
)


def scalar(value):
    return Linear(np.array([[float(value)]]))


def test_the_placements_worked_by_hand():
    # the "norm" multiplies by 3, the sub-layer by 5: pre: y = x + 5 (3 x) = 16 x; post: y = 3 (x + 5 x) = 18 x
    x, dy = np.array([[2.0]]), np.array([[7.0]])
    for place, factor, by_norm, by_sublayer in ((PreNorm, 16, 7 * 5 * 2, 7 * 3 * 2), (PostNorm, 18, 7 * 12, 7 * 3 * 2)):
        layer = place(scalar(3), scalar(5))
        y, saved = layer.forward(x)
        np.testing.assert_array_equal(y, [[factor * 2]])
        dx, grads = layer.backward(dy, saved)
        np.testing.assert_array_equal(dx, [[factor * 7]])
        np.testing.assert_array_equal(grads["norm"]["weight"], [[by_norm]])
        np.testing.assert_array_equal(grads["sublayer"]["weight"], [[by_sublayer]])


@PLACES
@SUBLAYERS
@pytest.mark.parametrize(("norm", "names"), [(LayerNorm, ("weight", "bias")), (RMSNorm, ("weight",))])
def test_backward_is_the_derivative(place, sublayer, params_of, norm, names):
    rng = np.random.default_rng(1)

    def make(params):
        return place(norm(**params["norm"], eps=0.1), sublayer(params["sublayer"]))

    params = {"norm": draw(rng, **dict.fromkeys(names, WIDTH)), "sublayer": params_of(rng)}
    x = rng.standard_normal((2, 5, WIDTH))
    check_backward(make, params, x, rng)
    check_central_difference(make, params, x, rng)


@PLACES
def test_two_blocks_in_a_chain_backward_is_the_derivative(place):
    rng = np.random.default_rng(2)

    def make(params):
        return Chain({name: place(LayerNorm(**p["norm"]), MLP(p["sublayer"])) for name, p in params.items()})

    params = {name: {"norm": draw(rng, weight=WIDTH, bias=WIDTH), "sublayer": mlp(rng)} for name in ("0", "1")}
    check_backward(make, params, rng.standard_normal((2, 5, WIDTH)), rng)


def test_with_a_silent_sublayer_pre_is_the_identity_and_post_is_the_norm():
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((3, WIDTH)), rng.standard_normal((3, WIDTH))
    norm, silent = LayerNorm(**draw(rng, weight=WIDTH, bias=WIDTH)), Linear(np.zeros((WIDTH, WIDTH)))
    y, saved = PreNorm(norm, silent).forward(x)
    same_bits(y, x)
    same_bits(PreNorm(norm, silent).backward(dy, saved)[0], dy)
    y, saved = PostNorm(norm, silent).forward(x)
    y_norm, saved_norm = norm.forward(x)
    same_bits(y, y_norm)
    same_bits(PostNorm(norm, silent).backward(dy, saved)[0], norm.backward(dy, saved_norm)[0])


@PLACES
def test_a_placement_names_its_parts(place):
    norm, sublayer = RMSNorm(np.ones(WIDTH)), MLP(mlp(np.random.default_rng(4)))
    layer = place(norm, sublayer)
    assert layer.params == {"norm": norm.params, "sublayer": sublayer.params}
    assert layer.shards == {"norm": norm.shards, "sublayer": sublayer.shards}


def test_a_chain_runs_in_order_and_back():
    rng = np.random.default_rng(5)
    first, second = Linear(**linear(rng, 4, 3)), Linear(**linear(rng, 2, 4))
    chain = Chain({"first": first, "gelu": GELU(), "second": second})
    x, dy = rng.standard_normal((5, 3)), rng.standard_normal((5, 2))
    y, saved = chain.forward(x)
    same_bits(y, second.forward(GELU().forward(first.forward(x)[0])[0])[0])
    dx, grads = chain.backward(dy, saved)
    assert dx.shape == x.shape
    assert list(grads) == list(chain.params) == list(chain.shards) == ["first", "gelu", "second"]
    close(grads["second"]["bias"], dy.sum(axis=0))


def test_an_empty_chain_is_the_identity():
    x = np.random.default_rng(6).standard_normal((2, 3))
    y, saved = Chain({}).forward(x)
    assert y is x
    assert Chain({}).backward(x, saved) == (x, {})
