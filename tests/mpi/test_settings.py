"""Ranks that build different layers: one error on all of them, in the constructor."""

import numpy as np
import pytest

from npnorm import BatchNorm, Derf, DyT, GatedRMSNorm, L2Norm, LayerNorm, QKNorm, RMSNorm, ScaleNorm, WeightNorm
from npnorm.checks import require_same_settings
from npnorm.layers import MLP, Attention, Embedding, Linear, Rotary
from npnorm.mpi import RankError, Ranks
from tests.mpi.pmpi import counting

ONE = np.ones(4)
TWO = np.array([1.0, 1.0, 1.0, np.nextafter(1.0, 2.0)])


def attention(heads=2, kv_heads=None, base=10000.0):
    square = {"weight": np.eye(8)}
    params = {name: square for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    return lambda group: Attention(params, heads, kv_heads, Rotary(base), group=group)


DIFFERENT = {  # what most ranks build, and what the last one does
    "BatchNorm: eps": (lambda g: BatchNorm(ONE, group=g), lambda g: BatchNorm(ONE, eps=1e-3, group=g)),
    "BatchNorm: momentum": (lambda g: BatchNorm(ONE, group=g), lambda g: BatchNorm(ONE, momentum=0.5, group=g)),
    "BatchNorm: batches": (lambda g: BatchNorm(ONE, group=g), lambda g: BatchNorm(ONE, batches=3, group=g)),
    "BatchNorm: weight": (lambda g: BatchNorm(ONE, group=g), lambda g: BatchNorm(TWO, group=g)),
    "BatchNorm: running": (
        lambda g: BatchNorm(running_mean=ONE, running_var=ONE, group=g),
        lambda g: BatchNorm(running_mean=ONE, running_var=TWO, group=g),
    ),
    "LayerNorm: axes": (lambda g: LayerNorm(group=g), lambda g: LayerNorm(axes=2, group=g)),
    "LayerNorm: statistics": (lambda g: LayerNorm(group=g), lambda g: LayerNorm(statistics="packed", group=g)),
    "RMSNorm: compute": (lambda g: RMSNorm(group=g), lambda g: RMSNorm(compute="float32", group=g)),
    "GatedRMSNorm: order": (lambda g: GatedRMSNorm(group=g), lambda g: GatedRMSNorm(norm_before_gate=False, group=g)),
    "QKNorm: weight": (lambda g: QKNorm(ONE, ONE, group=g), lambda g: QKNorm(ONE, TWO, group=g)),
    "ScaleNorm: weight": (lambda g: ScaleNorm(ONE[:1], group=g), lambda g: ScaleNorm(TWO[3:], group=g)),
    "L2Norm: axes": (lambda g: L2Norm(group=g), lambda g: L2Norm(axes=2, group=g)),
    "WeightNorm: weight_g": (lambda g: WeightNorm(ONE, group=g), lambda g: WeightNorm(TWO, group=g)),
    "DyT: alpha": (lambda g: DyT(ONE[0], group=g), lambda g: DyT(TWO[3], group=g)),
    "Derf: shift": (lambda g: Derf(ONE[0], ONE[0], group=g), lambda g: Derf(ONE[0], TWO[3], group=g)),
    "Linear: bias": (
        lambda g: Linear(np.ones((4, 3)), ONE, group=g),
        lambda g: Linear(np.ones((4, 3)), TWO, group=g),
    ),
    "Linear: shape": (lambda g: Linear(np.ones((4, 3)), group=g), lambda g: Linear(np.ones((4, 2)), group=g)),
    "Embedding: dtype": (
        lambda g: Embedding(np.ones((4, 3)), group=g),
        lambda g: Embedding(np.ones((4, 3), "float32"), group=g),
    ),
    "Attention: heads": (attention(), attention(heads=4)),
    "Attention: kv_heads": (attention(4), attention(4, 2)),
    "Attention: base": (attention(), attention(base=500.0)),
    "MLP: shape": (
        lambda g: MLP({"up_proj": {"weight": np.ones((4, 6))}, "down_proj": {"weight": np.ones((6, 4))}}, group=g),
        lambda g: MLP({"up_proj": {"weight": np.ones((6, 4))}, "down_proj": {"weight": np.ones((4, 6))}}, group=g),
    ),
}


@pytest.mark.mpi(ranks=2)
@pytest.mark.parametrize("name", DIFFERENT)
def test_another_setting_or_replicated_array_on_one_rank_is_one_error_on_all(comm, name):
    usual, other = DIFFERENT[name]
    with pytest.raises(RankError, match=rf"rank 0: {name.partition(':')[0]} (with|of) ") as error:
        (other if comm.rank == 1 else usual)(Ranks(comm))
    assert len(set(comm.allgather(str(error.value)))) == 1
    usual(Ranks(comm))  # nobody is left behind


@pytest.mark.mpi(ranks=(2, 3))
def test_shards_may_differ_and_replicated_arrays_may_not(comm):
    group, params = Ranks(comm), {"weight": ONE + comm.rank, "bias": ONE}
    require_same_settings("Layer", group, params, replicated=["bias"])
    with pytest.raises(RankError, match=r"rank 1: Layer with weight \(4,\) float64, checksum [0-9a-f]{8}, bias \(4,\)"):
        require_same_settings("Layer", group, params, replicated=["weight"])


@pytest.mark.mpi(ranks=2, counted=True)
def test_settings_are_compared_in_one_message(comm):
    group = Ranks(comm)
    with counting() as calls:
        BatchNorm(ONE, ONE, momentum=0.3, group=group)
    assert calls == {"Allreduce": (1, 16)}
