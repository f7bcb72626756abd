import numpy as np
import pytest

from npnorm import LayerNorm
from npnorm.engine import FORMS, Features, Mean, Row
from npnorm.engine.statistics import local, merge, subtract
from npnorm.group import SOLO
from npnorm.mpi import RankError, Ranks
from tests.mpi.pmpi import counting

ROWS, FEATURES = (3, 5), 24
EACH = pytest.mark.parametrize("statistics", sorted(FORMS))
NOT_PACKED = pytest.mark.parametrize("statistics", ["gathered", "two-pass"])


def arrays(mean=0.0, dtype="float64"):
    """Return x, dy, weight, bias: whole, the same on every rank."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((*ROWS, FEATURES)) + mean).astype(dtype)
    dy = rng.standard_normal((*ROWS, FEATURES)).astype(dtype)
    return x, dy, *rng.standard_normal((2, FEATURES)).astype(dtype)


def both(group, statistics, x, dy, params, **settings):
    """Return {name: (mine, the slice of serial)} for y, dx and each gradient."""

    def shard(whole):
        return group.shard(whole, -1)

    serial = LayerNorm(*params, **settings)
    split = LayerNorm(*map(shard, params), statistics=statistics, group=group, **settings)
    y, saved = serial.forward(x)
    my_y, my_saved = split.forward(shard(x))
    dx, grads = serial.backward(dy, saved)
    my_dx, my_grads = split.backward(shard(dy), my_saved)
    mine, whole = {"y": my_y, "dx": my_dx, **my_grads}, {"y": y, "dx": dx, **grads}
    return {name: (mine[name], shard(whole[name])) for name in whole}


@pytest.mark.mpi(ranks=(2, 3, 4))
@EACH
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_every_form_is_the_slice_of_serial(comm, statistics, mean):
    x, dy, *params = arrays(mean)
    for mine, serial in both(Ranks(comm), statistics, x, dy, params).values():
        np.testing.assert_allclose(mine, serial, rtol=1e-12, atol=1e-12)


@pytest.mark.mpi(ranks=(2, 3, 4))
@NOT_PACKED
@pytest.mark.parametrize("mean", [1e6, 1e12])
def test_rows_far_from_zero_lose_nothing(comm, statistics, mean):
    x, dy, *params = arrays(mean)
    for mine, serial in both(Ranks(comm), statistics, x, dy, params).values():
        np.testing.assert_allclose(mine, serial, rtol=1e-12, atol=1e-12)


@pytest.mark.mpi(ranks=(2, 3, 4))
@EACH
def test_float32_is_the_very_bits_of_serial(comm, statistics):
    x, dy, *params = arrays(dtype="float32")
    for mine, serial in both(Ranks(comm), statistics, x, dy, params).values():
        np.testing.assert_array_equal(mine, serial)


@pytest.mark.mpi(ranks=(2, 3, 4))
@EACH
@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_every_form_holds_over_the_whole_range(comm, statistics, size):
    x, dy, *params = arrays()
    results = both(Ranks(comm), statistics, x * size, dy, params, eps=0)
    for mine, serial in results.values():
        assert np.all(np.isfinite(serial))
        np.testing.assert_allclose(mine, serial, rtol=1e-12, atol=1e-12 * np.max(np.abs(serial)))


@pytest.mark.mpi(ranks=(2, 3, 4))
@pytest.mark.parametrize("mean", [0.0, 1e6])
def test_gathered_is_the_very_bits_of_the_parts_merged_in_one_process(comm, mean):
    x, _, weight, bias = arrays(mean)
    group, row = Ranks(comm), Row(Features("a norm", SOLO), 1e-5)
    parts = []
    for shard in np.split(x.reshape(-1, FEATURES), comm.size, axis=-1):
        part = local(row, shard)
        parts.append(np.stack([np.full_like(part.mean.high, part.n), *part.mean, part.var * part.n]))
    n, merged_mean, rest, squares = merge(np.stack(parts))
    z = subtract(x.reshape(-1, FEATURES), Mean(merged_mean, rest)) * (1 / np.sqrt(squares / n + 1e-5))
    y = (z * weight + bias).reshape(x.shape)
    norm = LayerNorm(group.shard(weight, -1), group.shard(bias, -1), statistics="gathered", group=group)
    mine, saved = norm.forward(group.shard(x, -1))
    np.testing.assert_array_equal(mine, group.shard(y, -1))
    np.testing.assert_array_equal(saved.mean.high, merged_mean)
    np.testing.assert_array_equal(saved.mean.low, rest)


@pytest.mark.mpi(ranks=(2, 3, 4))
def test_packed_refuses_a_mean_far_beyond_the_spread_on_every_rank(comm):
    x, _, weight, bias = arrays()
    x[1, 2] += 1e6  # a single row
    group = Ranks(comm)
    norm = LayerNorm(group.shard(weight, -1), group.shard(bias, -1), statistics="packed", group=group)
    with pytest.raises(ValueError, match="LayerNorm: in some row the mean is so far beyond the spread") as error:
        norm.forward(group.shard(x, -1))
    assert "statistics='gathered'" in str(error.value)
    assert len(set(comm.allgather(str(error.value)))) == 1
    norm.forward(group.shard(x - 1e6 * (x > 1e5), -1))  # nobody is left behind


@pytest.mark.mpi(ranks=(2, 3))
def test_packed_takes_a_batch_whose_digits_eps_covers(comm):
    x, dy, *params = arrays()
    for mine, serial in both(Ranks(comm), "packed", np.full_like(x, 3.0), dy, params).values():
        np.testing.assert_allclose(mine, serial, rtol=1e-12, atol=1e-12 * np.max(np.abs(serial)))


MESSAGES = {  # all-reduces or all-gathers of one forward: (calls, numbers for each row)
    "two-pass": {"Allreduce": (2, 1 + 2)},
    "packed": {"Allreduce": (1, 2)},
    "gathered": {"Allgather": (1, 4)},
}


@pytest.mark.mpi(ranks=(2, 4), counted=True)
@EACH
def test_messages_counted_by_mpi(comm, statistics):
    x, dy, weight, _ = arrays()
    group, rows = Ranks(comm, check=False), np.prod(ROWS)
    norm = LayerNorm(group.shard(weight, -1), statistics=statistics, group=group)
    x, dy = group.shard(x, -1), group.shard(dy, -1)
    with counting() as calls:
        _, saved = norm.forward(x)
    expected = {name: (number, each * rows * 8) for name, (number, each) in MESSAGES[statistics].items()}
    assert calls == expected
    with counting() as calls:
        norm.backward(dy, saved)
    assert calls == {"Allreduce": (1, 2 * rows * 8)}


@pytest.mark.mpi(ranks=2)
def test_an_unknown_form_on_one_rank_is_one_error_on_both(comm):
    with pytest.raises(RankError, match=r"rank 1: LayerNorm with .*statistics=welford"):
        LayerNorm(np.ones(4), statistics="welford" if comm.rank == 1 else "packed", group=Ranks(comm)).forward(
            np.ones((2, 4))
        )
    comm.Barrier()


@pytest.mark.mpi(ranks=(2, 3))
def test_other_forms_on_the_ranks_are_one_error_on_all(comm):
    with pytest.raises(RankError, match="the ranks disagree") as error:
        LayerNorm(np.ones(4), statistics="packed" if comm.rank == 1 else "gathered", group=Ranks(comm))
    assert len(set(comm.allgather(str(error.value)))) == 1
