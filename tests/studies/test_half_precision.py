import math

import numpy as np
import pytest
import torch

from npnorm import RMSNorm
from npnorm.studies.half_precision import STUDY
from npnorm.studies.half_precision_norms import FORMS, Generation1, InHalf, mean
from npnorm.studies.half_precision_range import first_lost, overflow, scales, vanishing
from npnorm.studies.study import Results, Verdict
from tests.check import close, draw, run, same_bits

HALVES = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


def by_torch(form, x, w, eps):
    """Return y as the model had it."""
    x, w = torch.tensor(x.astype("float32")).to(getattr(torch, x.dtype.name)), torch.tensor(w)
    if form == "generation 1":
        return w * (x.float() * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)).type_as(x)
    z = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return w * z.type_as(x) if form == "generation 2" else (w * z).type_as(x)


@HALVES
@pytest.mark.parametrize(("form", "rounding"), [("generation 1", 0.1), ("generation 2", 1e-3), ("generation 3", 1e-3)])
def test_torch_has_the_same_dtype_and_but_for_the_order_of_its_sums_the_same_numbers(form, rounding, dtype):
    rng = np.random.default_rng(0)
    x, w = (3 * rng.standard_normal((100, 512))).astype(dtype), rng.uniform(0.5, 1.5, 512).astype("float32")
    y, theirs = FORMS[form](x, w, 1e-5), by_torch(form, x, w, 1e-5)
    assert y.dtype.name == str(theirs.dtype).removeprefix("torch.")
    assert np.mean(y.astype("float32") != theirs.float().numpy()) < rounding  # generation 1: an ulp of a row's mean
    ulp = 2.0**-10 if dtype == "float16" else 2.0**-7
    close(y.astype("float32"), theirs.float().numpy(), ulp)


@HALVES
def test_the_forms_are_rmsnorm_where_nothing_overflows_or_vanishes(dtype):
    rng = np.random.default_rng(1)
    x, w = rng.standard_normal((5, 64)).astype(dtype), rng.uniform(0.5, 1.5, 64).astype(dtype)
    expected = RMSNorm(w.astype(float), eps=1e-5).forward(x.astype(float))[0]
    for form in ("in the dtype", "generation 1", "generation 2", "generation 3", "npnorm"):
        close(FORMS[form](x, w, 1e-5).astype(float), expected, 0.003 if dtype == "float16" else 0.03)


@HALVES
def test_theory_says_where_squares_overflow_and_vanish(dtype):
    kind = np.dtype(dtype).type
    large, small = overflow(dtype), vanishing(dtype)
    with np.errstate(over="ignore"):
        assert np.isinf(kind(large) * kind(large))
    assert np.isfinite(kind(0.99 * large) * kind(0.99 * large))
    assert kind(0.98 * small) * kind(0.98 * small) == 0
    assert kind(1.05 * small) * kind(1.05 * small) > 0


@pytest.mark.parametrize(("dtype", "stays"), [("float16", 2048), ("bfloat16", 256)])
def test_a_sum_of_ones_stops_where_the_next_is_below_its_last_place(dtype, stays):
    ones = np.ones((1, 4096), dtype)
    assert float(mean(ones, dtype)[0, 0]) == stays / 4096
    assert float(mean(ones, "float32")[0, 0]) == 1


def test_an_overflow_gives_zeros_forward_and_backward():
    x = np.array([[300.0, 1.0, -2.0, 3.0]], "float16")
    came = run(Generation1(np.ones(4, "float16"), 1e-5), x, np.ones_like(x))
    assert not any(array.any() for array in came.values())


def test_in_float32_generation_1_is_rmsnorm():
    rng = np.random.default_rng(2)
    a = draw(rng, "float32", x=(3, 5, 7), dy=(3, 5, 7), w=7)
    came, expected = (run(norm, a["x"], a["dy"]) for norm in (Generation1(a["w"], 0.1), RMSNorm(a["w"], eps=0.1)))
    for name, array in expected.items():
        assert came[name].dtype == np.float32
        close(came[name], array, 1e-6)


@pytest.mark.parametrize("form", ["generation 1", "llama", "olmo2", "gemma"])
@HALVES
def test_a_norm_in_half_is_a_norm_of_float32_that_is_rounded(form, dtype):
    rng = np.random.default_rng(3)
    a = draw(rng, "float32", x=(3, 5, 32), dy=(3, 5, 32), w=32)
    layer = InHalf(a["w"] - (form == "gemma"), dtype, form, 0.1, loss_scale=1.0)
    came, expected = run(layer, a["x"], a["dy"]), run(RMSNorm(a["w"], eps=0.1), a["x"], a["dy"])
    for name, array in expected.items():
        assert came[name].dtype == np.float32
        close(came[name], array, 0.003 if dtype == "float16" else 0.03)
        assert np.any(came[name] != array)


def test_the_scale_of_the_loss_keeps_small_gradients_of_float16():
    rng = np.random.default_rng(4)
    a = draw(rng, "float32", x=(3, 32), dy=(3, 32), w=32)
    dy = a["dy"] * np.float32(1e-8)
    lost, kept = (run(InHalf(a["w"], "float16", "olmo2", 0.1, scale), a["x"], dy) for scale in (1.0, 2.0**20))
    assert not np.any(lost["dx"])
    close(kept["dx"], run(RMSNorm(a["w"], eps=0.1), a["x"], dy)["dx"], 0.003)
    wide, scaled = (run(InHalf(a["w"], "bfloat16", "olmo2", 0.1, scale), a["x"], dy) for scale in (1.0, 2.0**20))
    same_bits(scaled, wide)  # bfloat16 has the range


def test_lost_is_what_stays_lost():
    error = np.full((2, scales("float16").size), 0.001)
    error[0, 30:], error[0, 3] = 1.0, math.inf
    lines = [
        {"part": "range", "dtype": "float16", "form": "npnorm", "eps": 1e-5, "features": 8, "error": row}
        for row in error.tolist()
    ]
    first = first_lost(Results({"features": [8]}, {}, lines), "float16", "npnorm")
    assert first.tolist() == [2.0 ** (30 - 24), math.inf]


def test_the_quick_run_finds_what_theory_says(verdicts):
    of = verdicts("half_precision")
    holds = [
        "The square of 1e-4 is 0 in float16.",
        "In float16 with eps = 1e-8, squares in 16 bits lose y where x is so small that its square is 0.",
        "In float16, squares in 16 bits lose y as soon as an element of x reaches 256.",
        "In float16 with eps = 1e-5, statistics in float32 make y right at every size of x.",
        "npnorm.RMSNorm is right at every size of x in both dtypes.",
        "In bfloat16 with everything in 16 bits, the sum of 2048 squares makes y wrong by more than 10 %.",
        "Generation 2 returns float32 for x of bfloat16.",
        "With activations of size 200, a model whose norms square in float16 learns nothing.",
    ]
    fails = [
        "The square of 1e-4 is 0 in bfloat16.",
        "In float16 with eps = 1e-5, squares in 16 bits lose y where x is so small that its square is 0.",
        "In bfloat16 with eps = 1e-5, squares in 16 bits lose y where x is so small that its square is 0.",
        "In bfloat16 with eps = 1e-5, statistics in float32 make y right at every size of x.",
        "In bfloat16, y is right up to larger x with statistics in float32 than with squares in 16 bits.",
        "With activations of size 200, squares in float16 make the loss NaN.",
    ]
    assert {says: of[says] for says in holds} == dict.fromkeys(holds, Verdict.HOLDS)
    assert {says: of[says] for says in fails} == dict.fromkeys(fails, Verdict.FAILS)


def test_casting_before_the_weight_costs_half_an_ulp_and_leaves_dx_alone(quick):
    orders = quick("half_precision")[0].where(part="orders")
    for dtype in ("float16", "bfloat16"):
        llama, olmo2 = (orders.where(dtype=dtype, form=form) for form in ("llama", "olmo2"))
        assert np.all(olmo2.values("y") < 0.51)
        assert np.all(llama.values("y") > 0.6)
        assert np.array_equal(llama.values("dx"), olmo2.values("dx"))


def test_the_tables_have_a_line_for_each_form(quick):
    results = quick("half_precision")[0]
    tables = STUDY.parts(results)
    assert tables["orders"].count("\n") == 1 + 12
    assert tables["losses"].count("\n") == 1 + 6
