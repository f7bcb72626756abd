"""What is said of RMSNorm in float16 and bfloat16, with the numbers: a part of the study half_precision."""

import numpy as np

from npnorm.studies import half_precision_range
from npnorm.studies.half_precision_norms import HALVES, ORDERS
from npnorm.studies.half_precision_range import RANGES, errors, first_lost, scales, share_wrong
from npnorm.studies.study import Claim, Results

SQUARES = "jingyaogong/minimind, issue 301"
PROMOTED = "jingyaogong/minimind, issue 665"
OVERFLOW = "theory; pytorch/pytorch, pull request 133085"
TWICE = "pytorch/pytorch, pull request 147203"
MIXED = "implied by Micikevicius et al. 2018, arXiv:1710.03740, section 4"
UNDERFLOW = "implied by minimind-notes, 01-normalization, quiz.md, question 5"
SMALL_EPS = "implied by minimind-notes, 01-normalization, code_guide.md, an exercise"
LAYER_NORM = "minimind-notes, 01-normalization, teaching.md"
NAN = "implied by minimind-notes, 01-normalization, quiz.md, question 6"
OWN = "npnorm, Precision"
ASKED = "asked here"

SAME = 0.02
"""Nats: losses that differ by less count as the same; chosen before the first run."""


def claims(results: Results) -> list[Claim]:
    """Return what is said of 16 bits, with the numbers."""
    return [*_claims_of_range(results), *_claims_of_orders(results), *_claims_of_training(results)]


def _claims_of_range(results: Results) -> list[Claim]:
    """Return what is said of the sizes of x at which y is right."""
    n, fewer = half_precision_range.features(results), results.settings["features"][0]
    tiny = {dtype: results.values("tiny", part="range", dtype=dtype) for dtype in HALVES}
    zero = {
        (dtype, eps): share_wrong(
            errors(results, dtype, "generation 1", eps), dtype, half_precision_range.vanishing(dtype)
        )
        for dtype, eps in RANGES
    }
    wide = {dtype: share_wrong(errors(results, dtype, "generation 3"), dtype) for dtype in HALVES}
    own = np.ravel([share_wrong(errors(results, dtype, "npnorm", eps), dtype) for dtype, eps in RANGES])
    layer, rms = (
        share_wrong(errors(results, "float16", form, 1e-8, fewer), "float16", below=1)
        for form in ("LayerNorm in the dtype", "in the dtype")
    )
    squared, in_half = (first_lost(results, "float16", form) for form in ("generation 1", "in the dtype"))
    wider = first_lost(results, "bfloat16", "generation 3") / first_lost(results, "bfloat16", "generation 1")
    narrow, summed = (
        errors(results, "bfloat16", form)[:, scales("bfloat16") == 0].ravel()
        for form in ("in the dtype", "generation 1")
    )
    limit = half_precision_range.overflow("float16", n)
    wrong = "the share at which y is off by more than 1 %"
    of_zero = f"of the sizes of x whose square is 0, {wrong}"
    of_all = f"of all sizes of x, {wrong}"
    lost = "smallest size of x from which on y is off by more than 50 %"
    at_one = "error of y / largest |y| of its row, for x of size 1"

    def vanishes(dtype: str, eps: float, source: str) -> Claim:
        small = f"{eps:.0e}".replace("-0", "-")
        says = f"In {dtype} with eps = {small}, squares in 16 bits lose y where x is so small that its square is 0."
        return Claim(says, source, of_zero, zero[dtype, eps], low=0.5)

    return [
        *(
            Claim(
                f"The square of 1e-4 is 0 in {dtype}.",
                source,
                f"1e-4 squared in {dtype}",
                tiny[dtype],
                high=0,
                exact=True,
            )
            for dtype, source in (("float16", SQUARES), ("bfloat16", UNDERFLOW))
        ),
        vanishes("float16", 1e-5, UNDERFLOW),
        vanishes("float16", 1e-8, SMALL_EPS),
        vanishes("bfloat16", 1e-5, UNDERFLOW),
        Claim(
            "In float16 with eps = 1e-8, LayerNorm loses more sizes of x than RMSNorm, with everything in 16 bits.",
            LAYER_NORM,
            f"of the sizes of x up to 1, {wrong}: LayerNorm's less RMSNorm's; n = {fewer}",
            layer - rms,
            low=0.05,
        ),
        Claim(
            "In float16, squares in 16 bits lose y as soon as an element of x reaches 256.",
            OVERFLOW,
            f"{lost}, in steps of 2; 256 is reached at a size of about 64",
            squared,
            256 / 4,
            256 / 2,
        ),
        Claim(
            f"In float16 with everything in 16 bits, y is lost where {n} features have a size of {limit:.3g} or more.",
            "theory",
            f"{lost}, in steps of 2",
            in_half,
            limit,
            2 * limit,
        ),
        *(
            Claim(
                f"In {dtype} with eps = 1e-5, statistics in float32 make y right at every size of x.",
                UNDERFLOW,
                of_all,
                wide[dtype],
                high=0,
                exact=True,
            )
            for dtype in HALVES
        ),
        Claim(
            "In bfloat16, y is right up to larger x with statistics in float32 than with squares in 16 bits.",
            UNDERFLOW,
            f"{lost}, in steps of 64: with statistics in float32 / with squares in 16 bits",
            wider,
            low=2,
        ),
        Claim("npnorm.RMSNorm is right at every size of x in both dtypes.", OWN, of_all, own, high=0, exact=True),
        Claim(
            f"In bfloat16 with everything in 16 bits, the sum of {n} squares makes y wrong by more than 10 %.",
            "theory",
            at_one,
            narrow,
            low=0.1,
        ),
        Claim(
            "In bfloat16, squares in 16 bits that are summed in float32 make y wrong by at most 1 %.",
            "theory",
            at_one,
            summed,
            high=0.01,
        ),
    ]


def _claims_of_orders(results: Results) -> list[Claim]:
    """Return what is said of the casts."""
    found = []
    for dtype in HALVES:
        y = {form: results.values("y", part="orders", dtype=dtype, form=form) for form in ORDERS}
        found += [
            Claim(
                f"Generation 2 returns float32 for x of {dtype}.",
                PROMOTED,
                "bits of an element of y",
                results.values("bits", part="orders", dtype=dtype, form="generation 2"),
                32,
                32,
                exact=True,
            ),
            Claim(
                f"In {dtype}, squares in 16 bits (generation 1) make y less precise than generation 3 does.",
                SQUARES,
                "error of y: generation 1 / generation 3",
                y["generation 1"] / y["generation 3"],
                low=1,
            ),
            Claim(
                f"In {dtype}, casting before the product with w (Llama) is less precise than casting after it (Gemma).",
                TWICE,
                "error of y: Llama's order / Gemma's order",
                y["llama"] / y["gemma"],
                low=1,
            ),
        ]
    return found


def _claims_of_training(results: Results) -> list[Claim]:
    """Return what is said of the loss."""

    def loss(gain: float, dtype: str, form: str) -> np.ndarray:
        return results.values("loss", part="train", gain=gain, dtype=dtype, form=form)

    def same(says: str, source: str, what: str, one: np.ndarray, other: np.ndarray) -> Claim:
        return Claim(says, source, f"loss {what}, in nats for each character", one - other, -SAME, SAME)

    found, plain = [], loss(1.0, "float32", "plain")
    for dtype, source in (("float16", MIXED), ("bfloat16", ASKED)):
        first, llama, last = (loss(1.0, dtype, form) for form in ("generation 1", "llama", "olmo2"))
        found += [
            same(
                f"With norms in {dtype} whose statistics are wider, the transformer ends at the loss of float32.",
                source,
                "of OLMo-2's order less that of float32",
                last,
                plain,
            ),
            same(
                f"With norms in {dtype}, casting before the product with w or after it gives the same loss.",
                ASKED,
                "of Llama's order less that of OLMo-2's",
                llama,
                last,
            ),
            same(
                f"With small activations, squares in {dtype} give the same loss as wider squares.",
                ASKED,
                "of generation 1 less that of OLMo-2's order",
                first,
                last,
            ),
        ]
    plain, up_cast, squares = (
        loss(1e4, *which) for which in (("float32", "plain"), ("float16", "olmo2"), ("bfloat16", "generation 1"))
    )
    lost = results.where(part="train", gain=1e4, dtype="float16", form="generation 1")
    return [
        *found,
        Claim(
            "With activations of size 200, a model whose norms square in float16 learns nothing.",
            "theory",
            "loss / loss of chance",
            lost.values("loss") / lost.values("chance"),
            0.999,
            1.001,
        ),
        Claim(
            "With activations of size 200, squares in float16 make the loss NaN.",
            NAN,
            "share of the seeds in which a number became NaN or infinite",
            lost.values("finite steps") < results.settings["steps"],
            low=1,
            exact=True,
        ),
        same(
            "With activations of size 200, norms in float16 whose statistics are wider end at the loss of float32.",
            f"implied by {SQUARES}",
            "of OLMo-2's order less that of float32",
            up_cast,
            plain,
        ),
        same(
            "With activations of size 200, squares in bfloat16 end at the loss of float32.",
            "theory",
            "of generation 1 less that of float32",
            squares,
            plain,
        ),
    ]
