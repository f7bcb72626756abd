"""What the studies share."""

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from npnorm.studies.study import Claim, Results, Study, Verdict, draw, load, run

MEASURED = []


def study_of(measure=None, **changes):
    """Return a study of three cells for each seed, whose claim is that the values are above 0.5."""

    def measure_cell(settings, cell):
        MEASURED.append(cell)
        return {"value": settings["scale"] * cell["x"] + cell["seed"] / 100, "bad": [math.nan, math.inf, -math.inf]}

    def curve(results, figure):
        ax = figure.subplots()
        ax.set_title("0.0163 of 6.907")
        ax.plot(results.values("x", seed=0), results.values("value", seed=0), label="value of x")
        ax.legend()

    parts = {
        "shows": "values of x",
        "minutes": 1,
        "full": {"scale": 1.0, "seeds": 2},
        "quick": {"scale": 1.0, "seeds": 2},
        "cells": lambda settings: [{"x": x, "seed": s} for x in (1, 2, 3) for s in range(settings["seeds"])],
        "measure": measure or measure_cell,
        "claims": lambda results: [Claim("It is above.", "a test", "value", results.values("value", x=1), low=0.5)],
        "table": lambda results: [{"x": str(line["x"]), "value": f"{line['value']:.2f}"} for line in results.lines],
        "draw": curve,
    }
    return Study(**(parts | changes))


@pytest.fixture(autouse=True)
def nothing_measured_yet():
    MEASURED.clear()


# Claims


def claim(values, **bounds):
    return Claim("Says.", "source", "quantity", values, **bounds)


def test_the_interval_is_that_of_students_t():
    first, last = claim([1.0, 2.0, 3.0], low=0).interval  # t(0.975, 2) = 4.302653, s = 1
    assert first == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert last == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "bounds", "verdict"),
    [
        ([1.0, 1.1, 0.9], {"low": 0.5}, Verdict.HOLDS),
        ([1.0, 1.1, 0.9], {"high": 0.5}, Verdict.FAILS),
        ([1.0, 1.1, 0.9], {"low": 1.05}, Verdict.OPEN),
        ([1.0, 1.1, 0.9], {"low": 0.5, "high": 1.5}, Verdict.HOLDS),
        ([1.0, 1.1, 0.9], {"low": 2.0, "high": 3.0}, Verdict.FAILS),
        ([1.0, 3.0], {"low": 0.5}, Verdict.OPEN),  # two seeds that differ decide little
        ([0.1] * 3, {"low": 0.1}, Verdict.HOLDS),  # though their mean, as it is computed, is not 0.1
        ([1.0], {"low": 0.5}, Verdict.OPEN),
        ([], {"low": 0.5}, Verdict.OPEN),
        ([1.0, math.nan, 1.0], {"low": 0.5}, Verdict.OPEN),
        ([1.0, math.inf], {"low": 0.5}, Verdict.OPEN),
    ],
)
def test_the_verdict_follows_from_mean_and_spread(values, bounds, verdict):
    assert claim(values, **bounds).verdict == verdict


def test_one_value_decides_where_there_is_no_spread():
    assert claim([1.0], low=0.5, exact=True).verdict == Verdict.HOLDS
    assert claim([1.0], high=0.5, exact=True).verdict == Verdict.FAILS
    assert claim([1.0, 0.2], low=0.5, exact=True).verdict == Verdict.OPEN
    assert claim([math.nan], low=0.5, exact=True).verdict == Verdict.OPEN


def test_a_claim_tells_its_numbers_in_words():
    assert claim([1.0, 2.0, 3.0], low=1).measured == "2 (95 %: -0.5 to 4.5; 3 seeds)"
    assert claim([1.0], low=1).measured == "1 (1 seed)"
    assert claim([2.5], low=1, exact=True).measured == "2.5"
    assert claim([0.1] * 3, low=1).measured == "0.1 in each of 3 seeds"  # which have no spread to judge by
    assert [claim([], **b).bounds for b in ({"low": 1}, {"high": 2}, {"low": 1, "high": 2}, {"low": 0, "high": 0})] == [
        "at least 1",
        "at most 2",
        "1 to 2",
        "0",
    ]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.99991, 0.99993, 0.99992], "0.99992 (95 %: 0.999895 to 0.999945; 3 seeds)"),  # both ends can be told apart
        ([1e-17, -2e-17, 1e-17], "0 (95 %: -4.3e-17 to 4.3e-17; 3 seeds)"),  # not -3e-34
        ([1200.0, 1300.0, 1250.0], "1250 (95 %: 1130 to 1370; 3 seeds)"),  # not 1.25e+03
    ],
)
def test_the_interval_is_told_with_two_figures_of_its_width(values, words):
    assert claim(values, low=1).measured == words


@pytest.mark.parametrize("bounds", [{}, {"low": 2.0, "high": 1.0}, {"low": math.nan}])
def test_a_claim_without_bounds_that_can_decide_is_refused(bounds):
    with pytest.raises(ValueError, match=r"Claim 'Says.': it needs low, high or both"):
        claim([1.0], **bounds)


# Results


def test_a_name_that_no_cell_has_is_refused():
    results = Results({}, {}, [{"x": 1, "loss": 2.0}])
    for ask in (lambda: results.values("los"), lambda: results.where(y=1), lambda: results.distinct("y")):
        with pytest.raises(KeyError, match=r"there are x, loss|los"):
            ask()


# Cells, files and what goes on


def test_a_run_measures_each_cell_once(tmp_path):
    study = study_of()
    results = run("name", study, study.full, tmp_path, quiet=True)
    assert results.values("value", x=2).tolist() == [2.0, 2.01]
    assert results.distinct("x") == [1, 2, 3]
    assert len(MEASURED) == 6
    again = run("name", study, study.full, tmp_path, quiet=True)
    assert len(MEASURED) == 6
    np.testing.assert_equal(again.lines, results.lines)


def test_more_seeds_measure_only_what_is_new(tmp_path):
    study = study_of()
    run("name", study, study.full, tmp_path, quiet=True)
    results = run("name", study, {"scale": 1.0, "seeds": 4}, tmp_path, quiet=True)
    assert [cell["seed"] for cell in MEASURED[6:]] == [2, 3] * 3
    assert results.values("x").tolist() == [1] * 4 + [2] * 4 + [3] * 4  # in the order of the cells, not of measuring


def test_the_file_has_settings_machine_cells_and_verdicts(tmp_path):
    study = study_of()
    run("name", study, study.full, tmp_path, quiet=True)
    file = json.loads((tmp_path / "name.json").read_text(), parse_constant=pytest.fail)  # strict: no NaN, no Infinity
    assert file["study"] == "name"
    assert file["settings"] == {"scale": 1.0}
    assert "numpy" in file["machine"]["versions"]
    assert file["machine"]["processor"]
    assert [entry["cell"] for entry in file["cells"]] == study.cells(study.full)
    assert file["cells"][0]["result"] == {"value": 1.0, "bad": ["nan", "inf", "-inf"]}
    assert [(line["says"], line["verdict"]) for line in file["claims"]] == [("It is above.", "holds")]


def test_numbers_that_are_not_finite_come_back(tmp_path):
    study = study_of()
    run("name", study, study.full, tmp_path, quiet=True)
    np.testing.assert_array_equal(load("name", tmp_path).values("bad", x=1, seed=0), [[math.nan, math.inf, -math.inf]])


def test_cells_may_have_what_numpy_and_tuples_have(tmp_path):
    third = 1 / 3
    cells = [{"x": np.int64(1), "shape": (2, 3), "third": third, "seed": 0}]
    study = study_of(cells=lambda settings: cells)
    for _ in range(2):
        results = run("name", study, study.full, str(tmp_path), quiet=True)
    assert len(MEASURED) == 1
    assert results.values("value", shape=(2, 3), third=third).tolist() == [1.0]


def test_cells_that_differ_in_a_late_digit_are_two(tmp_path):
    study = study_of(cells=lambda settings: [{"x": 1.0, "seed": 0}, {"x": 1.0 + 1e-9, "seed": 0}])
    run("name", study, study.full, tmp_path, quiet=True)
    assert len(MEASURED) == len(load("name", tmp_path).lines) == 2


def test_what_is_varied_and_what_is_measured_have_different_names(tmp_path):
    study = study_of(lambda settings, cell: {"x": 2})
    with pytest.raises(ValueError, match="x is the name of what is varied and of a result"):
        run("name", study, study.full, tmp_path, quiet=True)


def test_settings_say_how_many_seeds_there_are():
    with pytest.raises(ValueError, match='quick needs "seeds"'):
        study_of(quick={"scale": 1.0})


def test_a_study_that_fails_keeps_what_it_has(tmp_path):
    def measure(settings, cell):
        if cell["x"] == 3:
            raise RuntimeError("no such luck")
        return {"value": 1.0}

    with pytest.raises(RuntimeError, match="no such luck"):
        run("name", study_of(measure), {"scale": 1.0, "seeds": 1}, tmp_path, quiet=True)
    results = run("name", study_of(), {"scale": 1.0, "seeds": 1}, tmp_path, quiet=True)
    assert [cell["x"] for cell in MEASURED] == [3]
    assert results.values("value").tolist() == [1.0, 1.0, 3.0]


KILLED = """
    import sys, time
    from pathlib import Path
    from npnorm.studies.study import run
    from tests.studies.test_study import study_of

    def measure(settings, cell):
        with open(sys.argv[1] + "/measured", "a") as log:
            log.write(f"{cell['x']}{cell['seed']} ")
        if len(sys.argv) > 2 and cell["x"] == 2:
            time.sleep(60)
        return {"value": 1.0}

    study = study_of(measure)
    run("name", study, study.full, Path(sys.argv[1]), quiet=True)
"""


def test_a_study_that_was_killed_goes_on_where_it_was(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(KILLED))
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path), "sleep"], env=environment)
    log = tmp_path / "measured"
    deadline = time.monotonic() + 60
    while not log.exists() or not log.read_text().endswith("20 "):  # it sleeps in the third cell
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run([sys.executable, str(script), str(tmp_path)], env=environment, check=True)
    assert log.read_text().split() == ["10", "11", "20", "20", "21", "30", "31"]
    assert len(load("name", tmp_path).lines) == 6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"settings": {"scale": 2.0}}, "another setting 'scale': 2.0 there, 1.0 here"),
        ({"machine": {"processor": "an abacus"}}, "another processor: an abacus there"),
        ({"format": 99}, "its format is 99"),
    ],
)
def test_cells_of_another_kind_are_not_mixed(tmp_path, change, says):
    study, path = study_of(), tmp_path / "name.json"
    run("name", study, study.full, tmp_path, quiet=True)
    file = json.loads(path.read_text())
    file = file | {**change, "machine": file["machine"] | change.get("machine", {})}
    path.write_text(json.dumps(file))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="Take another --out") as problem:
        run("name", study, study.full, tmp_path, quiet=True)
    assert says in str(problem.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "not JSON", "[]", "{}", '{"study": "name", "format": 1}'])
def test_a_file_that_is_none_of_a_study_is_refused(tmp_path, text):
    (tmp_path / "name.json").write_text(text)
    with pytest.raises(ValueError, match=r"name.json is not a file of a study"):
        load("name", tmp_path)


def test_places_that_cannot_hold_a_file_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "name.json").mkdir()
    study = study_of()
    with pytest.raises(ValueError, match=r"file cannot be made: .*\. Take another --out"):
        run("name", study, study.full, tmp_path / "file", quiet=True)
    for folder in (tmp_path / "file", tmp_path):
        with pytest.raises(ValueError, match=r"name.json cannot be read: .*\. Take another --out"):
            load("name", folder)


def test_what_a_stopped_run_left_is_not_shown_as_a_result(tmp_path):
    def measure(settings, cell):
        if cell["x"] == 3:
            raise KeyboardInterrupt
        return {"value": 1.0}

    study = study_of(measure)
    with pytest.raises(KeyboardInterrupt):
        run("name", study, study.full, tmp_path, quiet=True)
    with pytest.raises(ValueError, match=r"a run that was stopped: 4 cells are measured\. Run it to the end"):
        load("name", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["name.json"]


# Picture


def test_the_text_of_a_picture_stays_text_and_its_bytes_the_same(tmp_path):
    study = study_of()
    results = run("name", study, study.full, tmp_path, quiet=True)
    path = draw("name", study, results, tmp_path)
    first = path.read_bytes()
    assert b">value of x</text>" in first
    assert b">0.0163 of 6.907</text>" in first  # places are rounded, numbers are not
    assert draw("name", study, results, tmp_path).read_bytes() == first
