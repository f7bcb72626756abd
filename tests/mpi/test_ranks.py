import inspect
import re
from functools import partial

import array_api_strict as strict
import ml_dtypes
import numpy as np
import pytest

from npnorm import RMSNorm
from npnorm.arrays import to_numpy
from npnorm.checks import message_label
from npnorm.mpi import RankError, Ranks
from tests.mpi.pmpi import counting

DEVICE = strict.Device("device1")


def draws(comm, shape, dtype="float64"):
    """Return the arrays of all ranks, the same on each, and this rank's."""
    arrays = np.random.default_rng(0).normal(size=(comm.size, *shape)).astype(dtype)
    return arrays, arrays[comm.rank]


@pytest.mark.mpi
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_sum_adds_over_the_ranks(comm, dtype):
    arrays, mine = draws(comm, (2, 3), dtype)
    total = Ranks(comm).sum(mine)
    assert total.dtype == dtype
    np.testing.assert_allclose(total, arrays.sum(axis=0), rtol=8 * np.finfo(dtype).eps, atol=8 * np.finfo(dtype).eps)


@pytest.mark.mpi
def test_sum_gives_every_rank_the_same_bits(comm):
    _, mine = draws(comm, (1000,), "float32")
    totals = comm.allgather(Ranks(comm).sum(mine).tobytes())
    assert len(set(totals)) == 1


@pytest.mark.mpi
def test_sum_leaves_its_argument_alone_and_takes_any_layout(comm):
    arrays, _ = draws(comm, (4, 3))
    mine = np.asfortranarray(arrays[comm.rank])
    mine.flags.writeable = False
    np.testing.assert_allclose(Ranks(comm).sum(mine.T), arrays.sum(axis=0).T, rtol=1e-14, atol=1e-14)
    np.testing.assert_array_equal(mine, arrays[comm.rank])


@pytest.mark.mpi(counted=True)
def test_several_sums_travel_in_one_message(comm):
    arrays, mine = draws(comm, (5,))
    group = Ranks(comm, check=False)
    with counting() as calls:
        first, second = group.sum(mine, mine[:2, None])
    assert calls == {"Allreduce": (1, 7 * 8)}
    assert (group.calls["sum"], group.bytes["sum"]) == (1, 7 * 8)
    np.testing.assert_allclose(first, arrays.sum(axis=0), rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose(second, arrays[:, :2, None].sum(axis=0), rtol=1e-14, atol=1e-14)


@pytest.mark.mpi(ranks=4)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bits_are_summed_in_float32(comm, dtype):
    # 2048 + 1 is 2048 in float16; so is 256 + 1 in bfloat16.
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    large = 2048 if dtype == np.float16 else 256
    total = Ranks(comm).sum(np.array([large if comm.rank == 0 else 2 / 3], dtype))
    exact = large + 3 * float(dtype.type(2 / 3))
    assert total.dtype == dtype
    assert total[0] == dtype.type(exact)


@pytest.mark.mpi
def test_sum_of_an_array_without_axes(comm):
    total = Ranks(comm).sum(np.asarray(comm.rank + 1.0))
    assert total.shape == ()
    assert total == sum(range(1, comm.size + 1))


@pytest.mark.mpi
def test_max_is_over_the_ranks(comm):
    arrays, mine = draws(comm, (2, 3))
    np.testing.assert_array_equal(Ranks(comm).max(mine), arrays.max(axis=0))


@pytest.mark.mpi
def test_max_keeps_a_nan_of_any_rank_on_all(comm):
    for bad in range(comm.size):
        largest = Ranks(comm).max(np.array([np.nan if comm.rank == bad else 1.0, 2.0]))
        np.testing.assert_array_equal(largest, [np.nan, 2.0])


@pytest.mark.mpi
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_gather_undoes_shard(comm, axis):
    whole = np.random.default_rng(0).normal(size=(12, 24))
    group = Ranks(comm)
    mine = group.shard(whole, axis)
    assert mine.shape[axis] * comm.size == whole.shape[axis]
    np.testing.assert_array_equal(group.gather(mine, axis), whole)


@pytest.mark.mpi
@pytest.mark.parametrize("axis", [None, 0])
def test_shard_is_a_copy(comm, axis):
    whole = np.ones((12, 2))
    Ranks(comm).shard(whole, axis)[...] = 0.0
    np.testing.assert_array_equal(whole, np.ones((12, 2)))


@pytest.mark.mpi(ranks=(2, 3))
def test_arrays_of_another_device_come_back_there(comm):
    arrays, mine = draws(comm, (4, 3))
    group = Ranks(comm)
    x = strict.asarray(mine, device=DEVICE)
    for result, expected in (
        (group.sum(x), arrays.sum(axis=0)),
        (group.max(x), arrays.max(axis=0)),
        (group.gather(x, axis=0), np.concatenate(arrays)),
    ):
        assert result.device == DEVICE
        np.testing.assert_allclose(to_numpy(result), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.mpi(ranks=(2, 4))
def test_a_length_that_the_ranks_do_not_divide_is_one_error_on_all(comm):
    with pytest.raises(ValueError, match=rf"{comm.size} ranks cannot share .* 7 is not a multiple of {comm.size}"):
        Ranks(comm).shard(np.ones((7, 2)), 0)
    comm.Barrier()  # no rank is left waiting


@pytest.mark.mpi(ranks=(2, 3, 4))
@pytest.mark.parametrize("wrong", ["shape", "dtype", "operation", "problem", "end"])
def test_ranks_that_disagree_raise_the_same_error_before_anything_is_sent(comm, wrong):
    group = Ranks(comm)
    last = comm.rank == comm.size - 1
    with pytest.raises(RankError) as error:  # noqa: PT012  ranks go different ways
        if last and wrong == "operation":
            group.max(np.ones(3))
        elif last and wrong == "problem":
            raise group.shared_error(ValueError("bad input"))
        elif last and wrong == "end":
            group.require_same("the end of the program")
        else:
            odd = {"shape": np.ones(4), "dtype": np.ones(3, np.float32)}
            group.sum(odd.get(wrong, np.ones(3)) if last else np.ones(3))
    texts = comm.allgather(str(error.value))
    assert len(set(texts)) == 1
    assert f"rank {comm.size - 1}: " in texts[0]
    assert texts[0].count("<-- differs") == (comm.size > 2)  # of two, none is the odd one
    assert "test_ranks.py, line" in texts[0]
    assert group.calls["sum"] == group.calls["max"] == 0
    comm.Barrier()


@pytest.mark.mpi(ranks=(2, 3))
def test_a_problem_in_the_input_of_one_rank_names_the_line_that_passed_it(comm):
    group = Ranks(comm)
    norm = RMSNorm(group=group)
    x = np.ones((2, 3), int if comm.rank == 1 else float)
    line = inspect.currentframe().f_lineno + 2
    with pytest.raises(RankError) as error:
        norm.forward(x)
    *_, problem = (text for text in str(error.value).splitlines() if "rank 1: " in text)
    assert re.search(rf"x is int64\. Convert .*float32\), at test_ranks\.py, line {line}(   <-- differs)?$", problem)


@pytest.mark.mpi(ranks=2, counted=True)
@pytest.mark.parametrize("operation", ["sum", "max", "gather"])
def test_a_label_carries_the_dtype_of_x_to_the_comparison(comm, operation):
    group = Ranks(comm)
    send = partial(group.gather, axis=0) if operation == "gather" else getattr(group, operation)
    x = np.ones(3, "float16" if comm.rank == 1 else "float64")
    with pytest.raises(RankError, match=r"rank 1: .* of \(3,\) float64.* for RMSNorm, x float16, at"):
        send(x.astype("float64"), label=message_label("RMSNorm", x=x))
    with counting() as calls:
        send(np.ones(3), label=message_label("RMSNorm", x=np.ones(3)))
    assert sum(count for count, _ in calls.values()) == 2  # the comparison and the message


@pytest.mark.mpi(ranks=(1, 3))
def test_an_error_that_every_rank_has_is_that_error(comm):
    with pytest.raises(TypeError, match="everywhere"):
        raise Ranks(comm).shared_error(TypeError("everywhere"))


@pytest.mark.mpi(ranks=2, counted=True)
def test_a_check_is_one_message_of_16_bytes(comm):
    group = Ranks(comm)
    with counting() as calls:
        group.sum(np.ones(3))
    assert calls == {"Allreduce": (2, 16 + 24)}
    assert dict(group.calls) == {"check": 1, "sum": 1}
    assert dict(group.bytes) == {"check": 16, "sum": 24}


@pytest.mark.mpi(ranks=2)
def test_big_endian_arrays_are_summed(comm):
    np.testing.assert_array_equal(Ranks(comm).sum(np.array([1.0, 2.0], ">f8")), [2.0, 4.0])
