"""The command, end to end on a tiny grid, and what holds it together."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from npnorm.bench import gpu, needs, run
from npnorm.bench.__main__ import main
from npnorm.bench.child import Plan
from npnorm.bench.grid import FULL, GRIDS, NORMS, QUICK, SECTIONS, Case, Effort
from npnorm.bench.machine import machine, share_of_others
from npnorm.bench.memory import highest, memory
from npnorm.bench.needs import Missing, need
from npnorm.bench.page import BEGIN, END
from npnorm.bench.peers import contenders
from npnorm.bench.plot import plot
from npnorm.bench.records import from_json
from npnorm.bench.run import environment, plans, regimes
from npnorm.bench.timing import interleave
from npnorm.threads import get_threads, set_threads
from tests.bench import fake

# The command


def test_a_tiny_run_from_end_to_end(tmp_path, capfd):
    page, numbers, picture = tmp_path / "speed.md", tmp_path / "numbers.json", tmp_path / "speed.png"
    page.write_text(f"prose\n\n{BEGIN}\n{END}\n", encoding="utf-8")
    options = ["--grid", "tiny", "--threads", "1", "--peers", "f64,f32,naive,torch", "--sections", "norms,step,memory"]
    main([*options, "--json", str(numbers), "--plot", str(picture), "--write", str(page)])
    out, err = capfd.readouterr()
    assert err == ""
    for title in (*(f"{norm}, 1 thread" for norm in NORMS), "A step of training", "Largest extra memory", "Goals"):
        assert f"\n{title}" in out
    measured = from_json(json.loads(numbers.read_text(encoding="utf-8")))
    assert {r.regime for r in measured.records} == set(regimes())
    assert {r.threads for r in measured.records} == {1}
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    assert text.startswith(
        f"prose\n\n{BEGIN}\n\n## Where it was measured\n\n- command: python -m npnorm.bench --grid tiny"
    )
    assert "![Bytes per second by size](speed.svg)" in text
    assert b"<svg" in (tmp_path / "speed.svg").read_bytes()
    main(["--load", str(numbers)])
    assert capfd.readouterr().out.strip() in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--norms", "RMSNorm,L3Norm"], "L3Norm is not among RMSNorm"),
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


def test_a_peer_that_is_not_installed_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as ended:
        main(["--peers", "torch"])
    assert ended.value.code == 1
    assert "pip install 'npnorm[bench]'" in capsys.readouterr().err


def test_without_torch_its_columns_are_left_out(capsys, monkeypatch):
    monkeypatch.setattr("npnorm.bench.__main__.installed", lambda name: name != "torch")
    seen = []
    monkeypatch.setattr("npnorm.bench.__main__.run", lambda todo: seen.extend(todo) or fake.measured())
    main(["--quick"])
    assert "without torch, which is not installed" in capsys.readouterr().out
    assert {plan.peers for plan in seen} == {("f64", "f32", "out", "naive")}


def test_without_a_gpu_it_ends_with_one_line():
    command, hidden = [sys.executable, "-m", "npnorm.bench", "--gpu"], os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=hidden, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "Traceback" not in done.stderr


def test_the_gpu_needs_cupy(monkeypatch):
    monkeypatch.setattr(gpu, "need", lambda name: (_ for _ in ()).throw(Missing(f"{name} is not installed")))
    with pytest.raises(gpu.NoGPU, match=r"npnorm\[gpu\]"):
        gpu.report()


# Processes


def test_each_heap_and_number_of_threads_is_a_process():
    found = plans("quick", SECTIONS, NORMS, ["f32"], [1, 4], ["default", "retained"])
    assert [(p.regime, p.threads) for p in found] == [("default", 1), ("default", 4), ("retained", 1), ("retained", 4)]
    assert [p.threads for p in found if "memory" in p.sections] == [1]
    assert {p.regime for p in found if "scaling" in p.sections} == {"retained"}
    assert all({"norms", "small"} <= set(p.sections) for p in found)
    assert {p.regime for p in found if "step" in p.sections} == {"retained"}
    full = plans("full", SECTIONS, NORMS, ["f32"], [1, 4], ["default", "retained"])
    assert all("step" in p.sections for p in full)


def test_with_one_heap_nothing_is_lost():
    (plan,) = plans("quick", SECTIONS, NORMS, ["f32"], [1], ["default"])
    assert plan.sections == SECTIONS
    assert plans("quick", ["memory"], NORMS, ["f32"], [1, 2], ["default", "retained"])[0].threads == 1


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
    with pytest.raises(RuntimeError, match=r"\(default heap, 1 thread\) ended with status 1"):
        run.run([Plan("no such grid", ("norms",), NORMS, ("f32",), "default", 1)])
    assert "KeyError" in capfd.readouterr().err


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_has_every_norm_and_groups_divide_channels(grid):
    cases = GRIDS[grid]
    assert {case.norm for case in cases.norms} == set(NORMS)
    for case in cases.norms + cases.small + cases.scaling + cases.memory:
        assert case.norm in ("RMSNorm", "LayerNorm") or case.shape[1] % 8 == 0


def test_the_full_grid():
    assert [case.mebibytes for case in FULL.norms if case.norm == "RMSNorm"] == [1, 16, 32, 256]
    assert len({case.shape for case in FULL.scaling if case.shape[1] != 1024}) == 5
    assert set(QUICK.small) == set(FULL.small)


# What is measured beside time


def test_memory_of_numpy_is_what_tracemalloc_says():
    case = Case("RMSNorm", (256, 1024))
    (use,) = memory(case, ["naive", "jax"])
    assert use.peer == "naive"
    assert 2 <= use.forward / case.nbytes < 2.2
    assert 3 <= use.backward / case.nbytes < 3.2


def test_memory_of_torch_is_what_its_profiler_says():
    case = Case("LayerNorm", (256, 1024))
    (use,) = memory(case, ["torch"])
    assert 1 <= use.forward / case.nbytes < 1.1
    assert 1 <= use.backward / case.nbytes < 1.1


def test_the_highest_sum_is_found_in_the_order_of_time():
    def event(ts, nbytes):
        return {"name": "[memory]", "ts": ts, "args": {"Bytes": nbytes}}

    assert highest([event(2, -5), event(1, 5), event(3, 4), {"name": "aten::mul", "ts": 0}]) == 5
    assert highest([]) == 0


def test_the_share_of_others():
    assert share_of_others(None, (1.0, 1.0), 1.0) is None
    assert share_of_others((0.0, 0.0), (1.0, 3.0), 1.0) == 0


def test_the_machine_says_what_matters():
    found = machine()
    assert set(found) == {"processor", "caches", "system", "huge pages", "BLAS of NumPy", "versions"}
    assert f"numpy {np.__version__}" in found["versions"]


def test_need_returns_the_package():
    assert need("numpy.linalg") is np
    with pytest.raises(Missing, match="no_such_package is not installed"):
        need("no_such_package")
    with pytest.raises(ModuleNotFoundError) as error:
        need("numpy.no_such_part")
    assert not isinstance(error.value, needs.Missing)


def test_the_plot_needs_norms(tmp_path):
    with pytest.raises(ValueError, match="section norms"):
        plot(fake.measured(fake.step()), tmp_path / "a.svg")


# Speed: ratios within one run, never seconds


@pytest.mark.parametrize("tries", [3])
def test_rms_norm_in_float32_takes_no_longer_than_the_textbook(tries):
    effort = Effort(seconds=1, least=15, most=60, warm=2)
    set_threads(1)
    try:
        ratios = []
        while len(ratios) < tries and (not ratios or min(ratios) > 1.0):
            times = interleave(contenders(Case("RMSNorm", (1024, 1024)), ["f32", "naive"], copies=False), effort)
            ratios.append(times["f32"]["both"].p10 / times["naive"]["both"].p10)  # others only ever add time
    finally:
        set_threads(None)
    assert get_threads() >= 1
    assert min(ratios) <= 1.0
