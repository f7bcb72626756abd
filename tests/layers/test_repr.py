"""A layer says in one line what it holds."""

import numpy as np
import pytest

from npnorm import SOLO, RMSNorm
from npnorm.blocks import Chain, DeepNorm, PostNorm, PreNorm, Residual, ResPostNorm, SandwichNorm
from npnorm.layers import (
    GELU,
    GRU,
    MLP,
    Attention,
    AvgPool2d,
    Conv2d,
    CrossEntropy,
    Embedding,
    GlobalAvgPool2d,
    GRUCell,
    Linear,
    MaxPool2d,
    Positions,
    ReLU,
    Rotary,
    SiLU,
    SwiGLU,
)
from npnorm.tree import summary

ONES = {name: {"weight": np.ones((2, 2), "float32")} for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
UP, DOWN = {"weight": np.ones((6, 4))}, {"weight": np.ones((4, 6)), "bias": np.ones(4)}
RECURRENT = {"weight_ih": np.ones((6, 5)), "weight_hh": np.ones((6, 2))}
LINEAR = Linear(np.ones((4, 5), "float32"), np.ones(4, "float32"))

LINES = {
    "Linear(weight=(4, 5) float32, bias=(4,) float32)": LINEAR,
    "Embedding(weight=(9, 4) float64)": Embedding(np.ones((9, 4))),
    "Positions(weight=(9, 4) float64)": Positions(np.ones((9, 4))),
    "MLP(up_proj.weight=(6, 4) float64, down_proj.weight=(4, 6) float64, down_proj.bias=(4,) float64, "
    "activation=GELU())": MLP({"up_proj": UP, "down_proj": DOWN}),
    "SwiGLU(gate_proj.weight=(6, 4) float64, up_proj.weight=(6, 4) float64, down_proj.weight=(4, 6) float64, "
    "down_proj.bias=(4,) float64)": SwiGLU({"gate_proj": UP, "up_proj": UP, "down_proj": DOWN}),
    "Attention(q_proj.weight=(2, 2) float32, k_proj.weight=(2, 2) float32, v_proj.weight=(2, 2) float32, "
    "o_proj.weight=(2, 2) float32, heads=1, rotary=Rotary(base=500.0))": Attention(ONES, 1, None, Rotary(500.0)),
    "Attention(q_proj.weight=(2, 2) float32, k_proj.weight=(2, 2) float32, v_proj.weight=(2, 2) float32, "
    "o_proj.weight=(2, 2) float32, heads=1, causal=False)": Attention(ONES, 1, causal=False),
    "GRU(weight_ih=(6, 5) float64, weight_hh=(6, 2) float64, hh_gates=RMSNorm(weight=(4,) float32, eps=1e-06))": GRU(
        RECURRENT, {"hh_gates": RMSNorm.init(4)}
    ),
    "GRUCell(weight_ih=(6, 5) float64, weight_hh=(6, 2) float64)": GRUCell(RECURRENT),
    "Conv2d(weight=(8, 3, 5, 5) float32, bias=(8,) float64, stride=2, padding=0)": Conv2d(
        np.ones((8, 3, 5, 5), "float32"), np.ones(8), stride=2
    ),
    "MaxPool2d(size=3, stride=2, padding=1)": MaxPool2d(3, 2, 1),
    "AvgPool2d(size=3, stride=3)": AvgPool2d(3),
    "GlobalAvgPool2d()": GlobalAvgPool2d(),
    "ReLU()": ReLU(),
    "GELU()": GELU(),
    "SiLU()": SiLU(),
    "CrossEntropy()": CrossEntropy(),
    "PreNorm(norm=GELU(), sublayer=SiLU())": PreNorm(GELU(), SiLU()),
    "PostNorm(norm=GELU(), sublayer=SiLU())": PostNorm(GELU(), SiLU()),
    "Residual(sublayer=SiLU())": Residual(SiLU()),
    "ResPostNorm(norm=GELU(), sublayer=SiLU())": ResPostNorm(GELU(), SiLU()),
    "SandwichNorm(norm1=GELU(), norm2=Rotary(base=500.0), sublayer=SiLU())": SandwichNorm(
        GELU(), Rotary(500.0), SiLU()
    ),
    "DeepNorm(norm=GELU(), sublayer=SiLU(), alpha=2.0)": DeepNorm(GELU(), SiLU(), alpha=2),
    "Chain(one=GELU(), two=Linear(weight=(4, 5) float32, bias=(4,) float32))": Chain({"one": GELU(), "two": LINEAR}),
    "Solo()": SOLO,
}


@pytest.mark.parametrize("line", LINES)
def test_a_layer_is_one_line(line):
    assert repr(LINES[line]) == line


def test_heads_of_keys_and_values_are_told_where_queries_share_them():
    params = {name: {"weight": np.ones((4, 4))} for name in ("q_proj", "o_proj")}
    params |= {name: {"weight": np.ones((2, 4))} for name in ("k_proj", "v_proj")}
    assert repr(Attention(params, 2, 1)).endswith(", heads=2, kv_heads=1)")


def test_settings_that_are_none_are_left_out():
    assert summary("RMSNorm", {"weight": np.ones(3)}, eps=1e-6, cast=None, group=SOLO) == (
        "RMSNorm(weight=(3,) float64, eps=1e-06)"
    )
    assert summary("L2Norm") == "L2Norm()"
