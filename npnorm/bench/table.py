"""Tables, for a terminal and for a page."""

from collections.abc import Sequence
from typing import NamedTuple


class Table(NamedTuple):
    """A title, a header, and rows of as many cells; the first `left` columns are aligned to the left.

    Examples
    --------
    >>> print(Table("Speed", ["norm", "ms"], [["RMSNorm", "1.5"]]).text())
    Speed
    <BLANKLINE>
    norm      ms
    RMSNorm  1.5
    """

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def text(self) -> str:
        """Return the table for a terminal."""
        lines = ["  ".join(cells).rstrip() for cells in self._padded(1)]
        return "\n".join([self.title, "", *lines])

    def markdown(self, level: int = 3) -> str:
        """Return the table for a page, below a heading."""
        header, *rows = (f"| {' | '.join(cells)} |" for cells in self._padded(3))
        rule = ["-" * w if i < self.left else "-" * (w - 1) + ":" for i, w in enumerate(self._widths(3))]
        return "\n".join([f"{'#' * level} {self.title}", "", header, f"| {' | '.join(rule)} |", *rows])

    def _widths(self, least: int) -> list[int]:
        return [max(least, *(len(row[i]) for row in [self.header, *self.rows])) for i in range(len(self.header))]

    def _padded(self, least: int) -> list[list[str]]:
        widths = self._widths(least)
        return [
            [c.ljust(w) if i < self.left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            for row in [self.header, *self.rows]
        ]
