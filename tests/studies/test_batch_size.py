import pytest

from npnorm.group import SOLO
from npnorm.studies import batch_size_ranks
from npnorm.studies.study import Verdict


@pytest.fixture
def results(quick):
    return quick("batch_size")[0]


def test_every_size_of_batch_sees_as_many_images(results):
    for line in results.where(norm="GroupNorm").lines:
        assert line["finite steps"] * line["images"] == 2 * 64
        assert 0 <= line["error"] <= 100


def test_statistics_over_the_ranks_are_those_of_the_whole_batch_and_those_of_each_rank_are_not(verdicts):
    of = verdicts("batch_size")
    both = "2 ranks with synchronized statistics do what one rank does with the whole batch."
    assert of[both] == Verdict.HOLDS
    assert of["Without synchronization they do not: each rank normalizes by its own images."] == Verdict.HOLDS


def test_on_one_rank_synchronized_or_not_is_the_same():
    found = batch_size_ranks.rank_main(SOLO, images=4, steps=2, seeds=1)
    assert found == {"synchronized": [0.0], "apart": [0.0]}
