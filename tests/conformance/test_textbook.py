import ml_dtypes
import numpy as np
import pytest

from npnorm import norms
from npnorm.conformance.textbook import NORMS, Textbook, layout
from tests.check import close

EACH = pytest.mark.parametrize("norm", NORMS)


def drawn(norm, shape, dtype="float64"):
    rng = np.random.default_rng(0)
    features = shape[1] if norm in ("GroupNorm", "BatchNorm") else shape[-1]
    x, dy = (rng.standard_normal(shape).astype(dtype) for _ in range(2))
    w, b = (rng.standard_normal(features).astype(dtype) for _ in range(2))
    return x, dy, w, None if norm == "RMSNorm" else b


@EACH
@pytest.mark.parametrize("shape", [(3, 6), (2, 6, 5), (2, 6, 4, 5)])
def test_it_is_the_norm(norm, shape):
    x, dy, w, b = drawn(norm, shape)
    groups = 3 if norm == "GroupNorm" else 1
    textbook = Textbook(norm, w, b, eps=0.3, groups=groups)
    y, saved = textbook.forward(x)
    dx, grads = textbook.backward(dy, saved)
    params = [w] if b is None else [w, b]
    layer = getattr(norms, norm)(*[groups] * (norm == "GroupNorm"), *params, eps=0.3)
    y_, saved_ = layer.forward(x)
    dx_, grads_ = layer.backward(dy, saved_)
    close(y, y_)
    close(dx, dx_)
    assert grads.keys() == grads_.keys()
    for name in grads:
        close(grads[name], grads_[name])


@EACH
@pytest.mark.parametrize("dtype", ["float32", "float16", ml_dtypes.bfloat16])
def test_it_stays_in_the_dtype_of_x(norm, dtype):
    x, dy, w, b = drawn(norm, (4, 8), dtype)
    textbook = Textbook(norm, w, b)
    y, saved = textbook.forward(x)
    dx, grads = textbook.backward(dy, saved)
    assert {a.dtype for a in (y, dx, *grads.values(), *saved)} == {np.dtype(dtype)}


def test_layouts_hold_all_elements_and_rows_miss_the_samples_of_a_group():
    assert layout("LayerNorm", (2, 3, 4)) == ((2, 3, 4), (4,), (2,), (0, 1))
    assert layout("BatchNorm", (2, 3, 4)) == ((2, 3, 4), (3, 1), (0, 2), (0, 2))
    assert layout("GroupNorm", (2, 6), groups=2) == ((2, 2, 3), (2, 3), (2,), (0,))
    assert layout("GroupNorm", (2, 6, 4, 5), groups=2) == ((2, 2, 3, 4, 5), (2, 3, 1, 1), (2, 3, 4), (0, 3, 4))
