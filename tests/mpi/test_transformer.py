import array_api_strict as strict
import numpy as np
import pytest

from npnorm import PartialRMSNorm
from npnorm.arrays import to_numpy
from npnorm.config import Config, init
from npnorm.layers import MLP, CrossEntropy, Embedding, Linear, SiLU
from npnorm.mpi import RankError, Ranks
from npnorm.training import AdamW, Recipe, clip, evaluate, generate, global_norm, train
from npnorm.transformer import Transformer
from npnorm.tree import leaves, map_tree, shard
from tests.mpi.pmpi import counting

SIZES = {"width": 24, "depth": 2, "heads": 12, "hidden": 36, "context": 10}
CONFIGS = {
    "original": Config.original(24, **SIZES),
    "modern": Config.modern(24, **SIZES),
    "pre-layer norm, biases": Config.original(24, placement="pre", tied=False, **SIZES),
    "post-rms norm, gated": Config.modern(24, placement="post", tied=True, bias=True, **SIZES),
}
MLP_PARAMS = {"up_proj": {"weight": np.ones((4, 2))}, "down_proj": {"weight": np.ones((2, 4))}}
EVERY_CONFIG = pytest.mark.parametrize("name", list(CONFIGS))


def problem(config):
    """Return whole parameters away from their first values, ids and targets: the same on every rank."""
    rng = np.random.default_rng(0)
    params = map_tree(lambda a: a + 0.2 * rng.normal(size=a.shape), init(config, rng, "float64"))
    return params, *rng.integers(0, config.vocabulary, (2, 3, 7))


def loss_and_grads(model, ids, targets):
    """Return logits, loss and gradients."""
    loss_layer = CrossEntropy(group=model.group)
    logits, saved = model.forward(ids)
    loss, saved_loss = loss_layer.forward(logits, targets)
    _, grads = model.backward(loss_layer.backward(1.0, saved_loss), saved)
    return logits, loss, grads


def assert_slices(mine, whole, shards, group, tolerance=1e-12):
    """Compare a tree with the slices of the serial one, each array relative to its own largest element.

    Some gradients are exactly 0 but for rounding (a bias of keys shifts all scores of a query alike): those are held
    against the rounding of the largest array.
    """
    floor = 1e-15 * max(np.max(np.abs(a)) for _, a in leaves(whole))
    for (name, a), (path, b) in zip(leaves(mine), leaves(shard(whole, shards, group)), strict=True):
        assert name == path
        a, b = to_numpy(a), to_numpy(b)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)) + floor, err_msg=name)


@pytest.mark.mpi
@EVERY_CONFIG
def test_logits_loss_and_gradients_are_the_slices_of_serial(comm, name):
    config, group = CONFIGS[name], Ranks(comm)
    params, ids, targets = problem(config)
    logits, loss, grads = loss_and_grads(Transformer(config, params), ids, targets)
    model = Transformer(config, params, group=group)
    my_logits, my_loss, my_grads = loss_and_grads(model, ids, targets)
    np.testing.assert_allclose(my_logits, group.shard(logits, -1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(my_loss, loss, rtol=1e-12)
    assert_slices(my_grads, grads, model.shards, group)


@pytest.mark.mpi(ranks=(2, 3))
def test_grouped_queries_are_the_slices_of_serial(comm):
    config, group = Config.modern(24, kv_heads=6, **SIZES), Ranks(comm)
    params, ids, targets = problem(config)
    _, loss, grads = loss_and_grads(Transformer(config, params), ids, targets)
    model = Transformer(config, params, group=group)
    _, my_loss, my_grads = loss_and_grads(model, ids, targets)
    np.testing.assert_allclose(my_loss, loss, rtol=1e-12)
    assert_slices(my_grads, grads, model.shards, group)


@pytest.mark.mpi(ranks=2)
@pytest.mark.parametrize(
    "settings",
    [
        {"placement": "none", "positions": "none"},
        {"placement": "res-post", "causal": False},
        {"placement": "sandwich", "mlp": "gelu"},
        {"placement": "deep", "mlp": "relu"},
    ],
    ids=str,
)
def test_each_placement_is_the_slices_of_serial(comm, settings):
    config, group = Config.modern(24, **(SIZES | {"depth": 1} | settings)), Ranks(comm)
    params, ids, targets = problem(config)
    logits, loss, grads = loss_and_grads(Transformer(config, params), ids, targets)
    model = Transformer(config, params, group=group)
    my_logits, my_loss, my_grads = loss_and_grads(model, ids, targets)
    np.testing.assert_allclose(my_logits, group.shard(logits, -1), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(my_loss, loss, rtol=1e-12)
    assert_slices(my_grads, grads, model.shards, group)


@pytest.mark.mpi(ranks=2)
def test_norms_made_by_a_function_are_replicated(comm):
    config, group = Config.modern(24, **SIZES), Ranks(comm)
    params, ids, targets = problem(config)

    def norm(params):
        return PartialRMSNorm(**params, p=0.25)

    _, loss, grads = loss_and_grads(Transformer(config, params, norm=norm), ids, targets)
    model = Transformer(config, params, group=group, norm=norm)
    _, my_loss, my_grads = loss_and_grads(model, ids, targets)
    np.testing.assert_allclose(my_loss, loss, rtol=1e-12)
    assert_slices(my_grads, grads, model.shards, group)


@pytest.mark.mpi(ranks=2)
def test_a_norm_that_one_rank_cannot_make_is_an_error_on_both(comm):
    config = Config.modern(24, **SIZES)
    with pytest.raises(RankError, match=r"rank 1: ValueError: PartialRMSNorm"):
        Transformer(
            config,
            problem(config)[0],
            group=Ranks(comm),
            norm=lambda params: PartialRMSNorm(**params, p=0.5 - comm.rank),
        )
    comm.Barrier()


@pytest.mark.mpi(ranks=(2, 3))
@pytest.mark.parametrize("name", ["original", "modern"])
def test_another_device(comm, name):
    config, group = CONFIGS[name], Ranks(comm)
    device = strict.Device("device1")
    params, ids, targets = problem(config)
    _, loss, grads = loss_and_grads(Transformer(config, params), ids, targets)
    there = map_tree(lambda a: strict.asarray(a, device=device), params)
    model = Transformer(config, there, group=group)
    _, my_loss, my_grads = loss_and_grads(model, *(strict.asarray(a, device=device) for a in (ids, targets)))
    assert my_loss.device == device
    np.testing.assert_allclose(float(to_numpy(my_loss)), loss, rtol=1e-12)
    assert_slices(my_grads, grads, model.shards, group)


@pytest.mark.mpi(ranks=(1, 4), counted=True)
@pytest.mark.parametrize("name", ["original", "modern"])
def test_messages_counted_by_mpi(comm, name):
    """One sum each way for each of the 2 x 2 sub-layers; one for the embedding forward, one for the head backward."""
    config, group = CONFIGS[name], Ranks(comm, check=False)
    params, ids, targets = problem(config)
    model, loss_layer = Transformer(config, params, group=group), CrossEntropy(group=group)
    activations, rows = 8 * ids.size * config.width, 8 * ids.size
    checks = int(comm.size > 1)  # ids and targets are compared in any case
    with counting() as calls:
        logits, saved = model.forward(ids)
    assert calls == {"Allreduce": (5 + checks, 5 * activations + 16 * checks)}
    with counting() as calls:
        _, saved_loss = loss_layer.forward(logits, targets)
    assert calls == {"Allgather": (1, rows), "Allreduce": (1 + checks, 2 * rows + 16 * checks)}
    with counting() as calls:
        model.backward(loss_layer.backward(1.0, saved_loss), saved)
    assert calls == {"Allreduce": (5, 5 * activations)}


@pytest.mark.mpi
@pytest.mark.parametrize("name", ["original", "modern"])
def test_clipped_steps_of_adamw_are_the_slices_of_serial(comm, name):
    config, group = CONFIGS[name], Ranks(comm)
    params, ids, targets = problem(config)
    serial, split = Transformer(config, params), Transformer(config, params, group=group)
    optimizers = AdamW(serial.params), AdamW(split.params)
    for _ in range(3):
        norms = []
        for model, optimizer in zip((serial, split), optimizers, strict=True):
            _, _, grads = loss_and_grads(model, ids, targets)
            norms.append(global_norm(grads, model.shards, model.group))
            optimizer.step(clip(grads, norms[-1], 0.1), lr=0.01)
        assert norms[0] > 0.1
        assert norms[1] == pytest.approx(norms[0], rel=1e-11)
    assert_slices(split.params, serial.params, split.shards, group, tolerance=1e-9)  # Adam divides by small gradients


@pytest.mark.mpi(ranks=(2, 4))
def test_training_evaluation_and_sample_are_those_of_serial(comm):
    config, text = CONFIGS["modern"], np.random.default_rng(0).integers(0, 20, 500)
    recipe = Recipe(steps=5, rows=4, length=10)
    results = []
    for model in (
        Transformer(config, init(config, np.random.default_rng(1), "float64")),
        Transformer(config, init(config, np.random.default_rng(1), "float64"), group=Ranks(comm)),
    ):
        losses = [step.loss for step in train(model, text, recipe, np.random.default_rng(2))]
        sample = generate(model, text[:3], 12, 20, np.random.default_rng(3))
        results.append((losses, evaluate(model, text, 4, 10), sample))
    (losses, loss, sample), (my_losses, my_loss, my_sample) = results
    np.testing.assert_allclose(my_losses, losses, rtol=1e-9)
    assert my_loss == pytest.approx(loss, rel=1e-9)
    np.testing.assert_array_equal(my_sample, sample)


@pytest.mark.mpi(ranks=4)
@pytest.mark.parametrize(
    ("sizes", "what"),
    [
        ({"heads": 6}, "4 ranks cannot share 6 heads equally"),
        ({"kv_heads": 2}, "4 ranks cannot share 2 heads of keys and values equally"),
        ({"hidden": 30}, "4 ranks cannot share 30 hidden features equally"),
        ({"vocabulary": 22}, "4 ranks cannot share a vocabulary of 22 equally"),
    ],
)
def test_sizes_that_the_ranks_do_not_divide_are_one_error_on_all(comm, sizes, what):
    config = Config.modern(**({"vocabulary": 24} | SIZES | sizes))
    params = init(config, np.random.default_rng(0))
    with pytest.raises(ValueError, match=what):
        Transformer(config, params, group=Ranks(comm))
    comm.Barrier()


@pytest.mark.mpi(ranks=2)
def test_other_ids_on_one_rank_are_an_error_on_both(comm):
    config = CONFIGS["modern"]
    params, ids, _ = problem(config)
    model = Transformer(config, params, group=Ranks(comm))
    ids[0, 0] = comm.rank
    with pytest.raises(RankError, match="Embedding with integers below 24 of shape"):
        model.forward(ids)
    comm.Barrier()


@pytest.mark.mpi(ranks=2)
def test_ids_that_are_too_long_on_one_rank_are_an_error_on_both(comm):
    config = CONFIGS["modern"]
    model = Transformer(config, problem(config)[0], group=Ranks(comm))
    with pytest.raises(RankError, match=r"rank 1: ValueError: Transformer takes ids"):
        model.forward(np.zeros((1, 11 if comm.rank == 1 else 10), int))
    comm.Barrier()


@pytest.mark.mpi(ranks=2)
@pytest.mark.parametrize("last", [False, True])
def test_an_id_that_differs_anywhere_is_an_error_on_both(comm, last):
    params, ids, targets = problem(CONFIGS["modern"])
    group = Ranks(comm)
    model = Transformer(CONFIGS["modern"], params, group=group)
    logits, _ = model.forward(ids)
    targets[(-1, -1) if last else (0, 0)] = comm.rank
    with pytest.raises(RankError, match="CrossEntropy with integers below 24"):
        CrossEntropy(group=group).forward(logits, targets)
    comm.Barrier()


MISFITS = {
    "logits": lambda group, rank: CrossEntropy(group=group).forward(np.ones((2, 3 + rank)), np.zeros(2, int)),
    "table": lambda group, rank: Embedding(np.ones((3 + rank, 2)), group=group),
    "bias": lambda group, rank: Linear(np.ones((2, 3)), None if rank else np.ones(2), group=group),
    "weights": lambda group, rank: MLP(MLP_PARAMS | {"up_proj": {"weight": np.ones((4, 2)) + rank}}, group=group),
    "dtype": lambda group, rank: MLP(MLP_PARAMS, group=group).forward(np.ones((3, 2), f"float{64 // (1 + rank)}")),
    "activation": lambda group, rank: MLP(MLP_PARAMS, activation=SiLU() if rank else None, group=group),
    "names": lambda group, rank: MLP({"up_proj": MLP_PARAMS["up_proj"]} if rank else MLP_PARAMS, group=group),
}


@pytest.mark.mpi(ranks=2)
@pytest.mark.parametrize("misfit", list(MISFITS))
def test_parts_that_do_not_fit_together_are_one_error_on_both(comm, misfit):
    with pytest.raises(RankError):
        MISFITS[misfit](Ranks(comm), comm.rank)
    comm.Barrier()


@pytest.mark.mpi(ranks=2)
def test_the_line_of_a_model_counts_the_parameters_of_all_ranks(comm):
    config, group = CONFIGS["original"], Ranks(comm)
    params, _, _ = problem(config)
    assert repr(Transformer(config, params, group=group)) == repr(Transformer(config, params))
    assert repr(Linear(np.ones((3, 2)), group=group)) == (
        f"Linear(weight=(3, 2) float64, group=Ranks(rank={comm.rank}, size=2))"
    )


@pytest.mark.mpi(ranks=2)
def test_parameters_of_another_seed_on_one_rank_are_an_error_on_both(comm):
    config = CONFIGS["original"]
    with pytest.raises(RankError, match="Transformer of whole arrays, checksum"):
        Transformer(config, init(config, np.random.default_rng(comm.rank)), group=Ranks(comm))
    comm.Barrier()


@pytest.mark.mpi(ranks=2)
def test_wrong_gradients_of_the_logits_on_one_rank_are_an_error_on_both(comm):
    config, group = CONFIGS["original"], Ranks(comm)
    params, ids, _ = problem(config)
    model = Transformer(config, params, group=group)
    logits, saved = model.forward(ids)
    with pytest.raises(RankError, match=r"rank 1: ValueError: Linear\.backward"):
        model.backward(logits[..., :-1] if comm.rank == 1 else logits, saved)
    comm.Barrier()


@pytest.mark.mpi(ranks=2)
def test_a_nan_in_a_row_of_the_table_stays_in_its_row(comm):
    table = np.ones((4, 1))
    table[2] = np.nan
    group = Ranks(comm)
    x, _ = Embedding(group.shard(table, 0), group=group).forward(np.arange(4))
    np.testing.assert_array_equal(x, table)
