"""The command: list the studies, or run one."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

try:
    from npnorm.studies import STUDIES
    from npnorm.studies.study import Study, draw, load, refresh, report, run
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed. The packages of the studies come with the extra npnorm[studies].")

COMMAND = "python -m npnorm.studies"


def find(name: str) -> Study:
    """Return the study of this name."""
    return import_module(f"npnorm.studies.{name}").STUDY


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(argv)
    folder = options.out or Path("studies") / ("quick" if options.quick else "full")
    try:
        if options.name is None:
            _list()
        else:
            _run(options, find(options.name), folder)
    except KeyboardInterrupt:
        sys.exit(f"\nstopped; what was measured is in {folder / options.name}.json, and the same command goes on there")
    except ModuleNotFoundError as missing:
        sys.exit(f"{missing.name} is not installed. The packages of the studies come with the extra npnorm[studies].")
    except ValueError as problem:
        parser.exit(2, f"{COMMAND}: {problem}\n")


def _run(options: argparse.Namespace, study: Study, folder: Path) -> None:
    if options.plot_only:
        results = load(options.name, folder)
    else:
        settings = dict(study.quick if options.quick else study.full)
        settings["seeds"] = options.seeds or settings["seeds"]
        results = run(options.name, study, settings, folder)
    print(report(study, results))
    print(f"\nwritten: {folder / options.name}.json, {draw(options.name, study, results, folder)}", end="")
    page = folder / f"{options.name}.md"
    if page.exists():
        refresh(page, study, results)
        print(f", {page}", end="")
    print()


def _list() -> None:
    studies = {name: find(name) for name in STUDIES}
    width = max(map(len, studies))
    print(f"{COMMAND} NAME [--quick] [--seeds K] [--out DIR] [--plot-only]\n\nstudy{'':{width - 5}}  minutes  it shows")
    for name, study in studies.items():
        print(f"{name:{width}}  {study.minutes:7g}  {study.shows}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Run a study; without a name, list them.")
    parser.add_argument("name", nargs="?", choices=STUDIES, metavar="NAME", help=", ".join(STUDIES))
    parser.add_argument("--quick", action="store_true", help="a small version, in less than half a minute")
    parser.add_argument("--seeds", type=_count, metavar="K", help="how many seeds; more narrow the intervals")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where NAME.json and the picture go; default: studies/full or /quick"
    )
    parser.add_argument("--plot-only", action="store_true", help="do not measure; draw again from NAME.json")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text}; it must be an integer, at least 1")
    return int(text)


if __name__ == "__main__":
    main()
