"""The checkers can fail: each fault is easily made, several were in published code, and each turns the checkers red."""

from functools import partial

import numpy as np
import pytest

from npnorm import Config, LayerNorm, RMSNorm, Transformer
from npnorm.blocks import DeepNorm, PostNorm, PreNorm, ResPostNorm
from npnorm.config import init
from npnorm.layers import GELU, MLP, Attention, CrossEntropy, Embedding, Linear, Rotary
from npnorm.tree import map_tree
from tests.check import (
    WithLoss,
    check_backward,
    check_central_difference,
    check_finite_differences,
    check_protocol,
    close,
    draw,
    exact_norm,
)

WIDTH = 6
CHECKS = pytest.mark.parametrize("check", [check_backward, check_central_difference])


def mean(a):
    return a.mean(axis=-1, keepdims=True)


class NoMeanOfDz(LayerNorm):
    def backward(self, dy, saved):
        dx, grads = super().backward(dy, saved)
        return dx + saved.rstd * mean(dy * self.params["weight"]), grads


class NoMeanOfDzz(LayerNorm):
    def backward(self, dy, saved):
        dz, rstd = dy * self.params["weight"], saved.rstd
        return rstd * (dz - mean(dz)), super().backward(dy, saved)[1]


class RstdWithoutEps(LayerNorm):
    def backward(self, dy, saved):
        return super().backward(dy, saved._replace(rstd=1 / np.sqrt(saved.x.var(axis=-1, keepdims=True))))


class WeightGradientOfX(LayerNorm):
    def backward(self, dy, saved):
        dx, grads = super().backward(dy, saved)
        return dx, grads | {"weight": np.sum(dy * saved.x, axis=0)}


class OneFeatureLess(RMSNorm):
    """The mean of backward is over n - 1."""

    def backward(self, dy, saved):
        dx, grads = super().backward(dy, saved)
        z = saved.x * saved.rstd
        return dx - saved.rstd * z * mean(dy * self.params["weight"] * z) / (WIDTH - 1), grads


class WeightTwice(RMSNorm):
    def backward(self, dy, saved):
        dx, _ = super().backward(dy * self.params["weight"], saved)
        return dx, super().backward(dy, saved)[1]


class NoBiasGradient(MLP):
    def backward(self, dy, saved):
        dx, grads = super().backward(dy, saved)
        down = grads["down_proj"]
        return dx, grads | {"down_proj": down | {"bias": np.zeros_like(down["bias"])}}


class GELUOfAnotherForm(GELU):
    """The derivative of x sigmoid(1.702 x)."""

    def backward(self, dy, saved):
        s = 1 / (1 + np.exp(-1.702 * saved.x))
        return dy * s * (1 + 1.702 * saved.x * (1 - s)), {}


class TimesForKeys(Linear):
    """A linear layer of which some gradients come in multiplied."""

    def backward(self, dy, saved):
        dy = dy.copy()
        dy[..., self.keys] *= self.factor
        return super().backward(dy, saved)


class UnscaledKeys(Attention):
    """The gradient of the keys is not divided by sqrt(d)."""

    def _qkv(self):
        qkv = TimesForKeys(**super()._qkv().params)
        qkv.keys = slice(self.features, self.features + self.kv_features)
        qkv.factor = self.d**0.5
        return qkv


class NoSoftmaxSum(Attention):
    """The gradient of the softmax is only p dp."""

    def backward(self, dy, saved):
        do, _ = self.o.backward(dy, saved.o_proj)
        do = self._split(do)
        shift = np.sum(do @ saved.v.swapaxes(-1, -2) * saved.p, axis=-1, keepdims=True)
        ds = saved.p * shift / self.d**0.5  # what was subtracted, added again
        dqkv = np.zeros((*dy.shape[:-1], self.features + 2 * self.kv_features))
        dq, _, _ = self._parts(dqkv)
        dq[...] = ds @ saved.k
        dx, grads = super().backward(dy, saved)
        more, grads_q = self._qkv().backward(dqkv, saved.qkv_proj)
        grads["q_proj"]["weight"] += grads_q["weight"][: self.features]
        return dx + more, grads


class TurnsTheSameWay(Rotary):
    def backward(self, dy, saved):
        return super().backward(dy, saved._replace(sin=-saved.sin))


class ForgetsResidualPre(PreNorm):
    def backward(self, dy, saved):
        dx, grads = super().backward(dy, saved)
        return dx - dy, grads


class ForgetsResidualResPost(ResPostNorm):
    def backward(self, dy, saved):
        dx, grads = super().backward(dy, saved)
        return dx - dy, grads


class AlphaOnTheOtherBranch(DeepNorm):
    def backward(self, dy, saved):
        ds, norm = self.norm.backward(dy, saved.norm)
        dx, sublayer = self.sublayer.backward(ds, saved.sublayer)
        return ds + self.alpha * dx, {"norm": norm, "sublayer": sublayer}


class ForgetsResidualPost(PostNorm):
    def backward(self, dy, saved):
        dx, grads = super().backward(dy, saved)
        return dx - self.norm.backward(dy, saved.norm)[0], grads


class LastTokenWins(Embedding):
    """Repeated ids overwrite their gradient instead of adding to it."""

    def backward(self, dx, saved):
        dw = np.zeros_like(self.params["weight"])
        dw[saved.rows] = dx
        return None, {"weight": dw}


class ForgetsTheHead(Linear):
    def backward(self, dy, saved):
        dx, grads = super().backward(dy, saved)
        return dx, map_tree(np.zeros_like, grads)


class TiedInForwardOnly(Transformer):
    def __init__(self, config, params):
        super().__init__(config, params)
        self.head = ForgetsTheHead(**self.head.params)


class SumOfRows(CrossEntropy):
    """The loss is a mean, its gradient that of a sum."""

    def backward(self, dloss, saved):
        return super().backward(dloss, saved) * (saved.p.size // saved.p.shape[-1])


class RemembersOnItself(LayerNorm):
    def forward(self, x):
        y, self.__dict__["saved"] = super().forward(x)
        return y, None

    def backward(self, dy, saved):
        return super().backward(dy, self.saved)


class ChangesItsInput(RMSNorm):
    def backward(self, dy, saved):
        dy *= 2
        return super().backward(dy / 2, saved)


class ChangesWhatItSaved(RMSNorm):
    def backward(self, dy, saved):
        result = super().backward(dy, saved)
        saved.rstd[:] *= 2
        return result


class DropsAGradient(LayerNorm):
    def backward(self, dy, saved):
        dx, grads = super().backward(dy, saved)
        return dx, {"weight": grads["weight"]}


class Float32Gradient(RMSNorm):
    def backward(self, dy, saved):
        dx, grads = super().backward(dy, saved)
        return dx, {"weight": grads["weight"].astype("float32")}


@CHECKS
@pytest.mark.parametrize("fault", [NoMeanOfDz, NoMeanOfDzz, RstdWithoutEps, WeightGradientOfX])
def test_a_fault_in_layer_norm_is_caught(check, fault):
    rng = np.random.default_rng(1)
    params, x = draw(rng, weight=WIDTH, bias=WIDTH), rng.standard_normal((4, WIDTH))
    check(lambda p: LayerNorm(**p), params, x, rng)
    with pytest.raises(AssertionError, match=r"derivative: analytic .*, numeric"):
        check(lambda p: fault(**p), params, x, rng)


@CHECKS
@pytest.mark.parametrize("fault", [OneFeatureLess, WeightTwice])
def test_a_fault_in_rms_norm_is_caught(check, fault):
    rng = np.random.default_rng(2)
    params, x = draw(rng, weight=WIDTH), rng.standard_normal((4, WIDTH))
    check(lambda p: RMSNorm(**p), params, x, rng)
    with pytest.raises(AssertionError, match=r"derivative: analytic .*, numeric"):
        check(lambda p: fault(**p), params, x, rng)


def test_a_fault_in_both_passes_is_caught_by_the_truth():
    """The variance of n - 1, consistently: backward is its derivative, and yet it is not the norm."""
    rng = np.random.default_rng(3)
    x, dy = rng.standard_normal((4, WIDTH)), rng.standard_normal((4, WIDTH))
    factor = ((WIDTH - 1) / WIDTH) ** 0.5

    class UnbiasedVariance(LayerNorm):
        def forward(self, x):
            y, saved = super().forward(x)
            return y * factor, saved

        def backward(self, dy, saved):
            return super().backward(dy * factor, saved)

    check_backward(lambda p: UnbiasedVariance(**p, eps=0), {}, x, rng)
    truth = exact_norm(x, np.ones(WIDTH), np.zeros(WIDTH), 0, dy, centred=True)[0]
    close(LayerNorm(eps=0).forward(x)[0], truth)
    with pytest.raises(AssertionError, match="not within"):
        close(UnbiasedVariance(eps=0).forward(x)[0], truth)


def test_finite_differences_of_each_entry_catch_a_fault():
    rng = np.random.default_rng(4)
    params, x = draw(rng, weight=WIDTH, bias=WIDTH), rng.standard_normal((4, WIDTH))
    check_finite_differences(lambda p: LayerNorm(**p), params, x, rng)
    with pytest.raises(AssertionError, match="not within"):
        check_finite_differences(lambda p: RstdWithoutEps(**p, eps=1e-4), params, x, rng)


@CHECKS
def test_a_forgotten_bias_gradient_is_caught(check):
    rng = np.random.default_rng(5)
    params = {
        "up_proj": draw(rng, weight=(9, WIDTH), bias=9),
        "down_proj": draw(rng, weight=(WIDTH, 9), bias=WIDTH),
    }
    x = rng.standard_normal((4, WIDTH))
    check(MLP, params, x, rng)
    with pytest.raises(AssertionError, match="derivative"):
        check(NoBiasGradient, params, x, rng)


@CHECKS
def test_the_derivative_of_another_gelu_is_caught(check):
    rng = np.random.default_rng(6)
    x = rng.standard_normal((4, WIDTH))
    check(lambda _: GELU(), {}, x, rng)
    with pytest.raises(AssertionError, match="derivative"):
        check(lambda _: GELUOfAnotherForm(), {}, x, rng)


@CHECKS
@pytest.mark.parametrize("fault", [UnscaledKeys, NoSoftmaxSum])
def test_a_fault_in_attention_is_caught(check, fault):
    rng = np.random.default_rng(7)
    params = {
        name: draw(rng, weight=(rows, columns))
        for name, rows, columns in (("q_proj", 8, 6), ("k_proj", 4, 6), ("v_proj", 4, 6), ("o_proj", 6, 8))
    }
    x = rng.standard_normal((2, 5, WIDTH))
    check(lambda p: Attention(p, 4, 2), params, x, rng)
    with pytest.raises(AssertionError, match="derivative"):
        check(lambda p: fault(p, 4, 2), params, x, rng)


@CHECKS
def test_a_rotation_the_same_way_back_is_caught(check):
    rng = np.random.default_rng(8)
    x = rng.standard_normal((2, 5, WIDTH))
    check(lambda _: Rotary(), {}, x, rng)
    with pytest.raises(AssertionError, match="derivative"):
        check(lambda _: TurnsTheSameWay(), {}, x, rng)


@CHECKS
@pytest.mark.parametrize(
    ("place", "fault"),
    [
        (PreNorm, ForgetsResidualPre),
        (PostNorm, ForgetsResidualPost),
        (ResPostNorm, ForgetsResidualResPost),
        (partial(DeepNorm, alpha=1.5), partial(AlphaOnTheOtherBranch, alpha=1.5)),
    ],
    ids=["pre", "post", "res-post", "deep"],
)
def test_a_forgotten_residual_or_a_misplaced_alpha_is_caught(check, place, fault):
    rng = np.random.default_rng(9)
    params = {"norm": draw(rng, weight=WIDTH), "sublayer": draw(rng, weight=(WIDTH, WIDTH))}
    x = rng.standard_normal((4, WIDTH))
    check(lambda p: place(RMSNorm(**p["norm"]), Linear(**p["sublayer"])), params, x, rng)
    with pytest.raises(AssertionError, match="derivative"):
        check(lambda p: fault(RMSNorm(**p["norm"]), Linear(**p["sublayer"])), params, x, rng)


@CHECKS
def test_overwriting_the_gradient_of_a_repeated_id_is_caught(check):
    rng = np.random.default_rng(10)
    params, ids = draw(rng, weight=(7, WIDTH)), np.array([3, 1, 3, 5])
    check(lambda p: Embedding(**p), params, ids, rng)
    with pytest.raises(AssertionError, match="derivative"):
        check(lambda p: LastTokenWins(**p), params, ids, rng)


@CHECKS
def test_a_forgotten_head_of_a_tied_table_is_caught(check):
    rng = np.random.default_rng(11)
    config = Config.original(12, width=24, depth=1, heads=6, kv_heads=3, hidden=36, context=7)
    params = map_tree(lambda a: a + 0.3 * rng.standard_normal(a.shape), init(config, rng, "float64"))
    ids, targets = (rng.integers(0, 12, (3, 5)) for _ in range(2))
    check(lambda p: WithLoss(Transformer(config, p), targets), params, ids, rng)
    with pytest.raises(AssertionError, match="derivative"):
        check(lambda p: WithLoss(TiedInForwardOnly(config, p), targets), params, ids, rng)


@CHECKS
def test_the_gradient_of_a_summed_loss_is_caught(check, monkeypatch):
    rng = np.random.default_rng(12)
    params, x, targets = draw(rng, weight=(5, WIDTH)), rng.standard_normal((4, WIDTH)), rng.integers(0, 5, 4)
    check(lambda p: WithLoss(Linear(**p), targets), params, x, rng)
    monkeypatch.setattr("tests.check.CrossEntropy", SumOfRows)
    with pytest.raises(AssertionError, match="derivative"):
        check(lambda p: WithLoss(Linear(**p), targets), params, x, rng)


@pytest.mark.parametrize("fault", [RemembersOnItself, ChangesItsInput, ChangesWhatItSaved])
def test_a_layer_with_side_effects_is_caught(fault):
    rng = np.random.default_rng(13)
    params, x = draw(rng, weight=WIDTH), rng.standard_normal((4, WIDTH))
    check_protocol(lambda p: RMSNorm(**p), params, x, rng)
    with pytest.raises(AssertionError, match="other bits"):
        check_protocol(lambda p: fault(**p), params, x, rng)


@CHECKS
@pytest.mark.parametrize("fault", [DropsAGradient, Float32Gradient])
def test_a_missing_gradient_and_one_of_another_dtype_are_caught(check, fault):
    rng = np.random.default_rng(14)
    params, x = draw(rng, weight=WIDTH, bias=WIDTH), rng.standard_normal((4, WIDTH))
    with pytest.raises(AssertionError, match=r"gradients .*, expected"):
        check(lambda p: fault(**p), params, x, rng)


def test_comparisons_catch_nan_shapes_and_single_bits():
    a = np.array([1.0, 2.0])
    for other in (np.array([1.0, np.nan]), np.array([[1.0, 2.0]]), np.array([1.0, 2.0 + 1e-11])):
        with pytest.raises(AssertionError):
            close(other, a)
    with pytest.raises(AssertionError):
        close(a, np.array([1.0, np.nan]))
