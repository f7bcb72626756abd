"""The command: measure, print the scoreboard, write the page."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from npnorm.studies.accuracy import cases
from npnorm.studies.accuracy.formats import FORMATS
from npnorm.studies.accuracy.needs import Missing, need
from npnorm.studies.accuracy.page import page
from npnorm.studies.accuracy.peers import PEERS, Peer
from npnorm.studies.accuracy.problems import NORMS
from npnorm.studies.accuracy.run import run
from npnorm.studies.accuracy.scoreboard import scoreboards

COMMAND = "python -m npnorm.studies.accuracy"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.write and not options.write.parent.is_dir():
        parser.error(f"--write {options.write}: there is no folder {options.write.parent}")
    try:
        tqdm = need("tqdm").tqdm
        need("gmpy2")
        for dtype in options.dtypes:
            FORMATS[dtype].dtype  # noqa: B018, asks for ml_dtypes
        peers = _load(options.peers)
    except Missing as missing:
        parser.exit(1, f"{missing}\n")

    def progress(work: list) -> Iterable:
        return tqdm(work, unit=" problems", leave=False, disable=None)  # None: if nobody watches

    sizes = cases.QUICK if options.quick else cases.FULL
    records = run(peers, options.norms, options.dtypes, sizes, progress)
    print(scoreboards(records))
    if options.write:
        command = f"{COMMAND} {shlex.join(sys.argv[1:] if argv is None else argv)}"
        options.write.write_text(page(records, peers, command) + "\n", encoding="utf-8")
        print(f"\nwritten: {options.write}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Hold norms against exact arithmetic.")
    parser.add_argument("--norms", type=_some_of(NORMS), default=list(NORMS), help=f"of {','.join(NORMS)}")
    parser.add_argument("--dtypes", type=_some_of(FORMATS), default=list(FORMATS), help=f"of {','.join(FORMATS)}")
    parser.add_argument("--peers", type=_some_of(PEERS), help=f"of {','.join(PEERS)}; those installed if left out")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="leave out the rows of a million elements: 2 minutes and 2 GB of memory instead of 10 and 6",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page with all tables")
    return parser


def _some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in names]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not among {', '.join(names)}")
        return list(dict.fromkeys(chosen))

    return parse


def _load(names: Sequence[str] | None) -> list[Peer]:
    """Return the peers of these names, which must be there; without names, those that are."""
    if names is not None:
        return [PEERS[name]() for name in names]
    peers = []
    for name, load in PEERS.items():
        try:
            peers.append(load())
        except Missing as missing:
            print(f"without {name}: {missing}")
    return peers


if __name__ == "__main__":
    main()
