import numpy as np
import pytest

from npnorm.norms import PartialRMSNorm, RMSNorm
from npnorm.studies.partial import PARTS, Redrawn, measure
from npnorm.studies.partial_error import error_of_gradient, error_of_rms, errors, gain, moment

# Theory


def test_the_moments_are_those_of_drawn_features():
    x = np.random.default_rng(0).standard_normal((100_000, 12)) ** 2
    ratio = x[:, :5].mean(axis=1) / x.mean(axis=1)
    for q in (-1, -0.5, 0.5, 1, 2):
        assert np.mean(ratio**q) == pytest.approx(moment(q, 5, 12), rel=0.02)


def test_for_large_k_the_errors_are_the_short_formulas():
    k, n = 20_000, 80_000
    assert error_of_rms(k, n) == pytest.approx(np.sqrt((1 - k / n) / (2 * k)), rel=1e-3)
    assert error_of_gradient(k, n) == pytest.approx(np.sqrt(3 * (1 - k / n) / (2 * k)), rel=1e-3)


def jacobians(n, k, seed):
    """Return a row, and how dx depends on dy with a part and with all."""
    x = np.random.default_rng(seed).standard_normal((1, n))
    found = []
    for norm in (PartialRMSNorm(p=k / n, eps=0), RMSNorm(eps=0)):
        y, saved = norm.forward(x)
        found += [saved.rstd.item(), y, np.array([norm.backward(e[None], saved)[0][0] for e in np.eye(n)]).T]
    return found


@pytest.mark.parametrize("k", [1, 3, 8])
def test_the_gradient_error_of_a_row_is_that_of_the_formula(k):
    n = 8
    partial, _, jacobian, whole, _, all_of_it = jacobians(n, k, 1)
    t = partial / whole
    error = np.sum((jacobian - all_of_it) ** 2) / np.sum(all_of_it**2)
    assert error == pytest.approx(((n - 2) * (t - 1) ** 2 + n / k * t**4 - 2 * t + 1) / (n - 1), abs=1e-14)


@pytest.mark.parametrize("k", [1, 3])
def test_the_largest_gain_is_that_of_the_jacobian(k):
    n = 8
    partial, z, jacobian, whole, _, all_of_it = jacobians(n, k, 2)
    largest = gain(k, n, whole / partial)
    assert np.linalg.norm(jacobian, 2) / whole == pytest.approx(largest, rel=1e-12)
    assert np.linalg.norm(all_of_it, 2) / whole == pytest.approx(1, rel=1e-12)
    dz = np.where(np.arange(n) < k, 0, z[0])
    assert np.linalg.norm(jacobian @ dz) / np.linalg.norm(dz) / whole == pytest.approx(largest, rel=1e-12)


def test_all_features_have_no_error():
    x, dy = np.random.default_rng(3).standard_normal((2, 2, 3, 16))
    assert errors(x, dy, 16, None) == {"RMS": 0.0, "gradient": 0.0, "gain": 1.0}
    assert error_of_rms(16, 16) == pytest.approx(0, abs=1e-6)
    assert error_of_gradient(16, 16) == pytest.approx(0, abs=1e-6)


# The layer that draws


def test_a_redrawn_part_is_that_of_its_generator():
    x, dy = np.random.default_rng(4).standard_normal((2, 5, 16)).astype("float32")
    weight = np.full(16, 2, "float32")
    drawn = Redrawn(np.random.default_rng(5), weight=weight, p=0.25)
    rng, plain = np.random.default_rng(5), PartialRMSNorm(weight, p=0.25)
    parts = []
    for _ in range(2):
        (y, saved), (expected, saved_plain) = drawn.forward(x), plain.forward(x, rng)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(drawn.backward(dy, saved)[0], plain.backward(dy, saved_plain)[0])
        parts.append(saved.subset)
    assert np.any(parts[0] != parts[1])


# The quick run


@pytest.fixture
def results(quick):
    return quick("partial")[0]


def test_the_errors_follow_the_theory(results):
    of = {
        name: lambda k, name=name: results.values(name, features="normal", k=k).mean() for name in ("RMS", "gradient")
    }
    for k in results.settings["k"][:-1]:
        assert of["RMS"](k) == pytest.approx(error_of_rms(k, 128), rel=0.1)
        if k >= 32:
            assert of["gradient"](k) == pytest.approx(error_of_gradient(k, 128), rel=0.1)


def test_of_features_that_are_alike_any_part_is_as_good_as_the_first(results):
    first, random = (results.values("RMS", features="normal", part=part, k=8).mean() for part in PARTS)
    assert random == pytest.approx(first, rel=0.2)


def test_an_outlier_beyond_the_part_makes_the_error_larger(results):
    normal, outlier = (results.values("RMS", features=f, part="first", k=64) for f in ("normal", "outlier"))
    assert np.all(outlier > 3 * normal)


def test_a_part_of_one_feature_makes_the_gradient_explode_and_the_loss_higher(results):
    one, whole = (results.where(features="trained", part="first", k=k) for k in (1, 128))
    assert np.all(one.values("largest gradient") > 10 * whole.values("largest gradient"))
    assert np.all(one.values("loss") > whole.values("loss"))


def test_a_drawn_part_of_all_features_trains_as_the_first_do(results):
    settings = {**results.settings, "steps": 2}
    cell = {"features": "trained", "k": 128, "seed": 1}
    first, random = (measure(settings, {**cell, "part": part}) for part in PARTS)
    assert first == random  # the same first weights and data
    assert measure(settings, {**cell, "part": "first", "seed": 2})["loss"] != first["loss"]
