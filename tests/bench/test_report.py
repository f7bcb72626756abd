import pytest

from npnorm.bench.grid import SECTIONS
from npnorm.bench.page import BEGIN, END, markdown, refresh, text
from npnorm.bench.records import Measured, from_json, to_json, together
from npnorm.bench.report import base, limit, noise, rate, share, tables
from npnorm.bench.summary import summary, summary_table
from npnorm.bench.table import Table
from tests.bench import fake
from tests.bench.fake import record


def lines(*records):
    return {line.what: line for line in summary(records)}


def test_ratios_are_those_of_the_medians():
    r = record(f32=(2, 3), torch=(4, 6))
    assert (r.ratio("f32", "torch", "forward"), r.ratio("torch", "f32", "both")) == (0.5, 2.0)


@pytest.mark.parametrize(("norm", "seconds"), {"RMSNorm": (1, 1.5, 2.5), "BatchNorm": (1.5, 2.5, 4)}.items())
def test_the_limit_is_that_of_the_faster_copy_by_the_arrays_that_must_move(norm, seconds):
    r = record(norm, f32=(2, 2))
    assert tuple(limit(r, op) for op in ("forward", "backward", "both")) == seconds
    assert share(r, "f32", "forward") == seconds[0] / 2


def test_bytes_per_second_count_what_must_move():
    r = record("LayerNorm", (256, 1024), f32=(2, 3))
    assert rate(r, "f32", "both") == 5 * 2**20 / 5
    assert rate(r, "copyto", "both") == 2 * 2**20


def test_noise_is_that_of_the_widest_spread():
    r = record(f32=(1, 1))
    r.times["torch"] = fake.times(1, 1, noise=0.25)
    assert noise(r, "both") == pytest.approx(0.25)


def test_a_row_with_too_few_calm_turns_has_a_mark():
    r = record()
    r.times["f32"]["both"] = r.times["f32"]["both"]._replace(calm=False)
    assert [row[-1] for row in tables(fake.measured(r))[0].rows] == ["0", "0", "0!"]


def test_the_tables_have_every_cell():
    records = [record(regime=heap, threads=n) for heap in ("default", "retained") for n in (1, 2)]
    one, two, memory = tables(fake.measured(*records))
    assert (one.title, two.title) == ("RMSNorm, 1 thread", "RMSNorm, 2 threads")
    header = ["shape", "op", "heap", "torch ms", "f64", "f32", "out", "naive", "%torch", "%f32", "%out", "+-%"]
    assert one.header == header
    assert [row[1:3] for row in one.rows] == [
        [op, heap] for op in ("fwd", "bwd", "both") for heap in ("default", "retained")
    ]
    assert one.rows[4][3:] == ["10000", "1.00", "0.50", "0.40", "2.00", "25", "50", "62", "0"]
    assert [row[3:] for row in memory.rows] == [["1.00", "0.00"], ["2.00", "0.50"]]


def test_without_torch_the_textbook_is_what_ratios_refer_to():
    r = record(f32=(2, 3), naive=(4, 6))
    assert base([r]) == "naive"
    table = tables(Measured([r], [], {}, {}))[0]
    assert table.header[3:5] == ["naive ms", "f32"]
    page = text(Measured([r], [], {}, {}))
    assert "torch is not installed, or was not asked for" in page
    assert not [line for line in lines(r) if "torch" in line]


def test_a_goal_is_judged_by_its_worst_cell():
    fast = record(threads=2, f32=(1, 1), torch=(4, 4))
    slow = record(shape=(512, 512), f32=(3, 3), torch=(4, 4))
    line = lines(fast, slow)["RMSNorm f32 / torch, default, >= 1 MiB"]
    assert (line.worst, line.where, line.goal, line.cells, line.missed, line.met) == (
        0.75,
        "512x512 1T",
        0.5,
        2,
        1,
        False,
    )
    assert line.mean == pytest.approx((0.25 * 0.75) ** 0.5)
    assert lines(fast)["RMSNorm f32 / torch, default, >= 1 MiB"].met


def test_goals_leave_out_what_was_disturbed():
    good, bad = record(f32=(1, 1), torch=(4, 4)), record(threads=2, f32=(1, 1), torch=(1, 1))
    bad.times["torch"]["both"] = bad.times["torch"]["both"]._replace(calm=False)
    line = lines(good, bad)["RMSNorm f32 / torch, default, >= 1 MiB"]
    assert (line.worst, line.cells) == (0.25, 1)
    assert "\ndisturbed: 1 of 2 cases" in text(fake.measured(good, bad))


def test_goals_differ_by_heap_and_size():
    large = [record("LayerNorm", regime=heap, f32=(1, 1), torch=(1, 1)) for heap in ("default", "retained")]
    small = [r._replace(case=r.case._replace(shape=(512, 512))) for r in large]
    found = lines(*large)
    assert not found["LayerNorm f32 / torch, default, >= 32 MiB"].met
    assert found["LayerNorm f32 / torch, retained, >= 32 MiB"].met
    assert "LayerNorm f32 / torch, default, >= 32 MiB" not in lines(*small)


def test_the_mean_over_the_grid_is_geometric_and_by_heap():
    records = [record(f32=(1, 1), torch=(4, 4)), record("BatchNorm", (2, 8, 4, 4), f32=(1, 1), torch=(1, 1))]
    line = lines(*records)["all norms, f32 / torch, default"]
    assert (line.mean, line.goal, line.met) == (pytest.approx(0.5), 0.40, False)
    assert "all norms, f32 / torch, retained" not in lines(*records)


def test_float64_is_held_against_the_textbook():
    line = lines(record(), record("GroupNorm", (2, 8, 4, 4), f64=(3, 3), naive=(2, 2)))["GroupNorm f64 / naive"]
    assert (line.worst, line.where, line.met) == (1.5, "2x8x4x4 1T", False)


def test_the_share_of_the_copy_should_be_large():
    line = lines(record(out=(1, 3), f32=(1, 3)))["RMSNorm out, share of copy, >= 32 MiB"]
    assert (line.worst, line.goal, line.at_least, line.met) == (2.5 / 4, 0.5, True, True)
    assert not lines(record(out=(4, 6)))["RMSNorm out, share of copy, >= 32 MiB"].met


def test_steps_of_training_have_a_goal():
    found = lines(fake.step(0.9), fake.step(0.99, threads=2, regime="retained"))["training step, npnorm / torch"]
    assert (found.worst, found.where, found.missed, found.met) == (0.99, "a model 2T retained", 1, False)


def test_every_line_of_the_summary_is_in_its_table():
    records = [record(), fake.step()]
    table = summary_table(fake.measured(*records))
    assert [row[0] for row in table.rows] == [line.what for line in summary(records)]
    row = next(row for row in table.rows if row[0] == "RMSNorm f64 / naive")
    assert row == ["RMSNorm f64 / naive", "8192x8192 1T", "0.50", "0.50", "<= 1.00", "1/1"]


def test_what_is_printed_fits_in_100_columns():
    sections = [
        record(section=section, norm="LayerNorm", shape=(65536, 64), regime=heap, threads=64)
        for section in ("norms", "small", "scaling")
        for heap in ("default", "retained")
    ]
    page = text(fake.measured(*sections, fake.step()))
    assert [line for line in page.splitlines() if len(line) > 100] == []
    assert set(SECTIONS) == {"norms", "small", "step", "scaling", "memory"}


def test_json_brings_back_what_was_measured():
    whole = fake.measured(record(), fake.step(), record("GroupNorm", (2, 8, 3, 3), "retained", 2))
    assert from_json(to_json(whole)) == whole


def test_runs_are_put_together():
    first, second = fake.measured(record()), Measured([fake.step()], [], {"b": 0.5}, {"caches": "none"})
    both = together([first, second])
    assert both.records == first.records + second.records
    assert both.others == {"default heap, 1 thread": 0.25, "b": 0.5}
    assert set(both.machine) == {"processor", "caches"}


def test_a_page_keeps_its_prose():
    page = f"# Speed\n\nprose\n\n{BEGIN}\n\nold\n\n{END}\n\nmore prose\n"
    new = refresh(page, "new")
    assert new == page.replace("old", "new")
    assert refresh(new, "new") == new


@pytest.mark.parametrize("page", ["", BEGIN, END, f"{END}\n{BEGIN}"])
def test_a_page_without_marks_is_refused(page):
    with pytest.raises(ValueError, match="between which the tables go"):
        refresh(page, "new")


def test_markdown_has_all_tables_and_the_picture():
    page = markdown(fake.measured(record(), fake.step()), "speed.svg")
    assert page.count("\n### ") == 3
    assert "## Goals\n\n| what" in page
    assert "![Bytes per second by size](speed.svg)" in page
    assert "- cores busy with other processes: default heap, 1 thread 25 %" in page
    assert "nan" not in page
    assert [line for line in page.splitlines() if len(line) > 110 and not line.startswith("|")] == []


def test_tables_are_aligned():
    table = Table("Some", ["a", "bcd"], [["long", "1"]])
    assert table.text() == "Some\n\na     bcd\nlong    1"
    assert table.markdown() == "### Some\n\n| a    | bcd |\n| ---- | --: |\n| long |   1 |"
