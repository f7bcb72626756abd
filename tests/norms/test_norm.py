"""What norms share: parameters that may be replaced, settings that may not, copies, and one line that shows all."""

import copy
import multiprocessing
import pickle

import numpy as np
import pytest

from npnorm import SOLO, norms
from npnorm.arrays import with_article
from npnorm.tree import leaves, map_tree
from tests.check import run, same_bits
from tests.norms.catalogue import EACH, norm_of

DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32"])
USED = pytest.mark.parametrize("used", [False, True], ids=["new", "used"])


@EACH
@DTYPES
@USED
@pytest.mark.parametrize("whole", [False, True], ids=["array by array", "all at once"])
def test_replaced_parameters_are_used_in_both_passes(entry, dtype, used, whole):
    params, x, dy = entry.problem(1, dtype)
    others, _, _ = entry.problem(2, dtype)
    inputs = set(others) - {
        name.replace("_norm.weight", "_weight") for name, _ in leaves(norm_of(entry.make(others)).params)
    }
    others |= {name: params[name] for name in inputs}  # a gate, say, is no parameter
    expected = run(entry.make(others), x, dy)
    made = entry.make(params)
    if used:
        run(made, x, dy)
        run(made, x, dy)
    norm, other = norm_of(made), norm_of(entry.make(others))
    if whole:
        norm.params = other.params
    else:
        replace(norm.params, other.params)
    same_bits(run(made, x, dy), expected)


def replace(tree, other):
    for name, child in tree.items():
        if isinstance(child, dict):
            replace(child, other[name])
        else:
            tree[name] = other[name]


@EACH
@DTYPES
@USED
def test_a_copy_of_a_norm_is_the_same_norm(entry, dtype, used):
    params, x, dy = entry.problem(3, dtype)
    made = entry.make(params)
    expected = run(made, x, dy) if used else run(entry.make(params), x, dy)
    for copied in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert repr(norm_of(copied)) == repr(norm_of(made))
        same_bits(run(copied, x, dy), expected)
        for (_, a), (_, b) in zip(leaves(norm_of(copied).params), leaves(norm_of(made).params), strict=True):
            assert not np.shares_memory(a, b)


@pytest.fixture(scope="module")
def process():
    """Return a process that was spawned."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool


@EACH
@USED
def test_a_norm_goes_to_a_process_that_is_spawned(entry, used, process):
    params, x, dy = entry.problem(6)
    made = entry.make(params)
    expected = run(made, x, dy) if used else run(entry.make(params), x, dy)
    same_bits(process.apply(run, (made, x, dy)), expected)


@EACH
def test_parameters_are_held_as_they_came(entry):
    params, _ = entry.draw(np.random.default_rng(7))
    own = dict(leaves(norm_of(entry.make(params)).params))
    assert all(any(a is given for given in params.values()) for a in own.values())


INIT = {
    "LayerNorm": (4, {"weight": 1, "bias": 0}),
    "RMSNorm": (4, {"weight": 1}),
    "PartialRMSNorm": (4, {"weight": 1}),
    "AddRMSNorm": (4, {"weight": 1}),
    "GatedRMSNorm": (4, {"weight": 1}),
    "QKNorm": (4, {"q_norm.weight": 1, "k_norm.weight": 1}),
    "GroupNorm": ((2, 4), {"weight": 1, "bias": 0}),
    "InstanceNorm": (4, {"weight": 1, "bias": 0}),
    "BatchNorm": (4, {"weight": 1, "bias": 0}),
}


@pytest.mark.parametrize("name", INIT)
def test_init_makes_ones_and_zeros(name):
    sizes, numbers = INIT[name]
    init, sizes = getattr(norms, name).init, sizes if isinstance(sizes, tuple) else (sizes,)
    for dtype, norm in (("float16", init(*sizes, "float16", eps=0.5)), ("float32", init(*sizes))):
        expected = {n: np.full(4, number, dtype) for n, number in numbers.items()}
        same_bits(dict(leaves(norm.params)), expected)
    assert init(*sizes, eps=0.5).eps == 0.5


@pytest.mark.parametrize("name", ["RMSNorm", "AddRMSNorm", "QKNorm"])
def test_init_makes_ones_minus_the_offset(name):
    norm = getattr(norms, name).init(4, "float16", offset=1)
    assert all(np.array_equal(a, np.zeros(4, "float16")) for _, a in leaves(norm.params))


@EACH
def test_settings_are_fixed(entry):
    params, _ = entry.draw(np.random.default_rng(4))
    norm = norm_of(entry.make(params))
    layer = type(norm).__name__
    for name in {*vars(norm), "group", "compute", "forward"} - {"params", "running_mean", "running_var", "batches"}:
        with pytest.raises(AttributeError, match=rf"^{layer}: {name} is fixed when the norm is made\. Make another"):
            setattr(norm, name, 1)
    with pytest.raises(AttributeError, match=rf"^{layer} has no setting 'foo', and nothing is added after it is made"):
        norm.foo = 1


@EACH
def test_a_parameter_is_in_params_and_no_attribute(entry):
    params, _ = entry.draw(np.random.default_rng(9))
    norm = norm_of(entry.make(params))
    for name in norm.params:
        message = rf"^{type(norm).__name__}: {name} is in params\. Read or assign norm\.params\['{name}'\]\.$"
        with pytest.raises(AttributeError, match=message):
            setattr(norm, name, np.ones(6))
        with pytest.raises(AttributeError, match=message):
            getattr(norm, name)
        assert not hasattr(norm, name)


def test_a_norm_without_parameters_has_no_weight():
    with pytest.raises(AttributeError, match=r"^L2Norm has no setting 'weight', and"):
        norms.L2Norm().weight  # noqa: B018


@pytest.mark.parametrize("name", ["running_mean", "running_var", "batches"])
def test_running_statistics_are_given_to_the_constructor(name):
    message = r"^BatchNorm: \w+ changes by track alone\. Pass running_mean=, running_var=, batches= to the BatchNorm"
    with pytest.raises(AttributeError, match=message):
        setattr(norms.BatchNorm.init(3), name, 1)


LINES = {
    "RMSNorm(weight=(6,) float64, eps=1e-06, offset=1)": lambda w: norms.RMSNorm(w, offset=1),
    "PartialRMSNorm(weight=(6,) float64, p=0.5, eps=1e-06)": lambda w: norms.PartialRMSNorm(w, p=0.5),
    "GroupNorm(weight=(6,) float64, groups=3, eps=1e-05)": lambda w: norms.GroupNorm(3, w),
    "InstanceNorm(eps=1e-05)": lambda w: norms.InstanceNorm(),
    "BatchNorm(weight=(6,) float64, eps=1e-05, momentum=None, batches=0)": lambda w: norms.BatchNorm(w, momentum=None),
    "LayerNorm(weight=(6,) float64, bias=(6,) float64, eps=0.3)": lambda w: norms.LayerNorm(w, w, eps=0.3),
    "CastRMSNorm(weight=(6,) float64, eps=1e-06, offset=1, cast='gemma')": lambda w: norms.CastRMSNorm(
        w, cast="gemma", offset=1
    ),
    "AddRMSNorm(weight=(6,) float64, eps=1e-06, compute='float32')": lambda w: norms.AddRMSNorm(w, compute="float32"),
    "QKNorm(q_norm.weight=(6,) float64, k_norm.weight=(6,) float64, eps=1e-06, cast='llama')": lambda w: norms.QKNorm(
        w, w, cast="llama"
    ),
    "AdaptiveNorm(norm=RMSNorm(eps=0.5))": lambda w: norms.AdaptiveNorm(norms.RMSNorm(eps=0.5)),
    "GatedRMSNorm(weight=(6,) float64, eps=1e-06, groups=2, norm_before_gate=False)": lambda w: norms.GatedRMSNorm(
        w, groups=2, norm_before_gate=False
    ),
    "GatedRMSNorm(eps=1e-06)": lambda w: norms.GatedRMSNorm(),
    "ScaleNorm(weight=() float64, axes=2, eps=1e-05)": lambda w: norms.ScaleNorm(w[0, ...], axes=2),
    "L2Norm(features=(6,), eps=1e-12)": lambda w: norms.L2Norm(features=6),
    "WeightNorm(weight_g=(6,) float64)": lambda w: norms.WeightNorm(w),
    "DyT(alpha=(1,) float64, weight=(6,) float64)": lambda w: norms.DyT(w[:1], w),
    "Derf(alpha=(1,) float64, shift=(1,) float64, compute='float32')": lambda w: norms.Derf(
        w[:1], w[:1], compute="float32"
    ),
}


@pytest.mark.parametrize("line", LINES)
def test_a_norm_is_one_line(line):
    assert repr(LINES[line](np.ones(6))) == line


@EACH
@pytest.mark.parametrize("bad", [[1.0], 2.5, None, np.ma.ones(6)], ids=["list", "float", "None", "masked array"])
def test_a_norm_is_shown_whatever_its_params_hold(entry, bad):
    params, _ = entry.draw(np.random.default_rng(8))
    norm = norm_of(entry.make(params))
    norm.params = map_tree(lambda _: bad, norm.params)
    assert repr(norm).count(f"={with_article(bad)}") == len(list(leaves(norm.params)))


def test_every_norm_has_a_line():
    assert {line.partition("(")[0] for line in LINES} == {name for name in norms.__all__ if name[0].isupper()}


@EACH
def test_what_is_saved_is_shown_by_its_shapes(entry):
    params, x, _ = entry.problem(6)
    shown = repr(entry.make(params).forward(x)[1])
    assert shown.startswith("Saved")
    assert "array(" not in shown
    assert str(x.shape) in shown


@EACH
def test_shards_have_the_shape_of_the_parameters(entry):
    params, _ = entry.draw(np.random.default_rng(5))
    norm = norm_of(entry.make(params))
    assert norm.group is SOLO
    assert norm.shards == map_tree(lambda _: None, norm.params)


@pytest.mark.parametrize("kind", [norms.LayerNorm, norms.RMSNorm, norms.L2Norm, norms.ScaleNorm])
def test_a_norm_without_weight_may_say_its_features(kind):
    norm = kind(features=(2, 3))
    y, _ = norm.forward(np.ones((4, 2, 3)))
    np.testing.assert_array_equal(y, kind(axes=2).forward(np.ones((4, 2, 3)))[0])
    with pytest.raises(ValueError, match=r"holds features of shape \(2, 3\); x has shape \(4, 3, 2\)"):
        norm.forward(np.ones((4, 3, 2)))
