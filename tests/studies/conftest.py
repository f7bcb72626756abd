"""Each study runs once in its quick version; all tests of it look at the same results."""

import functools

import pytest

from npnorm.studies.__main__ import find, main
from npnorm.studies.study import load


@pytest.fixture(scope="session")
def quick(tmp_path_factory):
    """Return a function from the name of a study to its quick results and the folder that it wrote."""

    @functools.cache
    def of(name):
        folder = tmp_path_factory.mktemp(name)
        main([name, "--quick", "--out", str(folder)])
        return load(name, folder), folder

    return of


@pytest.fixture
def verdicts(quick):
    """Return a function from the name of a study to the verdicts of its quick run, by what each claim says."""
    return lambda name: {claim.says: claim.verdict for claim in find(name).claims(quick(name)[0])}
