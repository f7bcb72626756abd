import numpy as np
import pytest

from npnorm.layers import GELU, SiLU
from npnorm.layers.inplace import BLOCK, add_into, elementwise, exp, in_blocks, sum_at, tanh
from npnorm.threads import set_threads
from tests.check import close, same_bits


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    set_threads(request.param)
    yield request.param
    set_threads(None)


@pytest.mark.parametrize("activation", [GELU(), SiLU()], ids=["GELU", "SiLU"])
@pytest.mark.parametrize("layout", ["rows", "columns", "every second"])
def test_blocks_of_any_layout_give_the_bits_of_the_whole(threads, activation, layout):
    rng = np.random.default_rng(1)
    x, dy = (rng.standard_normal((3, BLOCK // 2 + 5)).astype("float32") for _ in range(2))
    y, saved = activation.forward(x)
    dx, _ = activation.backward(dy, saved)
    pieces = [activation.forward(row) for row in x]  # each smaller than a block
    same_bits(y, np.stack([row for row, _ in pieces]))
    same_bits(dx, np.stack([activation.backward(d, s)[0] for d, (_, s) in zip(dy, pieces, strict=True)]))
    other = {
        "rows": x.copy(),
        "columns": np.asfortranarray(x),
        "every second": np.repeat(x, 2, axis=1)[:, ::2],
    }[layout]
    same_bits(activation.forward(other)[0], y)
    same_bits(other, x)


def test_every_block_is_computed_once(threads):
    x, counts = np.arange(3.0 * BLOCK + 7).reshape(-1, 1), np.zeros((3 * BLOCK + 7, 1))

    def count(x, counts):
        counts += x + 1

    in_blocks(count, 1, x, counts)
    np.testing.assert_array_equal(counts, x + 1)


def test_an_error_in_a_block_is_raised(threads):
    def fail(x):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_blocks(fail, BLOCK, np.zeros((4, 1)))


def test_several_arrays_and_results():
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, BLOCK + 1)), rng.standard_normal((2, BLOCK + 1)) + 0j
    total, product = elementwise(lambda a, b: (a + b, a * a), a, b)
    same_bits({"total": total, "product": product}, {"total": a + b, "product": a * a})


@pytest.mark.parametrize("f", [exp, tanh])
def test_a_function_is_written_over_its_argument(f):
    x = np.array([0.0, 1.0, -2.0])
    expected = getattr(np, f.__name__)(x)
    assert f(x) is x
    same_bits(x, expected)
    assert f(np.float64(1.0)) == getattr(np, f.__name__)(1.0)  # a scalar cannot be written to


def test_a_sum_is_written_over_the_first_where_it_fits():
    a, b = np.ones(3, "float32"), np.arange(3, dtype="float32")
    assert add_into(a, b) is a
    np.testing.assert_array_equal(a, [1, 2, 3])
    total = add_into(a, 1j * b.astype("complex128"))
    np.testing.assert_array_equal(total, [1, 2 + 1j, 3 + 2j])
    np.testing.assert_array_equal(a, [1, 2, 3])


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
@pytest.mark.parametrize("count", [1, 7, 40])
def test_sums_at_repeated_rows_are_the_product_with_one_hot_rows(dtype, count):
    rng = np.random.default_rng(3)
    rows, x = rng.integers(-2, count + 2, 60), rng.standard_normal((60, 5)).astype(dtype)
    before = x.copy()
    total = sum_at(rows, x, count)
    onehot = (rows[:, None] == np.arange(count)).astype(dtype)
    close(total, onehot.T @ x, 1e-5 if dtype == "float32" else 1e-14)
    assert total.dtype == dtype
    same_bits(x, before)


@pytest.mark.parametrize("rows", [np.zeros(0, int), np.array([5, -1])])
def test_sums_of_no_rows_are_zero(rows):
    np.testing.assert_array_equal(sum_at(rows, np.ones((len(rows), 3)), 4), np.zeros((4, 3)))
