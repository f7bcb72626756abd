"""The pytest hooks behind `@pytest.mark.mpi`: plain `pytest` runs such a test on real MPI ranks."""

from __future__ import annotations

import contextlib
import gc

import pytest

with contextlib.suppress(ImportError):  # without mpi4py the tests that need it say so
    import mpi4py

    mpi4py.rc.initialize = False  # some MPI libraries refuse to start an mpirun below a process that uses MPI

from tests.mpi.pool import Pools, rank_count, settings, shared_files, sweep

collect_ignore = ["mpi/worker.py"]  # the search for doctests would import it, and MPI with it
POOLS = pytest.StashKey[Pools]()
SHARED_BEFORE = pytest.StashKey[set]()


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line(
        "markers",
        "mpi(ranks=(1, 2, 3, 4), timeout=20, counted=False): run the test on that many MPI ranks; its argument `comm` "
        "is a fresh communicator; timeout in seconds; counted: the test uses tests.mpi.pmpi.counting",
    )
    config.stash[POOLS] = Pools(config.rootpath)
    config.stash[SHARED_BEFORE] = shared_files()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make one test of each number of ranks; in this process `comm` is only that number."""
    if wanted := settings(metafunc.definition):
        metafunc.parametrize("comm", wanted.counts(), ids="{}ranks".format)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Group the tests by their number of ranks, so that each pool starts once; tests without MPI come first."""
    items.sort(key=rank_count)


def pytest_collection() -> None:
    """Import the tests without searches for garbage: torch and JAX alone are a million objects."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Let later searches leave out what was imported."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run an MPI test on its ranks instead of in this process."""
    if not rank_count(pyfuncitem):
        return None
    pyfuncitem.config.stash[POOLS].run(pyfuncitem)
    return True


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the pool when the next test cannot use it."""
    if nextitem is None or rank_count(nextitem) != rank_count(item):
        item.config.stash[POOLS].close()


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the pool also after an interrupted run, and remove what jobs that failed on purpose have left."""
    config.stash[POOLS].close()
    sweep(config.stash[SHARED_BEFORE])
