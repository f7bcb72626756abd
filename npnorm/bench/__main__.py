"""The command: measure, print the tables, write them."""

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from npnorm.bench import gpu
from npnorm.bench.grid import NORMS, SECTIONS
from npnorm.bench.machine import cores
from npnorm.bench.needs import Missing, installed, need
from npnorm.bench.page import markdown, refresh, text
from npnorm.bench.peers import PACKAGES, PEERS
from npnorm.bench.plot import plot
from npnorm.bench.records import Measured, from_json, to_json
from npnorm.bench.run import plans, regimes, rows, run, thread_counts

COMMAND = "python -m npnorm.bench"
FILES = ("--json", "--load", "--plot", "--write")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(argv)
    page = _checked(parser, options)
    if options.gpu:
        try:
            print(gpu.report(quick=options.quick))
        except gpu.NoGPU as problem:
            parser.exit(1, f"{problem}\n")
        return
    if options.rows:
        parser.exit(rows(cores()))
    try:
        if options.plot or options.write:
            need("matplotlib.figure")
        measured = _measured(options, sys.argv[1:] if argv is None else argv)
    except (Missing, RuntimeError) as problem:
        parser.exit(1, f"{problem}\n")
    print(text(measured))
    if options.json:
        options.json.write_text(json.dumps(to_json(measured), indent=1) + "\n", encoding="utf-8")
    shown = any(record.section == "norms" for record in measured.records)
    if options.plot and shown:
        plot(measured, options.plot)
    if options.write:
        picture = options.write.with_suffix(".svg")
        if shown:
            plot(measured, picture)
        tables = markdown(measured, picture.name if shown else "")
        options.write.write_text(refresh(page, tables), encoding="utf-8")
        print(f"\nwritten: {options.write}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Hold the speed of norms against others and a copy.")
    parser.add_argument("--quick", action="store_true", help="a few sizes and fewer rounds: a minute or two")
    parser.add_argument("--grid", choices=("full", "quick", "tiny"), help=argparse.SUPPRESS)
    parser.add_argument("--sections", type=_some_of(SECTIONS), default=SECTIONS, help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--norms", type=_some_of(NORMS), default=NORMS, help=f"of {','.join(NORMS)}")
    parser.add_argument("--peers", type=_some_of(PEERS), help=f"of {','.join(PEERS)}; those installed if left out")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too; it needs a C++ compiler and time")
    parser.add_argument("--threads", type=_counts, help="such as 1,2; one and all cores if left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--load", type=Path, metavar="FILE", help="take what --json wrote instead of measuring")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bytes per second by size: .svg, .png")
    parser.add_argument("--write", type=Path, metavar="FILE", help="refresh the tables of a page such as docs/speed.md")
    parser.add_argument("--gpu", action="store_true", help="CuPy arrays against torch on a GPU, and nothing else")
    parser.add_argument("--rows", action="store_true", help="rows that need care against ordinary ones: 2 minutes")
    return parser


def _checked(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """Return the page to be refreshed; end here rather than after minutes if something cannot be written."""
    for path in (options.json, options.plot, options.write):
        if path and not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}")
    if options.plot and options.plot.suffix not in (".svg", ".png", ".pdf"):
        parser.error(f"--plot {options.plot}: its name must end with .svg, .png or .pdf")
    if not options.write:
        return ""
    try:
        page = options.write.read_text(encoding="utf-8")
        refresh(page, "")
    except (OSError, ValueError) as problem:
        parser.error(f"--write {options.write}: {problem}")
    return page


def _measured(options: argparse.Namespace, argv: Sequence[str]) -> Measured:
    if options.load:
        return from_json(json.loads(options.load.read_text(encoding="utf-8")))
    peers = _peers(options)
    grid = options.grid or ("quick" if options.quick else "full")
    counts = options.threads or thread_counts(cores())
    measured = run(plans(grid, options.sections, options.norms, peers, counts, regimes()))
    said = shlex.join(_without_files(argv))
    return measured._replace(machine={"command": f"{COMMAND} {said}".strip()} | measured.machine)


def _without_files(argv: Sequence[str]) -> list[str]:
    """Return the arguments that say what is measured, without those that say where it goes.

    Examples
    --------
    >>> _without_files(["--quick", "--json", "a.json", "--plot=b.svg", "--threads", "1"])
    ['--quick', '--threads', '1']
    """
    kept, skip = [], False
    for argument in argv:
        if not skip and argument.partition("=")[0] not in FILES:
            kept.append(argument)
        skip = not skip and argument in FILES
    return kept


def _peers(options: argparse.Namespace) -> list[str]:
    """Return the peers that were asked for, or those that are there."""
    if options.peers is not None:
        for name in options.peers:
            need(PACKAGES.get(name, "numpy"))
        found = list(options.peers)
    else:
        found = []
        for name in PEERS:
            if name == "compile" or (name == "jax" and options.quick):
                continue
            if installed(PACKAGES.get(name, "numpy")):
                found.append(name)
            else:
                print(f"without {name}, which is not installed")
    if options.compile and "compile" not in found:
        need("torch")
        found.append("compile")
    return found


def _some_of(names: Iterable[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := [name for name in chosen if name not in names]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is not among {', '.join(names)}")
        return list(dict.fromkeys(chosen))

    return parse


def _counts(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers of threads, such as 1,2")
    return sorted({int(part) for part in text.split(",")})


if __name__ == "__main__":
    main()
