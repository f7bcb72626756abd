"""Properties that hold to the last bit, for inputs of every dtype."""

import numpy as np
import pytest

from npnorm import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, PartialRMSNorm, RMSNorm
from npnorm.norms import L2Norm
from tests.check import BFLOAT16, draw, run, same_bits

DTYPES = pytest.mark.parametrize("dtype", ["float64", "float32", "float16", BFLOAT16], ids=str)
ROWS, N = 9, 777

OF_ROWS = {
    "LayerNorm": lambda w=None, b=None, eps=1e-5: LayerNorm(w, b, eps=eps),
    "RMSNorm": lambda w=None, b=None, eps=1e-5: RMSNorm(w, b, eps=eps),
    "PartialRMSNorm": lambda w=None, b=None, eps=1e-5: PartialRMSNorm(w, b, eps=eps),
}
OF_CHANNELS = {
    "GroupNorm": lambda w=None, b=None, eps=1e-5: GroupNorm(2, w, b, eps=eps),
    "InstanceNorm": lambda w=None, b=None, eps=1e-5: InstanceNorm(w, b, eps=eps),
    "BatchNorm": lambda w=None, b=None, eps=1e-5: BatchNorm(w, b, eps=eps),
}
EACH_OF_ROWS = pytest.mark.parametrize("norm", OF_ROWS.values(), ids=OF_ROWS.keys())
EACH = pytest.mark.parametrize("norm", [*OF_ROWS.values(), *OF_CHANNELS.values()], ids=[*OF_ROWS, *OF_CHANNELS])
CENTRED = pytest.mark.parametrize("name", ["LayerNorm", "GroupNorm", "InstanceNorm", "BatchNorm"])


def arrays(dtype, seed, shape=(ROWS, 6, N)):
    """Return x and dy that every norm here takes."""
    return draw(np.random.default_rng(seed), dtype, x=shape, dy=shape).values()


@EACH_OF_ROWS
@DTYPES
def test_a_row_alone_is_the_row_in_a_batch(norm, dtype):
    x, dy = arrays(dtype, 1)
    whole = run(norm(), x, dy)
    for i in range(ROWS):
        same_bits(run(norm(), x[i : i + 1], dy[i : i + 1]), {name: a[i : i + 1] for name, a in whole.items()})


@pytest.mark.parametrize(
    "norm", [OF_CHANNELS["GroupNorm"], OF_CHANNELS["InstanceNorm"]], ids=["GroupNorm", "InstanceNorm"]
)
@DTYPES
def test_a_sample_alone_is_the_sample_in_a_batch(norm, dtype):
    x, dy = arrays(dtype, 2)
    whole = run(norm(), x, dy)
    for i in range(ROWS):
        same_bits(run(norm(), x[i : i + 1], dy[i : i + 1]), {name: a[i : i + 1] for name, a in whole.items()})


@DTYPES
def test_a_channel_alone_is_the_channel_among_others(dtype):
    x, dy = arrays(dtype, 3)
    whole = run(BatchNorm(), x, dy)
    for i in range(6):
        same_bits(run(BatchNorm(), x[:, i : i + 1], dy[:, i : i + 1]), {k: a[:, i : i + 1] for k, a in whole.items()})


@EACH
@DTYPES
def test_the_negative_of_x_gives_the_negative_of_y(norm, dtype):
    x, _ = arrays(dtype, 4)
    same_bits(norm().forward(-x)[0], -norm().forward(x)[0])


@EACH
@pytest.mark.parametrize(
    ("dtype", "power"), [("float64", 40), ("float64", 520), ("float32", 80), (BFLOAT16, 80), ("float16", 4)], ids=str
)
def test_a_power_of_two_changes_nothing_without_eps(norm, dtype, power):
    x, _ = arrays(dtype, 5, (4, 6, 50))
    if dtype == "float16":
        x = np.where(abs(x) < 2.0**-6, np.float16(1), x)  # x / 16 stays exact
    plain, _ = norm(eps=0).forward(x)
    for k in (power, -power):
        same_bits(norm(eps=0).forward(np.ldexp(x.astype("float64"), k).astype(dtype))[0], plain)


@EACH
@pytest.mark.parametrize("power", [40, 520])
def test_a_power_of_two_divides_dx_without_eps(norm, power):
    x, dy = arrays("float64", 6, (4, 6, 50))
    plain = run(norm(eps=0), x, dy)["dx"]
    for k in (power, -power):
        same_bits(run(norm(eps=0), np.ldexp(x, k), dy)["dx"], np.ldexp(plain, -k))


@EACH
@pytest.mark.parametrize("power", [100, 500])
def test_backward_is_linear_in_powers_of_two(norm, power):
    x, dy = arrays("float64", 7, (4, 6, 50))
    plain = run(norm(), x, dy)["dx"]
    for k in (power, -power):
        same_bits(run(norm(), x, np.ldexp(dy, k))["dx"], np.ldexp(plain, k))


@CENTRED
@DTYPES
@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, 1000.1, -7.7, 60000.0])
def test_a_constant_row_gives_exactly_the_bias(name, dtype, value):
    rng = np.random.default_rng(8)
    if name == "LayerNorm":
        w, b = rng.standard_normal((2, N)).astype(dtype)
        y, _ = LayerNorm(w, b).forward(np.full((4, N), value).astype(dtype))
        same_bits(y, np.stack([b] * 4))
    else:
        w, b = rng.standard_normal((2, 6)).astype(dtype)
        y, _ = OF_CHANNELS[name](w, b).forward(np.full((4, 6, 111), value).astype(dtype))
        same_bits(y, np.ascontiguousarray(np.broadcast_to(b[:, None], (4, 6, 111))))


@CENTRED
def test_a_shift_of_integers_changes_nothing(name):
    x = np.random.default_rng(9).integers(-500, 500, (4, 6, 128)).astype("float32")
    norm = (OF_ROWS | OF_CHANNELS)[name]()
    same_bits(norm.forward(x + np.float32(2**14))[0], norm.forward(x)[0])


def test_partial_rms_norm_of_all_features_is_rms_norm():
    x, dy = arrays("float32", 10)
    same_bits(run(PartialRMSNorm(p=1), x, dy), run(RMSNorm(), x, dy))


def test_instance_norm_is_group_norm_with_a_group_for_each_channel():
    x, dy = arrays("float64", 11)
    same_bits(run(InstanceNorm(), x, dy), run(GroupNorm(6), x, dy))


def test_l2_norm_of_a_power_of_two_is_the_same():
    x, _ = arrays("float64", 12)
    for k in (300, -300, 600, -600):
        same_bits(L2Norm(eps=0).forward(np.ldexp(x, k))[0], L2Norm(eps=0).forward(x)[0])
