import tracemalloc

import numpy as np
import pytest
import torch

from npnorm.layers import Embedding, Positions
from tests.check import check_backward, check_finite_differences, close, same_bits


def embedding(params):
    return Embedding(**params)


def positions(params):
    return Positions(**params)


def test_a_lookup_worked_by_hand():
    layer = Embedding(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    x, saved = layer.forward(np.array([2, 0, 2]))
    np.testing.assert_array_equal(x, [[5, 6], [1, 2], [5, 6]])
    dx, grads = layer.backward(np.array([[1.0, 2.0], [10.0, 20.0], [0.5, -3.0]]), saved)
    assert dx is None
    np.testing.assert_array_equal(grads["weight"], [[10, 20], [0, 0], [1.5, -1]])  # id 2 stood twice, id 1 nowhere


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_the_gradient_of_the_table_is_the_derivative(shape):
    rng = np.random.default_rng(1)
    ids = np.asarray(rng.integers(0, 7, shape))
    check_backward(embedding, {"weight": rng.standard_normal((7, 5))}, ids, rng)


def test_the_gradient_of_the_table_agrees_with_finite_differences():
    rng = np.random.default_rng(2)
    check_finite_differences(embedding, {"weight": rng.standard_normal((6, 2))}, rng.integers(0, 6, (3, 4)), rng)


def test_torch_gives_the_same():
    rng = np.random.default_rng(3)
    w, ids, dx = rng.standard_normal((11, 5)), rng.integers(0, 11, (3, 4)), rng.standard_normal((3, 4, 5))
    table = torch.tensor(w, requires_grad=True)
    expected = torch.nn.functional.embedding(torch.tensor(ids), table)
    expected.backward(torch.tensor(dx))
    x, saved = Embedding(w).forward(ids)
    same_bits(x, expected.detach().numpy())
    close(Embedding(w).backward(dx, saved)[1]["weight"], table.grad)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "uint64", ">i4"])
def test_ids_of_any_integer_dtype_are_the_same(dtype):
    rng = np.random.default_rng(4)
    layer, ids = Embedding(rng.standard_normal((300, 2))), rng.integers(0, 128, (3, 4))
    x, saved = layer.forward(ids)
    x_other, saved_other = layer.forward(ids.astype(dtype))
    same_bits(x_other, x)
    same_bits(layer.backward(x, saved_other)[1], layer.backward(x, saved)[1])


def test_float32_stays_float32():
    w = np.random.default_rng(5).standard_normal((4, 3)).astype("float32")
    x, saved = Embedding(w).forward(np.array([1, 3]))
    assert x.dtype == Embedding(w).backward(x, saved)[1]["weight"].dtype == np.float32


@pytest.mark.parametrize(("ids", "came"), [([0, 5], "0 to 5"), ([-1, 2], "-1 to 2")])
def test_ids_outside_the_table_are_refused(ids, came):
    with pytest.raises(ValueError, match=f"Embedding takes integers from 0 to 4; got {came}"):
        Embedding(np.ones((5, 2))).forward(np.array(ids))


@pytest.mark.parametrize("dtype", ["float32", "bool"])
def test_ids_that_are_not_integers_are_refused(dtype):
    with pytest.raises(TypeError, match=f"Embedding takes integers from 0 to 4; got {dtype}"):
        Embedding(np.ones((5, 2))).forward(np.ones(3, dtype))


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"got a list.*numpy\.asarray"):
        Embedding(np.ones((5, 2))).forward([1, 2])


def test_a_table_that_is_not_a_matrix_is_refused():
    with pytest.raises(ValueError, match=r"Embedding: weight must have shape \(vocabulary, width\); got \(5,\)"):
        Embedding(np.ones(5))


def test_a_gradient_of_another_width_is_refused():
    layer = Embedding(np.ones((5, 2)))
    _, saved = layer.forward(np.array([1, 2]))
    with pytest.raises(ValueError, match=r"Embedding\.backward takes 2 features; dx has shape \(2, 3\)"):
        layer.backward(np.ones((2, 3)), saved)


def test_positions_worked_by_hand():
    layer = Positions(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    y, saved = layer.forward(np.array([[[10.0, 20.0], [30.0, 40.0]], [[0.5, 0.0], [0.0, -0.5]]]))
    np.testing.assert_array_equal(y, [[[11, 22], [33, 44]], [[1.5, 2], [3, 3.5]]])
    dy = np.array([[[1.0, 2.0], [3.0, 4.0]], [[10.0, 20.0], [30.0, 40.0]]])
    dx, grads = layer.backward(dy, saved)
    np.testing.assert_array_equal(dx, dy)
    np.testing.assert_array_equal(grads["weight"], [[11, 22], [33, 44], [0, 0]])  # position 2 did not occur


@pytest.mark.parametrize("length", [1, 4, 6])
def test_backward_of_positions_is_the_derivative(length):
    rng = np.random.default_rng(6)
    check_backward(positions, {"weight": rng.standard_normal((6, 5))}, rng.standard_normal((3, length, 5)), rng)


def test_backward_of_positions_agrees_with_finite_differences():
    rng = np.random.default_rng(7)
    check_finite_differences(positions, {"weight": rng.standard_normal((4, 2))}, rng.standard_normal((5, 3, 2)), rng)


def test_more_positions_than_the_table_has_are_refused():
    with pytest.raises(ValueError, match=r"Positions: x has 4 positions, the table 3\. Shorten the input"):
        Positions(np.ones((3, 2))).forward(np.ones((1, 4, 2)))


def test_positions_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"Positions takes 2 features; x has shape \(1, 3, 5\)"):
        Positions(np.ones((3, 2))).forward(np.ones((1, 3, 5)))


def test_ids_of_a_narrow_type_reach_every_row():
    rng = np.random.default_rng(20)
    table = rng.standard_normal((300, 2))
    x, _ = Embedding(table).forward(np.array([0, 255], "uint8"))
    np.testing.assert_array_equal(x, table[[0, 255]])


def test_the_gradient_of_a_large_table_takes_no_more_memory_than_the_table_and_dx():
    rng = np.random.default_rng(21)
    layer, ids = Embedding(rng.standard_normal((20_000, 8))), rng.integers(0, 20_000, (4, 500))
    x, saved = layer.forward(ids)
    tracemalloc.start()
    _, grads = layer.backward(x, saved)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * (grads["weight"].nbytes + x.nbytes)
