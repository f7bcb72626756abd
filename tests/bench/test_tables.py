import numpy as np
import pandas as pd
import pytest

from npnorm.bench.tables import GOALS, derive, goals, markdown, pivot, tables, text
from tests.bench import fake
from tests.bench.fake import case, frame


def found(*parts):
    """Return the goals by what they are about."""
    table = goals(frame(*parts)).reset_index()
    return {line["what"]: line for line in table.to_dict("records")}


def cell(table, column, **where):
    """Return the cell of a derived table."""
    some = table[np.logical_and.reduce([table[name] == value for name, value in where.items()])]
    return some[column].item()


def test_ratios_are_those_of_one_run():
    table = derive(frame(case(f32=(2, 3), torch=(4, 6)), case(threads=2, f32=(1, 1), torch=(10, 10))))
    assert cell(table, "torch", threads=1, peer="f32", op="forward") == 0.5
    assert cell(table, "torch", threads=2, peer="f32", op="forward") == 0.1  # not by the torch of another run
    assert cell(table, "torch", threads=1, peer="torch", op="both") == 1.0


@pytest.mark.parametrize(("norm", "shares"), {"RMSNorm": (0.5, 0.75), "BatchNorm": (0.75, 1.25)}.items())
def test_the_limit_is_that_of_the_faster_copy_by_the_arrays_that_must_move(norm, shares):
    table = derive(frame(case(norm, f32=(2, 2))))
    assert tuple(cell(table, "share", peer="f32", op=op) for op in ("forward", "backward")) == shares


def test_bytes_per_second_count_what_must_move():
    table = derive(frame(case("LayerNorm", mib=1, f32=(2, 3))))
    assert cell(table, "rate", peer="f32", op="both") == 5 * 2**20 / 5
    assert cell(table, "rate", peer="multiply", op="both") == 2 * 2**20


def test_a_pivot_keeps_rows_columns_and_values_together():
    lines = [("b", 2, "y", 1), ("a", 1, "x", 2), ("b", 2, "x", 3), ("a", 1, "y", 4)]
    table = pivot(pd.DataFrame(lines, columns=["row", "n", "col", "value"]), ["row", "n"], "col", "value")
    assert list(table.index) == [("b", 2), ("a", 1)]
    assert list(table.columns) == ["y", "x"]
    assert table.to_numpy().tolist() == [[1, 3], [4, 2]]


def test_two_values_for_one_cell_are_an_error_and_no_mean():
    with pytest.raises(ValueError, match=r"(?i)duplicate|not unique"):
        tables(frame(case(), case()))


def test_the_tables_have_every_cell_in_their_order():
    lines = frame(
        *(case(heap=heap, threads=n, mib=m) for m in (256, 1) for n in (2, 1) for heap in ("retained", "default"))
    )
    ((title, table),) = tables(lines)
    assert title == "RMSNorm"
    assert list(table.columns) == ["torch ms", "f64", "f32", "out", "naive", "%f32", "%out", "%torch", "+-%"]
    assert list(table.index)[:3] == [
        ("1MiB", 1, "forward", "default"),
        ("1MiB", 1, "forward", "retained"),
        ("1MiB", 1, "backward", "default"),
    ]
    assert len(table) == 2 * 2 * 2 * 3
    row = table.loc[("256MiB", 2, "both", "retained")]
    assert row.tolist() == ["10000", "1.00", "0.50", "0.40", "2.00", "50", "62", "25", "0"]


def test_noise_is_that_of_the_widest_spread():
    lines = case(f32=(1, 1), torch=(2, 2))
    next(line for line in lines if (line["peer"], line["op"]) == ("f32", "both")).update(fake.seconds(1, 0.25))
    ((_, table),) = tables(frame(lines))
    assert table["+-%"].tolist() == ["0", "0", "25"]


def test_without_torch_the_textbook_is_what_ratios_refer_to():
    lines = frame(case(f32=(2, 3), naive=(4, 6)))
    ((_, table),) = tables(lines)
    assert list(table.columns)[:2] == ["naive ms", "f32"]
    assert not [what for what in goals(lines).reset_index()["what"] if "torch" in what]


def test_a_peer_that_was_not_measured_everywhere_leaves_a_hole():
    ((_, table),) = tables(frame(case(), case(threads=2, f32=(1, 1), torch=(1, 1))))
    assert table.loc[("256MiB", 2, "both", "default")].tolist()[:5] == ["2000", "-", "1.00", "-", "-"]


def test_rows_that_need_care_are_held_against_ordinary_ones_of_the_same_call():
    lines = frame(fake.rows(constant=3.0, extra=2**21), fake.rows(peer="f64", ordinary=2.0, constant=3.0))
    (_, ratio), (_, memory) = tables(lines)
    assert ratio["constant"].to_dict() == {
        ("LayerNorm", "4096x1024", op, peer): value
        for op in ("forward", "backward")
        for peer, value in (("f64", "1.50"), ("f32", "3.00"))
    }
    assert memory.loc[("LayerNorm", "4096x1024", "forward", "f32")].tolist() == ["0.00", "2.00"]


# Goals


def test_a_goal_is_judged_by_its_worst_cell():
    lines = found(case(threads=2, f32=(1, 1), torch=(4, 4)), case(mib=1, f32=(3, 3), torch=(4, 4)))
    line = lines["RMSNorm f32 / torch, default, >= 1 MiB"]
    assert (line["worst"], line["worst cell"], line["goal"], line["met"]) == ("0.75", "1MiB 1T", "<= 0.50", "1/2")
    assert line["mean"] == f"{(0.25 * 0.75) ** 0.5:.2f}"


def test_goals_differ_by_heap_and_size():
    large = [case("LayerNorm", heap=heap, f32=(1, 1), torch=(1, 1)) for heap in ("default", "retained")]
    lines = found(*large, case("LayerNorm", mib=1, f32=(9, 9), torch=(1, 1)))
    assert lines["LayerNorm f32 / torch, default, >= 32 MiB"]["met"] == "0/1"
    assert lines["LayerNorm f32 / torch, retained, >= 32 MiB"]["met"] == "1/1"


def test_the_mean_over_the_grid_is_geometric_and_by_heap():
    lines = found(case(f32=(1, 1), torch=(4, 4)), case("BatchNorm", f32=(1, 1), torch=(1, 1)))
    line = lines["all norms, f32 / torch, default"]
    assert (line["worst cell"], line["mean"], line["met"]) == ("mean of 2 cells", "0.50", "no")
    assert "all norms, f32 / torch, retained" not in lines


def test_float64_is_held_against_the_textbook():
    line = found(case(), case("GroupNorm", f64=(3, 3), naive=(2, 2)))["GroupNorm f64 / naive"]
    assert (line["worst"], line["met"]) == ("1.50", "0/1")


def test_the_share_of_the_copy_should_be_large():
    what = "RMSNorm out, share of copy, >= 32 MiB"
    line = found(case(out=(1, 3), f32=(1, 3)), case(threads=2, out=(1, 1)))[what]
    assert (line["worst"], line["goal"], line["met"]) == ("0.62", ">= 0.50", "2/2")
    assert found(case(out=(4, 6)))[what]["met"] == "0/1"


def test_steps_of_training_have_a_goal():
    line = found(fake.step(0.9), fake.step(0.99, threads=2, heap="retained"))["training step, npnorm / torch"]
    assert (line["worst"], line["worst cell"], line["met"]) == ("0.99", "a model 2T retained", "1/2")


@pytest.mark.parametrize(("seconds", "met"), [(4.9, "4/4"), (5.1, "2/4")])
def test_rows_that_need_care_may_take_five_times_as_long(seconds, met):
    lines = found(fake.rows(constant=seconds, mean_5=1))
    line = lines["LayerNorm f32, rows that need care / ordinary rows"]
    assert (line["worst"], line["worst cell"]) == (f"{seconds:.2f}", "4096x1024 forward, constant")
    assert line["met"] == met


@pytest.mark.parametrize(("mib", "met"), [(31, "4/4"), (33, "2/4")])
def test_and_32_mib(mib, met):
    line = found(fake.rows(constant=1, extra=mib * 2**20))["LayerNorm, MiB of extra memory"]
    assert (line["worst"], line["met"]) == (f"{mib:.2f}", met)


def test_every_goal_is_told_once():
    assert len({goal.what for goal in GOALS}) == len(GOALS)


def test_the_page_of_a_terminal_has_all_of_it():
    page = text(
        frame(case(), fake.step(), fake.rows(constant=2), fake.memory(f32=(2**20, 2**21))), {"processor": "paper"}
    )
    titles = "RMSNorm", "A step of training", "Rows that need care: time", "Largest extra memory of a call", "Goals"
    assert all(f"\n{title}" in page for title in titles)
    assert page.startswith("- processor: paper\n")
    assert max(map(len, page.splitlines())) <= 130


def test_a_table_of_a_page_is_aligned_and_keeps_its_digits():
    ((_, table),) = tables(frame(fake.memory(f32=(2**20, 2**21))))
    first, rule, one, _ = markdown(table).splitlines()
    assert first.split() == "| norm | shape | op | f32 |".split()
    assert rule.endswith("-:|")
    assert one.split() == "| RMSNorm | 8x64 | forward | 1.00 |".split()
