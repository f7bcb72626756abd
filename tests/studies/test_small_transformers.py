import math

import numpy as np
import pytest
import torch
from torch import nn

from npnorm.config import Config
from npnorm.layers import CrossEntropy
from npnorm.studies import small_transformers as small
from npnorm.training import Recipe
from npnorm.transformer import Transformer
from npnorm.tree import leaves

SIZES = {"width": 64, "depth": 3, "heads": 4, "context": 10, "mlp": "relu"}


def of(config, draw, seed=0):
    return dict(leaves(draw(config, np.random.default_rng(seed))))


def test_the_first_parameters_are_of_torchs_distributions():
    params = of(Config(1000, **SIZES, norm="layer", positions="learned", bias=True), small.torch_init)
    attention, up, down = nn.MultiheadAttention(64, 4), nn.Linear(64, 256), nn.Linear(256, 64)
    first = "blocks.0.attention.sublayer"
    for name, theirs in {
        "embedding.weight": nn.Embedding(1000, 64).weight,
        "positions.weight": nn.Embedding(10, 64).weight,
        f"{first}.q_proj.weight": attention.in_proj_weight,
        f"{first}.v_proj.weight": attention.in_proj_weight,
        f"{first}.v_proj.bias": attention.in_proj_bias,
        f"{first}.o_proj.weight": attention.out_proj.weight,
        f"{first}.o_proj.bias": attention.out_proj.bias,
        "blocks.2.mlp.sublayer.up_proj.weight": up.weight,
        "blocks.2.mlp.sublayer.up_proj.bias": up.bias,
        "blocks.2.mlp.sublayer.down_proj.weight": down.weight,
        "blocks.2.mlp.sublayer.down_proj.bias": down.bias,
        "blocks.2.mlp.norm.weight": nn.LayerNorm(64).weight,
        "blocks.2.mlp.norm.bias": nn.LayerNorm(64).bias,
        "head.weight": nn.Linear(64, 1000).weight,
    }.items():
        theirs = theirs.detach().numpy()
        np.testing.assert_allclose(params[name].std(), theirs.std(), rtol=0.25, err_msg=name)
        if theirs.std() < 0.5:  # uniform: it has a largest value
            np.testing.assert_allclose(abs(params[name]).max(), abs(theirs).max(), rtol=0.1, err_msg=name)
        assert params[name].dtype == np.float32


def test_xaviers_matrices_are_smaller_with_deepnorm_but_for_queries_and_keys():
    plain, deep = (
        of(Config(50, **SIZES, norm="layer", placement=placement), small.xavier_init) for placement in ("post", "deep")
    )
    np.testing.assert_allclose(plain["blocks.1.mlp.sublayer.up_proj.weight"].std(), math.sqrt(2 / 320), rtol=0.05)
    for name, array in plain.items():
        gain = 24**-0.25 if name.split(".")[-2] in ("v_proj", "o_proj", "up_proj", "down_proj") else 1
        np.testing.assert_allclose(deep[name], gain * array, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("draw", [small.torch_init, small.xavier_init])
@pytest.mark.parametrize("placement", ["none", "pre", "res-post", "sandwich"])
def test_the_same_seed_is_the_same_weights_wherever_the_norms_stand(draw, placement):
    one, other = (of(Config(50, **SIZES, norm="layer", placement=p), draw) for p in ("post", placement))
    drawn = [name for name in one if "proj" in name or name in ("embedding.weight", "head.weight")]
    assert all(np.array_equal(one[name], other[name]) for name in drawn)


@pytest.mark.parametrize(
    ("placement", "norm"), [("none", "layer"), ("post", "layer"), ("pre", "layer"), ("pre", "rms")]
)
def test_the_network_as_written_is_that_of_torchs_layers(placement, norm):
    sizes = {"width": 24, "depth": 2, "heads": 4, "context": 7, "mlp": "relu", "bias": True}
    config = Config(small.VOCABULARY, **sizes, placement=placement, norm=norm, positions="none", causal=False)
    model = small.as_written(config, np.random.default_rng(0))
    ids = np.random.default_rng(1).integers(0, small.VOCABULARY, (3, 7))
    targets = np.roll(ids, -1, axis=1)
    logits, saved = model.forward(ids)
    loss, saved_loss = CrossEntropy().forward(logits, targets)
    _, grads = model.backward(CrossEntropy().backward(1.0, saved_loss), saved)

    p = {name: torch.tensor(array, requires_grad=True) for name, array in leaves(model.params)}
    theirs = _torch_loss(p, placement, norm, torch.tensor(ids), torch.tensor(targets))
    theirs.backward()
    assert float(loss) == pytest.approx(theirs.item(), rel=1e-5)
    for name, grad in leaves(grads):
        np.testing.assert_allclose(grad, p[name].grad, atol=2e-6, err_msg=name)


def _torch_loss(p, placement, norm, ids, targets):
    def sublayer(x, kind, i):
        q = {name.removeprefix(f"blocks.{i}.{kind}."): value for name, value in p.items()}
        w = {name.removeprefix("sublayer."): value for name, value in q.items()}

        def linear(x, name):
            return nn.functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

        def normalized(x):
            if norm == "rms":
                return nn.functional.rms_norm(x, (24,), q["norm.weight"], 1e-5)
            return nn.functional.layer_norm(x, (24,), q["norm.weight"], q["norm.bias"], 1e-5)

        z = normalized(x) if placement == "pre" else x
        if kind == "mlp":
            f = linear(linear(z, "up_proj").relu(), "down_proj")
        else:
            heads = (linear(z, name).unflatten(-1, (4, 6)).transpose(1, 2) for name in ("q_proj", "k_proj", "v_proj"))
            f = linear(nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2), "o_proj")
        return normalized(x + f) if placement == "post" else x + f

    x = p["embedding.weight"][ids]
    for i in range(2):
        x = sublayer(sublayer(x, "attention", i), "mlp", i)
    logits = nn.functional.linear(x, p["head.weight"], p["head.bias"])
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def written(lr):
    config = Config(
        small.VOCABULARY, **SIZES, norm="layer", placement="post", positions="none", causal=False, bias=True
    )
    model = small.as_written(config, np.random.default_rng(0))
    return small.train_on_random_tokens(model, 4, 2, 10, lr, math.inf, np.random.default_rng(1))


def test_losses_that_are_not_finite_end_the_run_as_written():
    losses = written(1e30)
    assert np.isfinite(losses[0])
    assert np.isnan(losses[1:]).all()
    assert np.isfinite(written(1e-4)).all()


def test_adam_learns_a_batch_that_does_not_change():
    config = Config(small.VOCABULARY, **SIZES, norm="layer", placement="pre", positions="none", causal=False, bias=True)

    class Same:
        def integers(self, low, high, shape):
            return np.arange(math.prod(shape)).reshape(shape) % 2  # of two tokens each follows the other

    model = small.as_written(config, np.random.default_rng(0))
    losses = small.train_on_random_tokens(model, 30, 2, 10, 1e-2, 1.0, Same())
    assert losses[0] > 6
    assert losses[-1] < 0.1


@pytest.mark.parametrize(("lr", "finite"), [(1e-2, True), (1e30, False)])
def test_a_run_that_diverges_counts_as_chance(lr, finite):
    data = small.text(100)
    config = Config(data.vocabulary, width=12, depth=1, heads=2, context=8, placement="none")
    model = Transformer(config, small.xavier_init(config, np.random.default_rng(0)))
    recipe = Recipe(30, rows=2, length=8, lr=lr, warmup=0, max_norm=math.inf)
    came = small.train_on_text(model, data, recipe, np.random.default_rng(1))
    assert (came["finite steps"] == 30) == finite
    assert (came["held-out loss"] < math.log(data.vocabulary)) == finite
    assert not came["trains"]


def test_what_needs_no_context_is_the_loss_of_the_frequencies():
    data = small.text(2000)
    assert len(data.held_out) == 2001
    counts = np.bincount(data.learn, minlength=data.vocabulary) + 1
    by_hand = [math.log(counts.sum() / counts[i]) for i in data.held_out[1:]]
    assert data.no_context == pytest.approx(np.mean(by_hand))
