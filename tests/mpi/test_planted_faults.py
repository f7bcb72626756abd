"""Bugs of split layers, planted: the comparison with serial must see each of them."""

import numpy as np
import pytest

from npnorm import SOLO, LayerNorm
from npnorm.config import Config
from npnorm.engine import Row
from npnorm.layers import MLP, Attention, Linear
from npnorm.layers.linear import Saved
from npnorm.mpi import Ranks
from npnorm.training import global_norm
from npnorm.transformer import Transformer
from npnorm.tree import map_tree
from tests.mpi.test_norms import arrays
from tests.mpi.test_transformer import SIZES, assert_slices, loss_and_grads, problem

CONFIG = Config.original(24, **SIZES)


def compare_with_serial(comm):
    """Raise AssertionError unless loss and gradients are those of serial."""
    group = Ranks(comm)
    params, ids, targets = problem(CONFIG)
    _, loss, grads = loss_and_grads(Transformer(CONFIG, params), ids, targets)
    model = Transformer(CONFIG, params, group=group)
    _, my_loss, my_grads = loss_and_grads(model, ids, targets)
    np.testing.assert_allclose(my_loss, loss, rtol=1e-12)
    assert_slices(my_grads, grads, model.shards, group)


def without_sum(layer):
    """Return the layer's backward with its group's sum left out: the f of a column and row pair."""
    backward = layer.backward

    def faulty(self, dy, saved):
        group, self.group = self.group, SOLO
        try:
            return backward(self, dy, saved)
        finally:
            self.group = group

    return faulty


@pytest.mark.mpi(ranks=2)
def test_the_healthy_model_passes(comm):
    compare_with_serial(comm)


@pytest.mark.mpi(ranks=2)
@pytest.mark.parametrize("layer", [MLP, Attention, Transformer], ids=lambda layer: layer.__name__)
def test_a_backward_without_its_sum_is_seen(comm, layer):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "backward", without_sum(layer))
        with pytest.raises(AssertionError):
            compare_with_serial(comm)
    comm.Barrier()


@pytest.mark.mpi(ranks=2)
def test_a_bias_added_before_the_sum_is_seen(comm):
    def faulty(self, x):
        y = x @ self.params["weight"].T
        return self.group.sum(y + self.params["bias"] if "bias" in self.params else y), Saved(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Linear, "forward", faulty)
        with pytest.raises(AssertionError):
            compare_with_serial(comm)
    comm.Barrier()


@pytest.mark.mpi(ranks=2)
def test_a_mean_over_the_shard_only_is_seen(comm):
    def faulty(self, *arrays):
        means = tuple(np.mean(a, axis=-1, keepdims=True) for a in arrays)
        return means[0] if len(means) == 1 else means

    x, _, weight, bias = arrays()
    group = Ranks(comm)
    y, _ = LayerNorm(weight, bias).forward(x)
    split = LayerNorm(group.shard(weight, -1), group.shard(bias, -1), group=group)
    np.testing.assert_allclose(split.forward(group.shard(x, -1))[0], group.shard(y, -1), rtol=1e-12, atol=1e-12)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Row, "mean", faulty)
        mine, _ = split.forward(group.shard(x, -1))
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(mine, group.shard(y, -1), rtol=1e-12, atol=1e-12)


@pytest.mark.mpi(ranks=2)
@pytest.mark.parametrize("shards", ["all replicated", "all sharded"])
def test_a_gradient_norm_that_counts_wrongly_is_seen(comm, shards):
    group = Ranks(comm)
    params, ids, targets = problem(CONFIG)
    serial, model = Transformer(CONFIG, params), Transformer(CONFIG, params, group=group)
    _, _, grads = loss_and_grads(serial, ids, targets)
    _, _, my_grads = loss_and_grads(model, ids, targets)
    norm = global_norm(grads, serial.shards)
    assert global_norm(my_grads, model.shards, group) == pytest.approx(norm, rel=1e-12)
    wrong = map_tree(lambda _: None if shards == "all replicated" else 0, model.params)
    assert global_norm(my_grads, wrong, group) != pytest.approx(norm, rel=1e-3)
