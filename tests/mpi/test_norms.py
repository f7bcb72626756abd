import array_api_strict as strict
import ml_dtypes
import numpy as np
import pytest

from npnorm import LayerNorm, RMSNorm
from npnorm.arrays import to_numpy
from npnorm.mpi import RankError, Ranks
from tests.mpi.pmpi import counting

ROWS, FEATURES = (3, 5), 24
NORMS = pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "float64": np.float64}


def arrays(dtype="float64", scale=1.0, offset=0.0):
    """Return x, dy, weight, bias: whole, the same on every rank."""
    rng = np.random.default_rng(0)
    x = (scale * (rng.normal(size=(*ROWS, FEATURES)) + offset)).astype(DTYPES[dtype])
    dy = rng.normal(size=(*ROWS, FEATURES)).astype(DTYPES[dtype])
    return x, dy, *rng.normal(size=(2, FEATURES))


def both(comm, kind, x, dy, params, **settings):
    """Return (mine, the slice of serial) for y, dx and each gradient."""
    group = Ranks(comm)

    def shard(whole):
        return group.shard(whole, -1)

    serial, split = kind(*params, **settings), kind(*map(shard, params), group=group, **settings)
    y, saved = serial.forward(x)
    my_y, my_saved = split.forward(shard(x))
    dx, grads = serial.backward(dy, saved)
    my_dx, my_grads = split.backward(shard(dy), my_saved)
    assert my_grads.keys() == grads.keys() == split.params.keys()
    return [(my_y, shard(y)), (my_dx, shard(dx)), *((my_grads[name], shard(grads[name])) for name in grads)]


@pytest.mark.mpi
@NORMS
@pytest.mark.parametrize("affine", ["none", "weight", "weight and bias"])
def test_float64_is_the_slice_of_serial(comm, kind, affine):
    x, dy, weight, bias = arrays()
    params = {"none": (), "weight": (weight,), "weight and bias": (weight, bias)}[affine]
    for mine, serial in both(comm, kind, x, dy, params):
        np.testing.assert_allclose(mine, serial, rtol=1e-12, atol=1e-12)


@pytest.mark.mpi(ranks=(2, 3, 4))
@NORMS
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_types_are_the_very_bits_of_serial(comm, kind, dtype):
    x, dy, weight, bias = arrays(dtype)
    for mine, serial in both(comm, kind, x, dy, (weight.astype(x.dtype), bias.astype(x.dtype))):
        assert mine.dtype == x.dtype
        np.testing.assert_array_equal(mine, serial)


@pytest.mark.mpi(ranks=(2, 3, 4))
@NORMS
@pytest.mark.parametrize(
    ("scale", "offset", "eps"), [(1e300, 0, 1e-5), (1e-300, 0, 0.0), (1, 1e7, 1e-5), (1e200, 3, 0.0)]
)
def test_the_whole_range_of_float64(comm, kind, scale, offset, eps):
    x, dy, weight, _ = arrays(scale=scale, offset=offset)
    for mine, serial in both(comm, kind, x, dy * min(scale, 1.0), (weight,), eps=eps):
        assert np.all(np.isfinite(serial))
        np.testing.assert_allclose(mine, serial, rtol=1e-12, atol=1e-12 * np.max(np.abs(serial)))


@pytest.mark.mpi(ranks=(1, 2, 4), counted=True)
@pytest.mark.parametrize(("kind", "forward", "backward"), [(LayerNorm, (2, 3), (1, 2)), (RMSNorm, (1, 1), (1, 1))])
def test_messages_counted_by_mpi(comm, kind, forward, backward):
    """Two against one: (all-reduces, numbers of 8 bytes for each row)."""
    x, dy, weight, _ = arrays("float32")
    group = Ranks(comm, check=False)
    norm = kind(group.shard(weight, -1), group=group)
    rows = np.prod(ROWS)
    with counting() as calls:
        _, saved = norm.forward(group.shard(x, -1))
    assert calls == {"Allreduce": (forward[0], forward[1] * rows * 8)}
    with counting() as calls:
        norm.backward(group.shard(dy, -1), saved)
    assert calls == {"Allreduce": (backward[0], backward[1] * rows * 8)}


@pytest.mark.mpi(ranks=(2, 3))
@NORMS
def test_another_device(comm, kind):
    x, dy, weight, bias = arrays()
    device = strict.Device("device1")
    x, dy, weight, bias = (strict.asarray(a, device=device) for a in (x, dy, weight, bias))
    for mine, serial in both(comm, kind, x, dy, (weight, bias)):
        assert mine.device == device
        np.testing.assert_allclose(to_numpy(mine), to_numpy(serial), rtol=1e-12, atol=1e-12)


@pytest.mark.mpi(ranks=(2, 4))
@NORMS
def test_complex_step_through_the_group(comm, kind):
    x, dy, weight, bias = arrays()
    v = np.random.default_rng(1).normal(size=x.shape)
    group = Ranks(comm)
    norm = kind(group.shard(weight, -1), group.shard(bias, -1), eps=0.3, group=group)
    dx, _ = norm.backward(group.shard(dy, -1), norm.forward(group.shard(x, -1))[1])
    y, _ = norm.forward(group.shard(x + 1e-200j * v, -1))
    numeric, analytic = group.sum(np.sum(y.imag * group.shard(dy, -1)) / 1e-200, np.sum(dx * group.shard(v, -1)))
    assert float(numeric) == pytest.approx(float(analytic), rel=1e-12)


@pytest.mark.mpi(ranks=(2, 3))
@NORMS
def test_shards_that_disagree_are_one_error_on_every_rank(comm, kind):
    group = Ranks(comm)
    with pytest.raises(RankError, match=rf"{kind.__name__} with eps=.* weight \(8,\) float64.*\n.*weight \(5,\)"):
        kind(np.ones(5 if comm.rank == 1 else 8), group=group)
    comm.Barrier()


@pytest.mark.mpi(ranks=(2, 3))
@NORMS
@pytest.mark.parametrize("bad", [(2, 7), (3, 8)], ids=["features", "rows"])
def test_a_bad_shape_on_one_rank_is_one_error_on_every_rank(comm, kind, bad):
    group = Ranks(comm)
    norm = kind(np.ones(8), group=group)
    with pytest.raises(RankError) as error:
        norm.forward(np.ones(bad if comm.rank == 1 else (2, 8)))
    assert kind.__name__ in str(error.value)
    assert "rank 1: " in str(error.value)
    assert len(set(comm.allgather(str(error.value)))) == 1


@pytest.mark.mpi(ranks=2)
@NORMS
def test_a_bad_shape_on_all_ranks_is_the_plain_error(comm, kind):
    norm = kind(np.ones(8), group=Ranks(comm))
    with pytest.raises(ValueError, match=rf"{kind.__name__} holds 8 features on each of 2 ranks; x has shape \(2, 7\)"):
        norm.forward(np.ones((2, 7)))


X = np.ones((2, 8))
PROBLEMS = {  # on the rank for which `bad` is true
    "a list for the weight": lambda kind, group, bad: kind([1.0] * 8 if bad else X[0], group=group),
    "a precision": lambda kind, group, bad: kind(X[0], compute="half" if bad else None, group=group).forward(X),
    "a list for x": lambda kind, group, bad: kind(X[0], group=group).forward([[1.0]] if bad else X),
    "integers": lambda kind, group, bad: kind(X[0], group=group).forward(X.astype(int) if bad else X),
}


@pytest.mark.mpi(ranks=2)
@NORMS
@pytest.mark.parametrize("problem", list(PROBLEMS))
def test_a_problem_of_one_rank_is_one_error_on_both(comm, kind, problem):
    with pytest.raises(RankError, match=r"rank 1: (TypeError|ValueError|.* with .*compute=half)"):
        PROBLEMS[problem](kind, Ranks(comm), comm.rank == 1)
    comm.Barrier()


@pytest.mark.mpi(ranks=2)
@NORMS
def test_a_dy_of_another_shape_on_one_rank_is_one_error_on_both(comm, kind):
    norm = kind(np.ones(8), group=Ranks(comm))
    x = np.random.default_rng(0).normal(size=(3, 8))
    _, saved = norm.forward(x)
    with pytest.raises(RankError, match=r"rank 1: ValueError: .*: dy has shape \(2, 8\)"):
        norm.backward(x[: 2 if comm.rank == 1 else 3], saved)
    comm.Barrier()


@pytest.mark.mpi(ranks=(2, 4))
@NORMS
def test_features_of_two_axes_are_split_along_the_last(comm, kind):
    group = Ranks(comm)
    rng = np.random.default_rng(7)
    w, b = rng.normal(size=(2, 3, 8))
    x, dy = rng.normal(size=(2, 5, 3, 8))
    serial, split = kind(w, b), kind(group.shard(w, -1), group.shard(b, -1), group=group)
    y, saved = serial.forward(x)
    dx, grads = serial.backward(dy, saved)
    my_y, my_saved = split.forward(group.shard(x, -1))
    my_dx, my_grads = split.backward(group.shard(dy, -1), my_saved)
    assert split.shards == {"weight": 1, "bias": 1}
    pairs = [(my_y, y), (my_dx, dx), *((my_grads[name], grads[name]) for name in grads)]
    for mine, whole in pairs:
        np.testing.assert_allclose(mine, group.shard(whole, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.mpi(ranks=2)
@pytest.mark.parametrize(("of_x", "of_dy"), [(-130, -200), (130, 200)])
@NORMS
def test_weight_gradients_of_a_split_row_stay_in_range(comm, kind, of_x, of_dy):
    group = Ranks(comm)
    rng = np.random.default_rng(8)
    x, dy = rng.normal(size=(2, 3, 8)) * [[[10.0**of_x]], [[10.0**of_dy]]]
    serial, split = kind(np.ones(8), eps=0), kind(group.shard(np.ones(8), -1), eps=0, group=group)
    _, grads = serial.backward(dy, serial.forward(x)[1])
    _, my_grads = split.backward(group.shard(dy, -1), split.forward(group.shard(x, -1))[1])
    np.testing.assert_allclose(my_grads["weight"], group.shard(grads["weight"], -1), rtol=1e-12)


@pytest.mark.mpi(ranks=2)
@NORMS
def test_what_is_not_saved_on_one_rank_is_one_error_on_both(comm, kind):
    norm = kind(np.ones(8), group=Ranks(comm))
    x = np.random.default_rng(0).normal(size=(3, 8))
    _, saved = norm.forward(x)
    with pytest.raises(RankError, match=r"rank 1: TypeError: .*backward takes what"):
        norm.backward(x, "nothing" if comm.rank == 1 else saved)
    comm.Barrier()
