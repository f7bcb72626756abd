import array_api_strict
import numpy as np
import pytest

from npnorm.arrays import to_numpy
from npnorm.layers.windows import Windows, full
from tests.check import same_bits


@pytest.mark.parametrize(
    ("height", "width", "stride", "padding"), [(2, 3, 1, 0), (3, 2, 2, 1), (1, 1, 3, 2), (6, 5, 1, 0)]
)
def test_windows_are_cut_out_of_the_padded_images(height, width, stride, padding):
    images = np.random.default_rng(1).standard_normal((3, 6, 5, 2))
    windows = Windows("Conv2d", height, width, stride, padding)
    padded = windows.pad(images, 7.0)
    same_bits(padded, np.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)), constant_values=7.0))
    same_bits(windows.inside(padded), images)
    rows, columns = windows.count((2, 3, 6, 5))
    places = np.stack(list(windows.places(padded)))
    assert places.shape == (height * width, 3, rows, columns, 2)
    for i in range(rows):
        for j in range(columns):
            window = padded[:, i * stride : i * stride + height, j * stride : j * stride + width]
            same_bits(places[:, :, i, j], np.moveaxis(window.reshape(3, -1, 2), 1, 0))
    beyond = (
        padded[:, rows * stride : rows * stride + height],
        padded[:, :, columns * stride : columns * stride + width],
    )
    assert beyond[0].shape[1] < height
    assert beyond[1].shape[2] < width


def test_places_are_views():
    images = np.zeros((1, 2, 3))
    for place in Windows("Conv2d", 1, 2, 1, 0).places(images):
        place += 1
    np.testing.assert_array_equal(images, [[[1, 2, 1], [1, 2, 1]]])


def test_an_array_of_one_value_has_the_common_dtype_and_the_device():
    x = array_api_strict.ones(2, dtype=array_api_strict.float32, device=array_api_strict.Device("device1"))
    filled = full((2, 3), -np.inf, x)
    assert (filled.dtype, filled.device) == (x.dtype, x.device)
    same_bits(to_numpy(filled), np.full((2, 3), -np.inf, "float32"))
    assert full((2,), 0, np.ones(1, "float32"), np.ones(1, "complex128")).dtype == "complex128"
    assert full((0, 3), 0, np.ones(1)).shape == (0, 3)
