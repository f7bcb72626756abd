import numpy as np
import pytest
import torch

from npnorm import Transformer
from npnorm.bench.grid import GRIDS
from npnorm.bench.step import MODELS, agree, config_of, own_step, steps, torch_loss, torch_step
from npnorm.config import init
from npnorm.layers import CrossEntropy

SIZES = GRIDS["tiny"].step._replace(depth=2)
EACH = pytest.mark.parametrize("model", MODELS)


def drawn(config):
    rng = np.random.default_rng(1)
    return init(config, rng), rng.integers(0, SIZES.vocabulary, (SIZES.batch, SIZES.length + 1))


@EACH
def test_the_loss_of_the_twin_is_ours(model):
    config = config_of(model, SIZES)
    params, ids = drawn(config)
    own = Transformer(config, params)
    ours, _ = CrossEntropy().forward(own.forward(ids[:, :-1])[0], ids[:, 1:])
    loss, tensors = torch_loss(config, params)
    theirs = loss(torch.tensor(ids[:, :-1]), torch.tensor(ids[:, 1:]))
    assert float(theirs.detach()) == pytest.approx(float(ours), rel=2e-6)
    assert sum(t.numel() for t in tensors) == sum(a.size for a in arrays(own.params))


def arrays(tree):
    return [a for child in tree.values() for a in arrays(child)] if isinstance(tree, dict) else [tree]


@EACH
def test_steps_of_training_stay_together(model):
    config = config_of(model, SIZES)
    params, ids = drawn(config)
    ours, theirs = own_step(config, params, ids), torch_step(config, params, ids)
    losses = np.array([[ours(), theirs()] for _ in range(6)])
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-5)
    assert losses[-1, 0] < losses[0, 0] - 0.01


@EACH
def test_the_models_are_those_that_their_names_say(model):
    config = config_of(model, SIZES)
    assert (config.norm, config.mlp) == (("layer", "gelu") if "LayerNorm" in model else ("rms", "swiglu"))
    assert config.placement == "pre"
    assert not config.tied


def test_only_what_is_asked_for_is_measured():
    assert list(steps(MODELS[0], GRIDS["tiny"].step, ["f32", "naive"])) == ["npnorm"]
    assert list(steps(MODELS[0], GRIDS["tiny"].step, ["torch"])) == ["npnorm", "torch"]


def test_losses_that_part_are_an_error():
    with pytest.raises(RuntimeError, match="steps of ours and theirs do not agree"):
        agree({"ours": [3.0, 2.0], "theirs": [3.0, 2.0001]})
