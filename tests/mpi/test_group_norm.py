import numpy as np
import pytest

from npnorm import GroupNorm, InstanceNorm, PartialRMSNorm
from npnorm.mpi import RankError, Ranks
from tests.check import close
from tests.mpi.pmpi import counting

SAMPLES, CHANNELS, SPACE = 2, 24, (3, 5)
DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])
PARTS = pytest.mark.parametrize("p", [0.0625, 0.3, 1])  # on several ranks: of the first only, of two, of all
SEEDS = pytest.mark.parametrize("seed", [None, 7], ids=["first features", "drawn"])


def arrays(dtype="float64", mean=0.0, shape=(SAMPLES, CHANNELS, *SPACE), channels=1):
    """Return x, dy, weight, bias: whole, the same on every rank."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal(shape) * 3 + mean, rng.standard_normal(shape)
    return (a.astype(dtype) for a in (x, dy, *rng.standard_normal((2, shape[channels]))))


def run(norm, x, dy, *seed):
    y, saved = norm.forward(x, *map(np.random.default_rng, seed))
    dx, grads = norm.backward(dy, saved)
    return {"y": y, "dx": dx, **grads}


def same(mine, serial, axis, group):
    """Raise unless mine is the slice of serial: to 1e-12, of narrower floats to the bit."""
    assert mine.keys() == serial.keys()
    for name, whole in serial.items():
        expected = group.shard(whole, axis if whole.ndim > 1 else 0)
        assert mine[name].dtype == expected.dtype
        if whole.dtype == "float64":
            np.testing.assert_allclose(mine[name], expected, rtol=1e-12, atol=1e-12 * np.max(np.abs(whole)))
        else:
            np.testing.assert_array_equal(mine[name], expected)


@pytest.mark.mpi(ranks=(2, 3, 4))
@DTYPES
@pytest.mark.parametrize("groups", [12, 24])
def test_whole_groups_on_each_rank_are_the_very_bits_of_serial(comm, dtype, groups):
    x, dy, *params = arrays(dtype)
    group = Ranks(comm)
    serial, split = GroupNorm(groups, *params), GroupNorm(groups, *(group.shard(a, 0) for a in params), group=group)
    mine, whole = run(split, group.shard(x, 1), group.shard(dy, 1)), run(serial, x, dy)
    for name, a in whole.items():
        if name in ("y", "dx"):
            np.testing.assert_array_equal(mine[name], group.shard(a, 1))
        else:
            np.testing.assert_allclose(mine[name], group.shard(a, 0), rtol=1e-12, atol=1e-12)


@pytest.mark.mpi(ranks=(2, 3, 4))
@DTYPES
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_ranks_that_share_a_group_have_their_slices_of_serial(comm, dtype, mean):
    group = Ranks(comm)
    for groups in (1, 2) if comm.size == 4 else (1,):
        x, dy, *params = arrays(dtype, mean)
        serial, split = GroupNorm(groups, *params), GroupNorm(groups, *(group.shard(a, 0) for a in params), group=group)
        same(run(split, group.shard(x, 1), group.shard(dy, 1)), run(serial, x, dy), 1, group)


@pytest.mark.mpi(ranks=(2, 4))
@pytest.mark.parametrize("shape", [(5, CHANNELS), (0, CHANNELS, 3), (2, CHANNELS, 2, 3, 2)], ids=str)
def test_shared_groups_of_any_number_of_axes(comm, shape):
    group = Ranks(comm)
    x, dy, *params = arrays(shape=shape)
    serial, split = GroupNorm(2, *params), GroupNorm(2, *(group.shard(a, 0) for a in params), group=group)
    mine, whole = run(split, group.shard(x, 1), group.shard(dy, 1)), run(serial, x, dy)
    for name, a in whole.items():
        expected = group.shard(a, 1 if name in ("y", "dx") else 0)
        np.testing.assert_allclose(mine[name], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.mpi(ranks=(2, 4))
@pytest.mark.parametrize("size", [0.0, 1e-200, 1e200])
def test_a_shared_group_is_right_over_the_whole_range(comm, size):
    group = Ranks(comm)
    x, dy, *params = arrays()
    serial, split = GroupNorm(1, *params), GroupNorm(1, *(group.shard(a, 0) for a in params), group=group)
    mine, whole = run(split, group.shard(x * size, 1), group.shard(dy, 1)), run(serial, x * size, dy)
    for name, a in whole.items():
        close(mine[name], group.shard(a, 1 if name in ("y", "dx") else 0))


@pytest.mark.mpi(ranks=4)
@pytest.mark.parametrize("size", [0.0, 1e-200, 1e200])
def test_one_of_two_shared_groups_may_be_out_of_range(comm, size):
    group = Ranks(comm)
    x, dy, *params = arrays()
    x[:, :12] *= size
    serial, split = GroupNorm(2, *params), GroupNorm(2, *(group.shard(a, 0) for a in params), group=group)
    mine, whole = run(split, group.shard(x, 1), group.shard(dy, 1)), run(serial, x, dy)
    for name, a in whole.items():
        close(mine[name], group.shard(a, 1 if name in ("y", "dx") else 0))


@pytest.mark.mpi(ranks=(2, 4))
def test_complex_step_through_shared_groups(comm):
    x, dy, weight, bias = arrays()
    v = np.random.default_rng(1).standard_normal(x.shape)
    group = Ranks(comm)
    norm = GroupNorm(comm.size // 2, group.shard(weight, 0), group.shard(bias, 0), eps=0.3, group=group)
    dx, _ = norm.backward(group.shard(dy, 1), norm.forward(group.shard(x, 1))[1])
    y, _ = norm.forward(group.shard(x + 1e-200j * v, 1))
    numeric, analytic = group.sum(np.sum(y.imag * group.shard(dy, 1)) / 1e-200, np.sum(dx * group.shard(v, 1)))
    assert float(numeric) == pytest.approx(float(analytic), rel=1e-12)


@pytest.mark.mpi(ranks=(2, 4), counted=True)
@pytest.mark.parametrize("kind", ["four groups", "InstanceNorm"])
def test_whole_groups_on_each_rank_send_nothing(comm, kind):
    x, dy, weight, bias = arrays()
    group = Ranks(comm, check=False)
    params = {"weight": group.shard(weight, 0), "bias": group.shard(bias, 0), "group": group}
    norm = InstanceNorm(**params) if kind == "InstanceNorm" else GroupNorm(4, **params)
    x, dy = group.shard(x, 1), group.shard(dy, 1)
    with counting() as calls:
        _, saved = norm.forward(x)
        norm.backward(dy, saved)
    assert calls == {}


@pytest.mark.mpi(ranks=(2, 4), counted=True)
def test_messages_of_shared_groups_counted_by_mpi(comm):
    """All groups travel in one message: three numbers forward and two backward, for each group of each sample."""
    x, dy, weight, _ = arrays("float32")
    group, groups = Ranks(comm, check=False), comm.size // 2
    norm = GroupNorm(groups, group.shard(weight, 0), group=group)
    x, dy = group.shard(x, 1), group.shard(dy, 1)
    with counting() as calls:
        _, saved = norm.forward(x)
    assert calls == {"Allreduce": (2, 3 * groups * SAMPLES * 8)}
    with counting() as calls:
        norm.backward(dy, saved)
    assert calls == {"Allreduce": (1, 2 * groups * SAMPLES * 8)}


@pytest.mark.mpi(ranks=(2, 3, 4))
def test_groups_that_the_ranks_cannot_share_are_the_same_error_on_all(comm):
    groups = {2: 3, 3: 2, 4: 6}[comm.size]
    with pytest.raises(ValueError, match=rf"GroupNorm: {comm.size} ranks cannot share {groups} groups. The ranks must"):
        GroupNorm(groups, np.ones(24 // comm.size), group=Ranks(comm))
    comm.Barrier()


@pytest.mark.mpi(ranks=(2, 4))
def test_groups_that_do_not_divide_the_channels_of_all_ranks_are_the_same_error_on_all(comm):
    message = rf"GroupNorm: {4 * comm.size} groups cannot share {6 * comm.size} channels equally"
    with pytest.raises(ValueError, match=message):
        GroupNorm(4 * comm.size, np.ones(6), group=Ranks(comm))
    with pytest.raises(ValueError, match=message):
        GroupNorm(4 * comm.size, group=Ranks(comm)).forward(np.ones((2, 6, 3)))
    comm.Barrier()


@pytest.mark.mpi(ranks=(2, 3))
def test_other_groups_on_one_rank_are_one_error_on_all(comm):
    with pytest.raises(RankError, match=r"GroupNorm with .*groups=1,(.|\n)*GroupNorm with .*groups=6,") as error:
        GroupNorm(6 if comm.rank == 1 else 1, np.ones(6), group=Ranks(comm))
    assert len(set(comm.allgather(str(error.value)))) == 1


@pytest.mark.mpi(ranks=(2, 3))
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((2, 8, 3), id="channels"),
        pytest.param((3, 6, 3), id="samples"),
        pytest.param((2, 6, 4), id="space"),
    ],
)
def test_another_shape_on_one_rank_that_shares_a_group_is_one_error_on_all(comm, shape):
    norm = GroupNorm(1, np.ones(6), group=Ranks(comm))
    with pytest.raises(RankError) as error:
        norm.forward(np.ones(shape if comm.rank == 1 else (2, 6, 3)))
    assert "GroupNorm" in str(error.value)
    assert "rank 1: " in str(error.value)
    assert len(set(comm.allgather(str(error.value)))) == 1


@pytest.mark.mpi(ranks=(2, 3, 4))
@DTYPES
def test_instance_norm_is_the_slice_of_serial(comm, dtype):
    x, dy, *params = arrays(dtype)
    group = Ranks(comm)
    split = InstanceNorm(*(group.shard(a, 0) for a in params), group=group)
    same(run(split, group.shard(x, 1), group.shard(dy, 1)), run(InstanceNorm(*params), x, dy), 1, group)


@pytest.mark.mpi(ranks=(2, 3, 4))
@DTYPES
@PARTS
@SEEDS
def test_partial_rms_norm_is_the_slice_of_serial(comm, dtype, p, seed):
    x, dy, *params = arrays(dtype, shape=(3, 5, CHANNELS), channels=-1)
    group, seeds = Ranks(comm), () if seed is None else (seed,)
    serial = PartialRMSNorm(*params, p=p)
    split = PartialRMSNorm(*(group.shard(a, 0) for a in params), p=p, group=group)
    same(run(split, group.shard(x, -1), group.shard(dy, -1), *seeds), run(serial, x, dy, *seeds), -1, group)


@pytest.mark.mpi(ranks=(2, 4))
@SEEDS
def test_partial_rms_norm_has_the_very_subset_of_serial(comm, seed):
    x, *_ = arrays(shape=(3, 5, CHANNELS), channels=-1)
    group, seeds = Ranks(comm), () if seed is None else (seed,)
    _, serial = PartialRMSNorm(p=0.3).forward(x, *map(np.random.default_rng, seeds))
    _, split = PartialRMSNorm(p=0.3, group=group).forward(group.shard(x, -1), *map(np.random.default_rng, seeds))
    np.testing.assert_array_equal(split.subset, group.shard(serial.subset, 0))


@pytest.mark.mpi(ranks=(2, 4), counted=True)
@PARTS
def test_messages_of_partial_rms_norm_counted_by_mpi(comm, p):
    x, dy, weight, _ = arrays("float32", shape=(3, 5, CHANNELS), channels=-1)
    group = Ranks(comm, check=False)
    norm = PartialRMSNorm(group.shard(weight, 0), p=p, group=group)
    x, dy = group.shard(x, -1), group.shard(dy, -1)
    with counting() as calls:
        _, saved = norm.forward(x)
    assert calls == {"Allreduce": (1, 15 * 8)}
    with counting() as calls:
        norm.backward(dy, saved)
    assert calls == {"Allreduce": (1, 15 * 8)}


@pytest.mark.mpi(ranks=(2, 3))
def test_other_generators_on_the_ranks_are_one_error_on_all(comm):
    norm = PartialRMSNorm(p=0.5, group=Ranks(comm))
    with pytest.raises(RankError, match="PartialRMSNorm with the subset") as error:
        norm.forward(np.ones((2, 12)), np.random.default_rng(comm.rank))
    assert len(set(comm.allgather(str(error.value)))) == 1


@pytest.mark.mpi(ranks=(2, 3))
def test_a_generator_on_one_rank_only_is_one_error_on_all(comm):
    norm = PartialRMSNorm(p=0.5, group=Ranks(comm))
    with pytest.raises(RankError, match="PartialRMSNorm with the subset"):
        norm.forward(np.ones((2, 12)), np.random.default_rng(0) if comm.rank == 1 else None)
    comm.Barrier()


@pytest.mark.mpi(ranks=2, timeout=3)
def test_what_is_not_a_generator_on_one_rank_is_one_error_on_both(comm):
    norm = PartialRMSNorm(p=0.5, group=Ranks(comm))
    with pytest.raises(RankError, match=r"rank 1: TypeError: PartialRMSNorm: rng is a int"):
        norm.forward(np.ones((2, 12)), 7 if comm.rank == 1 else np.random.default_rng(7))
    comm.Barrier()


@pytest.mark.mpi(ranks=(2, 3))
def test_another_part_on_one_rank_is_one_error_on_all(comm):
    with pytest.raises(RankError, match=r"PartialRMSNorm with .*p=0\.5,(.|\n)*PartialRMSNorm with .*p=0\.25,"):
        PartialRMSNorm(p=0.25 if comm.rank == 1 else 0.5, group=Ranks(comm))
    comm.Barrier()
