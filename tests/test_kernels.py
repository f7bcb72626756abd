import numpy as np
import pytest

from npnorm import BatchNorm, GroupNorm, LayerNorm, RMSNorm
from npnorm import kernels as writing
from npnorm.arrays import PIECE
from npnorm.kernels import Kind, dot
from npnorm.terms import Tape
from tests.check import BFLOAT16, close, rounded, same_bits

RMS_NORM = """\
# k0 = 1.0
# k1 = 16.0
# k2 = 0.25
def run(x, weight, y):
    v0 = vecdot(x, x)
    v1 = divide(v0, k1)
    v2 = add(v1, k2)
    v3 = sqrt(v2)
    v4 = divide(k0, v3)
    multiply(x, v4[:, None], out=y)
    multiply(y, weight, out=y)
    return (v4, ), ()
"""

RMS_NORM_BACKWARD = """\
# k0 = 16.0
# k1 = -1.0
# k2 = 1.0
def run(dy, x, weight, s0, dx):
    multiply(dy, x, out=dx)
    v1 = columns(dx, s0)
    v2 = vecdot(dx, weight)
    v3 = multiply(v2, s0)
    v4 = divide(v3, k0)
    v5 = multiply(s0, v4)
    v6 = multiply(v5, k1)
    v7 = multiply(v2, v6)
    v8 = multiply(v6, s0)
    multiply(dy, weight, out=dx)
    v10 = vecdot(dx, dx)
    multiply(dx, s0[:, None], out=dx)
    t_ = scratch('t_', dy.shape, 'float32')
    multiply(x, v8[:, None], out=t_)
    add(dx, t_, out=dx)
    return (v1, ), (v10, ), (v7, )
"""

LAYER_NORM = """\
# k0 = 16.0
# k1 = 0.0
# k2 = 1.0
# k3 = 0.25
def run(x, weight, bias, y):
    v0 = vecdot(x, ones)
    v1 = divide(v0, k0)
    v2 = multiply(k1, v1)
    subtract(x, v1[:, None], out=y)
    v4 = vecdot(y, y)
    v5 = divide(v4, k0)
    v6 = add(v5, k3)
    v7 = sqrt(v6)
    v8 = divide(k2, v7)
    v9 = multiply(v1, v8)
    multiply(y, v8[:, None], out=y)
    multiply(y, weight, out=y)
    add(y, bias, out=y)
    return (v1, v2, v8, ), (v9, )
"""

LAYER_NORM_BACKWARD = """\
# k0 = 1.0
# k1 = 16.0
# k2 = -1.0
def run(dy, x, weight, s0, s1, s2, dx):
    c0_ = scratch('c0_', dy.shape, 'float32')
    subtract(x, s0[:, None], out=c0_)
    multiply(c0_, dy, out=dx)
    v3 = columns(dx, s2)
    v4 = columns(dy)
    v5 = vecdot(dy, weight)
    v6 = divide(v5, k1)
    v7 = negative(v6)
    v8 = multiply(v5, v7)
    v9 = vecdot(dx, weight)
    v10 = multiply(v9, s2)
    v11 = divide(v10, k1)
    v12 = multiply(s2, v11)
    v13 = multiply(v12, k2)
    v14 = multiply(v9, v13)
    v15 = add(v8, v14)
    v16 = multiply(v7, s2)
    v17 = multiply(v13, s2)
    multiply(dy, weight, out=dx)
    v19 = vecdot(dx, dx)
    multiply(dx, s2[:, None], out=dx)
    multiply(c0_, v17[:, None], out=c0_)
    add(dx, c0_, out=dx)
    add(dx, v16[:, None], out=dx)
    return (v3, v4, ), (v19, ), (v15, )
"""

ROUNDED = """\
# k0 = 1.0
# k1 = 16.0
# k2 = 0.25
def run(x, weight, y):
    x_ = scratch('x_', x.shape, 'float64')
    copyto(x_, x)
    v2 = vecdot(x_, x_)
    v3 = divide(v2, k1)
    v4 = add(v3, k2)
    v5 = sqrt(v4)
    v6 = divide(k0, v5)
    multiply(x_, v6[:, None], out=x_)
    multiply(x_, weight, out=x_)
    copyto(y, round_to(x_, y.dtype), casting='unsafe')
    return (v6, ), ()
"""

MAKE = {
    "LayerNorm": lambda p, **s: LayerNorm(**p, **s),
    "RMSNorm": lambda p, **s: RMSNorm(**p, **s),
    "RMSNorm with offset": lambda p, **s: RMSNorm(p["weight"], offset=1, **s),
    "GroupNorm": lambda p, **s: GroupNorm(2, **p, **s),
    "BatchNorm": lambda p, **s: BatchNorm(**p, **s),
}
SHAPES = dict.fromkeys(MAKE, (5, 16)) | dict.fromkeys(("GroupNorm", "BatchNorm"), (5, 4, 16))


def draw(name, seed, dtype="float32", shape=None):
    """Return parameters, x and dy of a norm."""
    rng, shape = np.random.default_rng(seed), shape or SHAPES[name]
    params = {key: rng.uniform(0.5, 1.5, shape[1]).astype(dtype) for key in ("weight", "bias")}
    return params, *rng.standard_normal((2, *shape)).astype(dtype)


def kernels(name, compute="float32", params=None, dtype="float32", shape=None):
    """Return the kernels of a norm, forward and backward."""
    drawn, x, dy = draw(name, 1, dtype, shape)
    layer = MAKE[name](drawn if params is None else {key: drawn[key] for key in params}, eps=0.25, compute=compute)
    layer.backward(dy, layer.forward(x)[1])
    found = {key[1][0]: written.kernel for key, written in layer.rows.fast._written.items()}
    return found["x"], found["dy"]


def test_the_source_of_rms_norm():
    forward, backward = kernels("RMSNorm", params=["weight"])
    assert forward.source == RMS_NORM
    assert backward.source == RMS_NORM_BACKWARD


def test_the_source_of_layer_norm():
    forward, backward = kernels("LayerNorm")
    assert forward.source == LAYER_NORM
    assert backward.source == LAYER_NORM_BACKWARD


def test_the_source_in_a_wider_precision_is_rounded_once():
    forward, backward = kernels("RMSNorm", "float64", ["weight"])
    assert forward.source == ROUNDED
    assert backward.source.count("round_to(") == 1


PASSES = {
    # how often a whole array is written: forward, backward; in float64 what is cast is two more, and three
    "LayerNorm": {"float32": (4, 7), "float64": (6, 10)},
    "RMSNorm": {"float32": (3, 5), "float64": (5, 8)},
    "RMSNorm with offset": {"float32": (2, 5), "float64": (4, 8)},
    "GroupNorm": {"float32": (2, 4), "float64": (4, 7)},
    "BatchNorm": {"float32": (2, 4), "float64": (4, 7)},
}


def passes(kernel):
    return kernel.source.count("out=") + kernel.source.count("copyto(")


@pytest.mark.parametrize("name", PASSES)
def test_no_pass_over_the_whole_array_is_added(name):
    for compute, (forward, backward) in PASSES[name].items():
        came = [passes(kernel) for kernel in kernels(name, compute)]
        assert came[0] <= forward
        assert came[1] <= backward


@pytest.mark.parametrize("name", MAKE)
def test_no_array_is_made_in_passing(name):
    for kernel in kernels(name):
        made = [line for line in kernel.source.splitlines() if " = multiply(" in line or " = add(" in line]
        assert not [line for line in made if "(dy" in line or "(x" in line or "None]" in line]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("compute", ["float32", "float64"])
@pytest.mark.parametrize("which", [0, 1], ids=["forward", "backward"])
def test_inputs_are_never_written_to(name, compute, which):
    kernel = kernels(name, compute)[which]
    parameters = kernel.source.partition("def run(")[2].partition(")")[0].split(", ")
    *inputs, out = parameters
    written = {line.partition("out=")[2].rstrip(")") for line in kernel.source.splitlines() if "out=" in line}
    written |= {
        line.partition("copyto(")[2].partition(",")[0] for line in kernel.source.splitlines() if "copyto(" in line
    }
    assert written
    assert not written & set(inputs)
    assert out in written


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_inputs_that_may_not_be_written_to_are_fine(name, compute):
    params, x, dy = draw(name, 2)
    for a in (x, dy, *params.values()):
        a.flags.writeable = False
    layer = MAKE[name](params, compute=compute)
    for _ in range(2):  # the second time in the way of small arrays
        y, saved = layer.forward(x)
        dx, _ = layer.backward(dy, saved)
    assert y.flags.writeable
    assert dx.flags.writeable


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm"])
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_a_kernel_gives_the_same_bits_with_memory_of_its_own(name, compute):
    forward, backward = kernels(name, compute)
    params, x, dy = draw(name, 3)
    given = [a.astype(compute) for a in params.values()]
    y, again = np.empty_like(x), np.empty_like(x)
    statistics, means = forward.run(x, *given, y)
    statistics_again, means_again = forward.once(x, *given, again)
    same_bits(again, y)
    for a, b in zip((*statistics_again, *means_again), (*statistics, *means), strict=True):
        same_bits(a, b)
    found = backward.run(dy, x, given[0], *statistics, y)
    found_again = backward.once(dy, x, given[0], *statistics, again)
    same_bits(again, y)
    for a, b in zip(sum(found_again, ()), sum(found, ()), strict=True):
        same_bits(a, b)


@pytest.mark.parametrize("width", [1, 2, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 5])
def test_a_long_sum_of_products_is_cut_into_pieces(width):
    a, b = np.random.default_rng(4).standard_normal((2, 3, width))
    close(dot(a, b), (a * b).sum(axis=-1), 1e-13)
    expected = sum(np.vecdot(a[:, i : i + PIECE], b[:, i : i + PIECE]) for i in range(0, width, PIECE))
    same_bits(dot(a, b), expected)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"])
def test_rows_are_cut_where_they_are_longer_than_a_piece(name):
    shape = {2: lambda n: (3, n), 3: lambda n: (3, 2, n)}[len(SHAPES[name])]
    for kernel in kernels(name, shape=shape(PIECE)):
        assert "vecdot(" in kernel.source
        assert "dot(" not in kernel.source.replace("vecdot(", "")
    for kernel in kernels(name, shape=shape(PIECE + 1)):
        assert "dot(" in kernel.source
        assert "vecdot(" not in kernel.source


def exact(name, params, x, dy, eps):
    """Return everything that comes out in float64."""
    layer = MAKE[name]({key: a.astype("float64") for key, a in params.items()}, eps=eps)
    y, saved = layer.forward(x.astype("float64"))
    dx, grads = layer.backward(dy.astype("float64"), saved)
    return {"y": y, "dx": dx, **grads}


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"])
@pytest.mark.parametrize("compute", ["float32", "float64"])
def test_long_rows_are_right(name, compute):
    shape = (3, 2 * PIECE + 3) if len(SHAPES[name]) == 2 else (3, 2, 2 * PIECE + 3)
    params, x, dy = draw(name, 5, shape=shape)
    layer = MAKE[name](params, eps=0.25, compute=compute)
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    expected = exact(name, params, x, dy, 0.25)
    for key, a in {"y": y, "dx": dx, **grads}.items():
        of_float32 = 2.0**-21 if key in ("y", "dx") else 2.0**-20
        close(a, expected[key], of_float32 if compute == "float32" else 2.0**-24)


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("dtype", ["float32", "float16", BFLOAT16], ids=str)
def test_the_wider_precision_is_rounded_once(name, dtype):
    shape = (40, 160) if len(SHAPES[name]) == 2 else (20, 10, 32)
    params, x, dy = draw(name, 6, dtype, shape)
    layer = MAKE[name](params, eps=0.25)
    y, saved = layer.forward(x)
    dx, _ = layer.backward(dy, saved)
    assert layer.rows.fast._written
    expected = exact(name, params, x, dy, 0.25)
    if "offset" not in name:  # 1 + w is rounded to float32
        same_bits({"y": y, "dx": dx}, {"y": rounded(expected["y"], dtype), "dx": rounded(expected["dx"], dtype)})
    else:
        close(y.astype("float64"), expected["y"], np.finfo("float32").eps if dtype == "float32" else 2.0**-8)


def test_bfloat16_is_not_rounded_by_way_of_float32():
    x = np.random.default_rng(8).standard_normal((600, 1000)).astype(BFLOAT16)
    y, _ = RMSNorm().forward(x)
    exact_y, _ = RMSNorm().forward(x.astype("float64"))
    same_bits(y, rounded(exact_y, BFLOAT16))
    assert np.any(y != exact_y.astype("float32").astype(BFLOAT16))  # some numbers show the difference


@pytest.mark.parametrize("work", ["float32", "float64"])
def test_an_array_that_is_still_needed_is_not_written_over(work):
    tape = Tape((16,), folds=False)
    x = tape.array("x")
    c = (x - x.sum_over_row() / 16).formed()
    square = (c * c).sum_over_row()
    kernel = writing.forward(tape, Kind("Features", ("x",), (), work, work == "float64"), c * square + x * 3, (square,))
    given = np.random.default_rng(9).standard_normal((5, 16)).astype("float32")
    y = np.empty_like(given)
    kernel.run(given, y)
    centred = given - given.mean(axis=1, keepdims=True)
    close(y, centred * (centred * centred).sum(axis=1, keepdims=True) + 3 * given, 1e-6)


@pytest.mark.parametrize("dtype", ["float16", BFLOAT16], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_narrow_dtypes_in_float32_are_near(name, dtype):
    params, x, dy = draw(name, 7, dtype)
    layer = MAKE[name](params, eps=0.25, compute="float32")
    y, saved = layer.forward(x)
    dx, grads = layer.backward(dy, saved)
    expected = exact(name, params, x, dy, 0.25)
    for key, a in {"y": y, "dx": dx, **grads}.items():
        assert a.dtype == np.dtype(dtype)
        close(a.astype("float64"), expected[key], 2.0**-10 if dtype == "float16" else 2.0**-7)
