import numpy as np
import pytest
import torch

from npnorm import PartialRMSNorm, RMSNorm
from npnorm.tree import map_tree
from tests.check import BFLOAT16, check_backward, check_finite_differences, close, draw, rounded, run, same_bits

NARROW = pytest.mark.parametrize("dtype", [np.dtype("float32"), np.dtype("float16"), BFLOAT16], ids=str)
SEEDS = pytest.mark.parametrize("seed", [None, 0, 1], ids=["first features", "drawn", "drawn otherwise"])


class Drawn:
    """A PartialRMSNorm that draws the same subset in each forward."""

    def __init__(self, params, p, eps, seed):
        self.params, self.seed = params, seed
        self.norm = PartialRMSNorm(**params, p=p, eps=eps)

    def forward(self, x):
        return self.norm.forward(x, None if self.seed is None else np.random.default_rng(self.seed))

    def backward(self, dy, saved):
        return self.norm.backward(dy, saved)


def test_a_row_worked_by_hand():
    # k = 2, (1 + 9) / 2 = 5, rstd = 1 / sqrt(5 + 11) = 1/4, z = (1, 3, 6, -3) / 4
    x = np.array([[[1.0, 3.0, 6.0, -3.0]]])
    layer = PartialRMSNorm(np.array([4.0, 1.0, 2.0, -1.0]), np.array([0.0, 1.0, 0.0, 2.0]), p=0.5, eps=11)
    y, saved = layer.forward(x)
    np.testing.assert_array_equal(y, [[[1, 7 / 4, 3, 11 / 4]]])
    # dz = (4, 2, -2, -4), dz z = (1, 3/2, -3, 3), sum(dz z) / k = 5/4
    # dx = 1/4 ((4, 2) - 5/4 z) in the subset, 1/4 (-2, -4) outside
    dy = np.array([[[1.0, 2.0, -1.0, 4.0]]])
    dx, grads = layer.backward(dy, saved)
    np.testing.assert_array_equal(dx, [[[59 / 64, 17 / 64, -1 / 2, -1]]])
    np.testing.assert_array_equal(grads["weight"], [1 / 4, 3 / 2, -3 / 2, -3])
    np.testing.assert_array_equal(grads["bias"], dy[0, 0])


@pytest.mark.parametrize(
    ("n", "p", "k"),
    [(300, 0.0625, 19), (100, 0.29, 29), (100, 0.07, 7), (16, 0.0625, 1), (17, 0.0625, 2), (3, 1e-9, 1), (10, 1, 10)],
)
def test_the_part_is_rounded_up_as_it_is_written(n, p, k):
    layer = PartialRMSNorm(p=p, eps=0)
    assert layer.k(n) == k
    x = np.full((1, n), 2.0)
    x[:, k:] = 100
    y, _ = layer.forward(x)
    np.testing.assert_array_equal(y, x / 2)  # no feature beyond the first k counts
    x[:, k - 1] = 200  # the last of them does
    other = k % n
    assert layer.forward(x)[0][0, other] < 0.9 * y[0, other]


def test_a_part_of_a_narrow_dtype_is_taken_as_it_is_written():
    assert PartialRMSNorm(p=np.float32(0.07)).k(100) == 7


@SEEDS
@pytest.mark.parametrize("names", [(), ("weight",), ("weight", "bias")], ids="+".join)
@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.9])
def test_backward_is_the_derivative(seed, names, eps):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 7))
    check_backward(lambda params: Drawn(params, 0.4, eps, seed), draw(rng, **dict.fromkeys(names, 7)), x, rng)


def test_backward_of_a_drawn_subset_agrees_with_finite_differences():
    rng = np.random.default_rng(2)
    x = rng.standard_normal((2, 2, 5))
    check_finite_differences(lambda params: Drawn(params, 0.5, 0.3, 3), draw(rng, weight=5, bias=5), x, rng)


@SEEDS
def test_autograd_of_torch_gives_the_same(seed):
    rng = np.random.default_rng(3)
    x, dy, params = rng.standard_normal((3, 2, 9)), rng.standard_normal((3, 2, 9)), draw(rng, weight=9, bias=9)
    layer = Drawn(params, 0.3, 0.1, seed)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    tensors = {name: torch.tensor(a, requires_grad=True) for name, a in {"x": x, **params}.items()}
    square = tensors["x"][..., saved.subset.astype(bool)].square().mean(dim=-1, keepdim=True)
    expected = tensors["x"] * torch.rsqrt(square + 0.1) * tensors["weight"] + tensors["bias"]
    expected.backward(torch.tensor(dy))
    close(y, expected.detach())
    for name, came in {"x": dx, **grads}.items():
        close(came, tensors[name].grad)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("p", [1, 1.0, np.float32(1)])
@pytest.mark.parametrize("n", [1, 2, 9])
def test_the_whole_is_rms_norm_to_the_bit(dtype, p, n):
    rng = np.random.default_rng(4)
    x, dy = (rng.standard_normal((3, 5, n)).astype(dtype) for _ in range(2))
    params = draw(rng, dtype, weight=n, bias=n)
    same_bits(run(PartialRMSNorm(**params, p=p), x, dy), run(RMSNorm(**params), x, dy))


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e170, 1e300])
def test_the_whole_is_rms_norm_to_the_bit_over_the_whole_range(size):
    rng = np.random.default_rng(5)
    x, dy = rng.uniform(-3, 3, (3, 8)) * size, rng.standard_normal((3, 8))
    same_bits(run(PartialRMSNorm(p=1, eps=0), x, dy), run(RMSNorm(eps=0), x, dy))


def test_without_a_generator_the_first_features_count():
    _, saved = PartialRMSNorm(p=0.3).forward(np.random.default_rng(6).standard_normal((4, 10)))
    np.testing.assert_array_equal(saved.subset, [1] * 3 + [0] * 7)


def test_the_drawn_subset_is_the_one_that_saved_says():
    rng = np.random.default_rng(7)
    x = rng.standard_normal((5, 12))
    y, saved = PartialRMSNorm(p=0.4, eps=0.1).forward(x, np.random.default_rng(0))
    assert sorted(saved.subset) == [0] * 7 + [1] * 5
    square = (x[:, saved.subset == 1] ** 2).mean(axis=-1, keepdims=True)
    close(y, x / np.sqrt(square + 0.1))


def test_a_seed_gives_the_same_subset_again_and_another_seed_another():
    x, layer = np.random.default_rng(8).standard_normal((5, 12)), PartialRMSNorm(p=0.4)
    first, again, other = (layer.forward(x, np.random.default_rng(seed)) for seed in (0, 0, 1))
    same_bits(first[0], again[0])
    assert np.any(first[1].subset != other[1].subset)
    assert np.all(first[0] != other[0])


def test_each_forward_draws_anew_until_every_feature_has_counted():
    x, layer, rng = np.ones((1, 12)), PartialRMSNorm(p=0.25), np.random.default_rng(9)
    subsets = [layer.forward(x, rng)[1].subset for _ in range(40)]
    assert np.all(np.sum(subsets, axis=1) == 3)
    assert np.all(np.sum(subsets, axis=0) > 0)
    assert len({subset.tobytes() for subset in subsets}) > 20


def test_features_within_the_subset_may_change_places():
    rng = np.random.default_rng(10)
    x, dy = rng.standard_normal((2, 4, 6))
    order = [2, 0, 1, 5, 3, 4]
    came, expected = run(PartialRMSNorm(p=0.5), x[:, order], dy[:, order]), run(PartialRMSNorm(p=0.5), x, dy)
    for name, a in expected.items():
        close(came[name], a[..., order], 1e-14)


@SEEDS
def test_a_row_does_not_see_the_length_of_another(seed):
    rng = np.random.default_rng(11)
    x = rng.standard_normal((4, 8))
    y, _ = Drawn({}, 0.5, 0, seed).forward(x)
    close(Drawn({}, 0.5, 0, seed).forward(x * [[1.0], [1e9], [3.0], [1e-200]])[0], y, 1e-14)


@NARROW
@SEEDS
def test_narrow_floats_are_rounded_once(dtype, seed):
    rng = np.random.default_rng(12)
    x, dy = (rng.standard_normal((6, 11)).astype(dtype) for _ in range(2))
    params = draw(rng, dtype, weight=11, bias=11)
    wide = map_tree(lambda a: a.astype("float64"), {"x": x, "dy": dy, "params": params})
    expected = run(Drawn(wide["params"], 0.4, 1e-6, seed), wide["x"], wide["dy"])
    same_bits(run(Drawn(params, 0.4, 1e-6, seed), x, dy), map_tree(lambda a: rounded(a, dtype), expected))


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1.0, 1e20, 5e37])
def test_a_subset_of_another_size_than_the_rest_is_right_in_float32(size):
    x = np.array([[3.0, -4.0, 1.0, 2.0]], "float32")
    x[:, :2] *= np.float32(size)
    expected = x.astype("float64") / np.sqrt((x[:, :2].astype("float64") ** 2).sum() / 2)
    same_bits(PartialRMSNorm(p=0.5, eps=0).forward(x)[0], expected.astype("float32"))


@pytest.mark.parametrize(
    "size",
    [1e-200, 1e-160, 1e-100, 1e100, 1e200],
)
def test_a_subset_of_another_size_than_the_rest_is_right_in_float64(size):
    x = np.array([[3 * size, -4 * size, 1.0, 2.0]])
    y, _ = PartialRMSNorm(p=0.5, eps=0).forward(x)
    expected = np.array([[3.0, -4.0, 1 / size, 2 / size]]) / np.sqrt(12.5)
    np.testing.assert_allclose(y, expected, rtol=1e-14)


@pytest.mark.parametrize(
    "size",
    [1e-300, 1e100, 1e150, 1e160, 1e200],
)
def test_features_outside_the_subset_may_be_of_any_size(size):
    y, _ = PartialRMSNorm(p=0.5).forward(np.array([[3.0, -4.0, size, 2 * size]]))
    expected = np.array([[3.0, -4.0, size, 2 * size]]) / np.sqrt(12.5 + 1e-6)
    np.testing.assert_allclose(y, expected, rtol=1e-14)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_feature_outside_the_subset_that_is_not_finite_stays_alone(bad):
    y, _ = PartialRMSNorm(p=0.5, eps=0).forward(np.array([[1.0, -1.0, bad, 2.0]]))
    np.testing.assert_array_equal(y, [[1, -1, bad, 2]])


@pytest.mark.parametrize("rng", [0, np.random, np.random.RandomState(0)], ids=["a seed", "a module", "RandomState"])
def test_what_is_not_a_generator_is_refused(rng):
    with pytest.raises(TypeError, match=rf"PartialRMSNorm: rng is a {type(rng).__name__}\. Pass a generator"):
        PartialRMSNorm(p=0.5).forward(np.ones((2, 4)), rng)
