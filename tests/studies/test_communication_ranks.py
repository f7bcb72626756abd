"""The ranks' side of the study: this file imports no pictures and no statistics, since each rank loads it."""

import numpy as np
import pytest

from npnorm.config import Config, init
from npnorm.group import SOLO
from npnorm.mpi import Ranks
from npnorm.studies.communication_ranks import (
    MESSAGES,
    Held,
    block_of,
    counts,
    error,
    interleaved,
    norm_of,
    part,
    send,
)
from npnorm.tree import leaves, map_tree, shard
from tests.mpi.pmpi import counting

ROWS, WIDTH, HEADS = (3, 5), 24, 4
EACH = pytest.mark.parametrize("form", MESSAGES)


def arrays(dtype="float64"):
    """Return x, dy and the parameters of a block: whole, the same on every rank."""
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, *ROWS, WIDTH)).astype(dtype)
    params = init(Config(1, width=WIDTH, depth=1, heads=HEADS, mlp="gelu"), rng, dtype)["blocks"]["0"]
    return x, dy, map_tree(lambda a: a + (0.3 * rng.standard_normal(a.shape)).astype(dtype), params)


@pytest.mark.mpi(ranks=(2, 4))
@EACH
def test_a_block_is_the_slice_of_a_serial_one(comm, form):
    x, dy, params = arrays()
    group = Ranks(comm)
    kind = "RMSNorm" if form == "RMSNorm" else "replicated"
    serial, block = block_of(kind, params, HEADS, SOLO), block_of(form, params, HEADS, group)
    y, saved = serial.forward(x)
    dx, grads = serial.backward(dy, saved)
    my_y, my_saved = block.forward(part(form, x, group))
    my_dx, my_grads = block.backward(part(form, dy, group), my_saved)
    near = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(my_y, part(form, y, group), **near)
    np.testing.assert_allclose(my_dx, part(form, dx, group), **near)
    if kind == "replicated" and form != kind:  # the serial block has no `Whole` around its sub-layers
        grads = {name: g | {"sublayer": {"sublayer": g["sublayer"]}} for name, g in grads.items()}
    for (name, mine), (_, whole) in zip(leaves(my_grads), leaves(shard(grads, block.shards, group)), strict=True):
        np.testing.assert_allclose(mine, whole, **near, err_msg=name)


@pytest.mark.mpi(ranks=(2, 4), counted=True)
@EACH
@pytest.mark.parametrize("what", ["norm", "block"])
def test_counts_are_those_of_mpi(comm, form, what):
    x, dy, params = arrays("float32")
    group = Ranks(comm)
    norm = norm_of(form, params["mlp"]["norm"]["weight"], group)
    layer = norm if what == "norm" else block_of(form, params, HEADS, group)
    held = Held(layer, part(form, x, group), part(form, dy, group))
    with counting() as calls:
        found = counts(group, held, what)
    both = np.add(found[f"{what} forward"], found[f"{what} backward"])
    sent, volume, checks = map(int, both)
    assert checks == sent
    total = np.sum([(0, 0), *calls.values()], axis=0)
    assert total.tolist() == [sent + checks, volume + 16 * checks]


@pytest.mark.mpi(ranks=(2, 4))
@EACH
def test_messages_alone_are_those_of_the_norm(comm, form):
    x, dy, params = arrays("float32")
    group = Ranks(comm)
    held = Held(norm_of(form, params["mlp"]["norm"]["weight"], group), part(form, x, group), part(form, dy, group))
    group.calls.clear(), group.bytes.clear()
    held.forward()
    calls, volume = group.calls.copy(), group.bytes.copy()
    group.calls.clear(), group.bytes.clear()
    send(form, int(np.prod(ROWS)), group)
    assert (group.calls, group.bytes) == (calls, volume)


@pytest.mark.mpi(ranks=2)
def test_what_the_packed_form_refuses_is_no_number_and_leaves_nobody_behind(comm):
    group, rng = Ranks(comm), np.random.default_rng(0)
    assert np.isnan(error("packed", WIDTH, 1e5, rng, group))
    assert error("packed", WIDTH, 0.0, rng, group) < 1e-14


def test_calls_take_turns_and_their_medians_are_compared_with_the_first(monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def call(name, seconds):
        order.append(name)
        now[0] += seconds * (100 if len(order) == 7 else 1)  # one outlier among the rounds

    calls = {"a": lambda: call("a", 1.0), "b": lambda: call("b", 3.0)}
    assert interleaved(SOLO, calls, seconds=0, least=3) == {"a": (1.0, 1.0), "b": (3.0, 3.0)}
    assert "".join(order) == "abab" + "abbaab"
