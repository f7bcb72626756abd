import numpy as np
import pandas as pd
import pytest
import torch

from npnorm.conformance.cases import SMALL, cases
from npnorm.conformance.exact import exact
from npnorm.conformance.problems import pose
from npnorm.conformance.textbook import NORMS
from npnorm.conformance.ulps import DTYPES
from npnorm.studies.accuracy.__main__ import main
from npnorm.studies.accuracy.measure import Cell, Verdict, measure, run
from npnorm.studies.accuracy.page import bar, cells, misses, page, refusals, scoreboard, shown
from npnorm.studies.accuracy.peers import PEERS, Peer

EACH = pytest.mark.parametrize("dtype", DTYPES)


@EACH
def test_npnorm_is_within_its_bars(dtype):
    frame = run([PEERS["npnorm"]()], NORMS, [dtype], SMALL)
    alone = (frame["norm"] == "BatchNorm") & (frame["n"] == 1)
    assert frame[alone]["refusal"].str.contains("Its variance says nothing").all()
    frame = frame[~alone]
    assert set(frame["verdict"]) == {Verdict.NUMBER}
    few_sums = (frame["n"] <= 3) & frame["result"].isin(["dw", "db"])  # and the largest may cancel
    limit = np.where(few_sums & (dtype == "float64"), 64, bar(dtype))
    over = frame[frame["ulps"] > limit]
    assert over.empty, over
    assert frame["elements"].sum() > 50_000


# The measure


def planted(dtype="float32"):
    right = exact(pose("LayerNorm", cases(dtype, SMALL)[0]))["y"]
    return right.nearest.copy(), right


@EACH
def test_a_correctly_rounded_result_is_half_an_ulp_off(dtype):
    came, right = planted(dtype)
    cell = measure(came, right)
    assert cell.verdict is Verdict.NUMBER
    assert 0.4 < cell.ulps <= 0.5
    assert (cell.missed, cell.elements) == (0, came.size)


@EACH
def test_an_error_of_an_ulp_is_seen_as_one(dtype):
    came, right = planted(dtype)
    one = 1, np.argmax(abs(came[1].astype("float64")))  # the largest of its row
    came[one] = np.nextafter(came[one], came.dtype.type(np.inf))
    cell = measure(came, right)
    assert 0.5 < cell.ulps <= 1.5
    assert cell.missed == 1


def test_the_rest_of_float64_is_measured():
    came, right = planted("float64")
    without = measure(came, right._replace(rest=np.zeros_like(right.rest)))
    assert measure(came, right).ulps > 0.4
    assert without.ulps != measure(came, right).ulps


@pytest.mark.parametrize(("value", "verdict"), [(np.nan, Verdict.NAN), (np.inf, Verdict.INF), (1e30, Verdict.WRONG)])
def test_what_is_worse_than_ulps_is_seen(value, verdict):
    came, right = planted()
    came[2, 5] = value
    cell = measure(came, right)
    assert (cell.verdict, cell.missed) == (verdict, 1)


@pytest.mark.parametrize(
    ("dtype", "off", "verdict"), [("bfloat16", 6, "number"), ("bfloat16", 12, "wrong"), ("float32", 12, "number")]
)
def test_wrong_is_beyond_eight_ulps_and_a_percent(dtype, off, verdict):
    came, right = planted(dtype)
    came[1, 5] = (came[1, 5].astype("float64") + off * 2.0 ** right.ulp[1, 5]).astype(dtype)
    cell = measure(came, right)
    assert abs(cell.ulps - off) <= 1
    assert cell.verdict == verdict


def test_another_shape_or_dtype_is_no_result():
    came, right = planted()
    with pytest.raises(ValueError, match="float64"):
        measure(came.astype("float64"), right)
    with pytest.raises(ValueError, match="expected"):
        measure(came[:1], right)


def test_naive_numpy_is_seen_to_be_wrong_at_mean_1e7():
    frame = run([PEERS["naive"]()], ["LayerNorm"], ["float32"], SMALL)
    found = frame[frame["case"] == "mean 1e7"].set_index("result")["verdict"]
    assert (found["y"], found["dw"]) == (Verdict.WRONG, Verdict.WRONG)


def test_an_exception_is_a_refusal():
    def results(problem):
        raise ValueError("eps must be positive\nfor reasons")

    frame = run([Peer("none", "", (), results)], ["LayerNorm"], ["float32"], SMALL)
    assert set(frame["refusal"]) == {"ValueError: eps must be positive"}
    assert set(frame["verdict"]) == {Verdict.REFUSED}
    (line,) = refusals(frame).to_dict("records")
    assert (line["implementation"], line["cases"].count(";")) == ("none", 22)


# The tables


def made(*lines):
    """Return a frame of lines (peer, norm, case, result, cell)."""
    place = {"dtype": "float32", "n": 8, "refusal": ""}
    return pd.DataFrame(
        [
            place | {"peer": peer, "norm": norm, "case": case, "result": result, **cell._asdict()}
            for peer, norm, case, result, cell in lines
        ]
    )


GOOD, POOR, BAD = Cell(Verdict.NUMBER, 0.5, 0, 1, 8), Cell(Verdict.NUMBER, 7.0, 0, 2, 8), Cell(Verdict.NAN, missed=8)
WRONG = Cell(Verdict.WRONG, 9e5, 0.25, 3, 8)


def test_a_row_is_a_case_and_a_column_a_peer_and_the_worst_cell_is_shown():
    frame = made(
        ("b", "N", "second", "y", GOOD),
        ("a", "N", "second", "y", POOR),
        ("b", "N", "first", "dx", WRONG),
        ("b", "N", "first", "dw", POOR),
        ("a", "N", "first", "dx", POOR),
        ("a", "N", "first", "dw", BAD),
        ("a", "N", "first", "y", GOOD),
        ("b", "N", "first", "y", GOOD),
    )
    table = cells(frame)
    assert table.to_numpy().tolist() == [
        ["float32", "N", "forward", "second", "0.50", "7.00"],
        ["float32", "N", "backward", "first", "25 %", "nan"],
        ["float32", "N", "forward", "first", "0.50", "0.50"],
    ]
    assert list(table.columns[-2:]) == ["b", "a"]
    assert cells(frame, ["case"]).to_numpy().tolist() == [["second", "0.50", "7.00"], ["first", "25 %", "nan"]]


@pytest.mark.parametrize(("ulps", "text"), {0.494: "0.49", 12.3: "12", 99999: "1e+05"}.items())
def test_ulps_in_a_few_characters(ulps, text):
    assert shown(pd.Series(GOOD._replace(ulps=ulps)._asdict())) == text


def test_the_counts_of_a_line_add_up_and_no_peer_is_lost():
    frame = made(*(("b", "N", "c", "y", cell) for cell in (GOOD, POOR, POOR, BAD, WRONG)), ("a", "N", "c", "y", GOOD))
    table = scoreboard(frame).set_index("implementation")
    assert list(table.index) == ["b", "a"]
    assert table.loc["b"].tolist() == [5, 1, 0, 2, 0, 1, 1, 0, "50.00% of 0.0 M"]
    assert table.loc["a"].tolist()[:3] == [1, 1, 0]
    counts = table.drop(columns=["cells", "elements not nearest"]).sum(axis=1)
    assert (counts == table["cells"]).all()


def test_the_misses_are_those_of_npnorm_above_its_bar():
    frame = made(("npnorm", "N", "c", "y", GOOD), ("npnorm", "N", "c", "dx", POOR), ("torch", "N", "c", "y", POOR))
    assert misses(frame).to_numpy().tolist() == [["float32", "N", "c", "dx", "7.00"]]
    assert misses(frame.assign(dtype="float64")).empty


def test_the_page_has_every_part():
    frame = made(("npnorm", "N", "c", "y", WRONG))
    written = page(frame, [PEERS["npnorm"]()], "the command", "data/cells.csv")
    assert "<!--" not in written
    assert all(text in written for text in ("the command", "[All cells](data/cells.csv)", "**25 %**", "numpy 2"))
    assert max(len(line) for line in written.splitlines() if not line.startswith(("|", "    "))) <= 110


# The command


def test_the_command_prints_the_scoreboard_and_writes_page_and_cells(tmp_path, capsys):
    threads, path = torch.get_num_threads(), tmp_path / "accuracy.md"
    main(f"--quick --norms LayerNorm --dtypes float32 --peers npnorm,naive,torch --write {path}".split())
    assert torch.get_num_threads() == threads  # the study leaves torch as it was
    written, data = path.read_text(encoding="utf-8"), pd.read_csv(tmp_path / "data" / "accuracy.csv")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| npnorm")]
    count, nearest, *others = (int(word) for word in line.replace("|", " ").split()[1:9])
    assert count == nearest == 23 * 4
    assert not any(others)
    assert line in written
    assert data.shape == (23 * 2, 4 + 3)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--norms weight", "weight is not among LayerNorm, RMSNorm, GroupNorm, BatchNorm"),
        ("--dtypes float32,int8", "int8 is not among"),
        ("--peers tensorflow", "tensorflow is not among npnorm, naive, torch"),
        ("--write no/such/folder/page.md", "there is no folder no"),
    ],
)
def test_wrong_options_are_named(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv.split())
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_brings_it(capsys, monkeypatch):
    def absent():
        import no_such_package  # noqa: F401

    monkeypatch.setitem(PEERS, "keras", absent)
    with pytest.raises(SystemExit) as stop:
        main(["--quick", "--peers", "keras"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "no_such_package is not installed; it comes with the extra npnorm[accuracy]\n"
