import re

import numpy as np
import pytest
import torch

from npnorm import BatchNorm, InstanceNorm
from npnorm.tree import map_tree
from tests.check import close, draw, exact_norm, run, same_bits
from tests.norms.catalogue import named

SHAPES = pytest.mark.parametrize("shape", [(7, 3), (4, 3, 5), (2, 3, 4, 5), (2, 3, 4, 2, 5)])
MOMENTUM = pytest.mark.parametrize("momentum", [0.1, 0.3, None])
TORCH = {2: torch.nn.BatchNorm1d, 3: torch.nn.BatchNorm1d, 4: torch.nn.BatchNorm2d, 5: torch.nn.BatchNorm3d}

# channel 0 is (0, 2, 4, 6): mean 3, c = (-3, -1, 1, 3), var = 5
# channel 1 is (1, 5, 15, 19): mean 10, c = (-9, -5, 5, 9), var = 53
X = np.array([[[0.0, 2.0], [1.0, 5.0]], [[4.0, 6.0], [15.0, 19.0]]])
DY = np.array([[[4.0, 0.0], [1.0, 2.0]], [[2.0, -2.0], [0.0, 1.0]]])
W, B = np.array([2.0, -4.0]), np.array([1.0, 3.0])


def state(norm):
    """Return a copy of everything on a norm that could change."""
    running = {"mean": norm.running_mean, "var": norm.running_var}
    kept = {name: None if a is None else a.copy() for name, a in running.items()}
    return kept, map_tree(np.copy, norm.params), norm.batches, norm.momentum


def same_state(norm, before):
    (kept, params, *numbers), (kept_before, params_before, *numbers_before) = state(norm), before
    assert numbers == numbers_before
    same_bits(kept, kept_before)
    same_bits(params, params_before)


def test_training_worked_by_hand():
    # rstd = 1 / sqrt(5 + 11) = 1/4, z = (-3, -1, 1, 3) / 4; rstd = 1 / sqrt(53 + 11) = 1/8, z = (-9, -5, 5, 9) / 8
    layer = BatchNorm(W, B, eps=11)
    y, saved = layer.forward(X)
    expected = [[[-1 / 2, 1 / 2], [15 / 2, 11 / 2]], [[3 / 2, 5 / 2], [1 / 2, -3 / 2]]]
    np.testing.assert_array_equal(y, expected)
    # db = 4, dw = -3 + 0 + 1/2 - 3/2 = -4, dx = 2/4 (dy - 1 + z)
    # db = 4, dw = -9/8 - 10/8 + 0 + 9/8 = -5/4, dx = -4/8 (dy - 1 + 5/16 z)
    dx, grads = layer.backward(DY, saved)
    first, second = [[9 / 8, -5 / 8], [45 / 256, -103 / 256]], [[5 / 8, -9 / 8], [103 / 256, -45 / 256]]
    np.testing.assert_array_equal(dx, [first, second])
    np.testing.assert_array_equal(grads["weight"], [-4, -5 / 4])
    np.testing.assert_array_equal(grads["bias"], [4, 4])


def test_inference_worked_by_hand():
    # rstd = 1 / sqrt(5 + 11) = 1/4, z = (x - 2) / 4; rstd = 1 / sqrt(53 + 11) = 1/8, z = (x - 9) / 8
    layer = BatchNorm(W, B, eps=11, running_mean=np.array([2.0, 9.0]), running_var=np.array([5.0, 53.0]))
    y, saved = layer.inference(X)
    np.testing.assert_array_equal(y, [[[0, 1], [7, 5]], [[2, 3], [0, -2]]])
    dx, grads = layer.backward(DY, saved)
    np.testing.assert_array_equal(dx, [[[2, 0], [-1 / 2, -1]], [[1, -1], [0, -1 / 2]]])
    np.testing.assert_array_equal(grads["weight"], [-2 + 0 + 1 - 2, -1 - 1 + 0 + 5 / 4])
    np.testing.assert_array_equal(grads["bias"], [4, 4])


def test_running_statistics_worked_by_hand():
    # the unbiased variances are 20/3 and 212/3
    norm = BatchNorm(W, B, momentum=0.25)
    _, saved = norm.forward(X)
    norm.track(saved)
    close(norm.running_mean, [3 / 4, 10 / 4], 1e-15)
    close(norm.running_var, [3 / 4 + 5 / 3, 3 / 4 + 53 / 3], 1e-15)
    norm.track(saved)  # once more, as a second batch
    close(norm.running_mean, [9 / 16 + 3 / 4, 30 / 16 + 10 / 4], 1e-15)
    close(norm.running_var, [3 / 4 * (3 / 4 + 5 / 3) + 5 / 3, 3 / 4 * (3 / 4 + 53 / 3) + 53 / 3], 1e-15)
    assert norm.batches == 2


@MOMENTUM
@SHAPES
def test_torch_has_the_same_running_statistics_and_inference(momentum, shape):
    rng = np.random.default_rng(2)
    params = draw(rng, weight=3, bias=3)
    norm = BatchNorm(**params, momentum=momentum)
    theirs = TORCH[len(shape)](3, momentum=momentum, dtype=torch.float64)
    theirs.load_state_dict({name: torch.tensor(a) for name, a in params.items()}, strict=False)
    for size in (1.0, 5.0, 0.1, 2.0):
        x = size * rng.standard_normal((rng.integers(2, 9), *shape[1:])) + rng.standard_normal(
            (3, *[1] * (len(shape) - 2))
        )
        y, saved = norm.forward(x)
        norm.track(saved)
        close(y, theirs(torch.tensor(x)).detach())
        close(norm.running_mean, theirs.running_mean)
        close(norm.running_var, theirs.running_var)
        assert norm.batches == theirs.num_batches_tracked
    theirs.eval()
    theirs.zero_grad()
    x, dy = rng.standard_normal(shape), rng.standard_normal(shape)
    tensor = torch.tensor(x, requires_grad=True)
    expected = theirs(tensor)
    expected.backward(torch.tensor(dy))
    y, saved = norm.inference(x)
    dx, grads = norm.backward(dy, saved)
    close(y, expected.detach())
    close(dx, tensor.grad)
    for name in params:
        close(grads[name], getattr(theirs, name).grad)


def test_the_defaults_are_those_of_torch():
    x = np.random.default_rng(3).standard_normal((5, 4, 3)) * 0.01
    norm, theirs = BatchNorm.init(4, "float64"), torch.nn.BatchNorm1d(4, dtype=torch.float64)
    y, saved = norm.forward(x)
    norm.track(saved)
    close(y, theirs(torch.tensor(x)).detach())
    close(norm.running_mean, theirs.running_mean)
    close(norm.running_var, theirs.running_var)


def test_one_sample_is_instance_norm():
    rng = np.random.default_rng(4)
    x, dy, params = rng.standard_normal((1, 3, 4, 5)), rng.standard_normal((1, 3, 4, 5)), draw(rng, weight=3)
    came, expected = run(BatchNorm(**params), x, dy), run(InstanceNorm(**params), x, dy)
    for name in expected:
        close(came[name], expected[name])


def test_channels_do_not_see_each_other():
    rng = np.random.default_rng(5)
    x, dy, order = rng.standard_normal((4, 6, 5)), rng.standard_normal((4, 6, 5)), rng.permutation(6)
    params = draw(rng, weight=6, bias=6)
    came = run(BatchNorm(**{name: a[order] for name, a in params.items()}), x[:, order], dy[:, order])
    expected = run(BatchNorm(**params), x, dy)
    for name, a in expected.items():
        same_bits(came[name], a[order] if name in params else a[:, order])


def test_a_permutation_of_the_batch_permutes_the_result():
    rng = np.random.default_rng(6)
    x, dy, order = rng.standard_normal((6, 3, 5)), rng.standard_normal((6, 3, 5)), rng.permutation(6)
    came, expected = run(BatchNorm(), x[order], dy[order]), run(BatchNorm(), x, dy)
    close(came["y"], expected["y"][order], 1e-14)
    close(came["dx"], expected["dx"][order], 1e-14)


def test_in_inference_samples_do_not_see_each_other():
    rng = np.random.default_rng(7)
    norm = BatchNorm(running_mean=rng.standard_normal(3), running_var=rng.random(3))
    x = rng.standard_normal((6, 3, 5))
    same_bits(norm.inference(x[2:3])[0], norm.inference(x)[0][2:3])


def test_a_big_mean_is_right_where_torch_is_wrong():
    rng = np.random.default_rng(10)
    x, dy = (rng.standard_normal((2, 8, 2, 6)) * [[[[4.0]]], [[[1.0]]]]).astype("float32")
    x += np.float32(1e7)
    expected = named("BatchNorm")[0].exact({}, x, dy, 1e-5)
    came = run(BatchNorm(), x, dy)
    same_bits({"y": came["y"], "dx": came["dx"]}, {name: expected[name].astype("float32") for name in ("y", "dx")})
    theirs = torch.nn.functional.batch_norm(torch.tensor(x), None, None, training=True).numpy()
    assert np.abs(theirs - expected["y"]).max() > 0.01


def test_only_track_changes_the_norm():
    rng = np.random.default_rng(13)
    norm = BatchNorm(**draw(rng, weight=3, bias=3))
    before = state(norm)
    x, dy = rng.standard_normal((2, 4, 3, 5))
    _, saved = norm.forward(x)
    norm.backward(dy, saved)
    _, saved_inference = norm.inference(x)
    norm.backward(dy, saved_inference)
    same_state(norm, before)
    norm.track(saved)
    assert norm.batches == 1
    assert np.all(norm.running_mean != before[0]["mean"])
    assert np.all(norm.running_var != before[0]["var"])


def test_what_track_does_changes_no_gradient_of_before():
    rng = np.random.default_rng(14)
    norm = BatchNorm(**draw(rng, weight=3, bias=3))
    x, dy = rng.standard_normal((2, 4, 3, 5))
    _, training = norm.forward(x)
    _, inference = norm.inference(x)
    before = [norm.backward(dy, saved)[0] for saved in (training, inference)]
    norm.track(training)
    for saved, dx in zip((training, inference), before, strict=True):
        same_bits(norm.backward(dy, saved)[0], dx)


def test_without_parameters_the_running_statistics_start_with_the_first_batch():
    norm = BatchNorm(momentum=0.25)
    assert norm.running_mean is norm.running_var is None
    norm.track(norm.forward(X)[1])
    close(norm.running_mean, [3 / 4, 10 / 4], 1e-15)
    close(norm.running_var, [3 / 4 + 5 / 3, 3 / 4 + 53 / 3], 1e-15)


def test_momentum_zero_keeps_the_running_statistics():
    norm = BatchNorm(momentum=0, running_mean=np.array([0.1, 0.2]), running_var=np.array([0.3, 0.4]))
    norm.track(norm.forward(X)[1])
    same_bits(
        {"mean": norm.running_mean, "var": norm.running_var},
        {"mean": np.array([0.1, 0.2]), "var": np.array([0.3, 0.4])},
    )


def test_momentum_one_takes_the_last_batch():
    norm = BatchNorm(W, momentum=1)
    norm.track(norm.forward(X * 7)[1])
    norm.track(norm.forward(X)[1])
    close(norm.running_mean, [3, 10], 1e-15)
    close(norm.running_var, [20 / 3, 212 / 3], 1e-15)


def test_without_momentum_the_average_goes_on_from_the_batches_that_were_seen():
    running = {"running_mean": np.array([1.0, 2.0]), "running_var": np.array([3.0, 4.0])}
    norm = BatchNorm(momentum=None, **running, batches=3)
    norm.track(norm.forward(X)[1])
    close(norm.running_mean, [(3 * 1 + 3) / 4, (3 * 2 + 10) / 4], 1e-15)
    close(norm.running_var, [(3 * 3 + 20 / 3) / 4, (3 * 4 + 212 / 3) / 4], 1e-15)
    assert norm.batches == 4


def test_running_statistics_that_are_passed_in_are_copied():
    mean, var = np.zeros(2), np.ones(2)
    norm = BatchNorm(W, running_mean=mean, running_var=var)
    before = norm.inference(X)[0]
    mean += 5
    var += 5
    same_bits(norm.inference(X)[0], before)
    norm.track(norm.forward(X)[1])
    np.testing.assert_array_equal(mean, 5)
    np.testing.assert_array_equal(var, 6)


def test_running_statistics_keep_the_dtype_they_came_in_and_are_float64_else():
    norm = BatchNorm(running_mean=np.zeros(2, "float32"), running_var=np.ones(2, "float32"))
    norm.track(norm.forward(X)[1])
    assert norm.running_mean.dtype == norm.running_var.dtype == np.float32
    close(norm.running_var, 0.9 + np.array([2 / 3, 212 / 30]), 2.0**-23)
    norm = BatchNorm(W.astype("float16"))
    norm.track(norm.forward(X.astype("float16"))[1])
    assert norm.running_mean.dtype == norm.running_var.dtype == np.float64
    close(norm.running_var, 0.9 + np.array([2 / 3, 212 / 30]))


@pytest.mark.parametrize("size", [1e-170, 1e-140, 1e140, 1e153])
def test_running_statistics_are_right_where_the_batch_was_scaled(size):
    rng = np.random.default_rng(15)
    x = rng.uniform(-3, 3, (4, 2, 5))
    plain, scaled = BatchNorm(momentum=1), BatchNorm(momentum=1)
    plain.track(plain.forward(x)[1])
    scaled.track(scaled.forward(x * size)[1])
    close(scaled.running_mean, plain.running_mean * size, 1e-14)
    close(scaled.running_var, plain.running_var * size * size, 1e-14)  # 0 at 1e-170, as near as float64 has


def test_a_variance_beyond_the_range_is_refused_and_changes_nothing():
    norm = BatchNorm(W)
    y, saved = norm.forward(X * 1e200)
    assert np.all(np.isfinite(y))
    before = state(norm)
    with pytest.raises(ValueError, match=r"not finite in float64; the running statistics stay"):
        norm.track(saved)
    same_state(norm, before)


@pytest.mark.parametrize("x", [X + 1e39, X * 1e20], ids=["mean", "variance"])
def test_running_statistics_that_their_dtype_cannot_hold_are_refused_and_change_nothing(x):
    norm = BatchNorm(momentum=1, running_mean=np.zeros(2, "float32"), running_var=np.ones(2, "float32"))
    _, saved = norm.forward(x)
    before = state(norm)
    with pytest.raises(ValueError, match="the running statistics stay"):
        norm.track(saved)
    same_state(norm, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_batch_that_is_not_finite_is_not_tracked(bad):
    norm = BatchNorm(W, B)
    x = X.copy()
    x[1, 0, 1] = bad
    y, saved = norm.forward(x)
    assert np.all(np.isnan(y[:, 0]))
    same_bits(y[:, 1], norm.forward(X)[0][:, 1])  # the other channel is as ever
    before = state(norm)
    with pytest.raises(ValueError, match=r"not finite in float64; the running statistics stay.*Look for a NaN"):
        norm.track(saved)
    same_state(norm, before)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1), (0, 3), (0, 3, 5)])
def test_fewer_than_two_values_in_a_channel_are_refused(shape):
    norm = BatchNorm(np.ones(3))
    with pytest.raises(ValueError, match=rf"elements in a channel .*: {shape[0]}\. Its variance .* two"):
        norm.forward(np.ones(shape))
    y, saved = norm.inference(np.ones(shape))  # which needs no variance of x
    dx, grads = norm.backward(np.ones(shape), saved)
    assert y.shape == dx.shape == shape
    close(grads["weight"], np.full(3, shape[0] / np.sqrt(1 + 1e-5)))


def test_two_values_in_a_channel_are_enough():
    y, saved = BatchNorm(eps=7).forward(np.array([[2.0], [8.0]]))  # c = (-3, 3), var = 9, rstd = 1 / sqrt(9 + 7) = 1/4
    np.testing.assert_array_equal(y, [[-3 / 4], [3 / 4]])
    dx, _ = BatchNorm(eps=7).backward(np.array([[1.0], [0.0]]), saved)  # 1/4 (1/2 - 3/4 3/8)
    close(dx, [[7 / 128], [-7 / 128]], 1e-15)


def test_what_inference_saved_cannot_be_tracked():
    norm = BatchNorm(W)
    with pytest.raises(TypeError, match=r"^BatchNorm\.track takes what BatchNorm\.forward saved; got .*SavedInference"):
        norm.track(norm.inference(X)[1])


def test_a_gradient_of_another_shape_is_refused():
    norm = BatchNorm(W)
    for _, saved in (norm.forward(X), norm.inference(X)):
        with pytest.raises(ValueError, match=r"BatchNorm: dy has shape \(2, 2\), and the x that was saved \(2, 2, 2\)"):
            norm.backward(DY[0], saved)


@pytest.mark.parametrize("shape", [(4, 3, 5), (2,), (4, 2, 0)])
def test_an_input_of_another_shape_is_refused(shape):
    message = f"BatchNorm holds 2 channels; x has shape {shape}. It takes (N, C, ...) with nothing empty but N; axis 1"
    for pass_ in (BatchNorm(W).forward, BatchNorm(W).inference):
        with pytest.raises(ValueError, match=re.escape(message)):
            pass_(np.ones(shape))


def test_init_makes_ones_and_zeros():
    norm = BatchNorm.init(3, "float16", momentum=0.5)
    same_bits(norm.params, {"weight": np.ones(3, "float16"), "bias": np.zeros(3, "float16")})
    same_bits({"m": norm.running_mean, "v": norm.running_var}, {"m": np.zeros(3), "v": np.ones(3)})
    assert (norm.batches, norm.momentum) == (0, 0.5)
    assert BatchNorm.init(3).params["weight"].dtype == np.float32
    assert norm.shards == {"weight": None, "bias": None}


def test_a_running_variance_of_zero_needs_an_eps():
    x = np.random.default_rng(41).standard_normal((4, 2))
    running = {"running_mean": np.zeros(2), "running_var": np.array([0.0, 1.0])}
    close(BatchNorm(eps=0.25, **running).inference(x)[0], x / np.sqrt([0.25, 1.25]))
    with pytest.raises(ValueError, match=r"running_var \+ eps is 0 in some channel\. Take an eps above 0"):
        BatchNorm(eps=0, **running).inference(x)


def test_statistics_of_other_channels_are_not_tracked():
    norm = BatchNorm()
    norm.track(norm.forward(np.random.default_rng(42).standard_normal((4, 3)))[1])
    _, saved = BatchNorm().forward(np.random.default_rng(43).standard_normal((4, 1)))
    before = norm.running_mean.copy()
    with pytest.raises(ValueError, match=r"BatchNorm holds 3 channels; x has shape \(4, 1\)"):
        norm.track(saved)
    same_bits(norm.running_mean, before)


def test_two_elements_in_a_channel_keep_the_digits_of_dx():
    x, dy = np.array([[1.0, -3.0], [1.5, 4.0]]), np.array([[0.3, -2.0], [1.1, 0.7]])
    norm = BatchNorm(np.array([1.5, -0.5]), eps=1e-5)
    dx, _ = norm.backward(dy, norm.forward(x)[1])
    w = np.array([[1.5, 1.5], [-0.5, -0.5]])
    for channel in range(2):
        row, drow = x[None, :, channel], dy[None, :, channel]
        exact = exact_norm(row, w[channel], np.zeros(2), 1e-5, drow, centred=True)[1]
        np.testing.assert_allclose(dx[:, channel], exact[0], rtol=1e-13)  # 1e-5 of its terms is left


@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_inference_far_from_the_running_mean_loses_nothing(compute):
    rng = np.random.default_rng(31)
    x, dy = rng.standard_normal((2, 3, 2, 40)).astype("float32")
    x += 1e4
    mean, var = np.full(2, 1e4), np.array([1.0, 2.0])
    norm = BatchNorm(np.ones(2, "float32"), running_mean=mean, running_var=var, compute=compute)
    y, saved = norm.inference(x)
    dx, grads = norm.backward(dy, saved)
    z = (x.astype("float64") - mean[:, None]) / np.sqrt(var + 1e-5)[:, None]
    rtol = 6e-8 if compute == "float64" else 3e-7  # rounded once, or a few times
    np.testing.assert_allclose(y, z, rtol)
    np.testing.assert_allclose(dx, dy / np.sqrt(var + 1e-5)[:, None], rtol)
    expected = (dy * z).sum(axis=(0, 2))
    np.testing.assert_allclose(grads["weight"], expected, rtol=0, atol=2e-6 * np.abs(dy * z).sum())
