"""The gated recurrent unit (GRU), with norms before its gates.

Kyunghyun Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder for Statistical Machine Translation",
2014, arXiv:1406.1078, section 2.3; the reset gate multiplies the product with h, not h, as in torch and Nematus. The
four norms stand where the code of Biao Zhang and Rico Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019,
arXiv:1910.07467, has them; it follows Jimmy Lei Ba, Jamie Ryan Kiros and Geoffrey E. Hinton, "Layer Normalization",
2016, arXiv:1607.06450, supplementary material.

Forward, for a step from h to h' of dim features; W = [Wg; Wn] is weight_ih, with 2 dim rows for the two gates and dim
rows for the candidate, b = [bg; bn] is bias_ih; U and v likewise are weight_hh and bias_hh:

    ag   = norm(x Wg^T + bg)             the norm ih_gates
    an   = norm(x Wn^T + bn)             ih_candidate
    cg   = norm(h Ug^T + vg)             hh_gates
    cn   = norm(h Un^T + vn)             hh_candidate
    r, z = sigmoid(ag + cg)              reset gate, update gate
    n    = tanh(an + r cn)               candidate
    h'   = (1 - z) n + z h

Backward, given dh', with norm' the backward pass of norm:

    dan    = dh' (1 - z) (1 - n^2)
    dcn    = dan r
    dag    = [dcn cn (1 - r); dh' (h - n) z (1 - z)]        dcg is the same
    da     = [norm'(dag); norm'(dan)]
    dc     = [norm'(dcg); norm'(dcn)]
    dx     = da W
    dh     = dh' z + dc U
    dW, db = sum over rows of da^T x, of da
    dU, dv = sum over rows of dc^T h, of dc

In a sequence dh' is dy of the step plus dh of the next one, and the rows are those of all steps. Only what needs h goes
from step to step: ag and an, and backward da, dx and the sums over rows, are one call for the whole sequence.

On a group the layer is replicated: nothing is communicated.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from npnorm.arrays import Array, array_module, dtype_name, from_numpy
from npnorm.checks import check_dtype, check_entries, check_input, check_module, check_saved, check_width
from npnorm.layers.inplace import add_into, exp, tanh
from npnorm.tree import Layer, Tree, hand_down, map_tree, show_shapes, summary

ARRAYS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
NORMS = {"ih": ("ih_gates", "ih_candidate"), "hh": ("hh_gates", "hh_candidate")}


@show_shapes
class Step(NamedTuple):
    """What backward needs of a step; the arrays have shape (batch, dim)."""

    h: Array  # before the step
    cn: Array
    r: Array
    z: Array
    n: Array
    norms: list[Any]  # hh_gates, hh_candidate


@show_shapes
class Saved(NamedTuple):
    """What backward needs of forward."""

    x: Array  # (batch, length, inputs)
    norms: list[Any]  # ih_gates, ih_candidate
    steps: list[Step]
    from_h0: bool  # whether h0 was given


def step(ag: Array, an: Array, cg: Array, cn: Array, h: Array) -> tuple[Any, tuple[Any, Any, Any]]:
    """Return h', and r, z and n."""
    dim = h.shape[1]
    gates = _sigmoid(ag + cg)
    r, z = gates[:, :dim], gates[:, dim:]
    n = tanh(an + r * cn)
    return (1 - z) * n + z * h, (r, z, n)


def step_backward(dh: Array, h: Array, cn: Array, r: Array, z: Array, n: Array) -> tuple[Any, Any, Any]:
    """Return dan, dcn and dag; dh is that of h'."""
    dan = dh * (1 - z) * (1 - n * n)
    dcn = dan * r
    dag = array_module(dh).concat([dcn * cn * (1 - r), dh * (h - n) * z * (1 - z)], axis=1)
    return dan, dcn, dag


def _sigmoid(x: Array) -> Any:
    """Return 1 / (1 + exp(-x)), element by element."""
    with np.errstate(over="ignore"):  # exp(-x) = infinity gives 0, as it should
        s = exp(-x)
    s += 1
    return 1 / s


def _rows(of_steps: Sequence[Array]) -> Any:
    """Return arrays of shape (batch, features), one for each step, as rows: (batch length, features)."""
    xp = array_module(of_steps[0])
    return xp.reshape(xp.stack(of_steps, axis=1), (-1, of_steps[0].shape[1]))


class _Recurrence:
    """What `GRU` and `GRUCell` share: the parameters, and both passes through a sequence."""

    axes: tuple[str, ...]  # of x

    def __init__(self, params: Tree, norms: Mapping[str, Layer] | None = None) -> None:
        self.norms = dict(norms or {})
        _check_params(type(self).__name__, params, self.norms)
        self.params = {**params, **{name: norm.params for name, norm in self.norms.items()}}
        self.shards = {**dict.fromkeys(params), **{name: norm.shards for name, norm in self.norms.items()}}
        self.dim = params["weight_hh"].shape[1]

    def __repr__(self) -> str:
        own = {name: array for name, array in self.params.items() if name in ARRAYS}
        return summary(type(self).__name__, own, **self.norms)

    def _forward(self, x: Array, h0: Array | None) -> tuple[Any, Saved]:
        """Return h' of every step, (batch, length, dim), for x of shape (batch, length, inputs)."""
        hand_down(self.params, self.norms)
        xp, (batch, length, inputs) = array_module(x), x.shape
        a, norms = self._project("ih", xp.reshape(x, (-1, inputs)))
        ag, an = (xp.reshape(part, (batch, length, part.shape[1])) for part in a)
        h = from_numpy(np.zeros((batch, self.dim), dtype_name(x)), x) if h0 is None else h0
        y, steps = [], []
        for t in range(length):
            (cg, cn), norms_of_step = self._project("hh", h)
            h_next, gates = step(ag[:, t, :], an[:, t, :], cg, cn, h)
            steps.append(Step(h, cn, *gates, norms_of_step))
            y.append(h_next)
            h = h_next
        return xp.stack(y, axis=1), Saved(x, norms, steps, h0 is not None)

    def _backward(self, dy: Array, saved: Saved) -> tuple[Any, Any, Tree]:
        """Return dx, dh of the h before the first step, and the gradients."""
        hand_down(self.params, self.norms)
        dh, found = 0, []
        for t in reversed(range(dy.shape[1])):
            h, cn, r, z, n, norms = saved.steps[t]
            dh = dh + dy[:, t, :]
            dan, dcn, dag = step_backward(dh, h, cn, r, z, n)
            dc, grads_c = self._normalize_backward("hh", dag, dcn, norms)
            dh = dh * z + dc @ self.params["weight_hh"]
            found.append((dan, dag, dc, h, grads_c))
        *arrays, of_steps = zip(*reversed(found), strict=True)
        dan, dag, dc, h = map(_rows, arrays)
        da, grads_a = self._normalize_backward("ih", dag, dan, saved.norms)
        xp = array_module(dy)
        dx = xp.reshape(da @ self.params["weight_ih"], saved.x.shape)
        grads = {
            "weight_ih": da.T @ xp.reshape(saved.x, (-1, saved.x.shape[2])),
            "weight_hh": dc.T @ h,
            "bias_ih": xp.sum(da, axis=0),
            "bias_hh": xp.sum(dc, axis=0),
            **grads_a,
            **map_tree(lambda *grads: sum(grads), *of_steps),
        }
        return dx, dh, {name: grads[name] for name in self.params}

    def _project(self, side: str, x: Array) -> tuple[list[Any], list[Any]]:
        """Return norm(x W^T + b) of the gates and of the candidate, and what their norms saved."""
        w, b = self.params[f"weight_{side}"], self.params.get(f"bias_{side}")
        parts, saved = [], []
        for name, rows in zip(NORMS[side], (slice(2 * self.dim), slice(2 * self.dim, None)), strict=True):
            a = x @ w[rows, :].T  # a product for each: a norm is slower on a part of an array
            a = a if b is None else add_into(a, b[rows])
            a, of_norm = self.norms[name].forward(a) if name in self.norms else (a, None)
            parts.append(a)
            saved.append(of_norm)
        return parts, saved

    def _normalize_backward(self, side: str, dgates: Array, dcandidate: Array, saved: list[Any]) -> tuple[Any, Tree]:
        """Return the gradient of x W^T + b, gates and candidate, and those of their norms."""
        parts, grads = [], {}
        for name, da, of_norm in zip(NORMS[side], (dgates, dcandidate), saved, strict=True):
            if name in self.norms:
                da, grads[name] = self.norms[name].backward(da, of_norm)
            parts.append(da)
        return array_module(dgates).concat(parts, axis=1), grads

    def _check(self, x: Array, **state: Array | None) -> None:
        """Raise one clear error unless x has the axes of the layer, and the state, if there is one, goes with it."""
        layer, axes = type(self).__name__, ", ".join(self.axes)
        check_input(layer, x, self.params, self.params["weight_ih"].shape[1])
        if x.ndim != len(self.axes) or 0 in x.shape[1:]:
            raise ValueError(f"{layer} takes x of shape ({axes}), of which batch alone may be 0; got {tuple(x.shape)}.")
        _check_like(layer, x, (x.shape[0], self.dim), **state)

    def _check_backward(self, saved: Saved, **gradient: Array) -> None:
        """Raise one clear error unless `saved` is from such a layer, and the gradient goes with it."""
        layer = type(self).__name__
        check_saved(layer, saved, Saved)
        _check_like(layer, saved.x, (*saved.x.shape[: len(self.axes) - 1], self.dim), **gradient)


class GRUCell(_Recurrence):
    """One step of a gated recurrent unit: torch's GRUCell, with norms.

    Parameters
    ----------
    params, norms
        As for `GRU`.

    Examples
    --------
    >>> cell = GRUCell({"weight_ih": np.zeros((3, 2)), "weight_hh": np.zeros((3, 1))})  # r = z = 1/2 and n = 0
    >>> h, saved = cell.forward(np.array([[5.0, 6.0]]), np.array([[4.0]]))
    >>> h
    array([[2.]])
    """

    axes = ("batch", "inputs")

    def forward(self, x: Array, h: Array) -> tuple[Any, Saved]:
        """Return h', of the shape of h: (batch, dim), for x of shape (batch, inputs)."""
        self._check(x, h=h)
        y, saved = self._forward(x[:, None, :], h)
        return y[:, 0, :], saved

    def backward(self, dh: Array, saved: Saved) -> tuple[tuple[Any, Any], Tree]:
        """Return (dx, dh) for the dh of h', and the gradients."""
        self._check_backward(saved, dh=dh)
        dx, dh, grads = self._backward(dh[:, None, :], saved)
        return (dx[:, 0, :], dh), grads


class GRU(_Recurrence):
    """A gated recurrent unit that runs over a sequence: torch's GRU, batch first, with norms.

    Parameters
    ----------
    params : {"weight_ih": (3 dim, inputs), "weight_hh": (3 dim, dim), "bias_ih": (3 dim,), "bias_hh": (3 dim,)}
        Rows in the order r, z, n; biases may be left out. The arrays are held, not copied. torch's GRUCell has the same
        names and order, its GRU adds "_l0" to the names. Nematus has W and Wx side by side for weight_ih^T, U and Ux
        for weight_hh^T, b and bx for bias_ih.
    norms : {"ih_gates": norm, "ih_candidate": norm, "hh_gates": norm, "hh_candidate": norm} or None
        The norms of gates have 2 dim features, those of a candidate dim; what has no norm stays as it is. Their
        parameters stand under these names in the params of the layer.

    Examples
    --------
    >>> from npnorm.norms import RMSNorm
    >>> params = {"weight_ih": np.ones((6, 3)), "weight_hh": np.ones((6, 2)), "bias_ih": np.zeros(6)}
    >>> gru = GRU(params, {"hh_gates": RMSNorm.init(4, "float64"), "hh_candidate": RMSNorm.init(2, "float64")})
    >>> y, saved = gru.forward(np.ones((5, 7, 3)))
    >>> y.shape
    (5, 7, 2)
    """

    axes = ("batch", "length", "inputs")

    def forward(self, x: Array, h0: Array | None = None) -> tuple[Any, Saved]:
        """Return y, h' of every step, of shape (batch, length, dim) for x of shape (batch, length, inputs).

        h0 is the h before the first step, of shape (batch, dim); None stands for zeros.
        """
        self._check(x, h0=h0)
        return self._forward(x, h0)

    def backward(self, dy: Array, saved: Saved) -> tuple[Any, Tree]:
        """Return dx, or (dx, dh0) where h0 was given, and the gradients."""
        self._check_backward(saved, dy=dy)
        dx, dh0, grads = self._backward(dy, saved)
        return ((dx, dh0) if saved.from_h0 else dx), grads


def _check_params(layer: str, params: Tree, norms: Mapping[str, Layer]) -> None:
    """Raise one clear error unless the arrays have the shapes of one layer, and the norms known names."""
    check_entries(layer, params, ARRAYS, optional=("bias_ih", "bias_hh"))
    check_module(layer, params["weight_ih"], params, "weight_ih")
    known = (*NORMS["ih"], *NORMS["hh"])
    strange = [name for name in norms if name not in known]
    if strange:
        raise ValueError(f"{layer}: norms has {strange[0]!r}, which means nothing. It takes {', '.join(known)}.")
    shapes = {name: tuple(a.shape) for name, a in params.items()}
    dim, inputs = shapes["weight_hh"][-1:], shapes["weight_ih"][-1:]
    rows = tuple(3 * n for n in dim)
    expected = {"weight_ih": rows + inputs, "weight_hh": rows + dim, "bias_ih": rows, "bias_hh": rows}
    if not dim or any(shapes[name] != expected[name] for name in shapes):
        raise ValueError(
            f"{layer}: weight_ih must have shape (3 dim, inputs), weight_hh (3 dim, dim), both biases (3 dim,); got "
            f"{', '.join(f'{name} {shape}' for name, shape in shapes.items())}."
        )


def _check_like(layer: str, x: Array, shape: tuple[int, ...], **arrays: Array | None) -> None:
    """Raise one clear error unless the arrays that are there have this shape, and the module and dtype of x."""
    for name, a in arrays.items():
        if a is not None:
            check_module(layer, x, {name: a})
            check_width(layer, a, shape[-1], name)
            check_dtype(layer, x, {name: a})
            if tuple(a.shape) != shape:
                raise ValueError(f"{layer}: {name} has shape {tuple(a.shape)}. For this x it must be {shape}.")
