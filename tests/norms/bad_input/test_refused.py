import array_api_strict as strict
import pytest

from npnorm import norms
from tests.norms.bad_input.table import NORMS, TABLE, attempt


@pytest.mark.parametrize("row", [pytest.param(row, id=row.what) for row in TABLE])
def test_bad_input_is_refused(row):
    with pytest.raises(row.error, match=row.message):
        row.call()


@pytest.mark.parametrize("name", NORMS)
def test_the_same_call_with_nothing_bad_works(name):
    attempt(name)
    attempt(name, everything=strict.asarray)


def test_the_table_has_every_norm_and_no_row_twice():
    assert set(NORMS) == {name for name in norms.__all__ if name[0].isupper()}
    whats = [row.what for row in TABLE]
    assert len(set(whats)) == len(whats)
