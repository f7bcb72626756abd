"""The README's own code."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.mpi.pool import launcher

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def test_the_python_blocks_run_as_one_program_on_two_ranks(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("\n".join(blocks("python")))
    done = subprocess.run(
        [*launcher(), "-n", "2", sys.executable, str(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stderr) == (0, "")
    differences = re.fullmatch(r"largest differences from serial: y (\S+), dx (\S+)\n", done.stdout).groups()
    assert max(map(float, differences)) < 1e-12


def test_the_first_block_is_the_two_commands():
    commands = blocks("sh")[0].splitlines()
    assert len(commands) == 2
    assert commands[0].startswith('pip install -e ".[mpi]" && mpirun -n 4 python mpi_examples/')
    assert commands[1] == 'pip install -e ".[test]" && pytest'


def test_every_program_and_file_that_it_names_exists():
    named = re.findall(r"(?:npnorm|mpi_examples|docs)/[\w/]+\.(?:py|md)", README)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []
