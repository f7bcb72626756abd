from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from npnorm import (
    AdaptiveNorm,
    AddRMSNorm,
    Derf,
    DyT,
    GatedRMSNorm,
    L2Norm,
    LayerNorm,
    QKNorm,
    RMSNorm,
    ScaleNorm,
    WeightNorm,
)
from npnorm.group import SOLO
from npnorm.layers import Linear
from npnorm.mpi import RankError, Ranks
from npnorm.norms import centre_outputs, fold, to_rms_norm
from npnorm.tree import leaves
from tests.check import close
from tests.mpi.pmpi import counting

NUMBER = 8
ROWS = 15
X = ((3, 5, 24), -1)


class Split(NamedTuple):
    """A norm on a group: whole shapes with the axes along which they are split, and what is communicated."""

    build: Any  # (group, **params) -> layer
    params: dict[str, tuple[tuple[int, ...], int | None]]
    inputs: list[tuple[tuple[int, ...], int | None]]
    outputs: int  # arrays of the shapes of the first inputs
    forward: dict[str, tuple[int, int]]  # calls and bytes
    backward: dict[str, tuple[int, int]]


def sums(calls, numbers):
    return {"Allreduce": (calls, numbers * NUMBER)} if calls else {}


W, WB = {"weight": ((24,), 0)}, {"weight": ((24,), 0), "bias": ((24,), 0)}
ONE = sums(1, ROWS)
CONDITION = ((3, 24), -1)

SPLITS = {
    "QKNorm per head": Split(
        lambda group, **p: QKNorm(**p, eps=0.1, group=group),
        {"q_weight": ((5,), None), "k_weight": ((5,), None)},
        [((2, 24, 3, 5), 1), ((2, 12, 3, 5), 1)],
        2,
        sums(0, 0),
        sums(1, 2 * 5),
    ),
    "QKNorm over the full width": Split(
        lambda group, **p: QKNorm(**p, eps=0.1, full_width=True, group=group),
        {"q_weight": ((24,), 0), "k_weight": ((12,), 0)},
        [X, ((3, 5, 12), -1)],
        2,
        sums(2, 2 * ROWS),
        sums(2, 2 * ROWS),
    ),
    "GatedRMSNorm, norm first": Split(
        lambda group, **p: GatedRMSNorm(**p, eps=0.1, group=group), W, [X, X], 1, ONE, ONE
    ),
    "GatedRMSNorm, gate first": Split(
        lambda group, **p: GatedRMSNorm(**p, eps=0.1, norm_before_gate=False, group=group), W, [X, X], 1, ONE, ONE
    ),
    "GatedRMSNorm of whole groups": Split(
        lambda group, **p: GatedRMSNorm(**p, eps=0.1, groups=12, group=group), W, [X, X], 1, {}, {}
    ),
    "GatedRMSNorm of whole groups, gate first": Split(
        lambda group, **p: GatedRMSNorm(**p, eps=0.1, groups=12, norm_before_gate=False, group=group),
        W,
        [X, X],
        1,
        {},
        {},
    ),
    "AddRMSNorm": Split(lambda group, **p: AddRMSNorm(**p, eps=0.1, group=group), WB, [X, X], 2, ONE, ONE),
    "AdaptiveNorm of LayerNorm": Split(
        lambda group: AdaptiveNorm(LayerNorm(eps=0.1, group=group)),
        {},
        [X, CONDITION, CONDITION],
        1,
        sums(2, 3 * ROWS),
        sums(1, 2 * ROWS),
    ),
    "AdaptiveNorm of LayerNorm, gathered": Split(
        lambda group: AdaptiveNorm(LayerNorm(eps=0.1, statistics="gathered", group=group)),
        {},
        [X, CONDITION, CONDITION],
        1,
        {"Allgather": (1, 4 * ROWS * NUMBER)},
        sums(1, 2 * ROWS),
    ),
    "AdaptiveNorm of RMSNorm": Split(
        lambda group: AdaptiveNorm(RMSNorm(eps=0.1, group=group)), {}, [X, CONDITION, CONDITION], 1, ONE, ONE
    ),
    "ScaleNorm": Split(
        lambda group, **p: ScaleNorm(**p, eps=0.1, group=group), {"weight": ((), None)}, [X], 1, ONE, ONE
    ),
    "ScaleNorm of short rows": Split(
        lambda group, **p: ScaleNorm(**p, eps=5.0, group=group), {"weight": ((1,), None)}, [X], 1, ONE, ONE
    ),
    "L2Norm": Split(lambda group: L2Norm(group=group), {}, [X], 1, ONE, ONE),
    "WeightNorm, inputs": Split(
        lambda group, **p: WeightNorm(**p, group=group),
        {"weight_g": ((5, 1), None)},
        [((5, 24), 1)],
        1,
        sums(1, 5),
        sums(1, 5),
    ),
    "WeightNorm, input channels": Split(
        lambda group, **p: WeightNorm(**p, group=group),
        {"weight_g": ((5,), None)},
        [((5, 12, 3), 1)],
        1,
        sums(1, 5),
        sums(1, 5),
    ),
    "DyT": Split(lambda group, **p: DyT(**p, group=group), {"alpha": ((1,), None), **WB}, [X], 1, {}, sums(1, 1)),
    "Derf": Split(
        lambda group, **p: Derf(**p, group=group),
        {"alpha": ((1,), None), "shift": ((), None), **WB},
        [X],
        1,
        {},
        sums(1, 2),
    ),
}
EVERY = pytest.mark.parametrize("name", list(SPLITS))


def draw(split, dtype="float64", scale=1.0):
    """Return parameters, inputs and gradients of the outputs: whole, the same on every rank."""
    rng = np.random.default_rng(0)
    params = {name: np.asarray(rng.normal(size=shape)).astype(dtype) for name, (shape, _) in split.params.items()}
    inputs = [(scale * rng.normal(size=shape)).astype(dtype) for shape, _ in split.inputs]
    return params, inputs, [rng.normal(size=a.shape).astype(dtype) for a in inputs[: split.outputs]]


def sharded(split, group, params, inputs, gradients):
    """Return this rank's parts of what `draw` returns."""
    axes = [axis for _, axis in split.inputs]
    return (
        {name: group.shard(a, split.params[name][1]) for name, a in params.items()},
        [group.shard(a, axis) for a, axis in zip(inputs, axes, strict=True)],
        [group.shard(a, axis) for a, axis in zip(gradients, axes, strict=False)],
    )


def as_list(a):
    return list(a) if isinstance(a, tuple) else [a]


def run(layer, inputs, gradients):
    """Return the outputs, the gradients of the inputs, and those of the parameters."""
    y, saved = layer.forward(*inputs)
    dx, grads = layer.backward(*gradients, saved)
    return as_list(y), as_list(dx), dict(leaves(grads))


def pairs(comm, name, dtype="float64", scale=1.0):
    """Return, by name, what came on this rank and the slice of serial."""
    split, group = SPLITS[name], Ranks(comm)
    whole = draw(split, dtype, scale)
    mine = sharded(split, group, *whole)
    layer = split.build(group, **mine[0])
    y, dx, grads = run(layer, *mine[1:])
    serial = run(split.build(SOLO, **whole[0]), *whole[1:])
    axes = [axis for _, axis in split.inputs]
    shards = dict(leaves(layer.shards))
    assert dict(leaves(layer.params)).keys() == shards.keys() == grads.keys() == serial[2].keys()
    assert sorted(map(str, shards.values())) == sorted(str(axis) for _, axis in split.params.values())
    found = {f"y{i}": (a, group.shard(b, axes[i])) for i, (a, b) in enumerate(zip(y, serial[0], strict=True))}
    found |= {f"dx{i}": (a, group.shard(b, axes[i])) for i, (a, b) in enumerate(zip(dx, serial[1], strict=True))}
    return found | {name: (grads[name], group.shard(serial[2][name], shards[name])) for name in grads}


@pytest.mark.mpi
@EVERY
def test_float64_is_the_slice_of_serial(comm, name):
    for mine, serial in pairs(comm, name).values():
        close(mine, serial)


@pytest.mark.mpi(ranks=(2, 3, 4))
@EVERY
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_narrow_types_are_the_very_bits_of_serial(comm, name, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    for what, (mine, serial) in pairs(comm, name, dtype).items():
        assert mine.dtype == dtype
        np.testing.assert_array_equal(mine, serial, err_msg=what)


@pytest.mark.mpi(ranks=(2, 3))
@pytest.mark.parametrize("name", ["QKNorm over the full width", "AddRMSNorm", "WeightNorm, inputs", "L2Norm"])
@pytest.mark.parametrize("scale", [1e-250, 1e250])
def test_the_whole_range_of_float64(comm, name, scale):
    for mine, serial in pairs(comm, name, scale=scale).values():
        assert np.all(np.isfinite(serial))
        close(mine, serial)


@pytest.mark.mpi(ranks=(1, 2, 3, 4), counted=True)
@EVERY
def test_messages_counted_by_mpi(comm, name):
    split, group = SPLITS[name], Ranks(comm, check=False)
    params, inputs, gradients = sharded(split, group, *draw(split, "float32"))
    layer = split.build(group, **params)
    with counting() as calls:
        _, saved = layer.forward(*inputs)
    assert calls == split.forward
    with counting() as calls:
        layer.backward(*gradients, saved)
    assert calls == split.backward


@pytest.mark.mpi(ranks=(2, 3, 4))
def test_the_gradients_of_replicated_weights_are_the_same_bits_on_every_rank(comm):
    for name in ("QKNorm per head", "ScaleNorm", "WeightNorm, inputs", "DyT", "Derf"):
        split, group = SPLITS[name], Ranks(comm)
        params, inputs, gradients = sharded(split, group, *draw(split))
        layer = split.build(group, **params)
        _, _, grads = run(layer, inputs, gradients)
        for path, axis in leaves(layer.shards):
            if axis is None:
                assert len(set(comm.allgather(grads[path].tobytes()))) == 1, (name, path)


@pytest.mark.mpi(ranks=(2, 3, 4))
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm])
@pytest.mark.parametrize("names", [(), ("weight",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("biased", [False, True], ids=["linear without bias", "linear with bias"])
def test_a_norm_folded_into_a_row_split_is_the_slice_of_serial(comm, kind, names, biased):
    group, rng = Ranks(comm), np.random.default_rng(1)
    params = {name: rng.normal(size=24) for name in names}
    matrix, c = rng.normal(size=(5, 24)), rng.normal(size=5) if biased else None
    x, dy = rng.normal(size=(3, 4, 24)), rng.normal(size=(3, 4, 5))
    norm, linear = kind(**params, eps=0.3), Linear(matrix, c)
    z, saved = norm.forward(x)
    y, saved_linear = linear.forward(z)
    dx, _ = norm.backward(linear.backward(dy, saved_linear)[0], saved)

    mine = kind(**{name: group.shard(a, 0) for name, a in params.items()}, eps=0.3, group=group)
    bare, folded = fold(mine, Linear(group.shard(matrix, 1), c, group=group))
    assert bare.params == {}
    _, serial = fold(norm, linear)
    assert folded.params.keys() == serial.params.keys()
    for name, axis in folded.shards.items():
        close(folded.params[name], group.shard(serial.params[name], axis))
    z, saved = bare.forward(group.shard(x, -1))
    my_y, saved_linear = folded.forward(z)
    my_dx, _ = bare.backward(folded.backward(dy, saved_linear)[0], saved)
    close(my_y, y)
    close(my_dx, group.shard(dx, -1))


@pytest.mark.mpi(ranks=(2, 3, 4))
def test_a_norm_folded_into_a_column_split_is_the_slice_of_serial(comm):
    group, rng = Ranks(comm), np.random.default_rng(2)
    norm = RMSNorm(rng.normal(size=7), rng.normal(size=7))
    matrix, c = rng.normal(size=(12, 7)), rng.normal(size=12)
    _, serial = fold(norm, Linear(matrix, c))
    _, mine = fold(norm, Linear(group.shard(matrix, 0), group.shard(c, 0)))
    for name in ("weight", "bias"):
        close(mine.params[name], group.shard(serial.params[name], 0))


@pytest.mark.mpi(ranks=(2, 4), counted=True)
@pytest.mark.parametrize("names", [("weight",), ("weight", "bias")], ids="+".join)
def test_only_a_bias_makes_folding_into_a_row_split_send(comm, names):
    group = Ranks(comm, check=False)
    norm = LayerNorm(**{name: np.ones(6) for name in names}, group=group)
    linear = Linear(np.ones((5, 6)), group=group)
    compared = group.calls["check"]
    with counting() as calls:
        fold(norm, linear)
    compared = group.calls["check"] - compared  # the settings of the two new layers
    of_bias = int("bias" in names)
    assert calls == {"Allreduce": (compared + of_bias, 16 * compared + 5 * NUMBER * of_bias)}


@pytest.mark.mpi(ranks=(2, 3, 4), counted=True)
def test_the_rms_norm_of_a_layer_norm_sends_half_as_often(comm):
    group, rng = Ranks(comm, check=False), np.random.default_rng(3)
    writer = centre_outputs({"weight": rng.normal(size=(24, 5))})["weight"]
    x = group.shard(rng.normal(size=(3, 5, 5)) @ writer.T, -1)
    norm = LayerNorm(group.shard(rng.normal(size=24), 0), group=group)
    other = to_rms_norm(norm)
    expected, _ = norm.forward(x)
    with counting() as calls:
        y, _ = other.forward(x)
    assert calls == sums(1, ROWS)
    close(y, expected)


BAD = {  # on the rank for which `bad` is true
    "gate": lambda g, bad: GatedRMSNorm(group=g).forward(np.ones((2, 6)), np.ones((3 if bad else 2, 6))),
    "residual": lambda g, bad: AddRMSNorm(group=g).forward(np.ones((2, 6)), np.ones((2, 5 if bad else 6))),
    "scale": lambda g, bad: AdaptiveNorm(RMSNorm(group=g)).forward(
        np.ones((2, 6)), np.ones((1 if bad else 2, 6)), np.ones((2, 6))
    ),
    "k has": lambda g, bad: QKNorm(np.ones(6), np.ones(6), group=g).forward(
        np.ones((2, 6)), np.ones((2, 5 if bad else 6))
    ),
    "weight_v": lambda g, bad: WeightNorm(np.ones(3), group=g).forward(np.ones((4 if bad else 3, 6))),
    "x is int64": lambda g, bad: ScaleNorm(group=g).forward(np.ones((2, 6), int if bad else float)),
    "DyT needs": lambda g, bad: DyT(np.array(0.5), group=g).forward(np.ones((2, 0 if bad else 6))),
    "offset=1": lambda g, bad: QKNorm(np.ones(6), np.ones(6), offset=int(bad), group=g),
    "groups=4": lambda g, bad: GatedRMSNorm(np.ones(12), groups=4 if bad else 2, group=g),
    "cast=llama": lambda g, bad: AddRMSNorm(np.ones(12), cast="llama" if bad else None, group=g),
}


@pytest.mark.mpi(ranks=2)
@pytest.mark.parametrize("problem", list(BAD))
def test_a_problem_of_one_rank_is_one_error_on_both(comm, problem):
    group = Ranks(comm)

    def provoke():
        BAD[problem](group, comm.rank == 1)
        group.sum(np.ones(1))  # a layer that sends nothing tells it with the next message

    with pytest.raises(RankError, match=problem) as error:
        provoke()
    assert len(set(comm.allgather(str(error.value)))) == 1


@pytest.mark.mpi(ranks=(2, 3))
def test_ranks_that_do_not_divide_the_groups_are_refused(comm):
    group, message = Ranks(comm), rf"GatedRMSNorm: {comm.size} ranks cannot share 5 groups\. The ranks must divide them"
    with pytest.raises(ValueError, match=message):
        GatedRMSNorm(np.ones(10), groups=5, group=group)


@pytest.mark.mpi(ranks=2)
def test_a_group_is_counted_over_all_ranks(comm):
    """Two groups of four features of which each rank holds one: not two groups of two."""
    group = Ranks(comm)
    x = np.array([[1.0, 1.0, 7.0, 7.0, 5.0, 5.0, -5.0, -5.0]])
    mine = group.shard(x, -1)
    y, _ = GatedRMSNorm(eps=39, groups=2, group=group).forward(mine, np.full_like(mine, 64.0))
    np.testing.assert_array_equal(y, 8 * mine)


def test_every_norm_with_messages_of_its_own_is_here():
    kinds = {AdaptiveNorm, AddRMSNorm, Derf, DyT, GatedRMSNorm, L2Norm, QKNorm, ScaleNorm, WeightNorm}
    assert {kind.__name__ for kind in kinds} == {name.split()[0].rstrip(",") for name in SPLITS}


@pytest.mark.mpi(ranks=2)
@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm, L2Norm])
def test_a_row_of_zeros_costs_no_other_message(comm, kind):
    group = Ranks(comm)
    x = np.random.default_rng(0).standard_normal((3, 4))
    kind(group=group).forward(x)
    expected = dict(group.calls)
    x[1] = 0
    other = Ranks(comm)
    kind(group=other).forward(x)
    assert dict(other.calls) == expected


@pytest.mark.mpi(ranks=2)
def test_shards_say_what_is_split(comm):
    group, ones = Ranks(comm), np.ones((3, 4))
    assert DyT(np.array(0.5), ones, ones, group=group).shards == {"alpha": None, "weight": 1, "bias": 1}
    assert DyT(np.array(0.5), ones[0], group=group).shards == {"alpha": None, "weight": 0}
    assert DyT(np.array(0.5), ones[0]).shards == {"alpha": None, "weight": None}
