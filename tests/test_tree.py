import types

import numpy as np
import pytest

from npnorm.group import shard_slice
from npnorm.tree import check_names, checksum, leaves, map_tree, shard
from tests.check import same_bits


def test_map_tree_meets_matching_leaves_whatever_their_order():
    first = {"a": 1, "b": {"c": 2, "d": 3}}
    second = {"b": {"d": 30, "c": 20}, "a": 10}
    assert map_tree(lambda x, y: x + y, first, second) == {"a": 11, "b": {"c": 22, "d": 33}}


def test_map_tree_of_a_leaf_and_of_an_empty_tree():
    assert map_tree(lambda x: x + 1, 4) == 5
    assert map_tree(lambda x: x + 1, {"gelu": {}}) == {"gelu": {}}


def test_leaves_come_with_dotted_paths_in_order():
    tree = {"up": {"weight": 1, "bias": 2}, "gelu": {}, "down": {"weight": 3}}
    assert list(leaves(tree)) == [("up.weight", 1), ("up.bias", 2), ("down.weight", 3)]
    assert list(leaves(7)) == [("", 7)]


def test_shard_takes_this_ranks_part_of_each_array():
    rng = np.random.default_rng(1)
    params = {"up": {"weight": rng.standard_normal((4, 3))}, "bias": rng.standard_normal(5)}

    def take(x, axis):
        return (
            x if axis is None else np.moveaxis(np.moveaxis(x, axis, 0)[shard_slice(group, x.shape[axis], "")], 0, axis)
        )

    group = types.SimpleNamespace(rank=1, size=2, shard=take)
    mine = shard(params, {"up": {"weight": 0}, "bias": None}, group)
    same_bits(mine, {"up": {"weight": params["up"]["weight"][2:]}, "bias": params["bias"]})


def test_a_checksum_does_not_depend_on_the_order_of_names():
    a, b = np.arange(3.0), np.arange(4.0)
    assert checksum({"x": a, "y": b}) == checksum({"y": b, "x": a})
    assert checksum({"x": a, "y": b}) != checksum({"x": b, "y": a})
    assert checksum({"x": a}) != checksum({"x": a + 1e-16 * (a == 0)})


def test_missing_and_unknown_names_are_told():
    axes = {"up": {"weight": 0, "bias": 0}, "down": {"weight": 1}}
    check_names("Layer", {"down": {"weight": np.ones(2)}, "up": {"weight": np.ones(2)}}, axes)
    with pytest.raises(ValueError, match=r"missing: \['up.weight'\], unknown: \['up.gain'\]"):
        check_names("Layer", {"down": {"weight": np.ones(2)}, "up": {"gain": np.ones(2)}}, axes)
