import numpy as np
import pytest
import torch

from npnorm.studies.accuracy import exact as exact_module
from npnorm.studies.accuracy.__main__ import main
from npnorm.studies.accuracy.cases import SMALL, Case, cases
from npnorm.studies.accuracy.exact import exact
from npnorm.studies.accuracy.formats import FORMATS
from npnorm.studies.accuracy.measure import Verdict, measure
from npnorm.studies.accuracy.needs import Missing, need
from npnorm.studies.accuracy.page import page, shown
from npnorm.studies.accuracy.peers import PEERS, Peer
from npnorm.studies.accuracy.problems import NORMS, pose
from npnorm.studies.accuracy.run import run
from npnorm.studies.accuracy.scoreboard import bar, scoreboard
from tests.check import close, exact_norm

DTYPES = pytest.mark.parametrize("dtype", FORMATS)
OF_NORMS = pytest.mark.parametrize("norm", NORMS)


def small(dtype, name):
    """Return the case of a dtype whose name begins so."""
    return next(case for case in cases(dtype, SMALL) if case.name.startswith(name))


def measured(dtype):
    """Yield npnorm's record, name of the result, place and cell, for all small cases of all norms."""
    for record in run([PEERS["npnorm"]()], list(NORMS), [dtype], SMALL):
        for name, cell in record.cells.items():
            yield record, name, f"{record.norm} {record.case} {name}: {cell}", cell


# npnorm


@DTYPES
def test_npnorm_is_within_its_bars(dtype):
    seen = 0
    for record, name, place, cell in measured(dtype):
        if record.norm == "batch" and record.n == 1:
            assert "Its variance says nothing" in record.refusal
            continue
        assert cell.verdict is Verdict.NUMBER, place
        one_sum = dtype == "float64" and record.n <= 3 and name in ("dw", "db")  # few sums, and the largest may cancel
        assert cell.ulps <= (64 if one_sum else bar(record)), place
        seen += cell.elements
    assert seen > 50_000


# The cases


@pytest.mark.parametrize(("dtype", "count"), {"float32": 23, "float16": 19, "bfloat16": 21, "float64": 25}.items())
def test_cases_are_many_and_the_same_every_time(dtype, count):
    first, second = cases(dtype, SMALL), cases(dtype, SMALL)
    assert len(first) == len({case.name for case in first}) == count  # without n = 1e6
    for a, b in zip(first, second, strict=True):
        assert a.x.dtype == a.dy.dtype == dtype
        assert np.all(np.isfinite(a.x.astype("float64")))
        assert a.x.tobytes() == b.x.tobytes()
        assert a.dy.tobytes() == b.dy.tobytes()


# The exact results


def test_exact_results_are_those_of_decimal_arithmetic():
    problem = pose("layer", small("float64", "mean 1e7"))
    expected = exact_norm(problem.x, problem.weight, problem.bias, problem.eps, problem.dy, centred=True)
    for right, decimal in zip(exact(problem).values(), expected, strict=True):
        np.testing.assert_array_equal(right.nearest.squeeze(), np.squeeze(decimal))


@OF_NORMS
@pytest.mark.parametrize("name", ["normal", "near the largest", "of every size", "constant + 1 ulp, eps = 0", "n = 3"])
def test_four_hundred_bits_are_enough(norm, name, monkeypatch):
    problem = pose(norm, small("float64", name))
    right = exact(problem)
    monkeypatch.setattr(exact_module, "BITS", 3000)
    for few, many in zip(right.values(), exact(problem).values(), strict=True):
        zero = abs(many.units) < 1e-60  # an exact zero that cancels leaves a rest of that size
        np.testing.assert_array_equal(np.where(zero, 0, few.nearest), np.where(zero, 0, many.nearest))
        np.testing.assert_array_equal(few.ulp, many.ulp)
        assert np.all(abs((few.units - many.units) + (few.rest - many.rest)) < 1e-15)


@OF_NORMS
def test_torch_gives_the_exact_results_of_plain_rows_in_the_layout_of_the_norm(norm):
    problem = pose(norm, small("float64", "normal"))
    came = PEERS["torch"]().results(problem)
    assert set(came) == set(problem.tensors)
    for name, right in exact(problem).items():
        close(came[name].ravel(), in_layout(problem, name, right.nearest).ravel())


def in_layout(problem, name, a):
    return a[0, :, 0, :].T if problem.norm == "batch" and name in ("y", "dx") else a


@DTYPES
def test_the_nearest_number_is_the_one_that_the_cast_gives(dtype):
    fmt = FORMATS[dtype]
    rng = np.random.default_rng(0)
    exponents = rng.uniform(fmt.smallest - fmt.precision - 2, fmt.beyond - 1, 1000)
    a = (np.exp2(exponents / 2) * np.exp2(exponents / 2)).astype("float32" if dtype == "bfloat16" else "float64")
    with need("gmpy2").context(precision=400), np.errstate(over="ignore"):
        nearest = exact_module._nearest(exact_module._numbers(a), fmt)
    np.testing.assert_array_equal(nearest, a.astype(fmt.dtype))


# The measure


def planted(dtype="float32", norm="layer", name="normal"):
    problem = pose(norm, small(dtype, name))
    right = exact(problem)["y"]
    return right.nearest.copy(), right


@DTYPES
def test_a_correctly_rounded_result_is_half_an_ulp_off(dtype):
    came, right = planted(dtype)
    cell = measure(came, right)
    assert cell.verdict is Verdict.NUMBER
    assert 0.4 < cell.ulps <= 0.5
    assert (cell.missed, cell.elements) == (0, came.size)


@DTYPES
def test_an_error_of_an_ulp_is_seen_as_one(dtype):
    came, right = planted(dtype)
    one = np.unravel_index(np.argmax(abs(came[1].astype("float64"))), came[1].shape)  # the largest of its row
    came[1][one] = np.nextafter(came[1][one], came.dtype.type(np.inf))
    cell = measure(came, right)
    assert 0.5 < cell.ulps <= 1.5
    assert cell.missed == 1


def test_the_rest_of_float64_is_measured():
    came, right = planted("float64")
    without = measure(came, right._replace(rest=0.0))
    assert measure(came, right).ulps > 0.4
    assert without.ulps != measure(came, right).ulps


@pytest.mark.parametrize(("value", "verdict"), [(np.nan, Verdict.NAN), (np.inf, Verdict.INF), (1e30, Verdict.WRONG)])
def test_what_is_worse_than_ulps_is_seen(value, verdict):
    came, right = planted()
    came[2, 0, 5, 0] = value
    cell = measure(came, right)
    assert (cell.verdict, cell.missed) == (verdict, 1)
    assert f"{verdict}" in shown([cell]) or "%" in shown([cell])


def test_another_shape_or_dtype_is_no_result():
    came, right = planted()
    with pytest.raises(ValueError, match="float64"):
        measure(came.astype("float64"), right)
    with pytest.raises(ValueError, match="expected"):
        measure(came[:1], right)


def test_a_case_beyond_the_range_is_refused():
    case = Case("too far", 0, np.full((2, 3), 1e-30, "f4"), np.array([[1e30, -1e30, 1e30]] * 2, "f4"), 0.0, False)
    with pytest.raises(ValueError, match="smaller dy"):
        exact(pose("rms", case))


def test_naive_numpy_is_seen_to_be_wrong_at_mean_1e7():
    (record,) = [r for r in run([PEERS["naive"]()], ["layer"], ["float32"], SMALL) if r.case == "mean 1e7"]
    assert {name: record.cells[name].verdict for name in ("y", "dw")} == {"y": "wrong", "dw": "wrong"}
    assert shown(record.cells.values()).startswith("**")


def test_an_exception_is_a_refusal_and_a_missing_norm_is_left_out():
    def results(problem):
        if problem.norm == "rms":
            raise NotImplementedError
        raise ValueError("eps must be positive\nfor reasons")

    records = run([Peer("none", "", (), results)], ["rms", "layer"], ["float32"], SMALL)
    assert {record.norm for record in records} == {"layer"}
    assert {record.refusal for record in records} == {"ValueError: eps must be positive"}
    assert {cell.verdict for record in records for cell in record.cells.values()} == {Verdict.REFUSED}


# The command


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == threads  # the study leaves torch as it was


def test_the_command_prints_the_scoreboard_and_writes_the_page(tmp_path, capsys, one_thread):
    path = tmp_path / "accuracy.md"
    main(f"--quick --norms layer --dtypes float32 --peers npnorm,naive,torch --write {path}".split())
    printed, written = capsys.readouterr().out, path.read_text(encoding="utf-8")
    lines = {line.split()[1]: line for line in printed.splitlines() if line.startswith("| ") and "ulp" not in line}
    assert lines.keys() >= {"npnorm", "naive", "torch"}
    cells, nearest, *others = (int(word) for word in lines["npnorm"].replace("|", " ").split()[1:9])
    assert cells == nearest == 23 * 4
    assert not any(others)
    assert lines["npnorm"] in written
    assert "### LayerNorm, float32" in written
    assert "| mean 1e7 " in written
    assert "<!--" not in written
    assert max(len(line) for line in written.splitlines() if not line.startswith(("|", "    "))) <= 110


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ("--norms weight", "weight is not among layer, rms, group, batch"),
        ("--dtypes float32,int8", "int8 is not among"),
        ("--peers tensorflow", "tensorflow is not among npnorm, naive, torch"),
        ("--write no/such/folder/page.md", "there is no folder no"),
    ],
)
def test_wrong_options_are_named(argv, says, capsys):
    with pytest.raises(SystemExit) as stop:
        main(argv.split())
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_a_missing_package_is_named_with_what_installs_it(capsys, monkeypatch):
    with pytest.raises(Missing, match=r"^no_such_package is not installed.*npnorm\[accuracy\]"):
        need("no_such_package.part")

    def absent():
        need("no_such_package")

    monkeypatch.setitem(PEERS, "keras", absent)
    with pytest.raises(SystemExit) as stop:
        main(["--quick", "--peers", "keras"])
    assert stop.value.code == 1
    assert "npnorm[accuracy]" in capsys.readouterr().err


def test_the_misses_of_npnorm_are_listed_and_the_counts_of_a_line_add_up():
    def results(problem):
        return PEERS["naive"]().results(problem)

    pretender = PEERS["naive"]()._replace(name="npnorm", results=results)
    records = run([pretender], ["layer"], ["float32"], SMALL)
    written = page(records, [pretender], "command")
    assert "| float32 | LayerNorm | mean 1e7 " in written
    cells, *counts = (int(word) for word in scoreboard(records, "float32").splitlines()[-1].split("|")[2:10])
    assert cells == sum(counts)
