"""What a study tells: its table and verdicts on the terminal, and the same in a page of the documentation."""

import re
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate

from npnorm.studies.study import Claim, Results, Study, Verdict

WIDTH = 2 + max(map(len, Verdict))


def report(study: Study, results: Results) -> str:
    """Return the table and the verdicts, for the terminal."""
    lines = [tabulate(study.table(results), headers="keys", tablefmt="simple", disable_numparse=True), ""]
    claims = study.claims(results)
    for claim in claims:
        lines += [f"{claim.verdict:{WIDTH}}{claim.says} ({claim.source})"]
        lines += [f"{'':{WIDTH}}{claim.quantity}: {claim.measured}; the claim: {claim.bounds}"]
    return "\n".join([*lines, "", summary(claims)])


def summary(claims: Sequence[Claim]) -> str:
    """Return how many claims have which verdict.

    Examples
    --------
    >>> summary([Claim("It is one.", "nobody", "number", [1], low=0, exact=True)])
    'holds: 1, does not hold: 0, not decided by this data: 0'
    """
    return ", ".join(f"{verdict}: {sum(claim.verdict == verdict for claim in claims)}" for verdict in Verdict)


def refresh(page: Path, study: Study, results: Results) -> None:
    """Write what was measured into a page of the documentation: between `<!-- name -->` and `<!-- end -->`.

    Raises
    ------
    ValueError
        If a name is none of: verdicts, table, machine, and the study's own parts.
    """
    page.write_text(refreshed(page.read_text(encoding="utf-8"), study, results), encoding="utf-8")


def refreshed(text: str, study: Study, results: Results) -> str:
    """Return the text of a page with its marked parts made anew."""
    verdicts = [
        {
            "claim": f"{claim.says} ({claim.source})",
            "measured": f"{claim.quantity}: {claim.measured}",
            "it holds for": claim.bounds,
            "verdict": f"**{claim.verdict}**",
        }
        for claim in study.claims(results)
    ]
    parts = {
        "verdicts": _markdown(verdicts),
        "table": _markdown(study.table(results)),
        "machine": "\n".join(f"- {name}: {text}" for name, text in results.machine.items()),
        **study.parts(results),
    }

    def part(match: re.Match[str]) -> str:
        if match[1] not in parts:
            raise ValueError(f"the page has a part <!-- {match[1]} -->; there are {', '.join(parts)}")
        return f"<!-- {match[1]} -->\n\n{parts[match[1]]}\n\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", part, text, flags=re.DOTALL)


def _markdown(rows: list[dict[str, str]]) -> str:
    """Return a table; a stroke within a cell, as in |x|, would end the cell."""
    rows = [{name: text.replace("|", "\\|") for name, text in row.items()} for row in rows]
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)
