import math
from itertools import product

import numpy as np
import pytest
from matplotlib.figure import Figure

from npnorm.studies.norm_comparison import CONFIGURATIONS, capped, diverged, draw, floor, largest_lr, table
from npnorm.studies.small_transformers import VOCABULARY
from npnorm.studies.study import Results, Verdict


@pytest.mark.parametrize(("vocabulary", "length"), [(2, 3), (3, 4), (2, 6)])
def test_the_floor_is_the_loss_of_guessing_among_the_other_tokens(vocabulary, length):
    losses = []
    for tokens in product(range(vocabulary), repeat=length):
        for i in range(length):
            others = [*tokens[:i], *tokens[i + 1 :]]
            losses.append(-math.log(others.count(tokens[(i + 1) % length]) / (length - 1)))
    assert floor(vocabulary, length) == pytest.approx(np.mean(losses))


def test_the_documented_losses_are_below_the_floor(verdicts):
    assert verdicts("norm_comparison")["As written, in any size, a loss of 3.5 can be reached."] == Verdict.FAILS


def test_as_written_the_losses_are_near_chance(quick):
    results = quick("norm_comparison")[0]
    losses = results.values("last loss", part="as written")
    assert len(losses) == len(CONFIGURATIONS)
    np.testing.assert_allclose(losses, math.log(VOCABULARY), atol=0.5)
    assert not diverged(results.where(part="as written")).any()


def test_repaired_it_learns(quick):
    results = quick("norm_comparison")[0]
    for name in CONFIGURATIONS:
        (loss,) = results.values("held-out loss", part="repaired", configuration=name, lr=1e-2)
        assert loss < 3.6  # chance is 4.6


def test_a_learning_rate_trains_up_to_the_largest():
    runs = {(0.1, 0): True, (0.1, 1): True, (1.0, 0): True, (1.0, 1): False, (10.0, 0): False, (10.0, 1): False}
    lines = [
        {"part": "repaired", "configuration": "a", "lr": lr, "seed": seed, "trains": trains}
        for (lr, seed), trains in runs.items()
    ]
    results = Results({"lrs": [0.1, 1.0, 10.0]}, {}, lines)
    np.testing.assert_array_equal(largest_lr(results, "a"), [1.0, 0.1])
    never = results._replace(lines=[{**line, "trains": False} for line in lines])
    np.testing.assert_array_equal(largest_lr(never, "a"), [math.nan, math.nan])


def test_losses_that_are_chance_are_capped_and_others_are_not():
    losses = np.array([[2.8, math.log(103), 4.5], [math.log(20), round(math.log(97), 6), 5.0]])
    np.testing.assert_array_equal(capped(losses, 3.3), [[False, True, False], [False, True, False]])


def test_runs_that_are_capped_are_counted_in_the_table_and_ringed_in_the_picture(quick):
    results = quick("norm_comparison")[0]
    lines = [dict(line) for line in results.lines]
    for line in lines:
        if line["part"] == "repaired":
            line["held-out loss"] = math.log(103) if line["configuration"] == "Post-LN" and line["lr"] == 0.1 else 2.5
    results = results._replace(lines=lines)
    counts = {row["configuration"]: row["capped at chance"] for row in table(results) if row["part"] == "repaired"}
    assert counts == dict.fromkeys(CONFIGURATIONS, "0 of 2 runs") | {"Post-LN": "1 of 2 runs, at 0.1"}
    figure = Figure()
    draw(results, figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [*CONFIGURATIONS, "capped at chance"]
