"""What the tests share: comparison, derivatives without a derivation, and exact norms.

A layer comes as `make` and `params`: `make(params)` builds it, so that its parameters can be varied, complex ones too.
"""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import scipy.differentiate

from npnorm.conformance.exact import exact_norm as exact_norm
from npnorm.layers import CrossEntropy
from npnorm.tree import leaves, map_tree

STEP = 1e-30
"""The complex step: its square vanishes beside 1, so that the derivative has no truncation error."""

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def close(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Raise unless the arrays agree within `tolerance` times the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {actual.shape}, expected {expected.shape}")
    if not np.all(np.abs(actual - expected) <= tolerance * np.max(np.abs(expected), initial=0)):  # a NaN is not close
        raise AssertionError(f"not within {tolerance}:\n{actual}\nexpected\n{expected}")


def same_bits(actual: Any, expected: Any) -> None:
    """Raise unless two trees of arrays have the same dtypes, shapes and bits."""
    for (name, a), (_, b) in zip(leaves(actual), leaves(expected), strict=True):
        same = a is b or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
        if not same:
            raise AssertionError(f"{name or 'array'}: other bits:\n{a!r}\nthan\n{b!r}")


def rounded(a: np.ndarray, dtype: Any) -> np.ndarray:
    """Return float64 rounded to nearest, once; bfloat16 by arithmetic, for numbers that are not subnormal in it."""
    if dtype != BFLOAT16:
        return a.astype(dtype)
    mantissa, exponent = np.frexp(a)
    return np.ldexp(np.rint(mantissa * 2**8), exponent - 8).astype(dtype)


def agree(analytic: float, numeric: float, tolerance: float) -> None:
    """Raise, with both values, unless two directional derivatives agree."""
    if not abs(analytic - numeric) <= tolerance * max(abs(analytic), abs(numeric)):
        raise AssertionError(f"derivative: analytic {analytic!r}, numeric {numeric!r}, not within {tolerance}")


def draw(rng: np.random.Generator, dtype: Any = "float64", /, **shapes: Any) -> dict[str, np.ndarray]:
    """Return standard normal arrays of these shapes, by name."""
    return {name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def run(layer: Any, x: Any, dy: Any) -> dict[str, Any]:
    """Return everything that comes out of a layer, as a tree: y, dx and each gradient by the name of its parameter."""
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    return {"y": y, "dx": dx, **grads}


def copy(tree: Any) -> Any:
    return map_tree(np.copy, tree)


def noise(rng: np.random.Generator, tree: Any) -> Any:
    """Return a tree of standard normal numbers of the same shapes."""
    return map_tree(lambda a: rng.standard_normal(np.shape(a)), tree)


def dot(a: Any, b: Any) -> float:
    return sum(float(np.sum(x * y)) for (_, x), (_, y) in zip(leaves(a), leaves(b), strict=True))


def complex_step(f: Callable[[Any], Any], at: Any, direction: Any) -> Any:
    """Return the derivative of `f` at a tree in the direction of another: Im f(at + ih direction) / h."""
    return np.imag(f(map_tree(lambda a, v: a + 1j * STEP * v, at, direction))) / STEP


class WithLoss:
    """A layer followed by the cross entropy with given targets, as one layer."""

    def __init__(self, layer: Any, targets: Any) -> None:
        self.layer, self.targets, self.params = layer, targets, layer.params

    def forward(self, x: Any) -> tuple[Any, Any]:
        logits, saved = self.layer.forward(x)
        loss, saved_loss = CrossEntropy().forward(logits, self.targets)
        return loss, (saved, saved_loss)

    def backward(self, dloss: Any, saved: Any) -> tuple[Any, Any]:
        return self.layer.backward(CrossEntropy().backward(dloss, saved[1]), saved[0])


def problem(
    make: Callable[[Any], Any], params: Any, x: np.ndarray, rng: np.random.Generator
) -> tuple[Any, Any, Callable[[Any], Any]]:
    """Return a scalar function of input and parameters at once: the point, the gradient by backward, the function.

    The function is the sum of y times a random dy. Integers are not differentiated by.
    """
    y, saved = make(params).forward(x)
    dy = np.asarray(rng.standard_normal(y.shape))
    dx, grads = make(params).backward(dy, saved)
    at, gradient = {"params": params}, {"params": grads}
    if x.dtype.kind not in "iu":
        at, gradient = {"x": x, "params": params}, {"x": dx, "params": grads}
    expected = {name: (a.dtype, a.shape) for name, a in leaves(at)}
    came = {name: (g.dtype, g.shape) for name, g in leaves(gradient)}
    if came != expected:
        raise AssertionError(f"gradients {came}, expected {expected}")

    def loss(point: Any) -> Any:
        return np.sum(make(point["params"]).forward(point.get("x", x))[0] * dy)

    return at, map_tree(lambda _, g: g, at, gradient), loss


def check_protocol(make: Callable[[Any], Any], params: Any, x: np.ndarray, rng: np.random.Generator) -> None:
    """Raise unless inputs stay as they are, and forward and backward can each be run again, in any order."""
    params_before, x_before = copy(params), x.copy()
    layer = make(params)
    y, saved = layer.forward(x)
    dy = np.asarray(rng.standard_normal(y.shape))
    dy_before = dy.copy()
    dx, grads = layer.backward(dy, saved)
    y_again, saved_again = layer.forward(x)
    layer.forward(np.flip(x).reshape(x.shape))  # nothing of it may stay on the layer
    for s in (saved, saved_again):
        dx_again, grads_again = layer.backward(dy, s)
        same_bits({"y": y_again, "dx": dx_again, "grads": grads_again}, {"y": y, "dx": dx, "grads": grads})
    same_bits({"x": x, "dy": dy, "params": params}, {"x": x_before, "dy": dy_before, "params": params_before})


def check_backward(
    make: Callable[[Any], Any], params: Any, x: np.ndarray, rng: np.random.Generator, tolerance: float = 1e-12
) -> None:
    """Hold a layer to the protocol, and backward against the complex step in a random direction of everything."""
    check_protocol(make, params, x, rng)
    at, gradient, loss = problem(make, params, x, rng)
    direction = noise(rng, at)
    agree(dot(gradient, direction), float(complex_step(loss, at, direction)), tolerance)


def check_central_difference(
    make: Callable[[Any], Any], params: Any, x: np.ndarray, rng: np.random.Generator, tolerance: float = 1e-9
) -> None:
    """Hold backward against SciPy's finite differences in a random direction of everything: for large layers."""
    at, gradient, loss = problem(make, params, x, rng)
    direction = noise(rng, at)

    def along(steps: np.ndarray) -> np.ndarray:
        return np.vectorize(lambda t: loss(map_tree(lambda a, v: a + t * v, at, direction)))(steps)

    numeric = scipy.differentiate.derivative(along, 0.0, initial_step=1e-3, maxiter=4).df
    agree(dot(gradient, direction), float(numeric), tolerance)


def check_finite_differences(
    make: Callable[[Any], Any], params: Any, x: np.ndarray, rng: np.random.Generator, tolerance: float = 1e-9
) -> None:
    """Hold each entry of each gradient against SciPy's finite differences: for small layers."""
    at, gradient, loss = problem(make, params, x, rng)

    def loss_of(flat: np.ndarray) -> float:
        rest = iter(flat)
        return loss(map_tree(lambda a: np.fromiter(rest, float, a.size).reshape(a.shape), at))

    def flat(tree: Any) -> np.ndarray:
        return np.concatenate([a.ravel() for _, a in leaves(tree)])

    step = {"initial_step": 1e-3, "order": 4, "maxiter": 1}  # off by 1e-11 of the largest, in four calls for an entry
    numeric = scipy.differentiate.jacobian(lambda points: np.apply_along_axis(loss_of, 0, points), flat(at), **step).df
    close(flat(gradient), numeric, tolerance)
