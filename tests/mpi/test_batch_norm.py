import numpy as np
import pytest

from npnorm import BatchNorm
from npnorm.mpi import RankError, Ranks
from tests.check import close, same_bits
from tests.mpi.pmpi import counting

CHANNELS = 3
SPLITS = {  # the samples of each rank
    "equal": {2: (4, 4), 3: (3, 3, 3), 4: (2, 2, 2, 2)},
    "unequal": {2: (1, 7), 3: (5, 1, 3), 4: (1, 4, 2, 1)},
    "first empty": {2: (0, 8), 3: (0, 5, 4), 4: (0, 3, 2, 3)},
    "others empty": {2: (8, 0), 3: (5, 0, 4), 4: (4, 0, 4, 0)},
    "one for each": {2: (1, 1), 3: (1, 1, 1), 4: (1, 1, 1, 1)},
}
EACH_SPLIT = pytest.mark.parametrize("split", list(SPLITS))
SPACE = pytest.mark.parametrize("space", [(), (5,), (2, 3)], ids=str)


def mine_of(comm, split, whole):
    """Return this rank's samples."""
    lengths = SPLITS[split][comm.size]
    start = sum(lengths[: comm.rank])
    return whole[start : start + lengths[comm.rank]]


def arrays(comm, split, space, dtype="float64", mean=0.0):
    """Return x, dy, weight, bias: whole, the same on every rank."""
    rng = np.random.default_rng(0)
    shape = (sum(SPLITS[split][comm.size]), CHANNELS, *space)
    x, dy = rng.standard_normal(shape) * 3 + mean, rng.standard_normal(shape)
    return (a.astype(dtype) for a in (x, dy, *rng.standard_normal((2, CHANNELS))))


def run(norm, x, dy):
    y, saved = norm.forward(x)
    dx, grads = norm.backward(dy, saved)
    norm.track(saved)
    running = {"running_mean": norm.running_mean, "running_var": norm.running_var}
    return {"y": y, "dx": dx}, grads | running


def both(comm, split, x, dy, params, **settings):
    """Return {name: (mine, serial)}: what belongs to the samples as this rank's slice, the rest whole."""
    data, rest = run(BatchNorm(*params, **settings), x, dy)
    group = Ranks(comm)
    my_data, my_rest = run(BatchNorm(*params, group=group, **settings), *(mine_of(comm, split, a) for a in (x, dy)))
    sliced = {name: (my_data[name], mine_of(comm, split, data[name])) for name in data}
    return sliced, {name: (my_rest[name], rest[name]) for name in rest}


@pytest.mark.mpi(ranks=(2, 3, 4))
@EACH_SPLIT
@SPACE
def test_each_rank_has_its_slice_of_serial_and_the_whole_gradients(comm, split, space):
    x, dy, *params = arrays(comm, split, space, mean=2.0)
    sliced, whole = both(comm, split, x, dy, params, eps=0.1)
    for mine, serial in sliced.values():
        np.testing.assert_allclose(mine, serial, rtol=1e-12, atol=1e-12)
    for mine, serial in whole.values():
        np.testing.assert_allclose(mine, serial, rtol=1e-12, atol=1e-12)
        assert len(set(comm.allgather(mine.tobytes()))) == 1


@pytest.mark.mpi(ranks=(2, 3, 4))
@EACH_SPLIT
def test_float32_is_the_very_bits_of_serial(comm, split):
    x, dy, *params = arrays(comm, split, (5,), "float32")
    sliced, whole = both(comm, split, x, dy, params)
    for name, (mine, serial) in (sliced | whole).items():
        if not name.startswith("running"):
            same_bits(mine, serial)


@pytest.mark.mpi(ranks=(2, 3, 4))
@pytest.mark.parametrize("mean", [1e6, 1e12])
def test_channels_far_from_zero_lose_nothing(comm, mean):
    x, dy, *params = arrays(comm, "unequal", (5,), mean=mean)
    sliced, whole = both(comm, "unequal", x, dy, params)
    for mine, serial in (sliced | whole).values():
        close(mine, serial)


@pytest.mark.mpi(ranks=(2, 3))
@pytest.mark.parametrize("split", ["unequal", "first empty"])
@pytest.mark.parametrize("size", [1e-140, 1e140])
def test_the_whole_range_of_float64(comm, split, size):
    x, dy, *params = arrays(comm, split, (5,))
    sliced, whole = both(comm, split, x * size, dy, params, eps=0)
    for mine, serial in (sliced | whole).values():
        assert np.all(np.isfinite(serial))
        np.testing.assert_allclose(mine, serial, rtol=1e-12, atol=1e-12 * np.max(np.abs(serial), initial=0))


@pytest.mark.mpi(ranks=(2, 3))
@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_and_inference_are_those_of_serial_after_several_batches(comm, momentum):
    rng = np.random.default_rng(1)
    serial, split = BatchNorm(momentum=momentum), BatchNorm(momentum=momentum, group=Ranks(comm))
    for name in ("equal", "unequal", "others empty"):
        x = rng.standard_normal((sum(SPLITS[name][comm.size]), CHANNELS, 4)) + rng.standard_normal(CHANNELS)[:, None]
        serial.track(serial.forward(x)[1])
        split.track(split.forward(mine_of(comm, name, x))[1])
    close(split.running_mean, serial.running_mean)
    close(split.running_var, serial.running_var)
    assert split.batches == 3
    x, dy, *_ = arrays(comm, "unequal", (4,))
    y, saved = serial.inference(x)
    dx, _ = serial.backward(dy, saved)
    my_y, my_saved = split.inference(mine_of(comm, "unequal", x))
    my_dx, _ = split.backward(mine_of(comm, "unequal", dy), my_saved)
    np.testing.assert_allclose(my_y, mine_of(comm, "unequal", y), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(my_dx, mine_of(comm, "unequal", dx), rtol=1e-12, atol=1e-12)


@pytest.mark.mpi(ranks=(2, 3, 4))
@pytest.mark.parametrize("split", ["unequal", "first empty"])
def test_the_gradients_of_inference_are_whole_on_every_rank(comm, split):
    x, dy, weight, bias = arrays(comm, split, (5,))
    running = {"running_mean": np.array([0.5, -1.0, 2.0]), "running_var": np.array([0.2, 1.0, 3.0])}
    serial, norm = BatchNorm(weight, bias, **running), BatchNorm(weight, bias, **running, group=Ranks(comm))
    _, expected = serial.backward(dy, serial.inference(x)[1])
    _, grads = norm.backward(mine_of(comm, split, dy), norm.inference(mine_of(comm, split, x))[1])
    for name in expected:
        close(grads[name], expected[name])
        assert len(set(comm.allgather(grads[name].tobytes()))) == 1


@pytest.mark.mpi(ranks=(2, 4))
def test_complex_step_through_the_group(comm):
    x, dy, weight, bias = arrays(comm, "unequal", (5,))
    v = np.random.default_rng(2).standard_normal(x.shape)
    group = Ranks(comm)
    norm = BatchNorm(weight, bias, eps=0.3, group=group)
    x, dy, v = (mine_of(comm, "unequal", a) for a in (x, dy, v))
    dx, _ = norm.backward(dy, norm.forward(x)[1])
    y, _ = norm.forward(x + 1e-200j * v)
    numeric, analytic = group.sum(np.sum(y.imag * dy) / 1e-200, np.sum(dx * v))
    assert float(numeric) == pytest.approx(float(analytic), rel=1e-12)


@pytest.mark.mpi(ranks=(2, 4), counted=True)
@pytest.mark.parametrize("split", ["equal", "first empty"])
def test_messages_counted_by_mpi(comm, split):
    x, dy, weight, bias = arrays(comm, split, (5,))
    norm = BatchNorm(weight, bias, group=Ranks(comm, check=False))
    x, dy = mine_of(comm, split, x), mine_of(comm, split, dy)
    with counting() as calls:
        _, saved = norm.forward(x)
    assert calls == {"Allgather": (1, 4 * CHANNELS * 8)}
    with counting() as calls:
        norm.backward(dy, saved)
    assert calls == {"Allreduce": (1, 2 * CHANNELS * 8)}
    with counting() as calls:
        norm.track(saved)
        _, saved = norm.inference(x)
    assert calls == {}
    with counting() as calls:
        norm.backward(dy, saved)
    assert calls == {"Allreduce": (1, 2 * CHANNELS * 8)}


@pytest.mark.mpi(ranks=(2, 3, 4))
@pytest.mark.parametrize("elements", [pytest.param(0), 1])
def test_fewer_than_two_elements_over_all_ranks_are_the_same_error_on_all(comm, elements):
    norm = BatchNorm(np.ones(CHANNELS), group=Ranks(comm))
    shape = (elements if comm.rank == 1 else 0, CHANNELS)
    with pytest.raises(ValueError, match=rf"over all ranks: {elements}\. Its variance says nothing"):
        norm.forward(np.ones(shape))
    norm.forward(np.ones((1, CHANNELS)))  # nobody is left behind


@pytest.mark.mpi(ranks=(2, 3))
@pytest.mark.parametrize("affine", [True, False])
def test_other_channels_on_one_rank_are_one_error_on_all(comm, affine):
    norm = BatchNorm(*[np.ones(CHANNELS)] * affine, group=Ranks(comm))
    x = np.arange(40.0).reshape(2, 4, 5)[:, : CHANNELS + (comm.rank == 1)]
    with pytest.raises(RankError) as error:
        norm.forward(x)
    assert "rank 1: " in str(error.value)
    assert "BatchNorm" in str(error.value)
    assert len(set(comm.allgather(str(error.value)))) == 1


@pytest.mark.mpi(ranks=(2, 3))
def test_parameters_of_other_channels_on_one_rank_are_one_error_on_all(comm):
    with pytest.raises(RankError, match=r"BatchNorm with eps=.* weight \(3,\) float64(.|\n)*weight \(4,\)"):
        BatchNorm(np.ones(4 if comm.rank == 1 else 3), group=Ranks(comm))
    comm.Barrier()


@pytest.mark.mpi(ranks=2)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_batch_that_is_not_finite_on_one_rank_is_tracked_on_none(comm, bad):
    norm = BatchNorm(np.ones(CHANNELS), group=Ranks(comm))
    x = np.random.default_rng(comm.rank).standard_normal((4, CHANNELS))
    if comm.rank == 1:
        x[2, 1] = bad
    y, saved = norm.forward(x)
    assert np.all(np.isnan(y[:, 1]))
    assert np.all(np.isfinite(y[:, [0, 2]]))
    with pytest.raises(ValueError, match="not finite in float64; the running statistics stay as they were"):
        norm.track(saved)
    np.testing.assert_array_equal(norm.running_mean, np.zeros(CHANNELS))
    np.testing.assert_array_equal(norm.running_var, np.ones(CHANNELS))
    comm.Barrier()
