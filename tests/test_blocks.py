import numpy as np
import pytest

from npnorm import LayerNorm, RMSNorm
from npnorm.blocks import Chain, DeepNorm, PostNorm, PreNorm, Residual, ResPostNorm, SandwichNorm
from npnorm.layers import GELU, MLP, Attention, Linear, SwiGLU
from tests.check import check_backward, check_central_difference, close, draw, same_bits

WIDTH = 6


def deep(norm, sublayer):
    return DeepNorm(norm, sublayer, alpha=1.75)


PLACES = {  # the placement, and the names of its norms
    "Residual": (Residual, ()),
    "PostNorm": (PostNorm, ("norm",)),
    "PreNorm": (PreNorm, ("norm",)),
    "ResPostNorm": (ResPostNorm, ("norm",)),
    "SandwichNorm": (SandwichNorm, ("norm1", "norm2")),
    "DeepNorm": (deep, ("norm",)),
}
EACH = pytest.mark.parametrize(("place", "names"), PLACES.values(), ids=PLACES)


def placed(place, norm, sublayer, params):
    """Return a placement whose norms and sub-layer are made of a tree of parameters."""
    norms = {name: norm(p) for name, p in params.items() if name != "sublayer"}
    return place(**norms, sublayer=sublayer(params["sublayer"]))


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


BY_HAND = {
    # the norms multiply by 3 and 2, the sub-layer by 5, DeepNorm weighs x by 1.75; x = 2, dy = 7
    "Residual": (6, {"sublayer": 7 * 2}),  # y = x + 5 x
    "PostNorm": (18, {"norm": 7 * 12, "sublayer": 7 * 3 * 2}),  # y = 3 (x + 5 x)
    "PreNorm": (16, {"norm": 7 * 5 * 2, "sublayer": 7 * 3 * 2}),  # y = x + 5 (3 x)
    "ResPostNorm": (16, {"norm": 7 * 10, "sublayer": 7 * 3 * 2}),  # y = x + 3 (5 x)
    "SandwichNorm": (31, {"norm1": 7 * 2 * 5 * 2, "norm2": 7 * 30, "sublayer": 7 * 2 * 6}),  # y = x + 2 (5 (3 x))
    "DeepNorm": (20.25, {"norm": 7 * 13.5, "sublayer": 7 * 3 * 2}),  # y = 3 (1.75 x + 5 x)
}


@pytest.mark.parametrize("name", PLACES)
def test_a_placement_worked_by_hand(name):
    place, norms = PLACES[name]
    factor, by_weight = BY_HAND[name]
    layer = place(*(scalar(value) for value in (3, 2)[: len(norms)]), scalar(5))
    y, saved = layer.forward(np.array([[2.0]]))
    np.testing.assert_array_equal(y, [[factor * 2]])
    dx, grads = layer.backward(np.array([[7.0]]), saved)
    np.testing.assert_array_equal(dx, [[factor * 7]])
    assert {part: gradient["weight"].item() for part, gradient in grads.items()} == by_weight


@EACH
@SUBLAYERS
@pytest.mark.parametrize(("norm", "arrays"), [(LayerNorm, ("weight", "bias")), (RMSNorm, ("weight",))])
def test_backward_is_the_derivative(place, names, sublayer, params_of, norm, arrays):
    rng = np.random.default_rng(1)

    def make(params):
        return placed(place, lambda p: norm(**p, eps=0.1), sublayer, params)

    params = {name: draw(rng, **dict.fromkeys(arrays, WIDTH)) for name in names} | {"sublayer": params_of(rng)}
    x = rng.standard_normal((2, 5, WIDTH))
    check_backward(make, params, x, rng)
    check_central_difference(make, params, x, rng)


@EACH
def test_two_blocks_in_a_chain_backward_is_the_derivative(place, names):
    rng = np.random.default_rng(2)

    def make(params):
        return Chain({name: placed(place, lambda p: LayerNorm(**p), MLP, tree) for name, tree in params.items()})

    params = {
        block: {name: draw(rng, weight=WIDTH, bias=WIDTH) for name in names} | {"sublayer": mlp(rng)}
        for block in ("0", "1")
    }
    check_backward(make, params, rng.standard_normal((2, 5, WIDTH)), rng)


@EACH
def test_with_a_silent_sublayer_nothing_or_the_norm_is_left(place, names):
    """Of y = x + norm(0) the bias is left; norm(alpha x) with eps is norm(x) with eps / alpha^2."""
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((3, WIDTH)), rng.standard_normal((3, WIDTH))
    params = draw(rng, weight=WIDTH, bias=WIDTH)
    norm, silent = LayerNorm(**params, eps=0.5), Linear(np.zeros((WIDTH, WIDTH)))
    layer = place(**dict.fromkeys(names, norm), sublayer=silent)
    y, saved = layer.forward(x)
    result = {"y": y, "dx": layer.backward(dy, saved)[0]}
    if place in (Residual, PreNorm):
        same_bits(result, {"y": x, "dx": dy})
    elif place in (ResPostNorm, SandwichNorm):
        same_bits(result, {"y": x + params["bias"], "dx": dy})
    else:
        alone = LayerNorm(**params, eps=0.5 if place is PostNorm else 0.5 / 1.75**2)
        y, saved = alone.forward(x)
        close(result["y"], y, 1e-14)
        close(result["dx"], alone.backward(dy, saved)[0], 1e-14)


def test_limits_of_one_placement_are_another():
    rng = np.random.default_rng(7)
    x, dy = rng.standard_normal((2, 3, WIDTH)), rng.standard_normal((2, 3, WIDTH))
    norm, f, same = RMSNorm(**draw(rng, weight=WIDTH)), Linear(**linear(rng, WIDTH, WIDTH)), Linear(np.eye(WIDTH))

    def results(layer):
        y, saved = layer.forward(x)
        dx, grads = layer.backward(dy, saved)
        return {"y": y, "dx": dx, "sublayer": grads["sublayer"]}

    same_bits(results(DeepNorm(norm, f, alpha=1)), results(PostNorm(norm, f)))
    same_bits(results(SandwichNorm(norm, same, f)), results(PreNorm(norm, f)))
    same_bits(results(SandwichNorm(same, norm, f)), results(ResPostNorm(norm, f)))
    same_bits(results(PreNorm(same, f)), results(Residual(f)))


@EACH
def test_float32_stays_float32(place, names):
    rng = np.random.default_rng(8)
    layer = place(**{name: RMSNorm(**draw(rng, "float32", weight=WIDTH)) for name in names}, sublayer=GELU())
    x, dy = (rng.standard_normal((3, WIDTH)).astype("float32") for _ in range(2))
    y, saved = layer.forward(x)
    dx, _ = layer.backward(dy, saved)
    assert {y.dtype, dx.dtype} == {np.dtype("float32")}


@EACH
def test_a_placement_names_its_parts(place, names):
    parts = {name: RMSNorm(np.ones(WIDTH)) for name in names} | {"sublayer": MLP(mlp(np.random.default_rng(4)))}
    layer = place(**parts)
    assert layer.params == {name: part.params for name, part in parts.items()}
    assert layer.shards == {name: part.shards for name, part in parts.items()}
    assert list(layer.params) == [*names, "sublayer"]


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
