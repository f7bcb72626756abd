"""A layer uses what `params` holds at the call, in both passes, and travels between processes."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest

from npnorm import LayerNorm
from npnorm.blocks import Chain, DeepNorm, PostNorm, PreNorm, Residual, ResPostNorm, SandwichNorm
from npnorm.layers import (
    GELU,
    GRU,
    MLP,
    Attention,
    Conv2d,
    CrossEntropy,
    Embedding,
    Linear,
    Positions,
    Rotary,
    SiLU,
    SwiGLU,
)
from npnorm.tree import leaves, map_tree
from tests.check import same_bits

X = np.random.default_rng(0).standard_normal((2, 3, 4))
IDS = np.array([[1, 0, 3], [3, 3, 2]])


def linear(outputs, inputs):
    return {"weight": np.ones((outputs, inputs)), "bias": np.ones(outputs)}


def matrix(outputs, inputs):
    return {"weight": np.ones((outputs, inputs))}


def attention(make, **bias):
    shapes = {"q_proj": (4, 4), "k_proj": (2, 4), "v_proj": (2, 4), "o_proj": (4, 4)}
    return {name: bias.get(name, make)(*shape) for name, shape in shapes.items()}


LAYERS = {  # how the layer is made of a tree, the shapes of the tree, and an input
    "Linear": (lambda p: Linear(**p), linear(5, 4), X),
    "Embedding": (lambda p: Embedding(**p), matrix(4, 4), IDS),
    "Positions": (lambda p: Positions(**p), matrix(6, 4), X),
    "MLP": (MLP, {"up_proj": linear(6, 4), "down_proj": linear(4, 6)}, X),
    "SwiGLU": (SwiGLU, {"gate_proj": linear(6, 4), "up_proj": matrix(6, 4), "down_proj": linear(4, 6)}, X),
    "Attention": (lambda p: Attention(p, 2), attention(matrix) | {n: matrix(4, 4) for n in ("k_proj", "v_proj")}, X),
    "Attention with one bias, rotary": (
        lambda p: Attention(p, 2, 1, Rotary()),
        attention(matrix, k_proj=linear, o_proj=linear),
        X,
    ),
    "PreNorm": (
        lambda p: PreNorm(Linear(**p["norm"]), MLP(p["sublayer"])),
        {"norm": linear(4, 4), "sublayer": {"up_proj": linear(6, 4), "down_proj": linear(4, 6)}},
        X,
    ),
    "PostNorm": (
        lambda p: PostNorm(Linear(**p["norm"]), Attention(p["sublayer"], 2, 1)),
        {"norm": linear(4, 4), "sublayer": attention(linear)},
        X,
    ),
    "Residual": (lambda p: Residual(Linear(**p["sublayer"])), {"sublayer": linear(4, 4)}, X),
    "ResPostNorm": (
        lambda p: ResPostNorm(Linear(**p["norm"]), Linear(**p["sublayer"])),
        {"norm": linear(4, 4), "sublayer": matrix(4, 4)},
        X,
    ),
    "SandwichNorm": (
        lambda p: SandwichNorm(*(Linear(**p[name]) for name in ("norm1", "norm2", "sublayer"))),
        {"norm1": linear(4, 4), "norm2": matrix(4, 4), "sublayer": linear(4, 4)},
        X,
    ),
    "DeepNorm": (
        lambda p: DeepNorm(Linear(**p["norm"]), Linear(**p["sublayer"]), 1.5),
        {"norm": linear(4, 4), "sublayer": matrix(4, 4)},
        X,
    ),
    "Conv2d": (
        lambda p: Conv2d(**p, stride=2, padding=1),
        {"weight": np.ones((5, 2, 2, 1)), "bias": np.ones(5)},
        X[None],
    ),
    "GRU": (GRU, {"weight_ih": np.ones((6, 4)), "weight_hh": np.ones((6, 2)), "bias_ih": np.ones(6)}, X),
    "GRU with norms": (
        lambda p: GRU(
            {name: p[name] for name in ("weight_ih", "weight_hh")},
            {name: LayerNorm(**p[name]) for name in ("ih_gates", "hh_candidate")},
        ),
        {
            "weight_ih": np.ones((6, 4)),
            "weight_hh": np.ones((6, 2)),
            "ih_gates": {"weight": np.ones(4), "bias": np.ones(4)},
            "hh_candidate": {"weight": np.ones(2)},
        },
        X,
    ),
    "Chain": (
        lambda p: Chain({"one": PreNorm(Linear(**p["one"]["norm"]), Linear(**p["one"]["sublayer"])), "gelu": GELU()}),
        {"one": {"norm": linear(4, 4), "sublayer": matrix(4, 4)}, "gelu": {}},
        X,
    ),
}
EACH = pytest.mark.parametrize("name", LAYERS)


def drawn(tree, seed):
    rng = np.random.default_rng(seed)
    return map_tree(lambda a: rng.standard_normal(a.shape), tree)


def run(layer, x):
    """Return y, dx and the gradients."""
    y, saved = layer.forward(x)
    return [y, *layer.backward(np.cos(y), saved)]


def set_arrays(held, new):
    """Replace each array of the tree, and no dict."""
    for name, value in new.items():
        if isinstance(value, dict):
            set_arrays(held[name], value)
        else:
            held[name] = value


def set_dicts(layer, new):
    """Replace what stands at the top of the tree."""
    layer.params.update(copy.deepcopy(new))


def set_tree(layer, new):
    layer.params = copy.deepcopy(new)


REPLACE = pytest.mark.parametrize(
    "replace",
    [lambda layer, new: set_arrays(layer.params, new), set_dicts, set_tree],
    ids=["arrays", "dicts", "the tree"],
)


@EACH
@REPLACE
def test_replaced_parameters_are_used_in_both_passes(name, replace):
    make, shapes, x = LAYERS[name]
    layer, new = make(drawn(shapes, 1)), drawn(shapes, 2)
    first = run(layer, x)
    replace(layer, new)
    second = run(layer, x)
    same_bits(dict(enumerate(second)), dict(enumerate(run(make(new), x))))
    assert not np.array_equal(first[0], second[0])


@EACH
def test_each_replaced_array_is_used(name):
    make, shapes, x = LAYERS[name]
    params = drawn(shapes, 3)
    for path, array in leaves(params):
        layer, changed = make(params), copy.deepcopy(params)
        *folders, last = path.split(".")
        for tree in (layer.params, changed):
            for folder in folders:
                tree = tree[folder]
            tree[last] = 2 * array
        same_bits(dict(enumerate(run(layer, x))), dict(enumerate(run(make(changed), x))))


@EACH
@REPLACE
def test_backward_uses_the_parameters_of_its_own_call(name, replace):
    make, shapes, x = LAYERS[name]
    layer, new = make(drawn(shapes, 4)), drawn(shapes, 5)
    y, saved = layer.forward(x)
    replace(layer, new)
    expected = make(new).backward(np.cos(y), saved)
    same_bits(dict(enumerate(layer.backward(np.cos(y), saved))), dict(enumerate(expected)))


def copies(layer):
    return {"pickle": pickle.loads(pickle.dumps(layer)), "deepcopy": copy.deepcopy(layer)}


@EACH
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_a_copy_is_the_same_layer_with_parameters_of_its_own(name, used):
    make, shapes, x = LAYERS[name]
    layer = make(drawn(shapes, 6))
    if used:
        run(layer, x)
    expected = run(layer, x)
    for other in copies(layer).values():
        same_bits(dict(enumerate(run(other, x))), dict(enumerate(expected)))
        for _, array in leaves(other.params):
            array *= 2  # as an optimizer does
        same_bits(dict(enumerate(run(other, x))), dict(enumerate(run(make(other.params), x))))
        assert not np.array_equal(run(other, x)[0], expected[0])
        same_bits(dict(enumerate(run(layer, x))), dict(enumerate(expected)))


@pytest.mark.parametrize("layer", [GELU(), SiLU(), Rotary(500.0)], ids=["GELU", "SiLU", "Rotary"])
def test_a_copy_of_a_layer_without_parameters_is_the_same_layer(layer):
    for other in copies(layer).values():
        same_bits(other.forward(X)[0], layer.forward(X)[0])


def test_a_copy_of_the_cross_entropy_is_the_same_layer():
    expected, _ = CrossEntropy().forward(X, IDS)
    for other in copies(CrossEntropy()).values():
        assert other.forward(X, IDS)[0] == expected


def test_layers_go_to_processes_that_are_spawned():
    made = [(make(drawn(shapes, 7)), x) for make, shapes, x in LAYERS.values()]
    expected = [run(layer, x) for layer, x in made]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        results = pool.starmap(run, made)
    for there, here in zip(results, expected, strict=True):
        same_bits(dict(enumerate(there)), dict(enumerate(here)))
