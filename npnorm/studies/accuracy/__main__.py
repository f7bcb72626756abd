"""The command: measure, print the scoreboard, write the page."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

try:
    from tqdm import tqdm

    from npnorm.conformance.cases import FULL, QUICK
    from npnorm.conformance.textbook import NORMS
    from npnorm.conformance.ulps import DTYPES
    from npnorm.studies.accuracy.measure import run
    from npnorm.studies.accuracy.page import cells, page, scoreboards
    from npnorm.studies.accuracy.peers import PEERS, Peer
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed. The packages of the study come with the extra npnorm[accuracy].")

COMMAND = "python -m npnorm.studies.accuracy"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.write and not options.write.parent.is_dir():
        parser.error(f"--write {options.write}: there is no folder {options.write.parent}")
    peers = _load(parser, options.peers)

    def progress(work: list) -> Iterable:
        return tqdm(work, unit=" problems", leave=False, disable=None)  # None: if nobody watches

    frame = run(peers, options.norms, options.dtypes, QUICK if options.quick else FULL, progress)
    print(scoreboards(frame))
    if options.write:
        data = options.write.parent / "data" / f"{options.write.stem}.csv"
        data.parent.mkdir(exist_ok=True)
        cells(frame).to_csv(data, index=False)
        command = f"{COMMAND} {shlex.join(sys.argv[1:] if argv is None else argv)}"
        text = page(frame, peers, command, f"data/{data.name}")
        options.write.write_text(text + "\n", encoding="utf-8")
        print(f"\nwritten: {options.write}, {data}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Hold norms against exact arithmetic.")
    parser.add_argument("--norms", type=_some_of(NORMS), default=list(NORMS), help=f"of {','.join(NORMS)}")
    parser.add_argument("--dtypes", type=_some_of(DTYPES), default=list(DTYPES), help=f"of {','.join(DTYPES)}")
    parser.add_argument("--peers", type=_some_of(PEERS), help=f"of {','.join(PEERS)}; those installed if left out")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="leave out the rows of a million elements: 2 minutes and 2 GB of memory instead of 10 and 6",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the page, and all cells into data/ beside it")
    return parser


def _some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in names]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not among {', '.join(names)}")
        return list(dict.fromkeys(chosen))

    return parse


def _load(parser: argparse.ArgumentParser, names: Sequence[str] | None) -> list[Peer]:
    """Return the peers of these names, which must be there; without names, those that are."""
    peers = []
    for name in names or PEERS:
        try:
            peers.append(PEERS[name]())
        except ModuleNotFoundError as missing:
            said = f"{missing.name} is not installed; it comes with the extra npnorm[accuracy]"
            if names:
                parser.exit(1, f"{said}\n")
            print(f"without {name}: {said}")
    return peers


if __name__ == "__main__":
    main()
