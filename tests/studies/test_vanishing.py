import numpy as np
import pytest

from npnorm.studies.study import Verdict
from npnorm.studies.vanishing import growth, theory, uniform_floor

SLOWLY = "Without a norm the standard deviation falls slowly: 1.04, 0.85, 0.62, 0.38, 0.21 after layers 1 to 5."


@pytest.fixture
def results(quick):
    return quick("vanishing")[0]


def test_without_a_norm_the_activations_follow_the_theory(results):
    for gain in (1.0, 6.0):
        std = results.values("std", norm="none", gain=gain)
        np.testing.assert_allclose(std.mean(axis=0), theory(gain, 512, 10), rtol=0.05)


def test_the_norms_have_the_same_weights_and_data(results):
    assert np.ptp(results.values("std", seed=0, gain=1.0)[:, 0]) == 0
    assert len(results.where(seed=0, gain=1.0).lines) == 6


@pytest.mark.parametrize("norm", ["LayerNorm", "BatchNorm"])
def test_norms_that_centre_keep_the_standard_deviation_at_one(results, norm):
    np.testing.assert_allclose(results.values("std", norm=norm)[:, 1:], 1, rtol=0.01)


def test_the_verdicts_contradict_the_documented_decay_and_the_plateau_at_one(verdicts):
    of = verdicts("vanishing")
    assert of[SLOWLY] == Verdict.FAILS
    assert of["After RMSNorm the standard deviation is about 1.0."] == Verdict.FAILS
    assert of["Without a norm the gradient vanishes."] == Verdict.HOLDS


def test_the_last_documented_number_is_the_floor_that_the_bias_makes(results):
    floor = theory(1.0, 512, 100)[-1]
    assert abs(floor / 0.0163 - 1) < 0.01
    np.testing.assert_allclose(results.values("std", norm="none", gain=1.0)[:, 8:], floor, rtol=0.15)


def test_without_a_norm_the_gradient_vanishes_and_with_one_it_does_not(results):
    assert np.all(results.values("gradient", norm="none", gain=1.0)[:, 0] < 1e-3)
    for norm in ("LayerNorm", "RMSNorm", "BatchNorm"):
        assert np.all(results.values("gradient", norm=norm, gain=1.0)[:, 0] > 0.1)


def test_with_large_weights_the_signal_explodes_only_without_a_norm(results):
    assert np.all(results.values("std", norm="none", gain=6.0)[:, -1] > 1000)
    assert np.all(results.values("std", norm="RMSNorm", gain=6.0)[:, -1] < 1)


def test_the_floor_of_a_uniform_bias_is_lower(results):
    rng = np.random.default_rng(1)
    bias, rest = rng.uniform(-1, 1, 1_000_000) * np.sqrt(3 * 5 / 6), rng.standard_normal(1_000_000) * np.sqrt(1 / 6)
    of_normal = np.sqrt(1 / 2 - 1 / (2 * np.pi))
    assert np.maximum(bias + rest, 0).std() / of_normal == pytest.approx(uniform_floor(), rel=0.005)
    assert uniform_floor() < 0.98


@pytest.mark.parametrize(("norm", "count"), [("LayerNorm", 512), ("BatchNorm", 100)])
def test_the_gradient_grows_as_with_statistics_over_so_many_numbers(results, norm, count):
    grown = results.values("gradient", norm=norm)[:, 0] ** (1 / 10)
    assert grown.mean() == pytest.approx(growth(count), rel=0.005)


def test_the_fewer_numbers_a_norm_centres_over_the_more_the_gradient_grows():
    assert growth(16) > growth(100) > growth(4000)
