import math

import numpy as np
import pytest

from npnorm.studies.recurrent import RUNS, STUDY, measure, share_of_steps
from npnorm.studies.recurrent_model import OFF_CENTRE, hidden_to_hidden, language_model
from npnorm.studies.small_transformers import text
from npnorm.studies.study import Verdict

TINY = {"dim": 8, "rows": 2, "length": 6, "steps": 4, "every": 2, "held out": 3}


@pytest.fixture
def results(quick):
    return quick("recurrent")[0]


def last(results, start, norm, lr=STUDY.quick["lr"]):
    return results.values("curve", start=start, norm=norm, lr=lr)[:, -1]


def weights(start, norm="none", dim=8):
    params = language_model(start, norm, 11, dim, np.random.default_rng(5)).params
    gru, outer = params["gru"], {name: params[name]["weight"] for name in ("embedding", "head")}
    return {"ih": gru["weight_ih"], "hh": gru["weight_hh"], **outer}


@pytest.mark.parametrize("start", RUNS)
def test_the_norms_of_a_start_have_the_same_first_weights(start):
    plain = weights(start)
    for norm in ("LayerNorm", "RMSNorm", "pRMSNorm"):
        for name, a in weights(start, norm).items():
            np.testing.assert_array_equal(a, plain[name])


@pytest.mark.parametrize("start", OFF_CENTRE)
def test_off_centre_is_the_same_weights_with_something_added(start):
    plain = weights("paper")
    for name, a in weights(start).items():
        np.testing.assert_allclose(a - plain[name], 0.2 if name in OFF_CENTRE[start] else 0, atol=1e-7)


def test_the_weights_from_h_are_three_orthogonal_matrices():
    for u in weights("paper")["hh"].reshape(3, 8, 8):
        np.testing.assert_allclose(u @ u.T, np.eye(8), atol=1e-6)
    assert abs(weights("paper", dim=64)["ih"].std() / 0.01 - 1) < 0.05


@pytest.mark.parametrize("norm", ["none", "LayerNorm", "pRMSNorm"])
def test_the_hidden_to_hidden_mapping_is_what_the_gru_takes(norm):
    rng = np.random.default_rng(2)
    gru = language_model("paper", norm, 11, 8, rng).layers["gru"]
    h0 = rng.standard_normal((5, 8)).astype("float32")
    _, saved = gru.forward(rng.standard_normal((5, 3, 4)).astype("float32"), h0)
    for step in saved.steps:
        np.testing.assert_allclose(hidden_to_hidden(gru, step.h)["hh_candidate"], step.cn, atol=1e-6)
    ag = gru.forward(np.zeros((5, 1, 4), "float32"), h0)[1].steps[0]  # nothing but h reaches the gates
    gates = 1 / (1 + np.exp(-hidden_to_hidden(gru, h0)["hh_gates"]))
    np.testing.assert_allclose(gates, np.concatenate([ag.r, ag.z], axis=1), atol=1e-6)


@pytest.mark.parametrize(("level", "share"), [(5.0, 0.0), (4.0, 0.0), (3.0, 0.25), (2.0, 0.5), (1.5, 0.75), (0.5, 1.0)])
def test_the_share_of_steps_is_read_off_the_curve_at_its_first_crossing(level, share):
    assert share_of_steps(np.array([4.0, 2.0, 1.0]), level) == share
    assert share_of_steps(np.array([4.0, 1.0, 2.0]), 1.0) == 0.5


@pytest.mark.parametrize("norm", ["none", "RMSNorm"])
def test_what_is_not_finite_counts_as_chance(norm):
    found = measure(TINY, {"start": "paper", "norm": norm, "lr": 1e30, "seed": 0})
    np.testing.assert_array_equal(found["curve"][1:], math.log(text(18).vocabulary))


def test_from_the_start_of_the_paper_norms_learn_faster_at_the_same_learning_rate(results):
    for norm in ("LayerNorm", "RMSNorm"):
        assert np.all(last(results, "paper", norm) < last(results, "paper", "none"))


def test_layer_norm_trains_the_same_when_its_weights_are_off_centre_and_rms_norm_does_not(results, verdicts):
    of = verdicts("recurrent")
    says = "LayerNorm trains the same when the weights that it acts on are centred at 0.2."
    assert of[says] == Verdict.HOLDS
    differences = {
        norm: results.values("curve", start="centre 0.2, GRU", norm=norm)
        - results.values("curve", start="paper", norm=norm)
        for norm in ("LayerNorm", "RMSNorm")
    }
    assert np.all(np.abs(differences["LayerNorm"]) < 1e-3)
    assert np.all(np.abs(differences["RMSNorm"]).max(axis=1) > 0.01)


def test_norms_give_the_same_standard_deviation_at_every_position(results):
    for norm in ("LayerNorm", "RMSNorm"):
        std = results.values("std of hh_gates", start="paper", norm=norm)[:, :4]
        assert np.all(std.max(axis=1) / std.min(axis=1) < 1.1)
    std = results.values("std of hh_gates", start="paper", norm="none")[:, :4]
    assert np.all(std.max(axis=1) / std.min(axis=1) > 1.2)
