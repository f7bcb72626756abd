import numpy as np
import pytest

from npnorm.conformance.cases import FULL, SMALL, cases
from npnorm.conformance.problems import pose
from npnorm.conformance.textbook import NORMS, layout

COUNTS = {"float32": 23, "float16": 19, "bfloat16": 21, "float64": 25}  # without the rows of a million


@pytest.mark.parametrize(("dtype", "count"), COUNTS.items())
def test_cases_are_many_and_the_same_every_time(dtype, count):
    first, second = cases(dtype, SMALL), cases(dtype, SMALL)
    assert len(first) == len({case.name for case in first}) == count
    for a, b in zip(first, second, strict=True):
        assert a.x.dtype == a.dy.dtype == dtype
        assert np.all(np.isfinite(a.x.astype("float64")))
        assert a.x.tobytes() == b.x.tobytes()
        assert a.dy.tobytes() == b.dy.tobytes()


@pytest.mark.parametrize("dtype", COUNTS)
def test_cases_are_as_hard_as_they_say(dtype):
    found = {case.name: case.x.astype("float64") for case in cases(dtype, SMALL)}
    assert np.all(np.ptp(found["constant"], axis=1) == 0)
    assert np.all(np.count_nonzero(np.diff(np.sort(found["constant + 1 ulp"]), axis=1), axis=1) == 1)
    assert all(x.shape[1] == int(name[-1]) for name, x in found.items() if name.startswith("n = "))
    wide = found["of every size"]
    assert np.ptp(np.log10(abs(wide))) > {"float16": 7}.get(dtype, 60)
    assert FULL.long == 1_000_000


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_sees_the_rows_of_the_case(norm):
    case = cases("float32", SMALL)[0]
    problem = pose(norm, case)
    shape, weight, row, _ = layout(norm, problem.x.shape, problem.groups)
    seen = problem.x.reshape(shape)
    rows = np.moveaxis(seen, row, range(-len(row), 0)).reshape(-1, case.x.shape[1])
    np.testing.assert_array_equal(rows, case.x)
    assert np.prod(weight) == problem.weight.size
    assert (problem.bias is None) == (norm == "RMSNorm")
    assert (problem.groups > 1) == (norm == "GroupNorm")
