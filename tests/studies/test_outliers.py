import numpy as np
import pytest

from npnorm.config import Config, init
from npnorm.studies.outliers import of_normals, same_feature, second_half
from npnorm.studies.outliers_stream import alignment, blocks, gains, kurtosis, largest, standing_out, states, stream
from npnorm.studies.study import Results, Verdict
from npnorm.transformer import Transformer

SETTINGS = {"depth": 4, "at": [0, 16]}


def model_of(placement, seed=0):
    config = Config(11, width=24, depth=3, heads=4, context=7, placement=placement)
    return Transformer(config, init(config, np.random.default_rng(seed)))


@pytest.fixture
def ids():
    return np.random.default_rng(1).integers(0, 11, (5, 7))


@pytest.fixture
def results(quick):
    return quick("outliers")[0]


# The stream


@pytest.mark.parametrize("placement", ["post", "pre", "res-post", "sandwich", "deep"])
def test_the_last_state_is_what_the_head_reads(placement, ids):
    model = model_of(placement)
    found = states(model, ids)
    x = found[-1].reshape(5, 7, 24).astype("float32")
    if "norm" in model.stack.layers:
        x, _ = model.stack.layers["norm"].forward(x)
    logits, _ = model.head.forward(x)
    assert [state.shape for state in found] == [(35, 24)] * 4
    np.testing.assert_array_equal(logits, model.forward(ids)[0])


def test_one_feature_that_has_everything_is_found_and_hidden_by_a_rotation():
    rng = np.random.default_rng(2)
    x = 0.01 * rng.standard_normal((300, 64))
    x[:, 5] += 3.0
    q = np.linalg.qr(rng.standard_normal((64, 64)))[0]
    assert largest(x) == pytest.approx(8, rel=1e-3)  # sqrt(64)
    assert kurtosis(x) == pytest.approx(64, rel=1e-2)
    assert largest(x @ q) < 4.5
    assert kurtosis(x @ q) < 6


def test_a_feature_of_another_size_is_the_strongest_at_every_depth(ids):
    model = model_of("pre")
    model.embedding.params["weight"][:, 9] += 4.0
    found = stream(model, ids, [np.eye(24)])
    assert found["feature"] == [9] * 4
    assert found["largest, rotated"] == found["largest"]  # by the identity
    assert found["kurtosis, rotated"] == found["kurtosis"]
    assert found["rms"][0] == pytest.approx(4 / np.sqrt(24), rel=0.01)
    assert found["massive"][0] > 100


def test_the_largest_of_normal_numbers_is_as_expected():
    drawn = np.abs(np.random.default_rng(3).standard_normal((2001, 500))).max(axis=1)
    assert np.median(drawn) == pytest.approx(of_normals(500), rel=0.02)


# The gains


@pytest.mark.parametrize("placement", ["post", "sandwich"])
def test_gains_are_those_of_all_norms_of_a_block(placement):
    model = model_of(placement)
    names = [name for name in model.params["blocks"]["1"]["mlp"] if name != "sublayer"]
    model.params["blocks"]["1"]["mlp"][names[-1]]["weight"][7] = -3.0
    model.params["blocks"]["2"]["attention"][names[0]]["weight"][0] = 0.5
    found = gains(model)
    assert found["largest gain"] == [1, 3, 1]
    assert found["smallest gain"] == [1, 1, 0.5]
    assert found["gain stands out"][0] == 0
    assert found["gain stands out"][1] == pytest.approx(np.sqrt(23) / (2 * len(names)), rel=1e-3)


def test_how_far_a_gain_stands_out_is_in_standard_deviations():
    np.testing.assert_allclose(standing_out(np.array([[1.0, 1.0], [1.0, 3.0]])), [0, 1])


def silent(model):
    """Make the sub-layers add nothing, so that the stream is the embedding, but for norms after it."""
    for block in blocks(model):
        for place in block.layers.values():
            for part in place.sublayer.params.values():
                part["weight"][...] = 0
    return model


@pytest.mark.parametrize("sign", [1, -1])
def test_gains_before_a_sub_layer_are_compared_with_the_stream_that_they_take(sign, ids):
    model = silent(model_of("pre"))
    model.embedding.params["weight"][...] = np.arange(1, 25)
    for block in blocks(model):
        block.layers["attention"].norm.params["weight"][...] = np.arange(1, 25)[::sign]
    assert alignment(model, ids) == [sign] * 3


@pytest.mark.parametrize("sign", [1, -1])
def test_gains_after_a_sub_layer_are_compared_with_the_stream_that_they_make(sign, ids):
    model = silent(model_of("post"))
    model.embedding.params["weight"][...] = 1
    for block in blocks(model):
        block.layers["mlp"].norm.params["weight"][...] = np.arange(1, 25)[::sign]
    assert alignment(model, ids) == [1] * 3


# What is made of the numbers


def results_of(placement, **values):
    return Results(SETTINGS, {}, [{"placement": placement, "seed": 0, **values}])


def test_halves_that_add_the_same_variance_are_linear_growth():
    linear, exponential = np.sqrt([1, 2, 3, 4, 5]), np.sqrt([1, 2, 4, 8, 16])
    assert second_half(results_of("pre", rms=[linear, linear]), "pre") == pytest.approx([1])
    assert second_half(results_of("pre", rms=[linear, exponential]), "pre") == pytest.approx([4])


def test_blocks_that_agree_have_the_same_strongest_feature():
    assert same_feature(results_of("pre", feature=[[0] * 5, [8, 3, 3, 3, 8]]), "pre") == [0.75]


# The study


def test_placements_of_a_seed_start_from_the_same_embedding(results):
    for name in ("rms", "largest", "kurtosis", "feature"):
        first = results.values(name, seed=0)[:, 0, 0]
        assert len(first) == 4
        assert np.ptp(first) == 0


def test_a_norm_after_the_sub_layer_makes_what_it_adds_of_size_1(results):
    expected = np.sqrt(1 + 2 * np.arange(5))  # of each sub-layer, as long as they are independent
    rms = results.values("rms", placement="sandwich")[:, 0]
    np.testing.assert_allclose(rms.mean(axis=0), expected, rtol=0.1)


def test_post_norm_keeps_the_size_of_the_stream_and_pre_norm_lets_it_grow(results, verdicts):
    assert verdicts("outliers")["With post-norm the stream has the same size at every depth."] == Verdict.HOLDS
    np.testing.assert_allclose(results.values("rms", placement="post")[:, :, 1:], 1, rtol=0.1)
    rms = results.values("rms", placement="pre")
    assert np.all(np.diff(rms, axis=2) > 0)
    assert np.all(rms[:, -1, -1] > rms[:, 0, -1])


def test_a_model_this_small_has_no_massive_activations(verdicts):
    of = verdicts("outliers")
    assert of["With pre-norm there are massive activations, 1,000 times larger than the median."] == Verdict.FAILS
