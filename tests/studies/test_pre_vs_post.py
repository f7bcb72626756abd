import numpy as np
import pytest

from npnorm.studies.pre_vs_post_gradients import PLACEMENTS, by_layer, exponent
from npnorm.studies.study import Results


@pytest.fixture
def results(quick):
    return quick("pre_vs_post")[0]


@pytest.mark.parametrize("p", [-0.5, 0.0, 0.25])
def test_the_exponent_is_that_of_the_last_layers(p):
    depths = [4, 8, 16]
    lines = [
        {"part": "gradient", "placement": "pre", "depth": depth, "seed": seed, "gradient": [7.0, 3.0 * depth**p]}
        for depth in depths
        for seed in (0, 1)
    ]
    np.testing.assert_allclose(
        exponent(Results({"gradient depths": depths}, {}, lines), "pre", "gradient"), [p, p], atol=1e-12
    )


@pytest.mark.parametrize("part", ["theorem", "gradient"])
def test_in_pre_ln_the_last_gradient_falls_with_depth_and_in_post_ln_it_does_not(results, part):
    assert exponent(results, "pre", part).mean() < -0.2
    assert abs(exponent(results, "post", part).mean()) < 0.2


def test_in_pre_ln_the_gradients_fall_towards_the_output(results):
    pre = by_layer(results, "pre", 16).mean(axis=0)
    assert pre[0] > 1.5 * pre[-1]


def test_the_last_gradient_is_larger_in_post_ln(results):
    assert np.all(by_layer(results, "post", 16)[:, -1] > 2 * by_layer(results, "pre", 16)[:, -1])


def test_in_deepnorm_the_gradients_of_all_layers_are_alike_and_small(results):
    deep = by_layer(results, "deep", 16)
    assert np.all(deep.max(axis=1) < 1.5 * deep.min(axis=1))
    assert np.all(deep < by_layer(results, "post", 16))


def test_each_placement_is_trained_with_and_without_warm_up(results):
    runs = {(line["placement"], line["warmup"]) for line in results.where(part="train").lines}
    assert runs == {(placement, warmup) for placement in PLACEMENTS for warmup in (False, True)}
    assert np.isfinite(results.values("held-out loss", part="train")).all()
