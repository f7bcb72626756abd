import math

import numpy as np
import pytest
import torch

from npnorm import LayerNorm, PartialRMSNorm, RMSNorm
from npnorm.blocks import Chain
from npnorm.layers import GRU, Embedding, GRUCell, Linear
from npnorm.tree import leaves, map_tree
from tests.check import WithLoss, check_backward, check_central_difference, check_finite_differences, close, same_bits

INPUTS, DIM = 5, 4
FEATURES = {"ih_gates": 2, "ih_candidate": 1, "hh_gates": 2, "hh_candidate": 1}  # times dim
EPS = 0.1  # beside the variance it counts; and where h is zero, so is what is normalized
KINDS = {
    "none": None,
    "LayerNorm": lambda **p: LayerNorm(**p, eps=EPS),
    "RMSNorm": lambda **p: RMSNorm(**p, eps=EPS),
    "PartialRMSNorm": lambda **p: PartialRMSNorm(**p, p=0.3, eps=EPS),
}
ALL = pytest.mark.parametrize("kind", KINDS)


def draw(rng, kind="none", inputs=INPUTS, dim=DIM, biases=("bias_ih", "bias_hh"), normalized=tuple(FEATURES)):
    params = {"weight_ih": rng.standard_normal((3 * dim, inputs)), "weight_hh": rng.standard_normal((3 * dim, dim))}
    params |= {name: rng.standard_normal(3 * dim) for name in biases}
    if kind != "none":
        with_bias = ("weight", "bias") if kind == "LayerNorm" else ("weight",)
        for name in normalized:
            params[name] = {p: rng.standard_normal(FEATURES[name] * dim) for p in with_bias}
    return params


def making(kind, layer=GRU):
    """Return what makes the layer from the whole tree of parameters."""

    def make(params):
        norms = {name: KINDS[kind](**p) for name, p in params.items() if name in FEATURES}
        return layer({name: a for name, a in params.items() if name not in FEATURES}, norms)

    return make


class FromState:
    """A recurrent layer whose state before the first step is one more parameter."""

    def __init__(self, layer, h):
        self.layer, self.params = layer, {"h": h, "layer": layer.params}

    def forward(self, x):
        return self.layer.forward(x, self.params["h"])

    def backward(self, dy, saved):
        (dx, dh), grads = self.layer.backward(dy, saved)
        return dx, {"h": dh, "layer": grads}


def from_state(kind, layer):
    return lambda params: FromState(making(kind, layer)(params["layer"]), params["h"])


def column(*values):
    return np.array(values, float)[:, None]


def test_a_step_of_one_feature_worked_by_hand():
    # r = 3/4, z = 1/4, n = tanh(an + 3/4 cn) with cn = 4 and an = log 2 - 3: tanh(log 2) = 3/5
    # h' = 3/4 3/5 + 1/4 2; with dh' = 16: dan = 16 3/4 16/25, dcn = 3/4 dan, dr = dcn 4 1/4, dz = 16 (2 - 3/5) 3/16
    log3, an = math.log(3), math.log(2) - 3
    params = {"weight_ih": column(log3, -log3, an), "weight_hh": column(0, 0, 2)}
    cell = GRUCell(params | {"bias_ih": np.zeros(3), "bias_hh": np.zeros(3)})
    h, saved = cell.forward(np.array([[1.0]]), np.array([[2.0]]))
    close(h, [[0.95]], 1e-15)
    (dx, dh), grads = cell.backward(np.array([[16.0]]), saved)
    close(dx, [[5.76 * log3 - 4.2 * log3 + 7.68 * an]], 1e-14)
    close(dh, [[16 / 4 + 5.76 * 2]], 1e-14)
    close(grads["weight_ih"], column(5.76, 4.2, 7.68), 1e-14)
    close(grads["weight_hh"], 2 * column(5.76, 4.2, 5.76), 1e-14)
    close(grads["bias_ih"], [5.76, 4.2, 7.68], 1e-14)
    close(grads["bias_hh"], [5.76, 4.2, 5.76], 1e-14)


def test_a_step_with_a_norm_worked_by_hand():
    # an = a w / sqrt(a^2 + 3) with a = 1 and w = 2 log 2: log 2, of slope 3/8 w; z = 1/2 and h = 0: h' = 3/10
    log2 = math.log(2)
    norm = RMSNorm(np.array([2 * log2]), eps=3)
    gru = GRU({"weight_ih": column(0, 0, 1), "weight_hh": np.zeros((3, 1))}, {"ih_candidate": norm})
    y, saved = gru.forward(np.array([[[1.0]]]))
    close(y, [[[0.3]]], 1e-15)
    dx, grads = gru.backward(np.array([[[1.0]]]), saved)
    dan = 16 / 25 / 2
    close(dx, [[[dan * 3 / 4 * log2]]], 1e-14)
    close(grads["ih_candidate"]["weight"], [dan / 2], 1e-14)


@ALL
@pytest.mark.parametrize("biases", [(), ("bias_ih",), ("bias_hh",), ("bias_ih", "bias_hh")], ids="+".join)
def test_backward_is_the_derivative(kind, biases):
    rng = np.random.default_rng(1)
    params, x = draw(rng, kind, biases=biases), rng.standard_normal((2, 3, INPUTS))
    check_backward(making(kind), params, x, rng)
    params, x = {"h": rng.standard_normal((2, DIM)), "layer": params}, rng.standard_normal((2, 3, INPUTS))
    check_backward(from_state(kind, GRU), params, x, rng)


@ALL
def test_backward_of_a_cell_is_the_derivative(kind):
    rng = np.random.default_rng(2)
    params = {"h": rng.standard_normal((3, DIM)), "layer": draw(rng, kind)}
    check_backward(from_state(kind, GRUCell), params, rng.standard_normal((3, INPUTS)), rng)


@pytest.mark.parametrize("normalized", [("ih_gates",), ("hh_candidate",), ("ih_candidate", "hh_gates")], ids="+".join)
def test_what_has_no_norm_stays_as_it_is(normalized):
    rng = np.random.default_rng(3)
    params = draw(rng, "LayerNorm", normalized=normalized)
    check_backward(making("LayerNorm"), params, rng.standard_normal((2, 3, INPUTS)), rng)


@ALL
def test_backward_of_a_cell_agrees_with_finite_differences_for_each_entry(kind):
    rng = np.random.default_rng(4)
    params = {"h": rng.standard_normal((3, 2)), "layer": draw(rng, kind, 1, 2)}
    check_finite_differences(from_state(kind, GRUCell), params, rng.standard_normal((3, 1)), rng)


@ALL
def test_backward_of_a_sequence_agrees_with_finite_differences(kind):
    rng = np.random.default_rng(5)
    params = {"h": rng.standard_normal((2, DIM)), "layer": draw(rng, kind)}
    check_central_difference(from_state(kind, GRU), params, rng.standard_normal((2, 7, INPUTS)), rng)


def compare_with_torch(params, y, dx, dh0, grads, expected, dy, tensors):
    expected.backward(torch.tensor(dy))
    close(y, expected.detach())
    close(dx, tensors["x"].grad)
    close(dh0, tensors["h0"].grad)
    theirs = dict(leaves(tensors["params"]))
    assert [name for name, _ in leaves(grads)] == [name for name, _ in leaves(params)]
    for name, came in leaves(grads):
        close(came, theirs[name].grad)


def as_tensors(**arrays):
    return map_tree(lambda a: torch.tensor(a, requires_grad=True), arrays)


def problem(rng, kind):
    """Return parameters, x, h0 and dy, and what comes out."""
    params, x = draw(rng, kind), rng.standard_normal((2, 7, INPUTS))
    h0, dy = rng.standard_normal((2, DIM)), rng.standard_normal((2, 7, DIM))
    layer = making(kind)(params)
    y, saved = layer.forward(x, h0)
    (dx, dh0), grads = layer.backward(dy, saved)
    return params, x, h0, dy, (y, dx, dh0, grads)


def test_torch_gives_the_same():
    params, x, h0, dy, found = problem(np.random.default_rng(6), "none")
    theirs = torch.nn.GRU(INPUTS, DIM, batch_first=True, dtype=torch.float64)
    theirs.load_state_dict({f"{name}_l0": torch.tensor(a) for name, a in params.items()})
    tensors = as_tensors(x=x, h0=h0)
    expected, _ = theirs(tensors["x"], tensors["h0"][None])
    tensors["params"] = {name: getattr(theirs, f"{name}_l0") for name in params}
    compare_with_torch(params, *found, expected, dy, tensors)


def test_torch_gives_the_same_for_a_cell():
    rng = np.random.default_rng(7)
    params, x, h = draw(rng), rng.standard_normal((3, INPUTS)), rng.standard_normal((3, DIM))
    dh = rng.standard_normal((3, DIM))
    cell, theirs = GRUCell(params), torch.nn.GRUCell(INPUTS, DIM, dtype=torch.float64)
    theirs.load_state_dict(map_tree(torch.tensor, params))
    tensors = as_tensors(x=x, h0=h)
    expected = theirs(tensors["x"], tensors["h0"])
    y, saved = cell.forward(x, h)
    (dx, dh0), grads = cell.backward(dh, saved)
    tensors["params"] = dict(theirs.named_parameters())
    compare_with_torch(params, y, dx, dh0, grads, expected, dh, tensors)


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_torch_gives_the_same_with_norms(kind):
    params, x, h0, dy, found = problem(np.random.default_rng(8), kind)
    tensors = as_tensors(x=x, h0=h0, params=params)
    p, h, gates = tensors["params"], tensors["h0"], 2 * DIM

    def norm(name, a):
        function = torch.nn.functional.layer_norm if kind == "LayerNorm" else torch.nn.functional.rms_norm
        return function(a, a.shape[-1:], **p[name], eps=EPS)

    hs = []
    for step in tensors["x"].unbind(1):
        a = step @ p["weight_ih"].T + p["bias_ih"]
        c = h @ p["weight_hh"].T + p["bias_hh"]
        r, z = torch.sigmoid(norm("ih_gates", a[:, :gates]) + norm("hh_gates", c[:, :gates])).chunk(2, dim=1)
        n = torch.tanh(norm("ih_candidate", a[:, gates:]) + r * norm("hh_candidate", c[:, gates:]))
        h = z * h + (1 - z) * n
        hs.append(h)
    compare_with_torch(params, *found, torch.stack(hs, dim=1), dy, tensors)


@ALL
def test_a_sequence_is_a_cell_repeated(kind):
    params, x, h, dy, (y, dx, dh0, grads) = problem(np.random.default_rng(9), kind)
    cell, steps = making(kind, GRUCell)(params), []
    for t in range(x.shape[1]):
        h, saved = cell.forward(x[:, t], h)
        close(h, y[:, t], 1e-14)
        steps.append(saved)
    dh, total = np.zeros_like(h), map_tree(np.zeros_like, params)
    for t in reversed(range(x.shape[1])):
        (dx_t, dh), grads_t = cell.backward(dy[:, t] + dh, steps[t])
        close(dx_t, dx[:, t], 1e-13)
        total = map_tree(np.add, total, grads_t)
    close(dh, dh0, 1e-13)
    for (_, a), (_, b) in zip(leaves(total), leaves(grads), strict=True):
        close(a, b, 1e-13)


@ALL
def test_a_state_that_is_not_given_is_zero(kind):
    rng = np.random.default_rng(10)
    layer, x, dy = making(kind)(draw(rng, kind)), rng.standard_normal((2, 3, INPUTS)), rng.standard_normal((2, 3, DIM))
    y, saved = layer.forward(x)
    y_zero, saved_zero = layer.forward(x, np.zeros((2, DIM)))
    dx, grads = layer.backward(dy, saved)
    (dx_zero, dh0), grads_zero = layer.backward(dy, saved_zero)
    same_bits({"y": y, "dx": dx, **grads}, {"y": y_zero, "dx": dx_zero, **grads_zero})
    assert dh0.shape == (2, DIM)


@ALL
def test_a_sequence_may_be_cut_in_two(kind):
    params, x, h0, dy, (y, dx, dh0, _) = problem(np.random.default_rng(11), kind)
    layer = making(kind)(params)
    first, saved_first = layer.forward(x[:, :3], h0)
    second, saved_second = layer.forward(x[:, 3:], first[:, -1])
    close(np.concatenate([first, second], axis=1), y, 1e-14)
    (dx_second, dh), _ = layer.backward(dy[:, 3:], saved_second)
    dy_first = dy[:, :3].copy()
    dy_first[:, -1] += dh
    (dx_first, dh), _ = layer.backward(dy_first, saved_first)
    close(np.concatenate([dx_first, dx_second], axis=1), dx, 1e-13)
    close(dh, dh0, 1e-13)


@ALL
def test_a_later_step_does_not_change_what_was_before_it(kind):
    rng = np.random.default_rng(12)
    layer, x = making(kind)(draw(rng, kind)), rng.standard_normal((2, 6, INPUTS))
    other = x.copy()
    other[:, 4:] += 1
    y, y_other = layer.forward(x)[0], layer.forward(other)[0]
    same_bits(y[:, :4], y_other[:, :4])
    assert np.all(np.any(y[:, 4:] != y_other[:, 4:], axis=-1))


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm", "PartialRMSNorm"])
def test_with_norms_the_scale_of_the_weights_does_not_count(kind):
    rng = np.random.default_rng(13)
    params, x = draw(rng, kind, biases=("bias_ih",)), rng.standard_normal((2, 3, INPUTS))
    kinds = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm, "PartialRMSNorm": PartialRMSNorm}

    def y(scale):
        norms = {name: kinds[kind](**params[name], eps=0) for name in FEATURES}
        arrays = {name: scale * params[name] for name in ("weight_ih", "weight_hh", "bias_ih")}
        return GRU(arrays, norms).forward(x, np.ones((2, DIM)))[0]

    close(y(8.0), y(1.0), 1e-13)


def test_gates_that_are_full_open_or_shut_do_not_overflow():
    params = {"weight_ih": column(0, 0, 1), "weight_hh": np.zeros((3, 1)), "bias_ih": np.array([-1e4, -1e4, 0])}
    y, saved = GRU(params).forward(np.array([[[2.0]]]), np.array([[5.0]]))
    close(y, [[[math.tanh(2)]]], 1e-15)
    (dx, dh0), _ = GRU(params).backward(np.ones((1, 1, 1)), saved)
    close(dx, [[[1 - math.tanh(2) ** 2]]], 1e-14)
    np.testing.assert_array_equal(dh0, [[0]])
    y, _ = GRU(params | {"bias_ih": np.array([1e4, 1e4, 0])}).forward(np.array([[[2.0]]]), np.array([[5.0]]))
    np.testing.assert_array_equal(y, [[[5]]])


@ALL
def test_a_language_model_up_to_the_loss(kind):
    rng = np.random.default_rng(14)
    ids, targets = rng.integers(0, 11, (2, 6)), rng.integers(0, 11, (2, 6))
    params = {
        "embedding": {"weight": rng.standard_normal((11, INPUTS))},
        "gru": draw(rng, kind),
        "head": {"weight": rng.standard_normal((11, DIM)), "bias": rng.standard_normal(11)},
    }

    def make(p):
        layers = {"embedding": Embedding(**p["embedding"]), "gru": making(kind)(p["gru"]), "head": Linear(**p["head"])}
        return WithLoss(Chain(layers), targets)

    check_backward(make, params, ids, rng)


@ALL
def test_float32_stays_float32(kind):
    rng = np.random.default_rng(15)
    layer = making(kind)(map_tree(lambda a: a.astype("float32"), draw(rng, kind)))
    x, h0 = (rng.standard_normal(shape).astype("float32") for shape in ((2, 3, INPUTS), (2, DIM)))
    y, saved = layer.forward(x, h0)
    (dx, dh0), grads = layer.backward(y, saved)
    assert {a.dtype for a in (y, dx, dh0, *(g for _, g in leaves(grads)))} == {np.dtype("float32")}
    y, saved = layer.forward(x)
    assert {a.dtype for a in (y, layer.backward(y, saved)[0])} == {np.dtype("float32")}


@ALL
def test_an_empty_batch_gives_empty_results_and_zero_gradients(kind):
    layer = making(kind)(draw(np.random.default_rng(16), kind))
    y, saved = layer.forward(np.zeros((0, 3, INPUTS)))
    dx, grads = layer.backward(y, saved)
    assert (y.shape, dx.shape) == ((0, 3, DIM), (0, 3, INPUTS))
    same_bits(grads, map_tree(np.zeros_like, layer.params))


def test_nothing_is_split_over_ranks():
    layer = making("LayerNorm")(draw(np.random.default_rng(18), "LayerNorm"))
    assert [name for name, _ in leaves(layer.shards)] == [name for name, _ in leaves(layer.params)]
    assert {axis for _, axis in leaves(layer.shards)} == {None}


@pytest.mark.parametrize(("layer", "shape"), [(GRU, (2, INPUTS)), (GRU, (2, 0, INPUTS)), (GRUCell, (2, 3, INPUTS))])
def test_an_input_of_other_axes_is_refused(layer, shape):
    made = layer(draw(np.random.default_rng(20)))
    with pytest.raises(ValueError, match=rf"{layer.__name__} takes x of shape \(batch, .*inputs\), .*; got \(2, "):
        made.forward(np.ones(shape), np.ones((2, DIM)))


def test_an_input_of_another_width_or_dtype_is_refused():
    layer = GRU(draw(np.random.default_rng(21)))
    with pytest.raises(ValueError, match=r"GRU takes 5 features; x has shape \(2, 3, 6\)"):
        layer.forward(np.ones((2, 3, 6)))
    with pytest.raises(TypeError, match="GRU works in float32 or float64; the dtype of x is int64"):
        layer.forward(np.ones((2, 3, INPUTS), "int64"))


def test_a_state_that_does_not_go_with_x_is_refused():
    layer, x = GRU(draw(np.random.default_rng(22))), np.ones((2, 3, INPUTS))
    with pytest.raises(ValueError, match=r"GRU takes 4 features; h0 has shape \(2, 5\)"):
        layer.forward(x, np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"GRU: h0 has shape \(3, 4\)\. For this x it must be \(2, 4\)"):
        layer.forward(x, np.ones((3, DIM)))
    with pytest.raises(TypeError, match="GRU: h0 is float32, x is float64"):
        layer.forward(x, np.ones((2, DIM), "float32"))
    with pytest.raises(TypeError, match="GRU: h0 must be an array"):
        layer.forward(x, [[0.0] * DIM] * 2)


def test_a_gradient_of_another_shape_is_refused():
    rng = np.random.default_rng(23)
    layer, cell = GRU(draw(rng)), GRUCell(draw(rng))
    _, saved = layer.forward(np.ones((2, 3, INPUTS)))
    with pytest.raises(ValueError, match=r"GRU: dy has shape \(2, 4, 4\)\. For this x it must be \(2, 3, 4\)"):
        layer.backward(np.ones((2, 4, DIM)), saved)
    _, saved = cell.forward(np.ones((2, INPUTS)), np.ones((2, DIM)))
    with pytest.raises(ValueError, match=r"GRUCell: dh has shape \(1, 4\)\. For this x it must be \(2, 4\)"):
        cell.backward(np.ones((1, DIM)), saved)


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
@pytest.mark.parametrize("shape", [(), (11,), (11, 4), (12, 3, 1)])
def test_parameters_of_a_wrong_shape_are_refused(name, shape):
    params = draw(np.random.default_rng(24))
    with pytest.raises(ValueError, match=r"GRU: weight_ih must have shape \(3 dim, inputs\), .*; got weight_ih \("):
        GRU(params | {name: np.ones(shape)})


def test_unknown_or_missing_names_are_refused():
    params = draw(np.random.default_rng(25))
    with pytest.raises(ValueError, match=r"GRU: params has 'weight_ih_l0', which means nothing\. It takes weight_ih, "):
        GRU(params | {"weight_ih_l0": params["weight_ih"]})
    with pytest.raises(ValueError, match="GRUCell: params lacks 'weight_hh'"):
        GRUCell({"weight_ih": params["weight_ih"]})
    with pytest.raises(ValueError, match=r"GRU: norms has 'gates', which means nothing\. It takes ih_gates, ih_cand"):
        GRU(params, {"gates": RMSNorm.init(8)})
    with pytest.raises(TypeError, match="GRU: weight_hh must be an array"):
        GRU(params | {"weight_hh": params["weight_hh"].tolist()})
