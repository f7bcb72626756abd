import ast
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
    {"arrays", "threads"},
    {"group"},
    {"tree"},
    {"checks"},
    {"terms"},
    {"written"},
    {"axes", "cuda", "kernels", "mpi"},
    {"careful"},
    {"repeated"},
    {"device", "fast"},
    {"blocked"},
    {"norms"},
    {"layers"},
    {"blocks", "config"},
]
FLOORS += [{"transformer"}, {"training"}, {"__init__"}, {"conformance"}, {"studies", "bench"}]


def part(name):
    """Return the file or folder directly in the package that a module belongs to."""
    return [*name.split("."), "__init__"][1]


def floor(name):
    return next(i for i, parts in enumerate(FLOORS) if part(name) in parts)


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
    for other in imports(name):
        if other.split(".")[0] == "npnorm":
            same = part(name) == part(other) and (ROOT / part(name)).is_dir()
            assert same or floor(other) < floor(name), f"{name} imports {other}, which is not below it"


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


@pytest.mark.parametrize("module", ["mpi4py", "scipy", "torch", "tqdm", "cupy", "array_api_strict", "ml_dtypes"])
def test_importing_npnorm_loads_numpy_alone(module):
    code = f"import sys, npnorm; raise SystemExit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT.parent, check=False).returncode == 0


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
