import copy
import functools
import pickle
import re

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from npnorm import Config, DyT, PartialRMSNorm, Transformer
from npnorm.config import init
from npnorm.tree import leaves, map_tree
from tests.check import WithLoss, check_backward, check_central_difference, close, same_bits

SIZES = {"width": 24, "depth": 2, "heads": 6, "kv_heads": 3, "hidden": 36, "context": 7}
CONFIGS = {
    "original": Config.original(12, **SIZES),
    "original, a head of its own": Config.original(12, **SIZES, tied=False),
    "modern": Config.modern(12, **SIZES),
    "modern, tied, with biases": Config.modern(12, **SIZES, tied=True, bias=True),
    "pre-LayerNorm, rotary": Config.original(12, **SIZES, placement="pre", positions="rotary", bias=False),
    "post-RMSNorm, learned": Config.modern(12, **SIZES, placement="post", positions="learned"),
    "no norm, ReLU, no positions": Config.original(12, **SIZES, placement="none", mlp="relu", positions="none"),
    "res-post-RMSNorm": Config.modern(12, **SIZES, placement="res-post"),
    "sandwich-LayerNorm": Config.modern(12, **SIZES, placement="sandwich", norm="layer"),
    "DeepNorm": Config.original(12, **SIZES, placement="deep"),
    "modern, not causal": Config.modern(12, **SIZES, causal=False),
}
ALL = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
CAUSAL = pytest.mark.parametrize("config", [pytest.param(c, id=name) for name, c in CONFIGS.items() if c.causal])
SMOOTH = pytest.mark.parametrize("config", [pytest.param(c, id=n) for n, c in CONFIGS.items() if c.mlp != "relu"])


def draw(config, rng):
    """Return parameters that are far from where training starts, so that nothing is nearly linear."""
    return map_tree(lambda a: a + 0.3 * rng.standard_normal(a.shape), init(config, rng, "float64"))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def with_loss(config, targets):
    return lambda params: WithLoss(Transformer(config, params), targets)


def torch_logits(config, p, ids):
    """Return the logits by torch's own functions; rotary positions by complex numbers."""
    length, d = ids.shape[1], config.width // config.heads

    def linear(p, x):
        return F.linear(x, p["weight"], p.get("bias"))

    def norm(p, x):
        if config.norm == "layer":
            return F.layer_norm(x, x.shape[-1:], p["weight"], p["bias"], config.eps)
        return F.rms_norm(x, x.shape[-1:], p["weight"], config.eps)

    def turn(x):
        angle = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], dim=-1)

    def attention(p, x):
        q, k, v = (linear(p[n], x).unflatten(-1, (-1, d)).transpose(1, 2) for n in ("q_proj", "k_proj", "v_proj"))
        if config.positions == "rotary":
            q, k = turn(q), turn(k)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=config.causal, enable_gqa=True)
        return linear(p["o_proj"], o.transpose(1, 2).flatten(-2))

    def mlp(p, x):
        h = linear(p["up_proj"], x)
        if config.mlp == "swiglu":
            return linear(p["down_proj"], F.silu(linear(p["gate_proj"], x)) * h)
        return linear(p["down_proj"], F.relu(h) if config.mlp == "relu" else F.gelu(h, approximate="tanh"))

    def placed(p, f, x):
        def f_of(x):
            return f(p["sublayer"], x)

        match config.placement:
            case "none":
                return x + f_of(x)
            case "post":
                return norm(p["norm"], x + f_of(x))
            case "pre":
                return x + f_of(norm(p["norm"], x))
            case "res-post":
                return x + norm(p["norm"], f_of(x))
            case "sandwich":
                return x + norm(p["norm2"], f_of(norm(p["norm1"], x)))
            case "deep":
                return norm(p["norm"], (2 * config.depth) ** (1 / 4) * x + f_of(x))

    x = F.embedding(ids, p["embedding"]["weight"])
    if config.positions == "learned":
        x = x + p["positions"]["weight"][:length]
    for block in p["blocks"].values():
        x = placed(block["attention"], attention, x)
        x = placed(block["mlp"], mlp, x)
    if config.placement in ("pre", "res-post", "sandwich"):
        x = norm(p["norm"], x)
    return x @ (p["embedding"] if config.tied else p["head"])["weight"].T


@ALL
@pytest.mark.parametrize("length", [1, 5, 7])
def test_backward_up_to_the_loss_is_the_derivative(config, length):
    rng = np.random.default_rng(1)
    ids, targets = (rng.integers(0, 12, (3, length)) for _ in range(2))
    check_backward(with_loss(config, targets), draw(config, rng), ids, rng)


@ALL
def test_backward_up_to_the_logits_is_the_derivative(config):
    rng = np.random.default_rng(2)
    check_backward(lambda p: Transformer(config, p), draw(config, rng), rng.integers(0, 12, (3, 5)), rng)


@SMOOTH  # a step of 1e-3 passes the kinks of some of 2,160 hidden features
def test_backward_up_to_the_loss_agrees_with_finite_differences(config):
    rng = np.random.default_rng(3)
    ids, targets = (rng.integers(0, 12, (3, 5)) for _ in range(2))
    check_central_difference(with_loss(config, targets), draw(config, rng), ids, rng)


@ALL
def test_each_parameter_alone_has_the_right_gradient(config):
    rng = np.random.default_rng(4)
    params, ids, targets = draw(config, rng), *(rng.integers(0, 12, (3, 5)) for _ in range(2))
    layer = WithLoss(Transformer(config, params), targets)
    _, grads = layer.backward(1.7, layer.forward(ids)[1])
    for path, gradient in leaves(grads):
        direction = rng.standard_normal(gradient.shape)

        def move(tree, names, by):
            name, *rest = names
            return {**tree, name: move(tree[name], rest, by) if rest else tree[name] + by}

        moved = move(map_tree(lambda a: a + 0j, params), path.split("."), 1e-30j * direction)
        slope = 1.7 * with_loss(config, targets)(moved).forward(ids)[0].imag / 1e-30
        size = np.linalg.norm(gradient) * np.linalg.norm(direction)
        assert abs(slope - np.sum(gradient * direction)) <= 1e-12 * max(size, 1e-3), path


@ALL
def test_torch_gives_the_same_loss_and_gradients(config):
    rng = np.random.default_rng(5)
    params, ids, targets = draw(config, rng), *(rng.integers(0, 12, (3, 5)) for _ in range(2))
    tensors = map_tree(lambda a: torch.tensor(a, requires_grad=True), params)
    logits = torch_logits(config, tensors, torch.tensor(ids))
    expected = F.cross_entropy(logits.flatten(0, 1), torch.tensor(targets).flatten())
    (1.7 * expected).backward()
    layer = WithLoss(Transformer(config, params), targets)
    loss, saved = layer.forward(ids)
    _, grads = layer.backward(1.7, saved)
    close(loss, expected.detach())
    theirs = dict(leaves(tensors))
    assert set(theirs) == {name for name, _ in leaves(grads)}
    for name, gradient in leaves(grads):
        if name.endswith("k_proj.bias") and config.positions != "rotary":  # zero: a softmax does not see a shift
            assert np.abs(gradient).max() < 1e-15
        else:
            close(gradient, theirs[name].grad, 1e-11)


@ALL
def test_float32_stays_float32_and_near_float64(config):
    rng = np.random.default_rng(6)
    params, ids, targets = draw(config, rng), *(rng.integers(0, 12, (3, 5)) for _ in range(2))
    narrow = WithLoss(Transformer(config, map_tree(lambda a: a.astype("float32"), params)), targets)
    loss, saved = narrow.forward(ids)
    _, grads = narrow.backward(np.float32(1.7), saved)
    assert {loss.dtype, *(g.dtype for _, g in leaves(grads))} == {np.dtype("float32")}
    close(loss, WithLoss(Transformer(config, params), targets).forward(ids)[0], 1e-6)


@CAUSAL
def test_a_later_token_does_not_change_a_bit_before_it(config):
    rng = np.random.default_rng(7)
    model, ids = Transformer(config, draw(config, rng)), rng.integers(0, 12, (3, 6))
    other = ids.copy()
    other[:, 4:] = (other[:, 4:] + 5) % 12
    logits, logits_other = model.forward(ids)[0], model.forward(other)[0]
    same_bits(logits[:, :4], logits_other[:, :4])
    assert np.all(np.any(logits[:, 4:] != logits_other[:, 4:], axis=-1))


@CAUSAL
def test_a_beginning_gives_the_logits_of_the_whole(config):
    rng = np.random.default_rng(8)
    model, ids = Transformer(config, draw(config, rng)), rng.integers(0, 12, (3, 7))
    close(model.forward(ids[:, :3])[0], model.forward(ids)[0][:, :3])


def test_the_same_token_elsewhere_gives_other_logits():
    for config in CONFIGS.values():
        rng = np.random.default_rng(9)
        ids = np.array([[1, 2, 3, 1, 2]])
        logits, _ = Transformer(config, draw(config, rng)).forward(ids)
        assert np.abs(logits[0, 0] - logits[0, 3]).max() > 1e-3


def test_without_positions_and_mask_permuted_tokens_give_permuted_logits():
    rng = np.random.default_rng(31)
    config = Config.modern(12, **SIZES, positions="none", causal=False)
    model, ids, order = Transformer(config, draw(config, rng)), rng.integers(0, 12, (3, 7)), rng.permutation(7)
    close(model.forward(ids[:, order])[0], model.forward(ids)[0][:, order])


def test_without_a_mask_a_later_token_is_read():
    rng = np.random.default_rng(32)
    config = CONFIGS["modern, not causal"]
    model, ids = Transformer(config, draw(config, rng)), rng.integers(0, 12, (3, 6))
    other = ids.copy()
    other[:, -1] = (other[:, -1] + 5) % 12
    assert np.all(np.any(model.forward(ids)[0] != model.forward(other)[0], axis=-1))


def results(model, ids):
    """Return logits and gradients."""
    logits, saved = model.forward(ids)
    return {"logits": logits, "grads": model.backward(np.cos(logits), saved)[1]}


@pytest.mark.parametrize(("dtype", "compute"), [("float64", None), ("float32", "float32")])
@pytest.mark.parametrize("placement", ["post", "pre", "sandwich"])
def test_a_function_makes_the_norms(dtype, compute, placement):
    rng = np.random.default_rng(33)
    config, ids = Config.modern(12, **SIZES, placement=placement), rng.integers(0, 12, (3, 5))
    params = map_tree(lambda a: a.astype(dtype), draw(config, rng))

    def model(p):
        return Transformer(
            config, params, norm=lambda params: PartialRMSNorm(**params, p=p, eps=config.eps, compute=compute)
        )

    same_bits(results(model(1), ids), results(Transformer(config, params), ids))
    assert np.abs(results(model(0.25), ids)["logits"] - results(model(1), ids)["logits"]).max() > 0.01
    assert repr(model(0.25)) == repr(model(1)) == repr(Transformer(config, params))


def test_a_model_with_other_norms_backward_is_the_derivative():
    rng = np.random.default_rng(34)
    config = Config.original(12, **SIZES, placement="sandwich", tied=False)

    def make(params):
        return Transformer(config, params, norm=lambda p: PartialRMSNorm(**p, p=0.25))

    check_backward(make, draw(config, rng), rng.integers(0, 12, (3, 5)), rng)


def test_norms_with_parameters_of_their_own_are_learned_and_copied():
    rng = np.random.default_rng(35)
    config, ids = Config.original(12, **SIZES), rng.integers(0, 12, (3, 5))
    model = Transformer(config, draw(config, rng), norm=lambda p: DyT(alpha=np.array(0.5), **p))
    copied = pickle.loads(pickle.dumps(model))
    before = results(model, ids)
    assert before["grads"]["blocks"]["1"]["mlp"]["norm"]["alpha"].shape == ()
    assert [name for name, _ in leaves(model.shards)] == [name for name, _ in leaves(model.params)]
    same_bits(results(copied, ids), before)
    copied.params["blocks"]["1"]["mlp"]["norm"]["alpha"] = np.array(0.75)
    assert not np.array_equal(results(copied, ids)["logits"], before["logits"])


@ALL
def test_the_blocks_can_be_run_one_by_one(config):
    rng = np.random.default_rng(36)
    model, ids = Transformer(config, draw(config, rng)), rng.integers(0, 12, (3, 5))
    logits, saved = model.forward(ids)
    dlogits, parts = rng.standard_normal(logits.shape), model.stack.layers
    x, saved_embedding = model.embedding.forward(ids)
    if "positions" in parts:
        x, _ = parts["positions"].forward(x)
    for block in parts["blocks"].layers.values():
        x, _ = block.forward(x)
    if "norm" in parts:
        x, _ = parts["norm"].forward(x)
    same_bits(model.head.forward(x)[0], logits)

    dx, _ = model.head.backward(dlogits, saved.head)
    if "norm" in parts:
        dx, _ = parts["norm"].backward(dx, saved.stack["norm"])
    grads = {}
    for name, block in reversed(parts["blocks"].layers.items()):
        dx, grads[name] = block.backward(dx, saved.stack["blocks"][name])
    _, expected = model.backward(dlogits, saved)
    same_bits({name: grads[name] for name in expected["blocks"]}, expected["blocks"])
    if not config.tied:
        same_bits(model.embedding.backward(dx, saved_embedding)[1], expected["embedding"])


def test_the_loss_of_initial_parameters_is_near_the_log_of_the_vocabulary():
    for config in CONFIGS.values():
        rng = np.random.default_rng(14)
        ids, targets = (rng.integers(0, 12, (3, 5)) for _ in range(2))
        loss, _ = WithLoss(Transformer(config, init(config, rng)), targets).forward(ids)
        close(loss, np.log(12), 0.1)


@ALL
def test_parameters_are_copies_with_an_axis_for_each(config):
    params = draw(config, np.random.default_rng(15))
    model = Transformer(config, params)
    same_bits(dict(leaves(model.params)), dict(leaves(params)))
    for (name, held), (_, came) in zip(leaves(model.params), leaves(params), strict=True):
        assert not np.shares_memory(held, came), name
    assert [name for name, _ in leaves(model.shards)] == [name for name, _ in leaves(params)]


def test_the_tied_head_is_the_table_itself():
    config = CONFIGS["original"]
    model = Transformer(config, draw(config, np.random.default_rng(16)))
    assert model.head.params["weight"] is model.params["embedding"]["weight"]
    assert "head" not in model.params


@pytest.mark.parametrize("path", ["embedding", "blocks", "norm", "head"])
def test_missing_parameters_are_named(path):
    config = CONFIGS["modern"]
    params = init(config, np.random.default_rng(17))
    del params[path]
    with pytest.raises(ValueError, match=rf"do not fit the configuration\.\n  {path}.*: expected \(.*\), got nothing"):
        Transformer(config, params)


def test_misshapen_and_needless_parameters_are_named():
    config = CONFIGS["modern"]
    params = init(config, np.random.default_rng(18))
    params["blocks"]["1"]["mlp"]["norm"]["weight"] = np.ones(25, "float32")
    params["head"]["bias"] = np.zeros(12, "float32")
    with pytest.raises(ValueError, match="do not fit") as caught:
        Transformer(config, params)
    assert str(caught.value).splitlines()[1:] == [
        "  blocks.1.mlp.norm.weight: expected (24,), got (25,)",
        "  head.bias: expected nothing, got (12,)",
    ]


def test_a_model_is_one_line():
    config = CONFIGS["modern"]
    params = init(config, np.random.default_rng(22))
    size = sum(array.size for _, array in leaves(params))
    assert repr(Transformer(config, params)) == f"Transformer({config}, {size:,} parameters)"
    assert "\n" not in repr(config)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("replaced", ["arrays", "dicts", "the tree"])
def test_replaced_parameters_are_used_in_both_passes(name, replaced):
    config, ids = CONFIGS[name], np.random.default_rng(23).integers(0, 12, (2, 5))
    model, other = (Transformer(config, init(config, np.random.default_rng(seed), "float64")) for seed in (24, 25))

    def run(layer):
        logits, saved = layer.forward(ids)
        return {"logits": logits, "grads": layer.backward(np.cos(logits), saved)[1]}

    before = run(model)
    if replaced == "the tree":
        model.params = other.params
    elif replaced == "dicts":
        model.params.update(other.params)
    else:
        for path, array in leaves(other.params):
            *folders, last = path.split(".")
            functools.reduce(dict.get, folders, model.params)[last] = array
    same_bits(run(model), run(other))
    assert not np.array_equal(before["logits"], run(model)["logits"])


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "pickle"]
)
def test_a_copy_is_the_same_model_with_parameters_of_its_own(name, copied):
    config, ids = CONFIGS[name], np.random.default_rng(26).integers(0, 12, (2, 5))
    model = Transformer(config, init(config, np.random.default_rng(27), "float64"))
    other = copied(model)
    expected = model.forward(ids)[0]
    same_bits(other.forward(ids)[0], expected)
    for _, array in leaves(other.params):
        array *= 2
    same_bits(other.forward(ids)[0], Transformer(config, other.params).forward(ids)[0])
    same_bits(model.forward(ids)[0], expected)


@pytest.mark.parametrize("shape", [(3, 8), (3, 0), (5,), (1, 2, 3)])
def test_ids_of_a_wrong_shape_are_refused(shape):
    config = CONFIGS["modern"]
    model = Transformer(config, init(config, np.random.default_rng(19)))
    message = f"Transformer takes ids of shape (batch, length) with 1 to 7 positions; got {shape}."
    with pytest.raises(ValueError, match=re.escape(message)):
        model.forward(np.zeros(shape, int))


def test_ids_outside_the_vocabulary_are_refused():
    config = CONFIGS["modern"]
    model = Transformer(config, init(config, np.random.default_rng(20)))
    with pytest.raises(ValueError, match="integers from 0 to 11; got 0 to 12"):
        model.forward(np.array([[0, 12]]))


def test_blocks_run_in_the_order_of_their_numbers():
    rng = np.random.default_rng(30)
    config = Config.modern(12, width=8, depth=11, heads=2, hidden=10, context=7)
    params, ids = draw(config, rng), rng.integers(0, 12, (2, 5))
    by_name = {name: dict(sorted(tree.items())) for name, tree in sorted(params.items())}
    assert list(by_name["blocks"])[:3] == ["0", "1", "10"]
    same_bits(Transformer(config, by_name).forward(ids)[0], Transformer(config, params).forward(ids)[0])
