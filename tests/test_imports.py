import ast
import functools
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import npnorm

ROOT = Path(npnorm.__file__).parent
FILES = {
    ".".join(["npnorm", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
ALL = pytest.mark.parametrize("name", FILES)

FLOORS = [
    {"cuda_casts", "plotting"},
    {"arrays", "threads"},
    {"group"},
    {"tree"},
    {"checks"},
    {"engine", "mpi"},
    {"compiled"},  # loaded by a function of the engine, when the first array of CuPy comes: see LATE
    {"norms"},
    {"layers"},
    {"blocks", "config"},
]
LATE = {"npnorm.engine.other_modules": "npnorm.compiled.device"}
"""The one import that runs upward; it stands in a function."""

LONGEST = {"batch_norm": 220, "rms_norm": 105, "layer_norm": 105}
"""Lines of a page; the others have 150 at most."""

SHELLS = ("npnorm.norms.norm", "npnorm.norms.running")
"""What norms have in common, without mathematics."""

FLOORS += [{"transformer"}, {"training"}, {"__init__"}, {"conformance"}, {"studies", "bench"}]


def part(name):
    """Return the file or folder directly in the package that a module belongs to."""
    return [*name.split("."), "__init__"][1]


def floor(name):
    return next(i for i, parts in enumerate(FLOORS) if part(name) in parts)


@functools.cache
def tree(name):
    return ast.parse(FILES[name].read_text(encoding="utf-8"))


def imports(name):
    """Return the modules that a file imports; `from a import b` is a.b where that is a module."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively"
            found.update(
                full if (full := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names
            )
    return found


def definitions(node, prefix):
    """Yield the public functions, classes and methods of a module or class."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            yield f"{prefix}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child, f"{prefix}.{child.name}")


def test_the_files_were_found():
    assert {"npnorm", "npnorm.arrays", "npnorm.norms.layer_norm", "npnorm.transformer"} <= set(FILES)


@ALL
def test_imports_run_downward(name):
    for other in imports(name) - {LATE.get(name)}:
        if other.split(".")[0] == "npnorm":
            same = part(name) == part(other) and (ROOT / part(name)).is_dir()
            assert same or floor(other) < floor(name), f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize(("name", "other"), LATE.items())
def test_what_is_imported_late_is_imported_in_a_function(name, other):
    assert other in imports(name)
    modules = {node.module for node in tree(name).body if isinstance(node, ast.ImportFrom)}
    assert not any(module.startswith(other.rpartition(".")[0]) for module in modules)


def test_on_arrays_of_numpy_nothing_compiles():
    code = (
        "import sys, numpy, npnorm; norm = npnorm.LayerNorm.init(40, compute='float32'); x = numpy.eye(40, dtype='f4');"
        "norm.backward(x, norm.forward(x)[1]); raise SystemExit('npnorm.compiled' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT.parent, check=False).returncode == 0


@ALL
def test_above_the_engine_its_face_alone_is_imported(name):
    inside = {other for other in imports(name) if other.startswith("npnorm.engine.")}
    assert not inside or part(name) in ("engine", "compiled"), f"{name} imports {sorted(inside)}"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("npnorm.norms.") and name not in SHELLS])
def test_a_page_imports_eight_names_at_most(name):
    names = [
        alias.name
        for node in ast.walk(tree(name))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("npnorm")
        for alias in node.names
    ]
    assert len(names) <= 8, names
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) <= LONGEST.get(part_of_page(name), 150)


def part_of_page(name):
    return name.rpartition(".")[2]


@ALL
def test_nothing_imports_mpi_inside_the_package(name):
    assert "npnorm.mpi" not in imports(name)


@ALL
def test_one_file_names_mpi4py_and_one_names_cupy(name):
    words = {node.id for node in ast.walk(tree(name)) if isinstance(node, ast.Name)}
    words |= {node.value for node in ast.walk(tree(name)) if isinstance(node, ast.Constant)}
    words |= {module.split(".")[0] for module in imports(name)}
    assert ("cupy" in words) == (name == "npnorm.arrays")
    assert ("mpi4py" in words) == (name == "npnorm.mpi")


@ALL
def test_no_random_numbers_but_those_of_a_generator_that_is_passed(name):
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("np.random", "numpy.random"):
            assert node.attr in ("Generator", "default_rng"), f"{name} uses {ast.unparse(node)}"


@ALL
def test_everything_public_says_what_it_is(name):
    assert ast.get_docstring(tree(name)), name
    for full_name, node in definitions(tree(name), name):
        assert ast.get_docstring(node), full_name


def test_importing_npnorm_loads_numpy_alone():
    code = "import sys, npnorm; print(*sys.modules)"
    command = [sys.executable, "-W", "error", "-c", code]
    loaded = subprocess.run(command, cwd=ROOT.parent, stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert {"npnorm", "numpy"} <= set(loaded)
    others = {"mpi4py", "scipy", "torch", "tqdm", "cupy", "array_api_strict", "ml_dtypes"}
    assert others & set(loaded) == set()


def test_dir_shows_what_users_want_and_no_modules():
    assert dir(npnorm) == sorted([*npnorm.__all__, "__version__"])
    assert not any(inspect.ismodule(getattr(npnorm, name)) for name in dir(npnorm))


def test_the_version_is_written_in_one_place():
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert ROOT.parent / project["tool"]["hatch"]["version"]["path"] == Path(npnorm.__file__)
    citation = (ROOT.parent / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {npnorm.__version__}\n" in citation


def test_everything_exported_exists():
    assert all(hasattr(npnorm, name) for name in npnorm.__all__)
    assert sorted(npnorm.__all__) == sorted(set(npnorm.__all__))
