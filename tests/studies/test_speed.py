import gc
from functools import partial

import numpy as np
import pytest
import torch

from npnorm import get_threads, set_threads
from npnorm.studies import speed_networks, speed_torch
from npnorm.studies.speed import FIRST, OTHERS, PAPER, QUICK, SECOND, saved
from npnorm.studies.speed_networks import NORMS, OverSpace, input_of, norm_of
from npnorm.studies.speed_timing import interleaved, one_thread
from npnorm.studies.study import Verdict
from npnorm.tree import leaves
from tests.check import close


@pytest.fixture
def results(quick):
    return quick("speed")[0]


def test_every_norm_is_measured_in_every_network_unless_there_is_none(results):
    assert results.distinct("network") == list(QUICK)
    for line in results.lines:
        found = {name.removesuffix(" saves") for name in line if name.endswith(" saves")}
        left_out = {FIRST, SECOND} if line["implementation"] == "torch" else set()
        left_out |= {"none"} if line["network"].startswith("norm") else set()
        assert found == {*OTHERS} - left_out
        assert line["LayerNorm ms"] > 0
        assert all(line[f"{name} saves"] < 1 for name in found)


@pytest.mark.parametrize("implementation", ["npnorm", "torch, written out"])
def test_no_norm_is_faster_than_layer_norm_in_a_gru(results, implementation):
    assert np.median(results.values("none saves", network="GRU", implementation=implementation)) > 0.1


def test_the_paper_contradicts_its_abstract(verdicts):
    of = verdicts("speed")
    assert of["In the paper's tables RMSNorm saves up to 64 % of LayerNorm's time."] == Verdict.FAILS
    assert of["In the paper's tables RMSNorm saves at least 7 % of LayerNorm's time."] == Verdict.HOLDS
    assert of["The largest of the paper's percentages, of pRMSNorm in table 8, is a speed-up of 64 %."] == Verdict.FAILS
    assert of["pRMSNorm saves more than RMSNorm in each of the paper's tables."] == Verdict.FAILS


def test_each_setting_has_a_verdict(results, verdicts):
    for place in (
        "when measured alone on 32 x 256",
        "in the GRU",
        "in the transformer",
        "in the convolutional network",
    ):
        for implementation in results.distinct("implementation"):
            says = f"RMSNorm saves 7 to 64 % of LayerNorm's time {place} ({implementation})."
            assert says in verdicts("speed")


def test_the_paper_gives_the_same_percentages():
    given = {"RMSNorm": [24.7, 34.0, 11.0, 6.9, 15.1, 40.8, 20.5], FIRST: [25.9, 33.4, 12.0, 9.3, 15.8, 63.9, 23.1]}
    for name, percentages in given.items():
        np.testing.assert_allclose([100 * saved(table)[name] for table in PAPER], percentages, atol=0.051)


# The networks are the same in npnorm and in torch


def copied(kind, layer, network):
    """Give a network of torch the weights of npnorm's."""
    arrays = {name: torch.from_numpy(a) for name, a in leaves(layer.params)}
    if kind == "GRU":
        dim = layer.dim
        rows = {"gates": slice(2 * dim), "candidate": slice(2 * dim, None)}
        names = {
            f"{side}_{part}.0.{name}": arrays[f"{name}_{side}"][some]
            for side in ("ih", "hh")
            for part, some in rows.items()
            for name in ("weight", "bias")
        }
    elif kind == "transformer":
        names = {f"{name}.weight": arrays[f"{name}.weight"] for name in ("embedding", "positions", "head")}
        for name, a in arrays.items():
            match name.split("."):
                case ["blocks", i, "attention", "sublayer", projection, _]:
                    names[f"sublayers.{2 * int(i)}.{projection[0]}.weight"] = a
                case ["blocks", i, "mlp", "sublayer", projection, _]:
                    names[f"sublayers.{2 * int(i) + 1}.{0 if projection == 'up_proj' else 2}.weight"] = a
    else:
        names = {f"{4 * i}.weight": a for i, a in enumerate(arrays.values())}
    assert not network.load_state_dict(names, strict=False).unexpected_keys  # norms keep their ones and zeros


SIZES = {
    "GRU": {"kind": "GRU", "x": [3, 4, 5], "dim": 6},
    "transformer": {"kind": "transformer", "x": [2, 5], "vocabulary": 9, "width": 8, "depth": 2, "heads": 2},
    "convolution": {"kind": "convolution", "x": [2, 3, 16, 16], "channels": [4, 5]},
}


@pytest.mark.parametrize(
    ("name", "own"),
    [*((name, False) for name in NORMS), ("LayerNorm", True), ("RMSNorm", True)],
    ids=lambda value: {True: "torch's", False: "written out"}.get(value, value),
)
@pytest.mark.parametrize("kind", SIZES)
def test_torch_has_the_same_network(kind, name, own):
    sizes = SIZES[kind]
    layer = speed_networks.KINDS[kind](name, sizes, np.random.default_rng(0))
    network = speed_torch.KINDS[kind](sizes, partial(speed_torch.norm_of, name, own))
    copied(kind, layer, network)
    x = input_of(sizes, np.random.default_rng(1))
    of_torch = torch.from_numpy(x).requires_grad_(kind != "transformer")
    y, saved_ = layer.forward(x)
    y_torch = network(of_torch)
    close(y_torch.detach(), y, 1e-5)
    dy = np.random.default_rng(2).standard_normal(y.shape, np.float32)
    dx, grads = layer.backward(dy, saved_)
    y_torch.backward(torch.from_numpy(dy))
    if kind != "transformer":
        close(of_torch.grad, dx, 1e-4)
    assert sum(a.numel() for a in network.parameters()) == sum(a.size for _, a in leaves(layer.params))
    squares = sum(float((a.grad.double() ** 2).sum()) for a in network.parameters())
    np.testing.assert_allclose(squares, sum(float((a.astype("f8") ** 2).sum()) for _, a in leaves(grads)), rtol=1e-3)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", FIRST])
def test_a_norm_over_space_takes_each_channel_by_itself(name):
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((2, 2, 3, 4, 8), np.float32)
    layer = OverSpace(norm_of(name))
    y, of_all = layer.forward(x)
    dx, _ = layer.backward(dy, of_all)
    one, of_one = norm_of(name).forward(x[1, 2].reshape(1, -1))
    done, _ = norm_of(name).backward(dy[1, 2].reshape(1, -1), of_one)
    np.testing.assert_array_equal(y[1, 2].ravel(), one[0])
    np.testing.assert_array_equal(dx[1, 2].ravel(), done[0])


def test_all_norms_have_the_same_data_and_weights():
    sizes = SIZES["GRU"]
    layers = [speed_networks.gru(name, sizes, np.random.default_rng([5, 1])) for name in NORMS]
    for layer in layers[1:]:
        np.testing.assert_array_equal(layer.params["weight_hh"], layers[0].params["weight_hh"])


def test_a_network_of_torch_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    speed_torch.networks(SIZES["GRU"], 0, own=True)
    assert torch.equal(torch.random.get_rng_state(), before)


# Timing


def test_contenders_take_turns_forwards_and_backwards():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleaved(calls, 1e-9, 4)
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert rounds == [["a", "b", "c"]] * 3 + [["c", "b", "a"], ["a", "b", "c"], ["c", "b", "a"]]
    assert [len(a) for a in times.values()] == [4, 4, 4]
    assert gc.isenabled()


def test_what_is_slower_takes_longer():
    data = np.ones(1 << 16)
    times = interleaved({"once": lambda: data.sum(), "often": lambda: [data.sum() for _ in range(30)]}, 1e-3, 5)
    assert np.median(times["often"] / times["once"]) > 3


def test_the_threads_are_given_back():
    set_threads(2)
    before = torch.get_num_threads()
    try:
        with one_thread(torch=True):
            assert (get_threads(), torch.get_num_threads()) == (1, 1)
        assert get_threads() == 2
        assert torch.get_num_threads() == before
    finally:
        set_threads(None)
