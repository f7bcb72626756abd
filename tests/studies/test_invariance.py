import dataclasses

import numpy as np
import pytest
from matplotlib.figure import Figure

from npnorm.studies.invariance import (
    CHANGES,
    EXPECTED,
    NORMS,
    SCALE,
    SHORT,
    both_passes,
    claims,
    decided,
    draw,
    measure,
    nearest,
    table,
)
from npnorm.studies.study import Verdict

EACH = pytest.mark.parametrize("name", NORMS)


@pytest.fixture
def drawn():
    """Return x, W, dy and the gains."""
    rng = np.random.default_rng(3)
    return *map(rng.standard_normal, ((5, 7), (8, 7), (5, 8))), rng.standard_normal(8)


def test_the_changes_are_those_of_their_names(drawn):
    x, w, _, _ = drawn
    rng = np.random.default_rng(4)
    changed = {name: change(x, w, rng) for name, change in CHANGES.items()}
    of_x = [name for name, (_, after) in changed.items() if after is w]
    assert [name for name, (after, _) in changed.items() if after is x] == list(CHANGES)[:3]
    assert of_x == list(CHANGES)[3:]
    for name, (x_after, w_after) in changed.items():
        before, after = (x, x_after) if name in of_x else (w, w_after)
        if "centring" in name:
            np.testing.assert_allclose(after - before, np.tile((after - before)[0], (len(before), 1)), atol=1e-15)
        else:
            scaled = (after != before).all(axis=1)
            assert scaled.sum() == (len(before) if "matrix" in name or "dataset" in name else 1)
            np.testing.assert_allclose(after[scaled], SCALE * before[scaled])


@EACH
def test_the_gradients_are_derivatives(name, drawn):
    x, w, dy, g = drawn
    norm = NORMS[name](g, 1e-3)
    step = 1e-6 * np.random.default_rng(5).standard_normal(w.shape)
    change = both_passes(norm, x, w + step, dy).y - both_passes(norm, x, w - step, dy).y
    assert np.sum(both_passes(norm, x, w, dy).dw * step) == pytest.approx(np.sum(dy * change) / 2, rel=1e-6)


@EACH
def test_the_quick_run_finds_the_expected_answers(name, quick):
    changes = quick("invariance")[0].values("change", norm=name, eps=0.0)
    assert decided(changes) == EXPECTED[name].split()


def test_every_claim_holds(verdicts):
    assert set(verdicts("invariance").values()) == {Verdict.HOLDS}


@pytest.mark.parametrize(("change", "size"), [(0, 0.3), (1, 1e-16), (3, 1e-6)])
def test_an_answer_that_differs_from_the_table_is_seen(change, size, quick):
    results = quick("invariance")[0]
    lines = [dict(line, change=list(line["change"])) for line in results.lines]
    for line in lines:
        if line["norm"] == "RMSNorm" and line["eps"] == 0:
            line["change"][change] = size
    of = {
        claim.says: dataclasses.asdict(claim) | {"verdict": claim.verdict}
        for claim in claims(results._replace(lines=lines))
    }
    (says,) = [says for says in of if says.startswith("RMSNorm is invariant")]
    assert (of[says]["verdict"], list(of[says]["values"])) == (Verdict.FAILS, [5] * 3)


def test_the_sizes_shown_are_the_worst_of_the_seeds():
    changes = np.array([[1e-16, 0.3, 1e-6], [1e-15, 0.2, 2e-6]])
    np.testing.assert_array_equal(nearest(changes), [1e-15, 0.2, 2e-6])


def test_of_one_row_the_change_with_eps_is_that_of_the_formula():
    settings = {"cases": 1, "inputs": 48, "outputs": 64}
    came = measure(settings, {"norm": "RMSNorm", "eps": 1e-5, "seed": 0})
    assert came["change"][0] == pytest.approx((1 - 1 / SCALE**2) * came["bound"], rel=1e-4)


def test_gradients_go_with_the_scales_as_the_invariances_say(quick):
    results = quick("invariance")[0].where(eps=0.0)
    for name, expected in EXPECTED.items():
        by_w, by_x = (results.values(f"dW by {scale}", norm=name) for scale in "Wx")
        if name == "DyT":
            assert np.all((-0.9 < by_w) & (by_w < -0.01) & (0.1 < by_x) & (by_x < 0.99))
        else:
            np.testing.assert_allclose(by_w, -1, atol=1e-12)
            np.testing.assert_allclose(by_x, 0 if expected.split()[3] == "yes" else 1, atol=1e-12)


def test_the_table_has_a_line_without_eps_and_one_with_it_for_each_norm(quick):
    rows = table(quick("invariance")[0])
    assert [(row["norm"], row["eps"]) for row in rows] == [(name, eps) for name in EXPECTED for eps in ("0", "1e-05")]
    assert all(row[change].startswith(("yes ", "no ")) for row in rows[::2] for change in SHORT.values())
    assert all(float(row[change]) < 3 for row in rows[1::2] for change in SHORT.values())


def test_the_picture_frames_answers_that_differ(quick):
    results = quick("invariance")[0]
    lines = [dict(line, change=[1e-16] * len(CHANGES)) if line["norm"] == "DyT" else line for line in results.lines]
    for some, framed in ((results, 0), (results._replace(lines=lines), len(CHANGES))):
        figure = Figure()
        draw(some, figure)
        assert len(figure.axes[0].patches) == framed
        assert f"{48 - framed} of 48 answers agree" in figure.axes[0].get_xlabel()
