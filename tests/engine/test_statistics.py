import copy
import pickle
from fractions import Fraction

import numpy as np
import pytest

from npnorm import LayerNorm, RMSNorm
from npnorm.engine import FORMS, NO_BIAS, NO_WEIGHT, Features, Mean, Row
from npnorm.engine.cancellation import dx_where_it_cancels, dx_without_cancellation
from npnorm.engine.statistics import local, merge, packed, subtract
from npnorm.group import SOLO
from tests.check import close, exact_norm, same_bits

ROW = Row(Features("a norm", SOLO), 1e-5)
OFFSETS = pytest.mark.parametrize("offset", [0.0, 1e4, -1e8, 1e12])
LENGTHS = pytest.mark.parametrize(
    "lengths",
    [(5, 5), (1, 7), (7, 1), (1, 1), (3, 4, 9, 2), (0, 6), (6, 0), (3, 0, 5), (0, 0, 4, 0, 3, 0), (8,), (0, 1)],
    ids=str,
)


def exact_statistics(row):
    """Return mean and sum of centred squares as fractions."""
    x = [Fraction(float(a)) for a in row]
    mean = sum(x) / len(x)
    return mean, sum((a - mean) ** 2 for a in x)


def part_of(row):
    """Return n, the mean in two summands, and the sum of centred squares of one part."""
    _, mean, var, n = local(ROW, row[None, :])
    return np.array([n, mean.high[0, 0], mean.low[0, 0], var[0, 0] * n])


def off(mean, rest, exact):
    """Return how far mean + rest is from the exact mean."""
    return abs(float(Fraction(float(mean)) + Fraction(float(rest)) - exact))


@LENGTHS
@OFFSETS
def test_merged_parts_are_the_whole(lengths, offset):
    x = np.random.default_rng(1).standard_normal(sum(lengths)) + offset
    parts = np.stack([part_of(row) for row in np.split(x, np.cumsum(lengths)[:-1])])
    n, mean, rest, squares = merge(parts)
    exact_mean, exact_squares = exact_statistics(x)
    assert n == len(x)
    assert off(mean, rest, exact_mean) < 2e-15  # of a spread of 1, wherever the mean is
    assert abs(squares - float(exact_squares)) <= 2e-14 * float(exact_squares)


def test_parts_worked_by_hand():
    # (1) and (1, 3, 7): delta = 8/3, mean = 1 + 8/3 3/4 = 3, m2 = 56/3 + 64/9 1 3/4 = 24
    n, mean, rest, squares = merge(np.array([[1, 1, 0, 0], [3, 11 / 3, 0, 56 / 3]]))
    assert n == 4
    close([mean + rest, squares], [3, 24], 1e-15)


def test_parts_of_one_number_each_are_the_whole():
    x = np.random.default_rng(2).standard_normal(50) + 1e12
    n, mean, rest, squares = merge(np.stack([part_of(x[i : i + 1]) for i in range(50)]))
    exact_mean, exact_squares = exact_statistics(x)
    assert n == 50
    assert off(mean, rest, exact_mean) < 2e-15
    assert abs(squares - float(exact_squares)) <= 1e-14 * float(exact_squares)


def test_the_second_summand_of_a_part_counts():
    n, mean, rest, squares = merge(np.array([[2, 1e12, 0.25, 0.0], [2, 1e12, -0.75, 0.0]]))
    assert (n, mean, rest) == (4, 1e12, -0.25)
    assert squares == 1  # four numbers 1/2 from the mean


def test_each_row_is_merged_by_itself():
    rng = np.random.default_rng(3)
    parts = rng.random((3, 4, 5, 1))
    together = merge(parts)
    for row in range(5):
        for a, b in zip(merge(parts[:, :, row]), together, strict=True):
            same_bits(a, b[row])


def test_empty_parts_alone_are_empty():
    n, mean, rest, squares = merge(np.zeros((3, 4)))
    assert (n, mean, rest, squares) == (0, 0, 0, 0)


@OFFSETS
@pytest.mark.parametrize("n", [1, 2, 9, 1000])
def test_the_centre_is_exact_wherever_the_mean_is(n, offset):
    x = np.random.default_rng(4).standard_normal((1, n)) + offset
    row = Row(ROW.layout, 1e-5)
    c, mean, var = row.centre(x)
    exact_mean, exact_squares = exact_statistics(x[0])
    np.testing.assert_array_equal(row.n, [[n]])
    assert off(mean.high[0, 0], mean.low[0, 0], exact_mean) < 5e-16
    exact_c = np.array([[float(Fraction(float(a)) - exact_mean) for a in x[0]]])
    np.testing.assert_allclose(c, exact_c, rtol=0, atol=1e-15)
    assert abs(var[0, 0] - float(exact_squares / n)) <= 1e-15 * float(exact_squares / n)


@pytest.mark.parametrize("value", [0.0, 0.1, -1.1e7, 1e12, 1.1e100])
@pytest.mark.parametrize("n", [1, 3, 100])
def test_a_constant_row_has_the_centre_zero_and_no_variance(value, n):
    c, _, var = Row(ROW.layout, 1e-5).centre(np.full((2, n), value))
    np.testing.assert_array_equal(c, np.zeros((2, n)))
    np.testing.assert_array_equal(var, np.zeros((2, 1)))


@pytest.mark.parametrize("value", [0.1, -1.1e7, 1.1e100])
@pytest.mark.parametrize("n", [3, 100, 20001])
def test_the_centre_is_exact_where_a_row_spreads_by_a_single_step(value, n):
    x = np.full((1, n), value)
    x[0, 1] = np.nextafter(value, np.inf)
    c, _, var = Row(ROW.layout, 1e-5).centre(x)
    exact_mean, exact_squares = exact_statistics(x[0])
    exact_c = np.array([[float(Fraction(float(a)) - exact_mean) for a in x[0]]])
    np.testing.assert_allclose(c, exact_c, rtol=1e-15)  # each element, though all but one are small
    assert abs(var[0, 0] - float(exact_squares / n)) <= 1e-15 * float(exact_squares / n)


def test_subtract_gives_the_centre_again():
    x = np.random.default_rng(5).standard_normal((4, 9)) + 1e10
    c, mean, _, _ = local(ROW, x)
    same_bits(subtract(x, mean), c)
    same_bits(ROW.subtract(x, mean), c)


def test_an_empty_row_has_the_mean_zero():
    c, mean, var, n = local(ROW, np.ones((3, 0)))
    assert (c.shape, n) == ((3, 0), 0)
    for a in (*mean, var):
        same_bits(a, np.zeros((3, 1)))


@pytest.mark.parametrize("form", ["packed", "gathered"])
def test_alone_every_form_gives_the_same_bits(form):
    rng = np.random.default_rng(6)
    x, dy = rng.standard_normal((2, 3, 5, 11)) + 1e6
    results = []
    for statistics in ("two-pass", form):
        layer = LayerNorm(statistics=statistics)
        y, saved = layer.forward(x)
        results.append({"y": y, "dx": layer.backward(dy, saved)[0]})
    same_bits(*results)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_the_formula_of_each_form_is_that_of_numpy(form):
    x = np.random.default_rng(7).standard_normal((4, 9)) + 3
    c, mean, var, n = FORMS[form](ROW, x)
    close(c, x - x.mean(axis=-1, keepdims=True))
    close(mean.high + mean.low, x.mean(axis=-1, keepdims=True))
    close(var, x.var(axis=-1, keepdims=True))
    assert np.all(n == 9)


@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_packed_refuses_a_row_of_which_more_than_half_of_the_digits_cancel(dtype):
    x = np.random.default_rng(8).standard_normal((3, 50)).astype(dtype)
    x[1] += 1e3
    close(packed(ROW, x).var, x.real.var(axis=-1, keepdims=True), 2.0**-26)
    x[1] += 1e5
    with pytest.raises(ValueError, match=r"a norm: in some row the mean is so far.*Take statistics='gathered'"):
        packed(ROW, x)


def test_packed_takes_a_constant_row_where_eps_covers_what_cancels():
    x = np.full((1, 8), 3.0)
    assert packed(ROW, x).var[0, 0] == 0
    with pytest.raises(ValueError, match="more than half of its digits"):
        packed(Row(ROW.layout, 0.0), x)


def test_an_unknown_form_is_refused():
    with pytest.raises(
        ValueError, match=r"LayerNorm: statistics is 'welford'\. Choose one of two-pass, packed, gather"
    ):
        LayerNorm(statistics="welford")


@pytest.mark.parametrize("eps", [1e-2, 1e-5, 1e-9, 1e-12])
@pytest.mark.parametrize(("kind", "n"), [(LayerNorm, 2), (RMSNorm, 1)])
def test_the_gradient_of_the_shortest_rows_keeps_its_digits(kind, n, eps):
    rng = np.random.default_rng(9)
    x, dy = rng.standard_normal((2, 20, n))
    layer = kind(eps=eps)
    _, saved = layer.forward(x)
    dx, _ = layer.backward(dy, saved)
    expected = exact_norm(x, np.ones(n), np.zeros(n), eps, dy, centred=kind is LayerNorm)[1]
    np.testing.assert_allclose(dx, expected, rtol=1e-13)  # 1 - z^2 itself has 4 digits at an eps of 1e-12


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
def test_the_gradient_along_the_output_is_right(kind):
    x = np.random.default_rng(10).standard_normal((20, 9))
    layer = kind(eps=1e-5)
    y, saved = layer.forward(x)
    dx, _ = layer.backward(y, saved)
    expected = exact_norm(x, np.ones(9), np.zeros(9), 1e-5, y, centred=kind is LayerNorm)[1]
    close(dx, expected, 2e-15)  # though it is 1e-5 of dy, and less


@pytest.mark.parametrize(("kind", "n"), [(LayerNorm, 2), (LayerNorm, 3), (RMSNorm, 1), (RMSNorm, 2), (RMSNorm, 3)])
def test_the_gradient_of_short_rows_is_right_to_a_few_units(kind, n):
    rng = np.random.default_rng(20)
    x, dy = rng.standard_normal((2, 2000, n))
    w = rng.uniform(0.5, 1.5, n)
    layer = kind(w, eps=1e-5)
    dx, _ = layer.backward(dy, layer.forward(x)[1])
    expected = exact_norm(x, w, np.zeros(n), 1e-5, dy, centred=kind is LayerNorm)[1]
    units = np.abs(dx - expected) / np.spacing(np.abs(expected).max(axis=1, keepdims=True))
    assert units.max() <= 8  # some of these dx are 1e-4 of dz, and dz itself is rounded


# dx where it cancels: see npnorm.engine.cancellation.


def zero_mean(x):
    """Return a mean that is 0."""
    return Mean(np.zeros((len(x), 1)), np.zeros((len(x), 1)))


def again(dz, x, share, centre, low_precision=False):
    """Return dx / rstd, for a weight of 1."""
    row, statistics = Row(ROW.layout, 0.0, low_precision=low_precision), (np.ones((len(x), 1)),)
    with np.errstate(divide="ignore", invalid="ignore"):  # as in an evaluation
        return dx_where_it_cancels(row, dz, x, NO_WEIGHT, (zero_mean(x), *statistics) if centre else statistics, share)


LOW = pytest.mark.parametrize("low_precision", [False, True])


@LOW
@pytest.mark.parametrize("share", [1e-3, 1e-9, 1e-15])
@pytest.mark.parametrize("centre", [True, False])
def test_along_z_the_share_of_eps_is_left(share, centre, low_precision):
    signs = np.random.default_rng(11).permuted(np.repeat([[-1.0, 1.0]], 5, axis=1), axis=1)
    z = signs * [[1.0], [-1.0], [1.0], [-1.0]]  # mean 0 and mean square 1, exactly: nothing is left without eps
    close(again(4 * z, z, np.full((4, 1), share), centre, low_precision), 4 * z * share, 1e-14)


@LOW
@pytest.mark.parametrize("centre", [True, False])
def test_at_right_angles_to_z_everything_is_left(centre, low_precision):
    z, p = np.array([[-1.0, -1.0, 1.0, 1.0]]), np.array([[1.0, -1.0, 1.0, -1.0]]) * 2.0**-20
    close(again(3 * z + p, z, np.array([[1e-9]]), centre, low_precision), p + 3e-9 * z, 1e-15)


@LOW
def test_where_z_vanishes_the_gradient_is_the_centre(low_precision):
    dz = 1e8 + np.array([[0.0, 1.0, 2.0, 3.0]])
    found = again(dz, np.zeros_like(dz), np.ones((1, 1)), True, low_precision)
    np.testing.assert_array_equal(found, [[-1.5, -0.5, 0.5, 1.5]])


@LOW
def test_of_a_constant_dz_nothing_is_left(low_precision):
    x = np.random.default_rng(14).standard_normal((3, 9))
    for value in (1.0, 0.1, -3.7e5):
        found = again(np.full((3, 9), value), x, np.full((3, 1), 1e-3), True, low_precision)
        np.testing.assert_array_equal(found, np.zeros((3, 9)))


def test_what_is_left_far_below_the_rounding_of_dz_is_found():
    rng = np.random.default_rng(15)
    x = rng.standard_normal((20, 33)).astype("float32").astype("float64") + 1000
    w = rng.uniform(0.5, 1.5, 33).astype("float32").astype("float64")
    dy = ((x - x.mean(axis=1, keepdims=True)) / w).astype("float32").astype("float64")  # dz is c, but for 2^-24
    layer = LayerNorm(w.astype("float32"), eps=1e-12)
    _, saved = layer.forward(x.astype("float32"))
    dx, _ = layer.backward(dy.astype("float32"), saved)
    expected = exact_norm(x.astype("float32"), w, np.zeros(33), 1e-12, dy, centred=True)[1]
    assert np.abs(expected).max() < 1e-4
    unit = np.spacing(np.abs(expected).max(axis=1, keepdims=True).astype("float32"))
    np.testing.assert_array_less(np.abs(dx - expected), 0.51 * unit * np.ones(33))


def test_rows_that_lost_nothing_and_rows_of_zeros_stay_as_they_are():
    rng = np.random.default_rng(12)
    z, dz = rng.standard_normal((2, 3, 9))
    z = local(ROW, z).c
    z /= np.sqrt((z * z).mean(axis=-1, keepdims=True))
    dz[1], dz[2] = 0, z[2]
    d = rng.standard_normal((3, 9))
    d[1:] = 0
    given = (zero_mean(z), np.ones((3, 1)))
    found = dx_without_cancellation(ROW, d, dz, z, NO_WEIGHT, given, np.full((3, 1), 1e-3))
    same_bits(found[:2], d[:2])
    close(found[2], 1e-3 * z[2], 1e-13)


def test_what_a_norm_does_not_have_leaves_arrays_as_they_are():
    z = np.random.default_rng(13).standard_normal((3, 4))
    for result in (z * NO_WEIGHT, NO_WEIGHT * z, z + NO_BIAS, NO_BIAS + z):
        assert result is z
    for absent in (NO_WEIGHT, NO_BIAS):
        assert pickle.loads(pickle.dumps(absent)) is absent
        assert copy.deepcopy(absent) is absent
