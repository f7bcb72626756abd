import numpy as np
import pytest
import torch

from npnorm import norms
from npnorm.studies import small_convnets as small
from npnorm.studies.small_convnets import NORMS, Momentum, PerChannel, WeightNormConv2d
from npnorm.tree import leaves, map_tree
from tests.check import check_backward, close, draw


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# Layers


def test_per_channel_has_the_derivative_of_a_norm_and_its_weights(rng):
    params = draw(rng, weight=3, bias=3)
    x = rng.standard_normal((2, 3, 4, 5))
    check_backward(lambda p: PerChannel(norms.RMSNorm(features=(4, 5)), p["weight"], p["bias"]), params, x, rng)


def test_layer_norm_per_channel_over_space_is_instance_norm_and_over_all_is_group_norm_of_one_group(rng):
    weight, bias = rng.standard_normal((2, 3))
    x = rng.standard_normal((2, 3, 4, 5))
    for features, same in (
        ((4, 5), norms.InstanceNorm(weight, bias)),
        ((3, 4, 5), norms.GroupNorm(1, weight, bias)),
    ):
        close(PerChannel(norms.LayerNorm(features=features), weight, bias).forward(x)[0], same.forward(x)[0])


def test_a_convolution_with_weight_norm_starts_as_it_is_without_and_has_the_derivative(rng):
    weight, bias, x = rng.standard_normal((3, 2, 3, 3)), rng.standard_normal(3), rng.standard_normal((4, 2, 5, 6))
    layer = WeightNormConv2d(weight, bias, padding=1)
    y, _ = layer.forward(x)
    close(y, torch.nn.functional.conv2d(*map(torch.tensor, (x, weight, bias)), padding=1))

    def make(params):
        layer = WeightNormConv2d(weight, bias, padding=1)
        layer.params = params
        return layer

    check_backward(make, {"weight_v": weight, "weight_g": rng.standard_normal(3), "bias": bias}, x, rng)


@pytest.mark.parametrize("norm", NORMS)
def test_the_network_has_the_derivative_of_its_loss(norm, rng):
    model = small.network(norm, rng, "float64")
    params = map_tree(lambda p: p + 0.1 * rng.standard_normal(p.shape), model.params)
    images, labels = rng.standard_normal((6, 1, 8, 8)), rng.integers(0, 10, 6)
    direction = map_tree(lambda p: rng.standard_normal(p.shape), params)

    def at(t):
        model.params = map_tree(lambda p, d: p + t * d, params, direction)
        return small.loss_and_grads(model, images, labels)

    slope = sum(np.sum(g * d) for (_, g), (_, d) in zip(leaves(at(0)[1]), leaves(direction), strict=True))
    assert (at(1e-6)[0] - at(-1e-6)[0]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_a_norm_of_each_image_takes_no_notice_of_the_others_and_batch_norm_does(rng):
    images = rng.standard_normal((2, 1, 8, 8)).astype("float32")
    for norm in NORMS:
        model = small.network(norm, np.random.default_rng(1))
        together, _ = model.forward(images)
        alone, _ = model.forward(images[:1])
        assert np.allclose(together[:1], alone, atol=1e-5) == (norm != "BatchNorm")


def test_inference_takes_running_statistics(rng):
    model = small.network("BatchNorm", rng, "float64")
    images, labels = rng.standard_normal((6, 1, 8, 8)), rng.integers(0, 10, 6)
    for _ in range(3):
        small.loss_and_grads(model, images, labels)
    assert [norm.batches for norm in model.layers.values() if isinstance(norm, norms.BatchNorm)] == [3, 3, 3]
    alone = small.infer(model, images[:1])
    close(small.infer(model, images)[:1], alone)
    assert np.abs(model.forward(images[:1])[0] - alone).max() > 0.01


# Data and training


def test_digits_are_split_without_overlap_and_by_the_seed():
    data, again = (small.digits(100, 1697, np.random.default_rng(3)) for _ in range(2))
    assert (data.images.shape, data.held_out.shape) == ((100, 1, 8, 8), (1697, 1, 8, 8))
    assert abs(data.images.mean()) < 1e-6
    assert abs(data.images.std() - 1) < 1e-6
    assert len(np.unique(np.concatenate([data.images, data.held_out]).reshape(1797, -1), axis=0)) == 1797
    assert all(np.array_equal(a, b) for a, b in zip(data, again, strict=True))


def test_momentum_steps_as_torchs_sgd(rng):
    start, targets = rng.standard_normal((2, 3, 4))
    params = {"w": start.copy()}
    optimizer, w = Momentum(params, 0.9, 0.1), torch.tensor(start, requires_grad=True)
    torchs = torch.optim.SGD([w], lr=0.05, momentum=0.9, weight_decay=0.1)
    for _ in range(5):
        optimizer.step({"w": params["w"] - targets}, 0.05)
        torchs.zero_grad()
        (0.5 * ((w - torch.tensor(targets)) ** 2).sum()).backward()
        torchs.step()
    close(params["w"], w.detach())


def test_training_stops_before_a_loss_that_is_not_finite(rng):
    model = small.network("none", rng)
    data = small.digits(32, 16, rng)
    losses = list(small.train(model, Momentum(model.params, 0.9, 0.0), data, 8, [1e10] * 9, rng))
    assert 1 <= len(losses) < 9
    assert np.isfinite(losses).all()
