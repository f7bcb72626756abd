"""The command, end to end on a tiny grid, and what holds it together."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from npnorm.bench import run
from npnorm.bench.__main__ import BEGIN, END, main, refresh
from npnorm.bench.grid import GRIDS, NORMS, SECTIONS, Case, Effort
from npnorm.bench.memory import highest, memory
from npnorm.bench.peers import contenders
from npnorm.bench.plot import plot
from npnorm.bench.rows import KINDS
from npnorm.bench.run import Plan, environment, heaps, plans
from npnorm.bench.timing import interleave
from npnorm.threads import set_threads
from tests.bench import fake

# The command


def test_a_tiny_run_from_end_to_end(tmp_path, capfd):
    page, numbers, picture = tmp_path / "speed.md", tmp_path / "numbers.json", tmp_path / "speed.png"
    page.write_text(f"prose\n\n{BEGIN}\n{END}\n", encoding="utf-8")
    options = ["--grid", "tiny", "--threads", "1", "--peers", "f64,f32,naive,torch", "--norms", ",".join(NORMS)]
    main([*options, "--json", str(numbers), "--plot", str(picture), "--write", str(page)])
    out, err = capfd.readouterr()
    assert re.fullmatch(r"(process \d of \d: \w+ heap, 1 threads\n)+", err)
    for title in (*NORMS, "A step of training", "Rows that need care", "Largest extra memory", "Goals"):
        assert f"\n{title}" in out
    found = json.loads(numbers.read_text(encoding="utf-8"))
    assert {line[4] for line in found["data"]} == set(heaps())
    assert {line[0] for line in found["data"]} == set(SECTIONS)
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    assert text.startswith(
        f"prose\n\n{BEGIN}\n\n## Where it was measured\n\n- command: python -m npnorm.bench --grid tiny"
    )
    assert "![Bytes per second by size](speed.svg)" in text
    assert (tmp_path / "data" / "speed.json").read_bytes() == numbers.read_bytes()
    main(["--load", str(numbers)])
    assert capfd.readouterr().out.strip() in out


def test_rows_alone(capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "npnorm.bench.__main__.run", lambda todo: seen.extend(todo) or fake.frame(fake.rows(constant=9))
    )
    main(["--rows", "--threads", "3"])
    assert [(plan.sections, plan.threads, plan.heap) for plan in seen] == [(["rows"], 3, heaps()[-1])]
    assert set(seen[0].norms) == set(KINDS)
    assert "LayerNorm f32, rows that need care / ordinary rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--norms", "RMSNorm,L3Norm"], "L3Norm is not among LayerNorm"),
        (["--sections", "speed"], "speed is not among norms"),
        (["--threads", "0"], "'0' is not a list of numbers of threads"),
        (["--json", "no/such/folder.json"], "there is no folder no/such"),
        (["--plot", "speed.txt"], "must end with .svg, .png or .pdf"),
        (["--write", "no_such_page.md"], "No such file"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_measured(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(options)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("asked", [["--peers", "torch"], ["--compile"], []])
def test_a_peer_that_is_not_installed_is_one_line(asked, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else name)
    seen = []
    monkeypatch.setattr("npnorm.bench.__main__.run", lambda todo: seen.extend(todo) or fake.frame(fake.case()))
    if not asked:
        main(["--quick"])
        assert "without torch, which is not installed" in capsys.readouterr().out
        assert {tuple(plan.peers) for plan in seen} == {("f64", "f32", "out", "naive")}
        return
    with pytest.raises(SystemExit) as ended:
        main(asked)
    assert ended.value.code == 1
    assert capsys.readouterr().err == "torch is not installed; it comes with the extra npnorm[bench].\n"


def test_without_a_gpu_it_ends_with_one_line():
    command, hidden = [sys.executable, "-m", "npnorm.bench", "--gpu"], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("page", ["", BEGIN, END, f"{END}\n{BEGIN}"])
def test_a_page_keeps_its_prose_and_needs_both_marks(page):
    whole = f"# Speed\n\nprose\n\n{BEGIN}\n\nold\n\n{END}\n\nmore prose\n"
    assert refresh(whole, "new") == whole.replace("old", "new")
    with pytest.raises(ValueError, match="between which the tables go"):
        refresh(page, "new")


# Processes


def test_each_heap_and_number_of_threads_is_a_process_and_no_section_is_lost():
    found = plans("quick", SECTIONS, NORMS, ["f32"], [1, 4], ["default", "retained"])
    assert [(p.heap, p.threads) for p in found] == [("default", 1), ("default", 4), ("retained", 1), ("retained", 4)]
    where = {name: [(p.heap, p.threads) for p in found if name in p.sections] for name in SECTIONS}
    assert where["memory"] == [("default", 1)]
    assert where["rows"] == [("retained", 4)]
    assert where["scaling"] == where["step"] == [("retained", 1), ("retained", 4)]
    assert len(where["norms"]) == len(where["small"]) == 4
    full = plans("full", SECTIONS, NORMS, ["f32"], [1, 4], ["default", "retained"])
    assert all("step" in p.sections for p in full)
    (alone,) = plans("quick", SECTIONS, NORMS, ["f32"], [1], ["default"])
    assert set(alone.sections) == set(SECTIONS)


def test_the_environment_of_a_process():
    base = {"MALLOC_TRIM_THRESHOLD_": "1", "MALLOC_MMAP_MAX_": "1", "HOME": "here", "OPENBLAS_NUM_THREADS": "8"}
    default = environment(Plan("quick", (), (), (), "default", 2), base)
    retained = environment(Plan("quick", (), (), (), "retained", 1), base)
    assert not set(run.RETAINED) & set(default)
    assert {name: retained[name] for name in run.RETAINED} == run.RETAINED
    assert default["OPENBLAS_NUM_THREADS"] == retained["OPENBLAS_NUM_THREADS"] == "1"
    assert default["HOME"] == "here"
    assert (default["NPROC"], retained["NPROC"]) == ("2", "1")


def test_a_process_that_fails_is_an_error(capfd):
    with pytest.raises(RuntimeError, match=r"\(default heap, 1 threads\) ended with status 1"):
        run.run([Plan("no such grid", ("norms",), NORMS, ("f32",), "default", 1)])
    assert "KeyError" in capfd.readouterr().err


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_has_every_norm_and_groups_divide_channels(grid):
    cases = GRIDS[grid]
    assert {case.norm for case in cases.norms} == set(NORMS)
    for case in cases.norms + cases.small + cases.scaling + cases.memory:
        assert case.norm in ("RMSNorm", "LayerNorm") or case.shape[1] % 8 == 0


def test_the_full_grid():
    assert [case.mib for case in GRIDS["full"].norms if case.norm == "RMSNorm"] == [1, 16, 32, 256]
    assert len({case.shape for case in GRIDS["full"].scaling if case.shape[1] != 1024}) == 5
    assert set(GRIDS["quick"].small) == set(GRIDS["full"].small)


# What is measured beside time


def extra(case, peer):
    found = {line["op"]: line["extra"] for line in memory(case, [peer, "jax"])}
    return tuple(found[op] / 2**18 / case.mib / 4 for op in ("forward", "backward"))


def test_memory_of_numpy_is_what_tracemalloc_says():
    there, back = extra(Case("RMSNorm", (256, 1024)), "naive")
    assert 2 <= there < 2.2  # z and y
    assert 3 <= back < 4.2


def test_memory_of_torch_is_what_its_profiler_says():
    there, back = extra(Case("LayerNorm", (256, 1024)), "torch")
    assert 1 <= there < 1.1
    assert 1 <= back < 1.1


def test_the_highest_sum_is_found_in_the_order_of_time():
    def event(ts, nbytes):
        return {"name": "[memory]", "ts": ts, "args": {"Bytes": nbytes}}

    assert highest([event(2, -5), event(1, 5), event(3, 4), {"name": "aten::mul", "ts": 0}]) == 5
    assert highest([]) == 0


# The picture


def test_the_picture_is_small_its_text_is_text_and_it_is_the_same_every_time(tmp_path):
    sizes = {"RMSNorm": (1, 2, 4, 8), "LayerNorm": (1, 2, 4, 8), "BatchNorm": (3.0625, 24.5), "GroupNorm": (3, 24)}
    whole = fake.frame(
        *(fake.case(norm, m, heap, n) for norm in sizes for m in sizes[norm] for heap in heaps() for n in (1, 2))
    )
    files = tmp_path / "a.svg", tmp_path / "b.svg"
    for path in files:
        plot(whole, path)
    first, second = (path.read_text(encoding="utf-8") for path in files)
    assert first == second
    assert len(first) < 60_000
    assert all(f">{word}</text>" in first for word in (*NORMS, "torch eager", "GB/s", "3.06"))


def test_the_picture_shows_the_rates(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("npnorm.bench.plot._panel", lambda ax, cells: drawn.append(cells))
    plot(fake.frame(fake.case(mib=1000, f32=(2, 3)), fake.step()), tmp_path / "a.png")
    (cells,) = drawn
    np.testing.assert_allclose(cells.set_index("peer")["rate"]["f32"], 1000 * 2**20 * 5 / 5)
    with pytest.raises(ValueError, match="section norms"):
        plot(fake.frame(fake.step()), tmp_path / "a.svg")


# Speed: ratios within one run, never seconds


@pytest.mark.parametrize("tries", [3])
def test_rms_norm_in_float32_takes_no_longer_than_the_textbook(tries):
    effort = Effort(seconds=1, least=15, most=60, warm=2)
    set_threads(1)
    try:
        ratios = []
        while len(ratios) < tries and (not ratios or min(ratios) > 1.0):
            lines = interleave(contenders(Case("RMSNorm", (1024, 1024)), ["f32", "naive"], copies=False), effort)
            p10 = {line["peer"]: line["p10"] for line in lines if line["op"] == "both"}
            ratios.append(p10["f32"] / p10["naive"])  # others only ever add time
    finally:
        set_threads(None)
    assert min(ratios) <= 1.0
