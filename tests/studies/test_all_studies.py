"""What holds for every study: it runs from the command line, and its page has its numbers."""

import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from npnorm.studies import STUDIES, record
from npnorm.studies.__main__ import find, main
from npnorm.studies.report import refreshed
from npnorm.studies.study import Verdict, load

DOCS = Path(__file__).parents[2] / "docs" / "studies"
EACH = pytest.mark.parametrize("name", STUDIES)


@EACH
def test_the_quick_run_writes_numbers_verdicts_and_a_picture(name, quick):
    _, folder = quick(name)
    file = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    assert file["cells"]
    assert file["claims"]
    assert {claim["verdict"] for claim in file["claims"]} <= set(map(str, Verdict))
    picture = folder / f"{name}{find(name).suffix}"
    if picture.suffix == ".svg":
        text = " ".join(ElementTree.parse(picture).getroot().itertext())
        assert re.search(r"[a-z]{3}", text)  # its labels are text


@EACH
def test_the_quick_run_takes_less_than_half_a_minute(name, quick):
    file = json.loads((quick(name)[1] / f"{name}.json").read_text(encoding="utf-8"))
    assert sum(entry["seconds"] for entry in file["cells"]) < 30


@EACH
def test_drawing_again_measures_nothing(name, quick, capsys):
    _, folder = quick(name)
    numbers, picture = folder / f"{name}.json", folder / f"{name}{find(name).suffix}"
    before = numbers.read_bytes(), picture.read_bytes()
    picture.unlink()
    main([name, "--plot-only", "--out", str(folder)])
    assert (numbers.read_bytes(), picture.read_bytes()) == before
    printed = capsys.readouterr().out
    assert all(f"{claim.verdict:26}{claim.says}" in printed for claim in find(name).claims(load(name, folder)))


@EACH
def test_the_page_tells_what_the_full_run_measured(name):
    study, results = find(name), load(name, DOCS)
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert refreshed(page, study, results) == page
    assert {"verdicts", "table", "machine"} <= set(re.findall(r"<!-- (\w+) -->", page))
    assert f"({name}{study.suffix})" in page
    full = {key: value for key, value in study.full.items() if key != "seeds"}
    np.testing.assert_equal(results.settings, record.plain(full))
    file = json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))
    assert {record.key(cell) for cell in study.cells(study.full)} == {
        record.key(entry["cell"]) for entry in file["cells"]
    }
    said = [(claim.says, str(claim.verdict)) for claim in study.claims(results)]
    assert [(claim["says"], claim["verdict"]) for claim in file["claims"]] == said


@EACH
def test_the_committed_files_are_small(name):
    assert (DOCS / f"{name}{find(name).suffix}").stat().st_size < 100_000
    assert (DOCS / f"{name}.json").stat().st_size < 400_000


def test_the_index_has_every_study_in_the_order_of_the_command():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| \[(\w+)\]\(\1\.md\)", index, flags=re.MULTILINE)) == STUDIES


def test_the_command_lists_every_study(capsys):
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:]] == list(STUDIES)
    assert all(find(name).shows in line for name, line in zip(STUDIES, lines[3:], strict=True))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["nonsense"], "nonsense is none of the studies, vanishing, "),
        (["nonsense.py"], "and no file that ends in .py"),
        ([__file__], "test_all_studies.py defines no STUDY"),
        (["vanishing", "--seeds", "0"], "it must be an integer of at least 1, not 0"),
        (["vanishing", "--plot-only", "--out", "/no/such/folder"], "vanishing.json is not there. Run the study first."),
    ],
)
def test_wrong_options_are_named(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_a_study_of_ones_own_runs_from_its_file(tmp_path, capsys):
    (example,) = re.findall(
        r"^```python\n(.*?)^```$", (DOCS / "index.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "lengths.py").write_text(example)
    main([str(tmp_path / "lengths.py"), "--quick", "--seeds", "4", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "; 4 seeds); the claim: 0.999 to 1.001" in printed
    assert "holds: 1, does not hold: 0" in printed
    assert {path.name for path in tmp_path.iterdir()} >= {"lengths.py", "lengths.json", "lengths.svg"}


@pytest.mark.parametrize(("stop", "says"), [(0, "nothing was measured"), (1, "goes on there")])
def test_a_study_that_is_stopped_says_what_is_there(stop, says, monkeypatch, tmp_path, capsys):
    study = find("vanishing")
    measured = []

    def measure(settings, cell):
        if len(measured) == stop:
            raise KeyboardInterrupt
        measured.append(cell)
        return {"std": [1.0]}

    monkeypatch.setattr("npnorm.studies.__main__.find", lambda name: dataclasses.replace(study, measure=measure))
    with pytest.raises(SystemExit) as stopped:
        main(["vanishing", "--quick", "--out", str(tmp_path)])
    assert stopped.value.code == 130
    assert says in capsys.readouterr().err
