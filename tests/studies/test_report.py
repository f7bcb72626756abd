"""What a study tells."""

import pytest

from npnorm.studies.report import refreshed, report
from npnorm.studies.study import Results, run
from tests.studies.test_study import study_of


def test_the_report_has_the_table_and_each_verdict_with_its_numbers(tmp_path):
    study = study_of()
    text = report(study, run("name", study, study.full, tmp_path, quiet=True))
    assert "1.01" in text
    assert "holds                     It is above. (a test)\n" in text
    assert "   value: 1.005 (95 %: 0.941 to 1.069; 2 seeds); the claim: at least 0.5\n" in text
    assert text.endswith("\n\nholds: 1, does not hold: 0, not decided by this data: 0")


def test_the_marked_parts_of_a_page_are_made_anew():
    results = Results({}, {"processor": "an abacus"}, [{"x": 1, "seed": s, "value": 1.0 + s / 100} for s in (0, 1)])
    page = (
        "Before.\n\n<!-- table -->\nold\n<!-- end -->\n\nBetween <!-- remark --> them.\n\n<!-- own -->\n<!-- end -->\n"
    )
    text = refreshed(page, study_of(parts=lambda results: {"own": "A part."}), results)
    assert "old" not in text
    assert "|   x | value |" in text or "| x   | value   |" in text
    assert "Between <!-- remark --> them.\n\n<!-- own -->\n\nA part.\n\n<!-- end -->" in text
    assert refreshed(text, study_of(parts=lambda results: {"own": "A part."}), results) == text
    with pytest.raises(ValueError, match="the page has a part <!-- none -->; there are verdicts, table, machine"):
        refreshed("<!-- none -->\n<!-- end -->", study_of(), results)


def test_strokes_in_a_cell_do_not_end_it():
    results = Results({}, {}, [{"x": 1, "seed": 0, "value": 1.0}])
    study = study_of(table=lambda results: [{"largest": "|x| / rms"}])
    assert r"\|x\| / rms" in refreshed("<!-- table -->\n<!-- end -->", study, results)
