"""The tables within a page of the documentation, between two marks; the prose around them stays as it is."""

from textwrap import fill

from npnorm.bench.records import Measured
from npnorm.bench.report import conditions, legend, tables
from npnorm.bench.summary import summary_table

WIDTH, PAGE_WIDTH = 100, 110
"""Columns of the terminal, and of the lines of a page."""

BEGIN, END = "<!-- tables of python -m npnorm.bench -->", "<!-- end of the tables -->"
"""The marks, each on a line of its own."""


def refresh(page: str, tables: str) -> str:
    r"""Return the page with `tables` between its marks.

    Raises
    ------
    ValueError
        If it has not both marks, in their order.

    Examples
    --------
    >>> print(refresh(f"before\n{BEGIN}\nold\n{END}\nafter", "new"))
    before
    <!-- tables of python -m npnorm.bench -->
    <BLANKLINE>
    new
    <BLANKLINE>
    <!-- end of the tables -->
    after
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"The page needs the lines {BEGIN} and {END}, between which the tables go.")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"


def markdown(measured: Measured, picture: str) -> str:
    """Return all tables as Markdown, the conditions before them, and the picture by its name."""
    parts = [
        "## Where it was measured",
        _bullets(conditions(measured)),
        summary_table(measured).markdown(level=2),
        f"![Bytes per second by size]({picture})" if picture else "",
        "## Every cell",
        _bullets(legend(measured)),
        *(table.markdown() for table in tables(measured)),
    ]
    return "\n\n".join(part for part in parts if part)


def _bullets(lines: list[str]) -> str:
    return "\n".join(fill(f"- {line}", PAGE_WIDTH, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def text(measured: Measured) -> str:
    """Return all of it for a terminal: the conditions, the tables, the summary last."""
    before = conditions(measured), legend(measured)
    parts = [
        *(
            "\n".join(fill(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False) for line in some)
            for some in before
        ),
        *(table.text() for table in tables(measured)),
        summary_table(measured).text(),
    ]
    return "\n\n".join(part for part in parts if part)
