import numpy as np
import pytest
import torch

from npnorm.layers import AvgPool2d, GlobalAvgPool2d, MaxPool2d, ReLU
from npnorm.layers.inplace import BLOCK
from npnorm.threads import set_threads
from tests.check import check_backward, check_finite_differences, close, run, same_bits

BOTH = pytest.mark.parametrize("kind", [MaxPool2d, AvgPool2d])
F = torch.nn.functional
CASES = {
    "largest": (MaxPool2d(2), lambda x: F.max_pool2d(x, 2), (2, 3, 4, 6)),
    "largest, rows and columns left over": (MaxPool2d(2), lambda x: F.max_pool2d(x, 2), (2, 3, 5, 7)),
    "largest, windows overlap": (MaxPool2d(3, 2), lambda x: F.max_pool2d(x, 3, 2), (2, 3, 7, 9)),
    "largest, windows overlap, padding": (MaxPool2d(3, 2, 1), lambda x: F.max_pool2d(x, 3, 2, 1), (2, 3, 6, 7)),
    "largest, of one": (MaxPool2d(1, 2), lambda x: F.max_pool2d(x, 1, 2), (2, 3, 4, 5)),
    "mean": (AvgPool2d(2), lambda x: F.avg_pool2d(x, 2), (2, 3, 5, 6)),
    "mean, windows overlap": (AvgPool2d(3, 2), lambda x: F.avg_pool2d(x, 3, 2), (2, 3, 8, 7)),
    "mean, windows apart": (AvgPool2d(2, 3), lambda x: F.avg_pool2d(x, 2, 3), (2, 3, 8, 7)),
    "mean, of one": (AvgPool2d(1, 1), lambda x: F.avg_pool2d(x, 1), (2, 3, 4, 5)),
    "mean, of the whole image": (GlobalAvgPool2d(), lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), (2, 3, 4, 5)),
}
EACH = pytest.mark.parametrize("case", CASES)


def test_the_largest_of_overlapping_windows_worked_by_hand():
    layer = MaxPool2d(2, 1)
    y, saved = layer.forward(np.array([[[[1.0, 2.0, 5.0], [4.0, 3.0, 0.0], [6.0, 7.0, 2.0]]]]))
    np.testing.assert_array_equal(y, [[[[4, 5], [7, 7]]]])
    np.testing.assert_array_equal(saved.place, [[[[2, 1], [3, 2]]]])
    dx, grads = layer.backward(np.array([[[[1.0, 20.0], [300.0, 4000.0]]]]), saved)
    np.testing.assert_array_equal(dx, [[[[0, 0, 20], [1, 0, 0], [0, 4300, 0]]]])
    assert grads == {}


def test_padding_is_never_the_largest():
    layer = MaxPool2d(2, 2, 1)
    y, saved = layer.forward(np.array([[[[-5.0, -2.0], [-3.0, -4.0]]]]))
    np.testing.assert_array_equal(y, [[[[-5, -2], [-3, -4]]]])
    np.testing.assert_array_equal(saved.place, [[[[3, 2], [1, 0]]]])
    dx, _ = layer.backward(np.array([[[[1.0, 2.0], [3.0, 4.0]]]]), saved)
    np.testing.assert_array_equal(dx, [[[[1, 2], [3, 4]]]])


def test_means_of_overlapping_windows_worked_by_hand():
    layer = AvgPool2d(2, 1)
    y, saved = layer.forward(np.array([[[[1.0, 2.0, 5.0], [4.0, 3.0, 2.0]]]]))
    np.testing.assert_array_equal(y, [[[[2.5, 3]]]])
    dx, grads = layer.backward(np.array([[[[4.0, 8.0]]]]), saved)
    np.testing.assert_array_equal(dx, [[[[1, 3, 2], [1, 3, 2]]]])
    assert grads == {}


def test_the_mean_of_the_whole_image_worked_by_hand():
    y, saved = GlobalAvgPool2d().forward(np.array([[[[1.0, 2.0, 6.0]], [[4.0, 3.0, 2.0]]]]))
    np.testing.assert_array_equal(y, [[3, 3]])
    dx, grads = GlobalAvgPool2d().backward(np.array([[3.0, 6.0]]), saved)
    np.testing.assert_array_equal(dx, [[[[1, 1, 1]], [[2, 2, 2]]]])
    assert grads == {}


def test_of_equal_elements_the_first_gets_the_gradient():
    layer = MaxPool2d(2)
    y, saved = layer.forward(np.array([[[[0.0, 0.0, -0.0, 3.0], [0.0, 0.0, 3.0, 3.0]]]]))
    dx, _ = layer.backward(np.full_like(y, 5), saved)
    np.testing.assert_array_equal(dx, [[[[5, 0, 0, 5], [0, 0, 0, 0]]]])


@pytest.mark.parametrize("layer", [MaxPool2d(2), MaxPool2d(3, 2), MaxPool2d(3, 2, 1)], ids=repr)
def test_torch_gives_the_gradient_of_equal_elements_to_the_same(layer):
    rng = np.random.default_rng(1)
    x, _ = ReLU().forward(rng.integers(-3, 3, (4, 3, 8, 9)).astype(float))  # more than half are 0
    w = layer.windows
    tensor = torch.tensor(x, requires_grad=True)
    expected = F.max_pool2d(tensor, w.height, w.stride, w.padding)
    dy = rng.standard_normal(expected.shape)
    expected.backward(torch.tensor(dy))
    found = run(layer, x, dy)
    same_bits(found["y"], expected.detach().numpy())
    close(found["dx"], tensor.grad)


@EACH
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-6)])
def test_torch_gives_the_same(case, dtype, tolerance):
    layer, theirs, shape = CASES[case]
    rng = np.random.default_rng(2)
    x = rng.standard_normal(shape).astype(dtype)
    tensor = torch.tensor(x, requires_grad=True)
    expected = theirs(tensor)
    dy = rng.standard_normal(expected.shape).astype(dtype)
    expected.backward(torch.tensor(dy))
    found = run(layer, x, dy)
    assert found["y"].dtype == found["dx"].dtype == dtype
    close(found["y"], expected.detach(), tolerance)
    close(found["dx"], tensor.grad, tolerance)


@EACH
def test_backward_is_the_derivative(case):
    layer, _, shape = CASES[case]
    rng = np.random.default_rng(3)
    check_backward(lambda _: layer, {}, rng.standard_normal(shape), rng)


@EACH
def test_backward_agrees_with_finite_differences(case):
    layer, _, shape = CASES[case]
    rng = np.random.default_rng(4)
    x = (
        rng.permutation(np.prod(shape)).reshape(shape)[:, :1] / 10
    )  # no two are so near that a step makes another the largest
    check_finite_differences(lambda _: layer, {}, x, rng)


def test_a_mean_of_windows_as_large_as_the_image_is_the_mean_of_the_whole():
    x = np.random.default_rng(5).standard_normal((2, 3, 4, 4))
    close(AvgPool2d(4).forward(x)[0][:, :, 0, 0], GlobalAvgPool2d().forward(x)[0])


@EACH
@pytest.mark.parametrize("layout", ["channels last", "Fortran", "every second"])
def test_any_memory_layout_gives_the_same_bits(case, layout):
    def put(a):
        if layout == "channels last":
            return np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1)
        return np.asfortranarray(a) if layout == "Fortran" else np.repeat(a, 2, axis=-1)[..., ::2]

    layer, _, shape = CASES[case]
    rng = np.random.default_rng(6)
    x = rng.standard_normal(shape)
    dy = rng.standard_normal(layer.forward(x)[0].shape)
    same_bits(run(layer, put(x), put(dy)), run(layer, x, dy))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("layer", [MaxPool2d(3, 2, 1), AvgPool2d(3, 2)], ids=repr)
def test_blocks_give_the_bits_of_the_whole(layer, threads):
    rng = np.random.default_rng(7)
    x = rng.standard_normal((5, 41, 30, 25), dtype="float32")
    assert x.size > BLOCK > x[0].size
    dy = rng.standard_normal(layer.forward(x)[0].shape, dtype="float32")
    set_threads(threads)
    found = run(layer, x, dy)
    set_threads(None)
    alone = [run(layer, x[i : i + 1], dy[i : i + 1]) for i in range(5)]
    same_bits(found, {name: np.concatenate([one[name] for one in alone]) for name in found})


@EACH
def test_a_nan_stays_in_its_windows(case):
    layer, theirs, shape = CASES[case]
    x = np.random.default_rng(8).standard_normal(shape)
    x[1, 2, 2, 3] = np.nan
    x_t = torch.tensor(x, requires_grad=True)
    (y, saved), y_t = layer.forward(x), theirs(x_t)
    np.testing.assert_array_equal(np.isnan(y), torch.isnan(y_t))
    dy = np.random.default_rng(5).normal(size=y.shape)
    y_t.backward(torch.tensor(dy))
    close(layer.backward(dy, saved)[0], x_t.grad.numpy())  # the largest of its windows is the NaN


@BOTH
def test_y_is_no_view_of_x(kind):
    x = np.ones((2, 3, 4, 5))
    assert not np.shares_memory(kind(1).forward(x)[0], x)


@EACH
def test_an_empty_batch_is_an_empty_result(case):
    layer, _, shape = CASES[case]
    whole, _ = layer.forward(np.zeros(shape))
    y, saved = layer.forward(np.zeros((0, *shape[1:])))
    assert y.shape == (0, *whole.shape[1:])
    assert layer.backward(y, saved)[0].shape == (0, *shape[1:])


@BOTH
@pytest.mark.parametrize(
    ("size", "stride", "says"),
    [
        (0, None, "a window of 0 x 0, stride 0"),
        (2, 0, "a window of 2 x 2, stride 0, padding 0"),
        (2.0, 1, r"a window of 2\.0 x 2\.0"),
        ((2, 2), 1, r"a window of \(2, 2\) x \(2, 2\)"),
    ],
)
def test_settings_that_are_no_counts_are_refused(kind, size, stride, says):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: {says}.*\. Each must be an integer"):
        kind(size, stride)


@pytest.mark.parametrize("padding", [2, 3])
def test_padding_of_more_than_half_a_window_is_refused(padding):
    with pytest.raises(ValueError, match=f"MaxPool2d: padding is {padding}, size 3. It must be at most half"):
        MaxPool2d(3, 1, padding)


@BOTH
def test_images_smaller_than_a_window_are_refused(kind):
    with pytest.raises(ValueError, match=rf"{kind.__name__}: images of 4 x 6, .* smaller than a window of 5 x 5\."):
        kind(5).forward(np.ones((2, 3, 4, 6)))


def test_images_without_elements_are_refused():
    with pytest.raises(ValueError, match=r"GlobalAvgPool2d: x has shape \(2, 3, 0, 4\)\. .* no mean"):
        GlobalAvgPool2d().forward(np.ones((2, 3, 0, 4)))


@pytest.mark.parametrize(
    "layer", [MaxPool2d(2), AvgPool2d(2), GlobalAvgPool2d()], ids=lambda layer: type(layer).__name__
)
def test_an_input_of_other_axes_or_dtypes_is_refused(layer):
    name = type(layer).__name__
    with pytest.raises(ValueError, match=rf"{name} takes images of shape \(N, C, H, W\); x has shape \(3, 4, 4\)\."):
        layer.forward(np.ones((3, 4, 4)))
    with pytest.raises(TypeError, match=f"{name} works in float32 or float64; the dtype of x is int64"):
        layer.forward(np.ones((2, 3, 4, 4), "int64"))
    with pytest.raises(TypeError, match=f"{name}: x must be an array .* got a list"):
        layer.forward([[[[1.0]]]])


@EACH
def test_a_gradient_of_another_shape_is_refused(case):
    layer, _, shape = CASES[case]
    y, saved = layer.forward(np.ones(shape))
    name = type(layer).__name__
    with pytest.raises(
        ValueError, match=rf"{name}\.backward takes dy of the shape of y, .*; got \({y.shape[0]}, 1\)\."
    ):
        layer.backward(y.reshape(-1)[:2].reshape(2, 1), saved)
