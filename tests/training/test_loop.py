import array_api_strict as strict
import numpy as np
import pytest

from npnorm.config import Config, init
from npnorm.layer import leaves, map_tree
from npnorm.training import Characters, Recipe, evaluate, generate, train, unigram_entropy
from npnorm.transformer import Transformer

TEXT = "the mean of the squares is not the square of the mean; " * 40
SIZES = {"width": 16, "depth": 1, "heads": 2, "context": 12}


def model_and_ids(make_config):
    characters = Characters(TEXT)
    config = make_config(characters.size, **SIZES)
    return Transformer(config, init(config, np.random.default_rng(0))), characters.encode(TEXT)


@pytest.mark.parametrize("make_config", [Config.original, Config.modern])
def test_the_loss_falls_well_below_the_unigram_entropy(make_config):
    model, ids = model_and_ids(make_config)
    recipe = Recipe(steps=80, rows=8, length=12, lr=1e-2, warmup=8)
    losses = [step.loss for step in train(model, ids, recipe, np.random.default_rng(1))]
    assert losses[0] == pytest.approx(np.log(model.config.vocabulary), abs=0.3)  # it knows nothing yet
    assert np.mean(losses[-5:]) < unigram_entropy(ids) / 2
    assert evaluate(model, ids, rows=8, length=12) < unigram_entropy(ids) / 2


def test_the_same_seed_gives_the_same_bits():
    runs = []
    for _ in range(2):
        model, ids = model_and_ids(Config.modern)
        list(train(model, ids, Recipe(steps=3, rows=2, length=12), np.random.default_rng(1)))
        runs.append([array for _, array in leaves(model.params)])
    for first, second in zip(*runs, strict=True):
        np.testing.assert_array_equal(first, second)


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step():
    model, ids = model_and_ids(Config.modern)
    model.params["norm"]["weight"][0] = np.nan
    before = map_tree(np.copy, model.params)
    with pytest.raises(FloatingPointError, match="step 0: the loss is nan"):
        next(train(model, ids, Recipe(rows=2, length=12), np.random.default_rng(1)))
    for (_, now), (_, then) in zip(leaves(model.params), leaves(before), strict=True):
        np.testing.assert_array_equal(now, then)


def test_evaluate_is_the_mean_over_all_windows():
    model, ids = model_and_ids(Config.original)
    windows = [evaluate(model, ids[start : start + 13], 1, 12) for start in range(0, 12 * 5, 12)]
    assert evaluate(model, ids[: 12 * 5 + 1], rows=2, length=12) == pytest.approx(np.mean(windows), rel=1e-6)


def test_generate_continues_and_never_draws_padding():
    characters = Characters(TEXT)
    config = Config.modern(characters.size + 30, **SIZES)
    model = Transformer(config, init(config, np.random.default_rng(0)))
    start = characters.encode("the mean")
    ids = generate(model, start, 50, characters.size, np.random.default_rng(2))
    np.testing.assert_array_equal(ids[:8], start)
    assert len(ids) == 58
    assert ids.max() < characters.size
    np.testing.assert_array_equal(ids, generate(model, start, 50, characters.size, np.random.default_rng(2)))


def test_training_and_sample_on_another_device_are_the_same():
    device = strict.Device("device1")  # a stray NumPy call raises there, as it would on a GPU
    model, ids = model_and_ids(Config.modern)
    there = map_tree(lambda a: strict.asarray(a, device=device), model.params)
    results = []
    for each in (Transformer(model.config, there), model):
        losses = [step.loss for step in train(each, ids, Recipe(steps=4, rows=3, length=12), np.random.default_rng(1))]
        results.append((losses, list(generate(each, ids[:4], 10, 15, np.random.default_rng(2)))))
    assert results[0] == results[1]
