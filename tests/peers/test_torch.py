"""torch: the samples it tests its own norms by, and its finite differences for every norm's backward pass."""

import inspect
import warnings

import ml_dtypes
import numpy as np
import pytest
import torch

from npnorm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from npnorm.norms import L2Norm
from tests.norms.catalogue import CATALOGUE

SAMPLES = {"layer_norm": 6, "rms_norm": 6, "group_norm": 33, "batch_norm": 12, "instance_norm": 9, "normalize": 8}
"""How many samples torch 2.13 has of each function."""

EPS = "eps is -0.5. It must be a finite number"
NO_CHANNELS = "each parameter must have shape (channels,), the same for all; got running_mean (0,)"
REFUSED = {
    "layer_norm": {1: EPS},
    "rms_norm": {1: EPS},
    "group_norm": dict.fromkeys((4, 5, 6, 7), EPS),
    "batch_norm": {
        1: "momentum is -1.2. It must be a number from 0 to 1",
        3: NO_CHANNELS,  # x of one axis without an element
        4: NO_CHANNELS,
        5: "momentum is -1.0. It must be a number from 0 to 1",
        6: "momentum is -1.0. It must be a number from 0 to 1",
    },
    "instance_norm": {},  # which has no momentum in npnorm: the statistics that it tracks in torch are not used
    "normalize": dict.fromkeys((0, 2, 3, 4, 5), "p is not 2"),
}
"""Which samples npnorm refuses by design, by their number, and what it says; of other lengths than L2 it has none."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2.0**-21, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}


@pytest.fixture(scope="module")
def samples():
    """Return a function for the samples of a torch function. The import needs expecttest, takes seconds, and warns."""
    with warnings.catch_warnings(action="ignore"):
        from torch.testing._internal.common_methods_invocations import op_db

    functions = {op.name: op for op in op_db}

    def of(name, dtype):
        torch.manual_seed(0)
        op = functions[f"nn.functional.{name}"]
        found = list(op.reference_inputs("cpu", dtype, requires_grad=dtype == torch.float64))
        assert len(found) == SAMPLES[name]
        return op, found

    return of


def array(tensor):
    """Return a tensor as a NumPy array, bfloat16 too."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
    return LayerNorm(weight, bias, eps, axes=len(shape))


def rms_norm(x, shape, weight=None, eps=None):
    """Return the norm; torch's eps is by default that of the dtype it computes in."""
    default = np.finfo("float64" if x.dtype == np.float64 else "float32").eps
    return RMSNorm(weight, eps=default if eps is None else eps, axes=len(shape))


def group_norm(x, groups, weight=None, bias=None, eps=1e-5):
    return GroupNorm(groups, weight, bias, eps)


def batch_norm(x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    kind = BatchNorm if training else Inference
    return kind(weight, bias, eps, momentum, running_mean=mean, running_var=var)


def instance_norm(x, weight=None, bias=None, eps=1e-5, **_):
    return InstanceNorm(weight, bias, eps)


def normalize(x, p=2.0, dim=1, eps=1e-12):
    if p != 2:
        raise ValueError("p is not 2")
    return Along(dim, L2Norm(eps))


class Inference(BatchNorm):
    """A BatchNorm whose forward is inference."""

    def forward(self, x):
        return self.inference(x)


class Along:
    """A norm of the last axis, along another axis."""

    def __init__(self, axis, norm):
        self.axis, self.norm = axis, norm

    def forward(self, x):
        y, saved = self.norm.forward(np.moveaxis(x, self.axis, -1))
        return np.moveaxis(y, -1, self.axis), saved

    def backward(self, dy, saved):
        dx, grads = self.norm.backward(np.moveaxis(dy, self.axis, -1), saved)
        return np.moveaxis(dx, -1, self.axis), grads


OURS = {f.__name__: f for f in (layer_norm, rms_norm, group_norm, batch_norm, instance_norm, normalize)}


def near(came, expected, tolerance):
    """Raise unless arrays agree to `tolerance` of the largest expected value, or of 1."""
    came, expected = (np.asarray(a).astype("float64") for a in (came, expected))
    assert came.shape == expected.shape
    assert np.all(np.abs(came - expected) <= tolerance * max(1.0, np.max(np.abs(expected), initial=0)))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SAMPLES)
def test_the_samples_of_torch(name, dtype, samples):
    torch_function, found = samples(name, dtype)
    refused = {}
    for number, sample in enumerate(found):
        bound = inspect.signature(OURS[name]).bind(sample.input, *sample.args, **sample.kwargs).arguments
        arguments = {key: array(value) for key, value in bound.items()}
        try:
            norm = OURS[name](**arguments)
        except ValueError as problem:
            refused[number] = str(problem)
            continue
        y, saved = norm.forward(arguments["x"])
        theirs = torch_function(sample.input, *sample.args, **sample.kwargs)
        assert y.dtype == arguments["x"].dtype
        near(y, array(theirs), TOLERANCE[dtype])
        if type(norm) is BatchNorm and "mean" in bound and bound["mean"] is not None:
            norm.track(saved)
            near(norm.running_mean, array(bound["mean"]), TOLERANCE[dtype])  # which torch has updated in place
            near(norm.running_var, array(bound["var"]), TOLERANCE[dtype])
        if dtype == torch.float64:
            check_gradients(norm, saved, theirs, bound)
    assert refused.keys() == REFUSED[name].keys()
    for number, message in refused.items():
        assert REFUSED[name][number] in message


def check_gradients(norm, saved, theirs, bound):
    names = [key for key in ("x", "weight", "bias") if bound.get(key) is not None]
    dy = torch.from_numpy(np.random.default_rng(1).standard_normal(theirs.shape))
    dx, grads = norm.backward(dy.numpy(), saved)
    for key, gradient in zip(names, torch.autograd.grad(theirs, [bound[key] for key in names], dy), strict=True):
        near(({"x": dx} | grads)[key], gradient, 1e-12)


class OfNpnorm(torch.autograd.Function):
    """A norm of npnorm as a function that torch differentiates by it."""

    @staticmethod
    def forward(ctx, make, names, x, *params):
        ctx.names = names
        ctx.layer = make(dict(zip(names, map(array, params), strict=True)))
        y, ctx.kept = ctx.layer.forward(array(x))
        return torch.from_numpy(np.ascontiguousarray(y))

    @staticmethod
    def backward(ctx, dy):
        dx, grads = ctx.layer.backward(dy.numpy(), ctx.kept)
        return None, None, *(torch.from_numpy(np.ascontiguousarray(g)) for g in (dx, *(grads[n] for n in ctx.names)))


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_torch_finds_the_same_derivatives(entry):
    params, x = entry.draw(np.random.default_rng(2))
    inputs = [torch.tensor(a, requires_grad=True) for a in (x, *params.values())]

    def function(*inputs):
        return OfNpnorm.apply(entry.make, tuple(params), *inputs)

    assert torch.autograd.gradcheck(function, inputs, atol=1e-8, rtol=1e-8)


def test_a_layer_of_npnorm_trains_inside_torch():
    rng = np.random.default_rng(3)
    x, target = torch.from_numpy(rng.standard_normal((16, 6))), torch.from_numpy(rng.standard_normal((16, 6)))
    first = torch.tensor(rng.standard_normal((6, 6)), requires_grad=True)
    params = [torch.ones(6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    losses = []
    for function in (
        lambda h, w, b: OfNpnorm.apply(lambda p: LayerNorm(**p), ("weight", "bias"), h, w, b),
        lambda h, w, b: torch.nn.functional.layer_norm(h, (6,), w, b),
    ):
        tensors = [a.detach().clone().requires_grad_() for a in (first, *params)]
        optimizer = torch.optim.SGD(tensors, lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(function(x @ tensors[0], *tensors[1:]), target)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) <= 1e-12 * losses[1]
