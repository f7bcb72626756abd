import array_api_strict as strict
import numpy as np
import pytest

from npnorm.config import Config, init
from npnorm.training import AdamW, Characters, Recipe, evaluate, generate, global_norm, train, unigram_entropy
from npnorm.transformer import Transformer
from npnorm.tree import leaves, map_tree

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


def one_step(**recipe):
    model, ids = model_and_ids(Config.modern)
    settings = Recipe(steps=1, rows=2, length=12, warmup=1, lr=0.01, **recipe)
    return next(train(model, ids, settings, np.random.default_rng(1)))


def test_a_step_is_clipped_and_decayed_as_the_recipe_says(monkeypatch):
    seen = {}

    class Watched(AdamW):
        def __init__(self, params, **settings):
            seen.update(settings)
            super().__init__(params, **settings)

        def step(self, grads, lr):
            seen.update(norm=global_norm(grads, map_tree(lambda _: None, grads)), lr=lr)

    monkeypatch.setattr("npnorm.training.loop.AdamW", Watched)
    step = one_step(max_norm=0.01, weight_decay=0.3)
    assert step.norm > 0.01
    assert seen["norm"] == pytest.approx(0.01, rel=1e-6)
    assert (seen["weight_decay"], seen["lr"], step.lr) == (0.3, 0.01, 0.01)


def test_a_low_temperature_draws_the_most_likely():
    model, ids = model_and_ids(Config.modern)
    cold = [generate(model, ids[:6], 1, 15, np.random.default_rng(seed), temperature=1e-6)[-1] for seed in range(5)]
    logits, _ = model.forward(ids[None, :6])
    assert cold == [np.argmax(logits[0, -1, :15])] * 5
    hot = {int(generate(model, ids[:6], 1, 15, np.random.default_rng(seed), temperature=1e3)[-1]) for seed in range(20)}
    assert len(hot) > 5


def test_an_evaluation_without_a_window_is_an_error():
    model, ids = model_and_ids(Config.modern)
    with pytest.raises(ValueError, match="12 ids hold no window of 12 and its next id"):
        evaluate(model, ids[:12], 1, 12)
