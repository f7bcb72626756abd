import numpy as np
import pytest

from npnorm.studies.convolutional import STUDY, best, errors, measure
from npnorm.studies.small_convnets import NORMS
from npnorm.studies.study import Results


@pytest.fixture
def results(quick):
    return quick("convolutional")[0]


def test_every_norm_was_trained_to_the_end(results):
    steps = results.settings["epochs"][-1] * (results.settings["learn"] // results.settings["rows"])
    assert set(results.values("finite steps")) == {steps}
    assert results.distinct("norm") == list(NORMS)


def test_with_batch_norm_the_error_falls_faster_than_without_a_norm(results):
    assert np.all(errors(results, "BatchNorm")[:, :, -1] < errors(results, "none")[:, :, -1] - 10)


def test_a_run_that_diverges_has_the_error_of_guessing():
    settings = {**STUDY.quick, "epochs": [1], "lrs": [1e30]}
    with np.errstate(all="ignore"):
        found = measure(settings, {"norm": "none", "lr": 1e30, "seed": 0})
    assert found["errors"] == [90]
    assert found["finite steps"] < 8


def test_the_best_learning_rate_is_that_of_the_lowest_error_at_the_end():
    curves = {0.1: [[1.0, 5.0], [1.0, 6.0]], 0.2: [[3.0, 4.0], [3.0, 2.0]]}
    lines = [{"norm": "none", "lr": lr, "errors": e} for lr, seeds in curves.items() for e in seeds]
    lr, found = best(Results({"lrs": [0.1, 0.2]}, {}, lines), "none")
    assert lr == 0.2
    assert found.tolist() == curves[0.2]
