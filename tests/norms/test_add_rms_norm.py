import numpy as np
import pytest
import torch

from npnorm import AddRMSNorm, CastRMSNorm, RMSNorm
from tests.check import BFLOAT16, check_protocol, close, draw, rounded, same_bits

DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32", "float16", BFLOAT16], ids=str)


def arrays(rng, dtype="float64"):
    """Return x, residual, dy, dh, weight, bias."""
    shapes = dict.fromkeys(("x", "residual", "dy", "dh"), (4, 3, 7)) | {"weight": 7, "bias": 7}
    return draw(rng, dtype, **shapes).values()


def test_a_row_worked_by_hand():
    # h = (1, 7), rstd = 1 / sqrt(25 + 39) = 1/8, z = (1, 7) / 8
    layer = AddRMSNorm(np.array([2.0, 4.0]), np.array([1.0, -1.0]), eps=39)
    (y, h), saved = layer.forward(np.array([[4.0, 5.0]]), np.array([[-3.0, 2.0]]))
    np.testing.assert_array_equal(y, [[5 / 4, 5 / 2]])
    np.testing.assert_array_equal(h, [[1, 7]])
    # dz = (4, 4), mean(dz z) = 2, norm'(dy) = 1/8 ((4, 4) - 2 z) = (15, 9) / 32; beside it dh passes by
    (dx, dresidual), grads = layer.backward(np.array([[2.0, 1.0]]), np.array([[1.0, -1.0]]), saved)
    np.testing.assert_array_equal(dx, [[47 / 32, -23 / 32]])
    np.testing.assert_array_equal(dresidual, [[47 / 32, -23 / 32]])
    np.testing.assert_array_equal(grads["weight"], [1 / 4, 7 / 8])
    np.testing.assert_array_equal(grads["bias"], [2, 1])


@DTYPES
@pytest.mark.parametrize("settings", [{}, {"offset": 1, "cast": "llama"}, {"eps": 0.3}], ids=str)
def test_in_two_steps_it_is_the_same(dtype, settings):
    x, residual, dy, dh, w, b = arrays(np.random.default_rng(1), dtype)
    fused, norm = AddRMSNorm(w, b, **settings), CastRMSNorm(w, b, **{"cast": None, **settings})
    (y, h), saved = fused.forward(x, residual)
    (dx, dresidual), grads = fused.backward(dy, dh, saved)
    expected_h = x + residual
    expected_y, saved_norm = norm.forward(expected_h)
    d, expected_grads = norm.backward(dy, saved_norm)
    same_bits({"y": y, "h": h, **grads}, {"y": expected_y, "h": expected_h, **expected_grads})
    same_bits(dx, dresidual)
    unit = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10}.get(str(dx.dtype), 2.0**-7)
    close(dx.astype("float64"), (dh + d).astype("float64"), unit)  # which is rounded twice


@pytest.mark.parametrize("dtype", ["float32", "float16", BFLOAT16], ids=str)
def test_the_gradient_is_rounded_once(dtype):
    h, _, dy, dh, w, _ = arrays(np.random.default_rng(7), dtype)
    _, saved = AddRMSNorm(w, eps=0.3).forward(h, np.zeros_like(h))
    (dx, _), _ = AddRMSNorm(w, eps=0.3).backward(dy, dh, saved)
    wide = [a.astype("float64") for a in (h, dy, w)]
    norm = RMSNorm(wide[2], eps=0.3)
    d, _ = norm.backward(wide[1], norm.forward(wide[0])[1])
    same_bits(dx, rounded(dh.astype("float64") + d, np.dtype(dtype)))


def test_what_the_residual_cancels_does_not_overflow_before():
    _, saved = AddRMSNorm(eps=1e-12).forward(np.full((1, 2), 1e-3, "float16"), np.zeros((1, 2), "float16"))
    dy, dh = np.array([[100, -100]], "float16"), np.array([[-6e4, 6e4]], "float16")
    (dx, dresidual), _ = AddRMSNorm(eps=1e-12).backward(dy, dh, saved)
    assert np.all(np.abs(dx.astype("float64") - [[39969, -39969]]) < 32)
    dx[:] = 0
    assert np.all(dresidual != 0)


def test_torch_gives_the_same():
    x, residual, dy, dh, w, _ = arrays(np.random.default_rng(2))
    at = [torch.tensor(a, requires_grad=True) for a in (x, residual, w)]
    h = at[0] + at[1]
    y = torch.nn.functional.rms_norm(h, (7,), at[2], eps=0.1)
    torch.autograd.backward([y, h], [torch.tensor(dy), torch.tensor(dh)])
    layer = AddRMSNorm(w, eps=0.1)
    (came_y, came_h), saved = layer.forward(x, residual)
    (dx, dresidual), grads = layer.backward(dy, dh, saved)
    close(came_y, y.detach())
    close(came_h, h.detach())
    for came, right in zip((dx, dresidual, grads["weight"]), at, strict=True):
        close(came, right.grad)


def test_the_gradient_of_the_residual_does_not_pass_through_the_norm():
    x, residual, dy, dh, w, _ = arrays(np.random.default_rng(3))
    layer = AddRMSNorm(w)
    _, saved = layer.forward(x, residual)
    (dx, _), grads = layer.backward(dy, dh, saved)
    (through, _), wrong_grads = layer.backward(dy + dh, np.zeros_like(dh), saved)  # a well-known mistake
    assert np.abs(dx - through).max() > 0.1
    assert np.abs(grads["weight"] - wrong_grads["weight"]).max() > 0.1
    (without, _), _ = layer.backward(dy, np.zeros_like(dh), saved)
    close(dx - without, dh, 1e-14)


def test_the_rounded_sum_is_what_is_normalized():
    x, residual = np.array([[256.0, 1.0]], BFLOAT16), np.array([[1.0, 0.0]], BFLOAT16)
    (y, h), _ = AddRMSNorm(eps=0).forward(x, residual)
    same_bits(h, np.array([[256.0, 1.0]], BFLOAT16))  # 257 has nine bits
    same_bits(y, RMSNorm(eps=0).forward(h)[0])


def test_inputs_may_be_exchanged():
    x, residual, _, _, w, b = arrays(np.random.default_rng(4))
    layer = AddRMSNorm(w, b)
    (y, h), _ = layer.forward(x, residual)
    (y_other, h_other), _ = layer.forward(residual, x)
    same_bits({"y": y, "h": h}, {"y": y_other, "h": h_other})


def test_forward_and_backward_leave_everything_as_it_was():
    rng = np.random.default_rng(5)
    x, residual, _, dh, w, b = arrays(rng)

    class OfOne:
        """The layer as one of a single input."""

        def __init__(self, params):
            self.layer = AddRMSNorm(**params)

        def forward(self, x):
            (y, _), saved = self.layer.forward(x, residual)
            return y, saved

        def backward(self, dy, saved):
            (dx, _), grads = self.layer.backward(dy, dh, saved)
            return dx, grads

    before = residual.copy(), dh.copy()
    check_protocol(OfOne, {"weight": w, "bias": b}, x, rng)
    same_bits({"residual": residual, "dh": dh}, dict(zip(("residual", "dh"), before, strict=True)))


def test_a_sum_that_overflows_is_no_warning():
    x = np.full((1, 2), 3e38, "float32")
    (_, h), _ = AddRMSNorm().forward(x, x)
    np.testing.assert_array_equal(h, [[np.inf, np.inf]])
