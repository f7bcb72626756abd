"""ONNX: its own test cases for its normalization operators, with the tolerance it gives them.

The cases of single operators are made by modules of the wheel, six models exported by torch lie beside them as files.
All are float32 and forward only.
"""

import importlib
import warnings

import numpy as np
import onnx
import pytest
from onnx.backend.test.case import node as cases
from onnx.backend.test.loader import load_model_tests

from npnorm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from npnorm.norms import L2Norm

MODULES = {
    "layernormalization": "LayerNormalization",
    "rmsnormalization": "RMSNormalization",
    "groupnormalization": "GroupNormalization",
    "instance_normalization": "InstanceNormalization",
    "batch_normalization": "BatchNormalization",
    "lpnormalization": "LpNormalization",
    "meanvariancenormalization": "MeanVarianceNormalization",
}
COUNTS = dict(zip(MODULES.values(), (19, 19, 2, 2, 4, 6, 1), strict=True))
"""How many cases each operator has; a case that ONNX adds or takes away should be seen."""

ULPS = 4
"""How far npnorm may be from what ONNX computes in float32, in units of the last place of the largest output."""


def collect():
    """Return the single-operator cases by name: (operator, attributes, named inputs, outputs, rtol, atol)."""
    with warnings.catch_warnings(action="ignore"):  # a case divides zeros
        for module in MODULES:
            importlib.import_module(f"{cases.__name__}.{module}")  # which makes its cases
    found = {}
    for case in cases._NodeTestCases:  # collect_testcases would make those of all operators, in five seconds
        (node, *others), ((inputs, outputs),) = case.model.graph.node, case.data_sets
        if not others and node.op_type in COUNTS:  # the others spell an operator out in simpler ones
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            found[case.name] = node.op_type, attributes, inputs, outputs, case.rtol, case.atol
    return found


CASES = collect()


def inference(attributes, x, weight, bias, mean, var):
    norm = BatchNorm(weight, bias, attributes.get("epsilon", 1e-5), running_mean=mean, running_var=var)
    return norm.inference(x)[:1]


def training(attributes, x, weight, bias, mean, var):
    """Return y and the running statistics; momentum is the share of the old ones, and the variance is the biased one.

    npnorm, as torch, has momentum as the share of the new ones, and tracks the unbiased variance var n / (n - 1). The
    difference var / (n - 1) is taken off here.
    """
    momentum = 1 - attributes.get("momentum", 0.9)
    start = {"running_mean": mean.astype("float64"), "running_var": var.astype("float64")}
    norm = BatchNorm(weight, bias, attributes.get("epsilon", 1e-5), momentum, **start)
    y, saved = norm.forward(x)
    norm.track(saved)
    n = x.size // x.shape[1]
    return y, norm.running_mean, norm.running_var - momentum * x.var(axis=(0, 2, 3), dtype="float64") / (n - 1)


def layer_norm(attributes, x, weight, bias=None):
    """Return y, mean and 1 / standard deviation; the last two are in what LayerNorm saves."""
    axis = attributes.get("axis", -1) % x.ndim
    y, saved = LayerNorm(weight, bias, attributes.get("epsilon", 1e-5), axes=x.ndim - axis).forward(x)
    assert saved.exponent is None  # no row was divided by a power of two
    each = (*x.shape[:axis], *[1] * (x.ndim - axis))
    return y, np.reshape(saved.mean.high + saved.mean.low, each), np.reshape(saved.rstd, each)


def rms_norm(attributes, x, weight):
    axis = attributes.get("axis", -1) % x.ndim
    return RMSNorm(weight, eps=attributes.get("epsilon", 1e-5), axes=x.ndim - axis).forward(x)[:1]


def lp_normalization(attributes, x):
    axis = attributes.get("axis", -1)
    y, _ = L2Norm().forward(np.moveaxis(x, axis, -1))
    return (np.moveaxis(y, -1, axis),)


def batch_norm(attributes, *arrays):
    return (training if attributes.get("training_mode") else inference)(attributes, *arrays)


OURS = {
    "LayerNormalization": layer_norm,
    "RMSNormalization": rms_norm,
    "GroupNormalization": lambda a, *arrays: GroupNorm(a["num_groups"], *arrays[1:], a.get("epsilon", 1e-5)).forward(
        arrays[0]
    )[:1],
    "InstanceNormalization": lambda a, *arrays: InstanceNorm(*arrays[1:], a.get("epsilon", 1e-5)).forward(arrays[0])[
        :1
    ],
    "BatchNormalization": batch_norm,
    "LpNormalization": lp_normalization,
    # (x - mean) / (standard deviation + 1e-9) over all axes but the channels: in float32 the 1e-9 vanishes
    "MeanVarianceNormalization": lambda a, x: BatchNorm(eps=0).forward(x)[:1],
}


def near(came, expected, rtol, atol):
    """Hold outputs to the tolerance of ONNX, and to a few units in the last place."""
    for a, b in zip(came, expected, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol, atol)
        assert np.max(np.abs(a - b)) <= ULPS * np.spacing(np.max(np.abs(b)).astype("float32"))


def test_no_case_is_lost():
    operators = [operator for operator, *_ in CASES.values()]
    assert {operator: operators.count(operator) for operator in COUNTS} == COUNTS
    with_statistics = [name for name, (operator, *_, outputs, _, _) in CASES.items() if len(outputs) == 3]
    assert len(with_statistics) == 19 + 2  # LayerNormalization, and BatchNormalization in training


def test_only_the_l1_norm_is_not_in_npnorm():
    other = [name for name, (_, attributes, *_) in CASES.items() if attributes.get("p", 2) != 2]
    assert sorted(other) == [f"test_l1normalization_axis_{axis}" for axis in ("0", "1", "last")]


@pytest.mark.parametrize("name", [name for name, (_, attributes, *_) in CASES.items() if attributes.get("p", 2) == 2])
def test_single_operators(name):
    operator, attributes, inputs, outputs, rtol, atol = CASES[name]
    came = OURS[operator](attributes, *inputs)
    assert came[0].dtype == np.float32
    near(came, outputs, rtol, atol)


def exported():
    """Return the models exported by torch that normalize, by name."""
    found = {}
    for case in load_model_tests(kind="pytorch-converted") + load_model_tests(kind="pytorch-operator"):
        model = onnx.load(f"{case.model_dir}/model.onnx")
        if {node.op_type for node in model.graph.node} & COUNTS.keys():
            found[case.name] = case, model
    return found


EXPORTED = exported()


def tensor(path):
    return onnx.numpy_helper.to_array(onnx.load_tensor(path))


def test_no_exported_model_is_lost():
    assert {name: [node.op_type for node in model.graph.node] for name, (_, model) in EXPORTED.items()} == {
        "test_BatchNorm1d_3d_input_eval": ["BatchNormalization"],
        "test_BatchNorm2d_eval": ["BatchNormalization"],
        "test_BatchNorm2d_momentum_eval": ["BatchNormalization"],
        "test_BatchNorm3d_eval": ["BatchNormalization"],
        "test_BatchNorm3d_momentum_eval": ["BatchNormalization"],
        "test_operator_symbolic_override": ["InstanceNormalization"],
    }


@pytest.mark.parametrize("name", EXPORTED)
def test_models_exported_by_torch(name):
    case, model = EXPORTED[name]
    (node,) = model.graph.node
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    held = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    (x,) = [value.name for value in model.graph.input if value.name not in held]
    arrays = held | {x: tensor(f"{case.model_dir}/test_data_set_0/input_0.pb")}
    came = OURS[node.op_type](attributes, *(arrays[name] for name in node.input))
    near(came, [tensor(f"{case.model_dir}/test_data_set_0/output_0.pb")], case.rtol, case.atol)
