import numpy as np
import pytest
import torch

from npnorm.conformance.cases import SMALL, Sizes, cases
from npnorm.conformance.exact import exact
from npnorm.conformance.problems import pose
from npnorm.conformance.textbook import NORMS
from npnorm.conformance.ulps import DTYPES
from npnorm.studies.__main__ import main
from npnorm.studies.accuracy import STUDY, glance, measure, misses, not_nearest, parts, refusals, table
from npnorm.studies.accuracy_outcomes import FLOAT64, KINDS, NEAREST, Error, Outcome, compare, hold, outcomes
from npnorm.studies.accuracy_peers import PEERS, Peer
from npnorm.studies.study import Results, Verdict

EACH = pytest.mark.parametrize("dtype", DTYPES)

# What was measured


@pytest.fixture(scope="session")
def every(quick):
    return outcomes(quick("accuracy")[0])


@EACH
def test_npnorm_is_within_its_bars(every, dtype):
    own = [o for o in every if (o.peer, o.dtype) == ("npnorm", dtype)]
    alone = [o for o in own if (o.norm, o.case) == ("BatchNorm", "n = 1")]
    assert {o.norm for o in own} == set(NORMS)
    assert all("Its variance says nothing" in o.error for o in alone)
    for o in set(own) - set(alone):
        few_sums = o.case in ("n = 1", "n = 2", "n = 3") and o.result in ("dw", "db")  # and the largest may cancel
        assert o.ulps <= (NEAREST if dtype != "float64" else 64 if few_sums else FLOAT64), o
    assert sum(o.elements for o in own) > 50_000


def test_the_verdicts_say_who_is_right(verdicts):
    of = verdicts("accuracy")
    for dtype in ("float32", "float16", "bfloat16"):
        says = f"{dtype} results of npnorm are within 0.51 ulp of the row's largest number, forward and backward."
        assert of[says] == Verdict.HOLDS
    assert of["float64 results of npnorm are within 8 ulps of the row's largest number: y and dx."] == Verdict.HOLDS
    assert of["What npnorm returns in these cases is never wrong, nan or inf."] == Verdict.HOLDS
    assert of["Each other implementation is wrong, nan or inf in some of these cases: naive, torch."] == Verdict.HOLDS


def test_naive_numpy_is_seen_to_be_wrong_at_mean_1e7(every):
    at = {
        o.result: o.kind
        for o in every
        if (o.peer, o.dtype, o.norm, o.case) == ("naive", "float32", "LayerNorm", "mean 1e7")
    }
    assert (at["y"], at["dw"]) == ("wrong", "wrong")


def test_every_kind_of_result_has_a_place_in_the_table(quick, every):
    rows = table(quick("accuracy")[0])
    assert [(row["dtype"], row["implementation"]) for row in rows] == [
        (dtype, peer) for dtype in DTYPES for peer in ("npnorm", "naive", "torch")
    ]
    assert all(sum(int(row[kind]) for kind in KINDS) == int(row["results"]) for row in rows)
    assert sum(int(row["results"]) for row in rows) == len(every)


# The measure


def planted(dtype="float32"):
    right = exact(pose("LayerNorm", cases(dtype, SMALL)[0]))["y"]
    return right.nearest.copy(), right


def kind(error):
    return outcome("a peer", "y", error).kind


@EACH
def test_a_correctly_rounded_result_is_half_an_ulp_off(dtype):
    error = compare(*planted(dtype))
    assert 0.4 < error.ulps <= 0.5
    assert error.missed == 0
    assert kind(error) == "<= 0.51 ulp"


@EACH
def test_an_error_of_an_ulp_is_seen_as_one(dtype):
    came, right = planted(dtype)
    one = 1, np.argmax(abs(came[1].astype("float64")))  # the largest of its row
    came[one] = np.nextafter(came[one], came.dtype.type(np.inf))
    error = compare(came, right)
    assert 0.5 < error.ulps <= 1.5
    assert error.missed == 1


def test_the_rest_of_float64_is_measured():
    came, right = planted("float64")
    without = compare(came, right._replace(rest=np.zeros_like(right.rest)))
    assert compare(came, right).ulps > 0.4
    assert without.ulps != compare(came, right).ulps


@pytest.mark.parametrize(("value", "seen"), [(np.nan, "nan, inf"), (np.inf, "nan, inf"), (1e30, "wrong")])
def test_what_is_worse_than_ulps_is_seen(value, seen):
    came, right = planted()
    came[2, 5] = value
    error = compare(came, right)
    assert (kind(error), error.missed) == (seen, 1)


def test_a_number_is_off_by_a_number_however_large_it_is():
    came, right = planted("float64")
    came[2, 5] = 1.7e308
    assert kind(compare(came, right)) == "wrong"


@pytest.mark.parametrize(
    ("dtype", "off", "seen"),
    [("bfloat16", 6, "to 8 ulps"), ("bfloat16", 12, "wrong"), ("float32", 12, "8 ulps to 1 %")],
)
def test_wrong_is_beyond_eight_ulps_and_a_percent(dtype, off, seen):
    came, right = planted(dtype)
    came[1, 5] = (came[1, 5].astype("float64") + off * 2.0 ** right.ulp[1, 5]).astype(dtype)
    error = compare(came, right)
    assert abs(error.ulps - off) <= 1
    assert kind(error) == seen


def test_another_shape_or_dtype_is_no_result():
    came, right = planted()
    with pytest.raises(ValueError, match="float64"):
        compare(came.astype("float64"), right)
    with pytest.raises(ValueError, match="expected"):
        compare(came[:1], right)


def test_an_exception_is_a_refusal():
    def solve(problem):
        raise ValueError("eps must be positive\nfor reasons")

    problem = pose("LayerNorm", cases("float32", SMALL)[0])
    assert hold(solve, problem, exact(problem)) == "ValueError: eps must be positive"


CELL = {"dtype": "float32", "case": "n = 2", "norm": "LayerNorm"}


def test_a_peer_that_is_not_installed_is_left_out_and_named(monkeypatch):
    def absent():
        import no_such_package  # noqa: F401

    monkeypatch.setitem(PEERS, "absent", Peer("of a package that nobody has", ("no_such_package",), absent))
    settings = {"sizes": SMALL._asdict(), "peers": ["npnorm", "absent"]}
    results = Results(settings, {}, [{**CELL, **measure(settings, CELL)}])
    assert {o.peer for o in outcomes(results)} == {"npnorm"}
    assert parts(results)["peers"] == "- **npnorm**: `npnorm.LayerNorm` and the others.\n- absent: not installed."


def test_torch_is_left_as_it_was():
    threads = torch.get_num_threads()
    measure({"sizes": SMALL._asdict(), "peers": ["torch"]}, CELL)
    assert torch.get_num_threads() == threads


def test_the_full_run_has_all_cases_and_all_peers():
    assert Sizes(**STUDY.full["sizes"]).long == 1_000_000
    assert STUDY.full["peers"] == list(PEERS) == ["npnorm", "naive", "torch", "flax", "keras", "equinox"]
    assert {"torch", "flax", "jax", "keras", "equinox", "gmpy2"} == set(STUDY.packages)


# The tables


def outcome(peer, result, error, case="c", dtype="float32"):
    return Outcome(dtype, "N", case, peer, result, 8, error)


GOOD, POOR, BAD, WRONG = Error(0.5, 0, 1), Error(7.0, 0, 2), Error(np.nan, np.nan, 8), Error(9e5, 0.25, 3)


def test_a_row_is_a_case_and_a_column_a_peer_and_the_worst_result_is_shown():
    some = [
        outcome("b", "y", GOOD, "second"),
        outcome("a", "y", POOR, "second"),
        outcome("b", "dx", WRONG, "first"),
        outcome("b", "dw", POOR, "first"),
        outcome("a", "dx", POOR, "first"),
        outcome("a", "dw", BAD, "first"),
        outcome("a", "y", GOOD, "first"),
        outcome("b", "y", GOOD, "first"),
    ]
    assert glance(some) == [
        {"case": "second", "b": "0.50", "a": "7.00"},
        {"case": "first", "b": "**25 %**", "a": "**nan**"},
    ]


@pytest.mark.parametrize(("ulps", "text"), {0.494: "0.49", 12.3: "12", 99999: "1e+05", np.inf: "**inf**"}.items())
def test_ulps_in_a_few_characters(ulps, text):
    assert outcome("b", "y", GOOD._replace(ulps=ulps)).shown == text


def test_the_counts_of_a_line_are_those_of_the_kinds():
    errors = {"y": GOOD, "dx": POOR, "dw": BAD, "db": WRONG}
    line = {**CELL, "elements": dict.fromkeys(errors, 8), "peers": {"b": errors, "a": "no"}}
    b, a = table(Results({}, {}, [line]))
    assert [b[kind] for kind in KINDS] == ["1", "0", "1", "0", "1", "1", "0"]
    assert (b["results"], b["elements not nearest"]) == ("4", "43.75% of 0.0 M")
    assert (a["implementation"], a["refused"]) == ("a", "4")


def test_the_misses_are_those_of_npnorm_above_its_bar():
    some = [outcome("npnorm", "y", GOOD), outcome("npnorm", "dx", POOR), outcome("torch", "y", POOR)]
    assert misses(some) == [{"dtype": "float32", "norm": "N", "case": "c", "result": "dx", "ulps": "7.00"}]
    assert misses([o._replace(dtype="float64") for o in some]) == []


def test_the_elements_that_are_not_nearest_are_those_of_npnorm_below_float64():
    errors = {"y": GOOD._replace(missed=0), "dx": GOOD._replace(missed=2)}
    some = [*(outcome("npnorm", result, error) for result, error in errors.items()), outcome("torch", "y", POOR)]
    (row,) = not_nearest(some)
    assert (row["result"], row["elements not nearest"], row["largest error, ulps"]) == ("dx", "2 of 8", "0.50")
    assert not_nearest([o._replace(dtype="float64") for o in some]) == []
    assert not_nearest([outcome("npnorm", "y", "ValueError: no")]) == []


def test_a_refusal_is_told_once_with_its_cases():
    some = [outcome("torch", name, "ValueError: no", case) for case in ("first", "second") for name in ("y", "dx")]
    assert refusals(some) == [
        {"implementation": "torch", "norm": "N", "cases": "first; second", "what it says": "ValueError: no"}
    ]


def test_more_seeds_are_refused_since_each_case_has_its_own(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["accuracy", "--quick", "--seeds", "2", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "Leave --seeds out" in capsys.readouterr().err
