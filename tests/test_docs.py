"""The code on the pages of the docs runs, and their links lead somewhere."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
EACH = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(DOCS).as_posix())


def code(page):
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def test_there_are_pages_with_code():
    assert sum(bool(code(page)) for page in PAGES) > 15


@EACH
def test_the_code_runs(page):
    exec(compile("\n".join(code(page)), page.name, "exec"), {"__name__": page.stem})


@EACH
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_norm_has_a_page():
    index = (DOCS / "norms" / "index.md").read_text(encoding="utf-8")
    for page in (DOCS / "norms").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, page.name
