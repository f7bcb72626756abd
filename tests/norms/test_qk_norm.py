import numpy as np
import pytest
import torch

from npnorm import CastRMSNorm, QKNorm
from tests.check import BFLOAT16, check_protocol, close, draw, run, same_bits

DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32", "float16", BFLOAT16], ids=str)


def heads(rng, dtype="float64"):
    """Return q and dq of 6 heads, k and dk of 2 heads: (batch, heads, length, head_dim)."""
    shapes = {name: (3, heads, 5, 4) for name, heads in (("q", 6), ("dq", 6), ("k", 2), ("dk", 2))}
    return draw(rng, dtype, **shapes).values()


def joined(x):
    """Take (batch, heads, length, head_dim) to (batch, length, heads head_dim)."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def run_both(layer, q, k, dq, dk):
    """Return what `run` does, for queries and keys."""
    (y_q, y_k), saved = layer.forward(q, k)
    (dx_q, dx_k), grads = layer.backward(dq, dk, saved)
    return {"q": {"y": y_q, "dx": dx_q, **grads["q_norm"]}, "k": {"y": y_k, "dx": dx_k, **grads["k_norm"]}}


def two_norms(w_q, w_k, q, k, dq, dk, **settings):
    """Return the same of two norms."""
    of_q, of_k = (CastRMSNorm(w, **{"cast": None, **settings}) for w in (w_q, w_k))
    return {"q": run(of_q, q, dq), "k": run(of_k, k, dk)}


# rstd = 1 / sqrt(25 + 39) = 1/8 for each head, and for both in a row
Q, K = np.array([[[1.0, 7.0]], [[5.0, -5.0]]]), np.array([[[-7.0, 1.0]]])
DQ, DK = np.array([[[2.0, 1.0]], [[1.0, 1.0]]]), np.array([[[8.0, 8.0]]])


def test_heads_worked_by_hand():
    layer = QKNorm(np.array([2.0, 4.0]), np.array([1.0, -2.0]), eps=39)
    (q, k), saved = layer.forward(Q, K)
    np.testing.assert_array_equal(q, [[[1 / 4, 7 / 2]], [[5 / 4, -5 / 2]]])
    np.testing.assert_array_equal(k, [[[-7 / 8, -1 / 4]]])
    # first head: dz = (4, 4), mean(dz z) = 2, dx = 1/8 ((4, 4) - 2 z); second: dz = (2, 4), mean(dz z) = -5/8
    # keys: dz = (8, -16), mean(dz z) = -9/2
    (dq, dk), grads = layer.backward(DQ, DK, saved)
    np.testing.assert_array_equal(dq, [[[15 / 32, 9 / 32]], [[153 / 512, 231 / 512]]])
    np.testing.assert_array_equal(dk, [[[65 / 128, -247 / 128]]])
    np.testing.assert_array_equal(grads["q_norm"]["weight"], [7 / 8, 1 / 4])
    np.testing.assert_array_equal(grads["k_norm"]["weight"], [-7, 1])


def test_the_full_width_worked_by_hand():
    layer = QKNorm(np.array([2.0, 4.0, 2.0, 4.0]), np.array([1.0, -2.0]), eps=39, full_width=True)
    (q, _), saved = layer.forward(Q.reshape(1, 4), K.reshape(1, 2))
    np.testing.assert_array_equal(q, [[1 / 4, 7 / 2, 5 / 4, -5 / 2]])
    # dz = (4, 4, 2, 4), dz z = (1/2, 7/2, 5/4, -5/2), mean(dz z) = 11/16
    (dq, _), grads = layer.backward(DQ.reshape(1, 4), DK.reshape(1, 2), saved)
    np.testing.assert_array_equal(dq, [[501 / 1024, 435 / 1024, 201 / 1024, 567 / 1024]])
    np.testing.assert_array_equal(grads["q_norm"]["weight"], [1 / 4, 7 / 8, 5 / 8, -5 / 8])


@DTYPES
@pytest.mark.parametrize("settings", [{}, {"cast": "llama"}, {"offset": 1, "cast": "gemma"}, {"eps": 0.3}], ids=str)
def test_each_head_is_an_rms_norm_bit_for_bit(dtype, settings):
    rng = np.random.default_rng(1)
    q, dq, k, dk = heads(rng, dtype)
    w_q, w_k = rng.standard_normal((2, 4)).astype(dtype)
    came = run_both(QKNorm(w_q, w_k, **settings), q, k, dq, dk)
    same_bits(came, two_norms(w_q, w_k, q, k, dq, dk, **settings))
    alone, _ = CastRMSNorm(w_q, **{"cast": None, **settings}).forward(np.ascontiguousarray(q[:, 4]))
    same_bits(np.ascontiguousarray(came["q"]["y"][:, 4]), alone)


@DTYPES
def test_the_full_width_is_an_rms_norm_of_the_joined_heads_bit_for_bit(dtype):
    rng = np.random.default_rng(2)
    q, dq, k, dk = (joined(x) for x in heads(rng, dtype))
    w_q, w_k = rng.standard_normal(24).astype(dtype), rng.standard_normal(8).astype(dtype)
    came = run_both(QKNorm(w_q, w_k, full_width=True), q, k, dq, dk)
    same_bits(came, two_norms(w_q, w_k, q, k, dq, dk))


def test_the_two_forms_differ_where_heads_are_of_different_size():
    q = np.array([[[1.0, 2.0, 30.0, 40.0]]])
    full = QKNorm(np.ones(4), np.ones(4), full_width=True).forward(q, q)[0][0]
    heads = QKNorm.init(2, "float64").forward(q.reshape(1, 2, 1, 2), q.reshape(1, 2, 1, 2))[0][0]
    assert np.abs(heads.ravel() - full.ravel()).max() > 0.1


@pytest.mark.parametrize("full_width", [False, True])
def test_torch_gives_the_same(full_width):
    rng = np.random.default_rng(3)
    arrays = heads(rng)
    q, dq, k, dk = map(joined, arrays) if full_width else arrays
    w_q, w_k = rng.standard_normal(q.shape[-1]), rng.standard_normal(k.shape[-1])
    at = {name: torch.tensor(a, requires_grad=True) for name, a in {"q": q, "k": k, "w_q": w_q, "w_k": w_k}.items()}

    def normalized(x, w):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 0.2) * w

    expected = {name: normalized(at[name], at[f"w_{name}"]) for name in ("q", "k")}
    torch.autograd.backward(list(expected.values()), [torch.tensor(dq), torch.tensor(dk)])
    came = run_both(QKNorm(w_q, w_k, eps=0.2, full_width=full_width), q, k, dq, dk)
    for name in ("q", "k"):
        close(came[name]["y"], expected[name].detach())
        close(came[name]["dx"], at[name].grad)
        close(came[name]["weight"], at[f"w_{name}"].grad)


def test_queries_and_keys_may_have_different_dtypes_and_shapes():
    rng = np.random.default_rng(4)
    q, k = rng.standard_normal((2, 6, 3, 4)).astype("float32"), rng.standard_normal((2, 7, 4)).astype("float16")
    (y_q, y_k), saved = QKNorm.init(4).forward(q, k)
    (dq, dk), _ = QKNorm.init(4).backward(q, k, saved)
    assert y_q.dtype == dq.dtype == np.float32
    assert y_k.dtype == dk.dtype == np.float16
    assert (dq.shape, dk.shape) == (q.shape, k.shape)


def test_no_score_is_larger_than_the_root_of_head_dim():
    rng = np.random.default_rng(5)
    q, _, k, _ = heads(rng)
    (q, k), _ = QKNorm.init(4, "float64", eps=0).forward(1e5 * q, k)
    scores = np.einsum("bhtd,bgsd->bhgts", q, k) / 2
    assert 1.5 < np.abs(scores).max() <= 2 * (1 + 1e-15)


def test_forward_and_backward_leave_everything_as_it_was():
    rng = np.random.default_rng(6)
    q, _, k, dk = heads(rng)

    class OfQueries:
        """The layer as one of a single input."""

        def __init__(self, params):
            self.layer = QKNorm(**params)

        def forward(self, x):
            (y, _), saved = self.layer.forward(x, k)
            return y, saved

        def backward(self, dy, saved):
            (dx, _), grads = self.layer.backward(dy, dk, saved)
            return dx, grads

    before = k.copy(), dk.copy()
    params = {"q_weight": rng.standard_normal(4), "k_weight": rng.standard_normal(4)}
    check_protocol(OfQueries, params, q, rng)
    same_bits({"k": k, "dk": dk}, dict(zip(("k", "dk"), before, strict=True)))


def test_a_weight_must_be_given():
    with pytest.raises(TypeError, match=r"QKNorm: weight must be an array of shape .*; got a NoneType"):
        QKNorm(np.ones(4), None)


def test_each_weight_keeps_the_digits_of_its_own_dtype():
    q = np.array([[1.0, -1.0]])
    small = np.full(2, 1e-9)
    (narrow, wide), _ = QKNorm(small.astype("float32"), small, eps=0, offset=1).forward(q, q)
    same_bits(narrow, q)  # 1 + 1e-9 is 1 in float32
    close(wide, q * (1 + small), 1e-15)


@pytest.mark.parametrize("dtypes", [("float32", "float64"), ("float64", "float32"), ("float16", "float64")], ids=str)
@pytest.mark.parametrize("compute", [None, "float32"])
def test_two_weights_of_different_dtypes_are_two_norms(dtypes, compute):
    if compute and "float64" in dtypes:
        dtypes = tuple(dtype.replace("float64", "float16") for dtype in dtypes)
    rng = np.random.default_rng(7)
    q, k, dq, dk = rng.standard_normal((4, 4, 16, 64)).astype("float32")
    w_q, w_k = (1e-3 * rng.standard_normal(64).astype(dtype) for dtype in dtypes)
    layer = QKNorm(w_q, w_k, offset=1, compute=compute)
    for _ in range(2):  # the second time with the same arrays
        came = run_both(layer, q, k, dq, dk)
        same_bits(came, two_norms(w_q, w_k, q, k, dq, dk, offset=1, compute=compute))
