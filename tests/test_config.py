import re

import numpy as np
import pytest
import torch

from npnorm import Config
from npnorm.config import init, layout
from npnorm.tree import leaves, map_tree
from tests.check import close, same_bits
from tests.test_transformer import ALL, CONFIGS, SIZES


@ALL
def test_initial_parameters_follow_the_seed(config):
    same_bits(init(config, np.random.default_rng(10)), init(config, np.random.default_rng(10)))
    first, other = init(config, np.random.default_rng(10)), init(config, np.random.default_rng(11))
    assert not np.array_equal(first["embedding"]["weight"], other["embedding"]["weight"])


@ALL
def test_initial_parameters_have_the_shapes_and_spread_of_the_layout(config):
    params = dict(leaves(init(config, np.random.default_rng(12), "float64")))
    for name, leaf in leaves(layout(config)):
        assert params[name].shape == leaf.shape
        assert abs(params[name].mean() - leaf.mean) <= 6 * leaf.std / params[name].size ** 0.5
        close(params[name].std(), leaf.std, 6 / params[name].size ** 0.5)
    sublayer = "blocks.1.attention.sublayer"
    assert params[f"{sublayer}.o_proj.weight"].std() < 0.6 * params[f"{sublayer}.q_proj.weight"].std()
    assert all(np.all(array == 1) for name, array in params.items() if "norm" in name and name.endswith("weight"))


@pytest.mark.parametrize(
    ("placement", "norms", "final"),
    [
        ("none", [], False),
        ("post", ["norm"], False),
        ("pre", ["norm"], True),
        ("res-post", ["norm"], True),
        ("sandwich", ["norm1", "norm2"], True),
        ("deep", ["norm"], False),
    ],
)
def test_each_placement_has_its_norms(placement, norms, final):
    tree = layout(Config(12, placement=placement, depth=1))
    assert list(tree["blocks"]["0"]["attention"]) == list(tree["blocks"]["0"]["mlp"]) == [*norms, "sublayer"]
    assert ("norm" in tree) == Config(12, placement=placement).final_norm == final


def test_deep_norm_starts_from_xavier_with_a_gain_that_falls_with_depth():
    config = Config(50, width=24, depth=32, heads=4, kv_heads=2, hidden=36, placement="deep", mlp="swiglu")
    tree = dict(leaves(layout(config)["blocks"]["31"]))
    beta = 256 ** (-1 / 4)  # of 8 * 32; a quarter
    for name, gain, outputs, inputs in (
        ("attention.sublayer.q_proj", 1, 24, 24),
        ("attention.sublayer.k_proj", 1, 12, 24),
        ("attention.sublayer.v_proj", beta, 12, 24),
        ("attention.sublayer.o_proj", beta, 24, 24),
        ("mlp.sublayer.gate_proj", beta, 36, 24),
        ("mlp.sublayer.up_proj", beta, 36, 24),
        ("mlp.sublayer.down_proj", beta, 24, 36),
    ):
        weight = torch.empty(10 * outputs, 10 * inputs, dtype=torch.float64)
        torch.nn.init.xavier_normal_(weight, gain, generator=torch.Generator().manual_seed(0))
        drawn = tree[f"{name}.weight"]
        assert drawn.shape == (outputs, inputs)
        close(drawn.std, 10**0.5 * weight.numpy().std(), 0.01)
    assert layout(config)["embedding"]["weight"].std == layout(config)["head"]["weight"].std == 0.02


def test_initial_parameters_are_float32_unless_asked():
    config = CONFIGS["modern"]
    assert {a.dtype for _, a in leaves(init(config, np.random.default_rng(13)))} == {np.dtype("float32")}
    double = init(config, np.random.default_rng(13), "float64")
    same_bits(map_tree(lambda a: a.astype("float32"), double), init(config, np.random.default_rng(13)))


def test_the_two_published_settings():
    original, modern = Config.original(12), Config.modern(12)
    choices = ("norm", "placement", "mlp", "positions", "tied", "bias")
    assert [getattr(original, c) for c in choices] == ["layer", "post", "gelu", "learned", True, True]
    assert [getattr(modern, c) for c in choices] == ["rms", "pre", "swiglu", "rotary", False, False]
    assert original.eps == modern.eps == 1e-5


@pytest.mark.parametrize(
    ("config", "hidden"),
    [
        (Config.original(12, width=24), 96),
        (Config.original(12, width=24, mlp="relu"), 96),
        (Config.modern(12, width=24), 64),
        (Config.modern(12, width=48), 128),
        (Config.modern(12, width=24, hidden=36), 36),
    ],
)
def test_the_hidden_features_follow_the_width(config, hidden):
    assert config.hidden_features == hidden
    assert layout(config)["blocks"]["0"]["mlp"]["sublayer"]["down_proj"]["weight"].shape == (config.width, hidden)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "batch"}, "norm is 'batch'. Choose one of layer, rms."),
        ({"placement": "both"}, "placement is 'both'. Choose one of none, post, pre, res-post, sandwich, deep."),
        ({"mlp": "silu"}, "mlp is 'silu'. Choose one of relu, gelu, swiglu."),
        ({"positions": "rope"}, "positions is 'rope'. Choose one of none, learned, rotary."),
        ({"depth": 0}, "depth is 0. It must be at least 1."),
        ({"context": -1}, "context is -1. It must be at least 1."),
        ({"width": 25}, "6 heads cannot share 25 features. Make width a multiple of heads."),
        ({"kv_heads": 4}, "6 heads cannot share 4 heads of keys and values equally."),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(f"Config: {message}")):
        Config.modern(12, **(SIZES | settings))


@pytest.mark.parametrize("settings", [{"width": 18}, {"hidden": -36}, {"kv_heads": -3}])
def test_settings_that_no_layer_could_take_are_refused_at_once(settings):
    with pytest.raises(ValueError, match="Config: "):  # 18 features leave a head 3: no pairs to turn
        Config.modern(12, **(SIZES | settings))


@pytest.mark.parametrize(
    "config", [Config(48), Config.original(12, width=24, heads=6), Config(9, kv_heads=2, tied=True, causal=False)]
)
def test_a_configuration_is_one_line_that_makes_it_again(config):
    assert eval(repr(config)) == config


def test_the_line_of_a_configuration_has_the_sizes_and_what_is_not_usual():
    assert repr(Config(48, kv_heads=2)) == "Config(vocabulary=48, width=128, depth=4, heads=4, context=128, kv_heads=2)"
