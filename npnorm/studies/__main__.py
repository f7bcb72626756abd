"""The command: list the studies, or run one."""

import argparse
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

COMMAND = "python -m npnorm.studies"
EXTRA = "The packages of the studies come with the extra npnorm[studies]."

try:
    from npnorm.studies import STUDIES
    from npnorm.studies.report import refresh, report
    from npnorm.studies.study import Study, draw, load, run
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed. {EXTRA}")
except KeyboardInterrupt:
    sys.exit(130)


def find(name: str) -> Study:
    """Return the study of this name, or the one that a file of Python defines as STUDY.

    Raises
    ------
    ValueError
        If there is none.
    """
    if name in STUDIES:
        return import_module(f"npnorm.studies.{name}").STUDY
    path = Path(name)
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"{name} is none of the studies, {', '.join(STUDIES)}, and no file that ends in .py")
    study = runpy.run_path(name).get("STUDY")
    if not isinstance(study, Study):
        raise ValueError(f"{name} defines no STUDY, which is an npnorm.studies.study.Study")
    return study


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
        path = folder / f"{Path(options.name or '').stem}.json"
        goes_on = f"what was measured is in {path}, and the same command goes on there"
        parser.exit(130, f"\nstopped; {goes_on if path.is_file() else 'nothing was measured'}\n")
    except ModuleNotFoundError as missing:
        sys.exit(f"{missing.name} is not installed. {EXTRA}")
    except ValueError as problem:
        parser.exit(2, f"{COMMAND}: {problem}\n")


def _run(options: argparse.Namespace, study: Study, folder: Path) -> None:
    name = Path(options.name).stem
    if options.plot_only:
        results = load(name, folder)
    else:
        settings = dict(study.quick if options.quick else study.full)
        settings["seeds"] = options.seeds or settings["seeds"]
        results = run(name, study, settings, folder)
    print(report(study, results))
    print(f"\nwritten: {folder / name}.json, {draw(name, study, results, folder)}", end="")
    page = folder / f"{name}.md"
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
    names = f"one of {', '.join(STUDIES)}; or the path of a file.py that defines STUDY"
    parser.add_argument("name", nargs="?", metavar="NAME", help=names)
    parser.add_argument("--quick", action="store_true", help="a small version, in less than half a minute")
    parser.add_argument(
        "--seeds", type=_count, metavar="K", help="how many seeds in all; more of them narrow the intervals"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where NAME.json and the picture go, studies/full or studies/quick if it is not given; "
        "the marked parts of DIR/NAME.md, where there is one, are made anew",
    )
    parser.add_argument(
        "--plot-only",
        action="store_true",
        help="measure nothing; table, verdicts and picture from NAME.json (with --quick: of the quick run)",
    )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it must be an integer of at least 1, not {text}")
    return int(text)


if __name__ == "__main__":
    main()
