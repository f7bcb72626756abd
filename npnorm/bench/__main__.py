"""The command: measure, print the tables, write them."""

import argparse
import importlib.util
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

try:
    import pandas as pd

    from npnorm.bench.grid import SECTIONS
    from npnorm.bench.peers import PACKAGES, PEERS
    from npnorm.bench.rows import KINDS
    from npnorm.bench.run import heaps, plans, run
    from npnorm.bench.tables import bullets, conditions, goals, legend, markdown, text
    from npnorm.conformance.machine import cores, machine
except ModuleNotFoundError as missing:
    sys.exit(f"{missing.name} is not installed. The packages of the tables come with the extra npnorm[bench].")

COMMAND = "python -m npnorm.bench"
BEGIN, END = "<!-- tables of python -m npnorm.bench -->", "<!-- end of the tables -->"
"""The lines of a page between which the tables go."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = _parser()
    options = parser.parse_args(argv)
    page = _checked(parser, options)
    try:
        if options.gpu:
            from npnorm.bench import gpu

            print(gpu.report(quick=options.quick))
            return
        if options.plot or options.write:
            from npnorm.bench.plot import plot
        frame, facts = _load(options.load) if options.load else _measured(options, argv)
    except ModuleNotFoundError as problem:
        parser.exit(1, f"{problem.name} is not installed; it comes with the extra npnorm[bench].\n")
    except (ImportError, OSError, RuntimeError) as problem:
        parser.exit(1, f"{problem}\n")
    print(text(frame, facts))
    if options.json:
        options.json.write_text(_dump(frame, facts), encoding="utf-8")
    if options.plot:
        plot(frame, options.plot)
    if options.write:
        data = options.write.parent / "data" / f"{options.write.stem}.json"
        data.parent.mkdir(exist_ok=True)
        data.write_text(_dump(frame, facts), encoding="utf-8")
        picture = options.write.with_suffix(".svg")
        if "norms" in set(frame["section"]):
            plot(frame, picture)
        found = _tables(frame, facts, picture.name, f"data/{data.name}")
        options.write.write_text(refresh(page, found), encoding="utf-8")
        print(f"\nwritten: {options.write}, {data}")


def _tables(frame: pd.DataFrame, facts: dict[str, str], picture: str, data: str) -> str:
    """Return what a page shows: the conditions, the goals, the picture, and a link to all cells."""
    parts = [
        f"## Where it was measured\n\n{bullets(conditions(facts))}",
        f"## Goals\n\n{bullets(legend(frame))}\n\n{markdown(goals(frame))}",
        f"![Bytes per second by size]({picture})" if "norms" in set(frame["section"]) else "",
        f"[All medians and percentiles]({data}); `{COMMAND} --load` prints them as tables.",
    ]
    return "\n\n".join(part for part in parts if part)


def refresh(page: str, tables: str) -> str:
    r"""Return the page with `tables` between its marks.

    Raises
    ------
    ValueError
        If it has not both marks, in their order.

    Examples
    --------
    >>> refresh(f"before\n{BEGIN}\nold\n{END}\nafter", "new") == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter"
    True
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"The page needs the lines {BEGIN} and {END}, between which the tables go.")
    return f"{before}{begin}\n\n{tables}\n\n{end}{after}"


def _dump(frame: pd.DataFrame, facts: dict[str, str]) -> str:
    """Return the long table as JSON, a line for each of its lines."""
    lines = ",\n".join(json.dumps(line) for line in json.loads(frame.to_json(orient="values", double_precision=15)))
    return (
        f'{{"machine": {json.dumps(facts)},\n"columns": {json.dumps(list(frame.columns))},\n"data": [\n{lines}\n]}}\n'
    )


def _load(path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    return pd.DataFrame(found["data"], columns=found["columns"]), found["machine"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=COMMAND, description="Hold the speed of norms against others and a copy.")
    parser.add_argument("--quick", action="store_true", help="a few sizes and fewer rounds: a minute or two")
    parser.add_argument("--rows", action="store_true", help="rows that need care, and nothing else: two minutes")
    parser.add_argument("--grid", choices=("full", "quick", "tiny"), help=argparse.SUPPRESS)
    parser.add_argument("--sections", type=_some_of(SECTIONS), default=SECTIONS, help=f"of {','.join(SECTIONS)}")
    parser.add_argument("--norms", type=_some_of(KINDS), default=list(KINDS), help=f"of {','.join(KINDS)}")
    parser.add_argument("--peers", type=_some_of(PEERS), help=f"of {','.join(PEERS)}; those installed if left out")
    parser.add_argument("--compile", action="store_true", help="torch.compile, too; it needs a C++ compiler and time")
    parser.add_argument("--threads", type=_counts, help="such as 1,2; one and all cores if left out")
    parser.add_argument("--heaps", type=_some_of(heaps()), default=heaps(), help=f"of {','.join(heaps())}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--load", type=Path, metavar="FILE", help="take what --json wrote instead of measuring")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw bytes per second by size: .svg, .png")
    parser.add_argument("--write", type=Path, metavar="FILE", help="refresh the tables of a page such as docs/speed.md")
    parser.add_argument("--gpu", action="store_true", help="CuPy arrays against torch on a GPU, and nothing else")
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


def _measured(options: argparse.Namespace, argv: Sequence[str] | None) -> tuple[pd.DataFrame, dict[str, str]]:
    sections, peers = (["rows"], ["f64", "f32"]) if options.rows else (options.sections, _peers(options))
    grid = options.grid or ("quick" if options.quick else "full")
    counts = options.threads or sorted({1, cores()})
    frame = run(plans(grid, sections, options.norms, peers, counts, options.heaps))
    command = shlex.join(sys.argv[1:] if argv is None else argv)
    return frame, {"command": f"{COMMAND} {command}".strip(), **machine(["numpy", "torch", "jax"])}


def _peers(options: argparse.Namespace) -> list[str]:
    """Return the peers that were asked for, or those that are there."""
    wanted = options.peers or [n for n in PEERS if n != "compile" and not (n == "jax" and options.quick)]
    found = []
    for name in wanted + ["compile"] * (options.compile and "compile" not in wanted):
        package = PACKAGES.get(name, "numpy")
        if importlib.util.find_spec(package):
            found.append(name)
        elif options.peers or name == "compile":
            raise ModuleNotFoundError(name=package)
        else:
            print(f"without {name}, which is not installed")
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
