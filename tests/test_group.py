import types

import numpy as np
import pytest

from npnorm.group import SOLO, errors_on_all_ranks, shard_slice
from tests.check import same_bits


def test_solo_is_rank_zero_of_one():
    assert (SOLO.rank, SOLO.size) == (0, 1)


def test_the_sum_over_one_rank_is_the_array_itself():
    a, b = np.arange(3.0), np.arange(4.0)
    assert SOLO.sum(a) is a
    assert SOLO.sum(a, b, label="two at once") == (a, b)


def test_max_and_gather_over_one_rank_are_the_array_itself():
    a = np.arange(3.0)
    assert SOLO.max(a) is a
    assert SOLO.gather(a, 0) is a


@pytest.mark.parametrize("axis", [0, 1, None])
def test_the_shard_of_one_rank_is_a_copy_of_all(axis):
    a = np.random.default_rng(1).standard_normal((2, 3))
    shard = SOLO.shard(a, axis)
    same_bits(shard, a)
    assert not np.shares_memory(shard, a)


def test_one_rank_agrees_with_itself_and_hands_errors_back():
    problem = ValueError("too long")
    assert SOLO.require_same("anything") is None
    assert SOLO.shared_error(problem) is problem


def test_parts_cover_the_length_without_overlap():
    ranks = [types.SimpleNamespace(rank=rank, size=4) for rank in range(4)]
    shared = [shard_slice(group, 12, "12 heads") for group in ranks]
    assert np.concatenate([np.arange(12)[s] for s in shared]).tolist() == list(range(12))
    assert shard_slice(SOLO, 12, "12 heads") == slice(0, 12)


def test_a_length_that_the_ranks_do_not_divide_is_refused():
    group = types.SimpleNamespace(rank=1, size=4, shared_error=lambda problem: problem)
    with pytest.raises(ValueError, match=r"4 ranks cannot share 6 heads equally: 6 is not a multiple of 4\. Choose"):
        shard_slice(group, 6, "6 heads")


def test_errors_on_all_ranks_lets_an_error_through_on_one_rank():
    with pytest.raises(KeyError, match="a name"), errors_on_all_ranks(SOLO):
        raise KeyError("a name")
