import types

import numpy as np
import pytest

from npnorm.checks import check_ids, check_width
from npnorm.group import SOLO


@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_features_of_the_right_width_pass(dtype):
    check_width("Linear", np.zeros((2, 3), dtype), 3)


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        ("int64", r"Convert it first, for example by x\.astype\(numpy\.float32\)"),
        ("float16", r"Convert it first, for example by x\.astype\(numpy\.float32\)"),
        ("bool", r"Convert it first, for example by x\.astype\(numpy\.float32\)"),
        ("longdouble", r"Convert it first, for example by x\.astype\(numpy\.float64\)"),
        ("complex64", r"Take x\.real; the only complex dtype that is taken is complex128, for the complex step"),
    ],
)
def test_features_of_another_dtype_are_refused_with_advice_that_keeps_their_digits(dtype, remedy):
    x = np.zeros((2, 3), dtype)
    with pytest.raises(TypeError, match=rf"the dtype of x is {x.dtype.name}\. {remedy}; only the norms take 16-bit"):
        check_width("Linear", x, 3)


@pytest.mark.parametrize("shape", [(), (3, 2), (0,)])
def test_features_of_another_width_are_refused(shape):
    with pytest.raises(ValueError, match=r"Linear takes 3 features; x has shape \(.*\)\. The last axis must be 3\."):
        check_width("Linear", np.zeros(shape), 3)


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "uint64"])
def test_ids_of_any_integer_dtype_pass(dtype):
    check_ids("Embedding", np.array([[0, 4], [2, 1]], dtype), 5, SOLO)
    check_ids("Embedding", np.zeros((0, 2), dtype), 5, SOLO)


@pytest.mark.parametrize(("ids", "came"), [([0, 5], "0 to 5"), ([-1, 3], "-1 to 3")])
def test_ids_outside_the_vocabulary_are_refused(ids, came):
    with pytest.raises(ValueError, match=rf"integers from 0 to 4; got {came}\. Was the text encoded"):
        check_ids("Embedding", np.array(ids), 5, SOLO)


@pytest.mark.parametrize("dtype", ["float64", "bool"])
def test_ids_that_are_not_integers_are_refused(dtype):
    with pytest.raises(TypeError, match=rf"Embedding takes integers from 0 to 4; got {dtype}"):
        check_ids("Embedding", np.zeros(3, dtype), 5, SOLO)


def test_ids_are_compared_over_the_ranks():
    said = []
    group = types.SimpleNamespace(rank=0, size=2, require_same=said.append)
    for ids in ([1, 2], [1, 2], [2, 1], [[1, 2]]):
        check_ids("Embedding", np.array(ids), 5, group)
    assert said[0] == said[1]
    assert len(set(said)) == 3
