"""What holds for every study: it runs from the command line, and its page has its numbers."""

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from npnorm.studies import STUDIES
from npnorm.studies.__main__ import find, main
from npnorm.studies.study import Verdict, _key, _plain, load, refreshed

DOCS = Path(__file__).parents[2] / "docs" / "studies"
EACH = pytest.mark.parametrize("name", STUDIES)
NOT_YET = ("pre_vs_post", "communication")
"""Whose full run has not been done yet; their pages say so."""

RUN_IN_FULL = pytest.mark.parametrize("name", [name for name in STUDIES if name not in NOT_YET])


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
    assert all(f"{claim.verdict}: {claim.says}" in printed for claim in find(name).claims(load(name, folder)))


@RUN_IN_FULL
def test_the_page_tells_what_the_full_run_measured(name):
    study, results = find(name), load(name, DOCS)
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert refreshed(page, study, results) == page
    assert {"verdicts", "table", "machine"} <= set(re.findall(r"<!-- (\w+) -->", page))
    assert f"({name}{study.suffix})" in page
    full = {key: value for key, value in study.full.items() if key != "seeds"}
    np.testing.assert_equal(results.settings, json.loads(json.dumps(_plain(full))))
    assert {_key(cell) for cell in study.cells(study.full)} == {
        _key(entry["cell"]) for entry in json.loads((DOCS / f"{name}.json").read_text(encoding="utf-8"))["cells"]
    }


@RUN_IN_FULL
def test_the_committed_files_are_small(name):
    assert (DOCS / f"{name}{find(name).suffix}").stat().st_size < 100_000
    assert (DOCS / f"{name}.json").stat().st_size < 400_000


@pytest.mark.parametrize("name", NOT_YET)
def test_a_page_without_a_full_run_says_so(name):
    assert not (DOCS / f"{name}.json").exists()
    assert "has not been run in full yet" in (DOCS / f"{name}.md").read_text(encoding="utf-8")


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
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["vanishing", "--seeds", "0"], "it must be an integer, at least 1"),
        (["vanishing", "--plot-only", "--out", "/no/such/folder"], "vanishing.json is not there. Run the study first."),
    ],
)
def test_wrong_options_are_named(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
