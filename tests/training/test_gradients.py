import tracemalloc

import numpy as np
import pytest

from npnorm import Config, Transformer
from npnorm.config import init
from npnorm.layers import CrossEntropy
from npnorm.threads import set_threads
from npnorm.training import AdamW, gradients, loss_and_grads
from npnorm.tree import leaves, map_tree
from tests.check import close, copy, same_bits

CONFIGS = pytest.mark.parametrize("make_config", [Config.original, Config.modern], ids=["original", "modern"])


@pytest.fixture(autouse=True)
def default_threads():
    yield
    set_threads(None)


def problem(make_config, rows=7, dtype="float64"):
    rng = np.random.default_rng(0)
    config = make_config(20, width=16, depth=2, heads=4, context=10)
    params = map_tree(lambda a: (a + 0.2 * rng.standard_normal(a.shape)).astype(dtype), init(config, rng))
    return Transformer(config, params), *rng.integers(0, 20, (2, rows, 10))


def whole(model, inputs, targets):
    logits, saved = model.forward(inputs)
    loss, saved_loss = CrossEntropy().forward(logits, targets)
    return loss, model.backward(CrossEntropy().backward(1.0, saved_loss), saved)[1]


@CONFIGS
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_the_pieces_add_up_to_the_batch(monkeypatch, make_config, rows):
    monkeypatch.setattr(gradients, "PIECE", 20)  # two rows: 7 of them are 3 pieces, not of one size
    model, inputs, targets = problem(make_config, rows)
    params, ids = copy(model.params), inputs.copy()
    loss, grads = loss_and_grads(model, inputs, targets)
    expected_loss, expected = whole(model, inputs, targets)
    close(loss, expected_loss, 1e-14)
    largest = max(np.abs(g).max() for _, g in leaves(expected))
    for (name, g), (path, e) in zip(leaves(grads), leaves(expected), strict=True):
        assert name == path
        np.testing.assert_allclose(g, e, rtol=0, atol=1e-14 * largest, err_msg=name)
    same_bits({"params": model.params, "ids": inputs}, {"params": params, "ids": ids})


@CONFIGS
def test_any_number_of_threads_gives_the_same_bits(monkeypatch, make_config):
    monkeypatch.setattr(gradients, "PIECE", 10)
    model, inputs, targets = problem(make_config, dtype="float32")
    results = []
    for threads in (1, 2, 3, 2):
        set_threads(threads)
        results.append(loss_and_grads(model, inputs, targets))
    for loss, grads in results[1:]:
        same_bits({"loss": loss, "grads": grads}, {"loss": results[0][0], "grads": results[0][1]})


@CONFIGS
def test_training_steps_have_the_same_bits_for_any_number_of_threads(monkeypatch, make_config):
    monkeypatch.setattr(gradients, "PIECE", 20)
    trained = []
    for threads in (1, 2):
        set_threads(threads)
        model, inputs, targets = problem(make_config, dtype="float32")
        optimizer = AdamW(model.params)
        for _ in range(3):
            optimizer.step(loss_and_grads(model, inputs, targets)[1], lr=0.01)
        trained.append(model.params)
    same_bits(*trained)


def test_pieces_are_added_in_their_order():
    parts = [(np.float64(v), {"w": np.array([v])}) for v in (1.0, 1e16, -1e16, 1.0)]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]):
        sums = gradients._Sums()
        for i in order:
            sums.add(i, (parts[i][0], {"w": parts[i][1]["w"].copy()}))
        assert sums.total == (1.0, {"w": np.array([1.0])})  # ((1 + 1e16) - 1e16) + 1


@pytest.mark.parametrize(
    ("rows", "length", "sizes"),
    [(8, 128, [4, 4]), (7, 128, [7]), (3, 600, [1, 1, 1]), (1, 4096, [1]), (13, 128, [4, 4, 5]), (2, 10, [2])],
)
def test_the_pieces_depend_on_the_batch_alone(rows, length, sizes):
    model, _, _ = problem(Config.modern)
    for threads in (1, 5):
        set_threads(threads)
        pieces = gradients._pieces(model, np.zeros((rows, length), int))
        assert [p.stop - p.start for p in pieces] == sizes
        assert [i for p in pieces for i in range(p.start, p.stop)] == list(range(rows))


def test_blas_has_one_thread_in_a_piece_and_its_own_again_after(monkeypatch):
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def threads():
        return [info["num_threads"] for info in threadpoolctl.threadpool_info() if info["user_api"] == "blas"]

    monkeypatch.setattr(gradients, "PIECE", 20)
    model, inputs, targets = problem(Config.modern)
    seen, forward, before = [], model.forward, threads()
    monkeypatch.setattr(model, "forward", lambda ids: (seen.append(threads()), forward(ids))[1])
    loss_and_grads(model, inputs, targets)
    assert seen == [[1] * len(before)] * 3
    assert threads() == before


def test_without_threadpoolctl_the_pieces_follow_each_other(monkeypatch):
    monkeypatch.setattr(gradients, "PIECE", 20)
    model, inputs, targets = problem(Config.modern)
    expected = loss_and_grads(model, inputs, targets)
    monkeypatch.setattr(gradients, "_blas", lambda: None)
    loss, grads = loss_and_grads(model, inputs, targets)
    close(loss, expected[0], 1e-14)
    for (_, g), (_, e) in zip(leaves(grads), leaves(expected[1]), strict=True):
        close(g, e, 1e-11)


def test_an_error_in_a_piece_is_raised(monkeypatch):
    monkeypatch.setattr(gradients, "PIECE", 20)
    model, inputs, targets = problem(Config.modern)
    targets[-1, -1] = 20
    with pytest.raises(ValueError, match="CrossEntropy takes integers from 0 to 19"):
        loss_and_grads(model, inputs, targets)


@CONFIGS
def test_a_step_needs_no_more_memory_than_what_torch_keeps_of_the_whole_batch(make_config):
    config = make_config(64, width=64, depth=3, heads=4, context=64)
    model = Transformer(config, init(config, np.random.default_rng(0)))
    inputs, targets = np.random.default_rng(1).integers(0, 64, (2, 32, 64))
    # For each position: of a block the two sums and norms, q, k, v, o and the hidden features (up, its activation; with
    # a gate twice as many); logits and their probabilities. The gradients once.
    hidden = config.hidden_features * (4 if config.mlp == "swiglu" else 2)
    floats = inputs.size * (config.depth * (8 * config.width + hidden) + 2 * config.vocabulary)
    floats += sum(a.size for _, a in leaves(model.params))
    set_threads(1)
    loss_and_grads(model, inputs, targets)
    tracemalloc.start()
    loss_and_grads(model, inputs, targets)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.7 * 4 * floats
