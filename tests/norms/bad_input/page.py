"""The tables of docs/norms/bad_input.md; `python -m tests.norms.bad_input.page` writes them."""

import pathlib
import re

import torch

from tests.norms.bad_input.like_torch import ACCEPTED, REFUSED, message

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "norms" / "bad_input.md"
TABLE = re.compile(r"^\| input .*\n(?:\|.*\n)+", re.MULTILINE)


def table(*rows):
    """Return the lines of a table."""
    version = ".".join(torch.__version__.split(".")[:2])
    head = f"| input | npnorm | torch {version} |\n|---|---|---|\n"
    return head + "".join(f"| {' | '.join(row)} |\n" for row in rows)


def page():
    """Return the page with the tables that the data make."""
    tables = iter(
        [
            table(*((what, f"`{message(what)}`", does) for what, (_, does) in REFUSED.items())),
            table(*((what, npnorm_does, torch_does) for what, _, npnorm_does, _, torch_does in ACCEPTED)),
        ]
    )
    text = TABLE.sub(lambda _: next(tables), PAGE.read_text(encoding="utf-8"))
    if next(tables, None) is not None:
        raise ValueError(f"{PAGE} has too few tables that begin with | input |. There are two.")
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
