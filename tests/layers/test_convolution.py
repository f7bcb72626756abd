import re

import array_api_strict
import numpy as np
import pytest
import torch

from npnorm.layers import Conv2d
from npnorm.layers.convolution import COLUMNS
from npnorm.threads import set_threads
from tests.check import check_backward, check_finite_differences, close, draw, run, same_bits

SETTINGS = pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [((3, 3), 1, 0), ((3, 3), 1, 1), ((2, 3), 2, 0), ((3, 2), 2, 2), ((1, 1), 1, 0), ((1, 2), 3, 1), ((5, 8), 1, 1)],
)
BIAS = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


def parameters(rng, kernel, bias=True, dtype="float64"):
    return draw(rng, dtype, weight=(4, 3, *kernel)) | (draw(rng, dtype, bias=4) if bias else {})


def maker(stride, padding):
    return lambda params: Conv2d(**params, stride=stride, padding=padding)


def test_two_kernels_on_one_image_worked_by_hand():
    x = np.array([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]]])
    layer = Conv2d(np.array([[[[1.0, 10.0]]], [[[0.0, -1.0]]]]), np.array([0.5, 100.0]))
    y, saved = layer.forward(x)
    np.testing.assert_array_equal(y, [[[[21.5, 32.5], [54.5, 65.5]], [[98, 97], [95, 94]]]])
    dx, grads = layer.backward(np.array([[[[1.0, 2.0], [0.0, 3.0]], [[4.0, 0.0], [0.0, 5.0]]]]), saved)
    np.testing.assert_array_equal(dx, [[[[1, 8, 20], [0, 3, 25]]]])
    np.testing.assert_array_equal(grads["weight"], [[[[20, 26]]], [[[29, 38]]]])
    np.testing.assert_array_equal(grads["bias"], [6, 9])


@SETTINGS
@BIAS
def test_backward_is_the_derivative(kernel, stride, padding, bias):
    rng = np.random.default_rng(1)
    check_backward(maker(stride, padding), parameters(rng, kernel, bias), rng.standard_normal((2, 3, 5, 7)), rng)


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
def test_backward_agrees_with_finite_differences(stride, padding):
    rng = np.random.default_rng(2)
    params = draw(rng, weight=(2, 3, 2, 3), bias=2)
    check_finite_differences(maker(stride, padding), params, rng.standard_normal((2, 3, 4, 5)), rng)


@SETTINGS
@BIAS
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
def test_torch_gives_the_same(kernel, stride, padding, bias, dtype, tolerance):
    rng = np.random.default_rng(3)
    params, x = parameters(rng, kernel, bias, dtype), rng.standard_normal((2, 3, 5, 7)).astype(dtype)
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in {"x": x, **params}.items()}
    expected = torch.nn.functional.conv2d(
        tensors["x"], tensors["weight"], tensors.get("bias"), stride=stride, padding=padding
    )
    dy = rng.standard_normal(expected.shape).astype(dtype)
    expected.backward(torch.tensor(dy))
    found = run(maker(stride, padding)(params), x, dy)
    assert list(found) == ["y", "dx", *params]
    assert {a.dtype for a in found.values()} == {np.dtype(dtype)}
    close(found["y"], expected.detach(), tolerance)
    close(found["dx"], tensors["x"].grad, tolerance)
    for name in params:
        close(found[name], tensors[name].grad, tolerance)


def test_a_kernel_of_one_element_is_a_linear_layer_over_the_channels():
    rng = np.random.default_rng(5)
    weight, x = rng.standard_normal((4, 3, 1, 1)), rng.standard_normal((2, 3, 5, 6))
    close(Conv2d(weight).forward(x)[0], np.einsum("oc,nchw->nohw", weight[:, :, 0, 0], x))


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    set_threads(request.param)
    yield request.param
    set_threads(None)


@pytest.mark.parametrize("images", [1, 3, 21])
def test_blocks_of_images_give_what_single_images_give(threads, images):
    rng = np.random.default_rng(6)
    layer = Conv2d(**parameters(rng, (3, 2)), padding=1)
    x, side = rng.standard_normal((images, 3, 9, 10)), (9, 11)
    assert COLUMNS // (side[0] * side[1]) == 10  # images in a block
    dy = rng.standard_normal((images, 4, *side))
    found = run(layer, x, dy)
    alone = [run(layer, x[i : i + 1], dy[i : i + 1]) for i in range(images)]
    for name in ("y", "dx"):
        close(found[name], np.concatenate([one[name] for one in alone]))
    for name in ("weight", "bias"):
        close(found[name], sum(one[name] for one in alone))


def test_any_number_of_threads_gives_the_same_bits():
    rng = np.random.default_rng(7)
    layer = Conv2d(**parameters(rng, (3, 3), dtype="float32"))
    x, dy = (rng.standard_normal((37, *shape)).astype("float32") for shape in ((3, 9, 9), (4, 7, 7)))
    found = []
    for n in (1, 2, 3):
        set_threads(n)
        found.append(run(layer, x, dy))
    set_threads(None)
    same_bits(found[1], found[0])
    same_bits(found[2], found[0])


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize(
    "layout",
    [
        lambda a: np.ascontiguousarray(a.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),  # channels last
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=3)[..., ::2],
        lambda a: np.flip(np.flip(a, 2).copy(), 2),
    ],
    ids=["channels last", "Fortran", "every second", "backwards"],
)
@pytest.mark.parametrize("shape", [(30, 3, 6, 7), (2, 3, 35, 34)], ids=["images in blocks", "an image in a block"])
def test_any_memory_layout_gives_the_same_bits(layout, padding, shape):
    rng = np.random.default_rng(8)
    params, x = parameters(rng, (3, 2)), rng.standard_normal(shape)
    layer = Conv2d(**params, padding=padding)
    dy = rng.standard_normal(layer.forward(x)[0].shape)
    expected = run(layer, x, dy)
    same_bits(run(layer, layout(x), layout(dy)), expected)
    other = Conv2d(layout(params["weight"]), params["bias"], padding=padding)
    same_bits(run(other, x, dy), expected)


def test_an_empty_batch_has_gradients_of_zero():
    rng = np.random.default_rng(9)
    params = parameters(rng, (3, 3))
    found = run(Conv2d(**params), np.zeros((0, 3, 5, 7)), np.zeros((0, 4, 3, 5)))
    assert {name: a.shape for name, a in found.items()} == {
        "y": (0, 4, 3, 5), "dx": (0, 3, 5, 7), "weight": (4, 3, 3, 3), "bias": (4,)
    }  # fmt: skip
    assert not found["weight"].any()
    assert not found["bias"].any()


def test_a_complex_step_in_the_bias_alone_is_kept():
    y, _ = Conv2d(np.ones((1, 1, 1, 1)), np.array([2 + 1e-30j])).forward(np.ones((1, 1, 1, 2)))
    np.testing.assert_array_equal(y.imag, [[[[1e-30, 1e-30]]]])


def test_parameters_are_held_as_they_came():
    weight = np.ones((2, 3, 1, 1))
    layer = Conv2d(weight, np.zeros(2))
    assert layer.params["weight"] is weight
    assert layer.shards == {"weight": None, "bias": None}


@pytest.mark.parametrize(
    ("weight", "bias", "came"),
    [
        ((4, 3), None, "weight (4, 3) float64"),
        ((4, 0, 3, 3), None, "weight (4, 0, 3, 3) float64"),
        ((4, 3, 2, 2), (3,), "weight (4, 3, 2, 2) float64, bias (3,) float64"),
        ((4, 3, 2, 2), (4, 1), "weight (4, 3, 2, 2) float64, bias (4, 1) float64"),
    ],
)
def test_parameters_of_a_wrong_shape_are_refused(weight, bias, came):
    message = f"bias (channels of y,); got {came}."
    with pytest.raises(ValueError, match=r"Conv2d: weight must have shape .*" + re.escape(message)):
        Conv2d(np.ones(weight), None if bias is None else np.ones(bias))


@pytest.mark.parametrize("setting", [{"stride": 0}, {"stride": 1.0}, {"padding": -1}, {"padding": True}])
def test_settings_that_are_no_counts_are_refused(setting):
    ((name, value),) = setting.items()
    with pytest.raises(ValueError, match=f"Conv2d: a window of 2 x 3,.* {name} {value}.* Each must be an integer"):
        Conv2d(np.ones((4, 3, 2, 3)), **setting)


@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 5, 5, 3), (1, 2, 3, 5, 5), ()])
def test_an_input_of_other_axes_or_channels_is_refused(shape):
    message = f"Conv2d takes images of shape (N, 3, H, W); x has shape {shape}. The channels are axis 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        Conv2d(np.ones((4, 3, 2, 2))).forward(np.ones(shape))


@pytest.mark.parametrize("size", [(4, 9), (9, 2), (0, 5)])
def test_images_smaller_than_the_kernel_are_refused(size):
    message = (
        f"Conv2d: images of {size[0]} x {size[1]}, with padding 1 on each side, are smaller than a window of 7 x 5"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        Conv2d(np.ones((4, 3, 7, 5)), padding=1).forward(np.ones((2, 3, *size)))


@pytest.mark.parametrize("dtype", ["int64", "float16"])
def test_an_input_of_another_dtype_is_refused(dtype):
    with pytest.raises(TypeError, match=f"Conv2d works in float32 or float64; the dtype of x is {dtype}"):
        Conv2d(np.ones((4, 3, 2, 2))).forward(np.ones((2, 3, 5, 5), dtype))


def test_another_dtype_than_that_of_the_parameters_is_refused():
    with pytest.raises(TypeError, match=r"Conv2d: weight is float64, x is float32\. Convert one of them"):
        Conv2d(np.ones((4, 3, 2, 2))).forward(np.ones((2, 3, 5, 5), "float32"))


def test_lists_are_refused():
    with pytest.raises(TypeError, match=r"Conv2d: weight must be an array.*got a list"):
        Conv2d([[[[1.0]]]])
    with pytest.raises(TypeError, match=r"Conv2d: x must be an array.*got a list"):
        Conv2d(np.ones((1, 1, 1, 1))).forward([[[[1.0]]]])


def test_a_gradient_of_another_shape_is_refused():
    layer = Conv2d(np.ones((4, 3, 2, 2)))
    _, saved = layer.forward(np.ones((2, 3, 5, 6)))
    with pytest.raises(ValueError, match=r"Conv2d\.backward takes dy of the shape of y, \(2, 4, 4, 5\); got \(2, 4\)"):
        layer.backward(np.ones((2, 4)), saved)


def test_a_gradient_of_another_module_is_refused():
    layer = Conv2d(np.ones((4, 3, 2, 2)))
    y, saved = layer.forward(np.ones((2, 3, 5, 6)))
    with pytest.raises(TypeError, match=r"Conv2d\.backward: dy is an array of array_api_strict, .* Bring both"):
        layer.backward(array_api_strict.asarray(y), saved)
