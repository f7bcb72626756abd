import numpy as np
import pytest

from npnorm.layers import (
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
    SwiGLU,
)

W = {"weight": np.ones((2, 2))}
RECURRENT = {"weight_ih": np.ones((6, 2)), "weight_hh": np.ones((6, 2))}
LAYERS = [
    Linear(**W),
    MLP({"up_proj": W, "down_proj": W}),
    SwiGLU({"gate_proj": W, "up_proj": W, "down_proj": W}),
    Attention({"q_proj": W, "k_proj": W, "v_proj": W, "o_proj": W}, heads=1),
    GRU(RECURRENT),
    GRUCell(RECURRENT),
    Conv2d(np.ones((2, 2, 1, 1))),
    MaxPool2d(2),
    AvgPool2d(2),
    GlobalAvgPool2d(),
    Embedding(**W),
    CrossEntropy(),
]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("saved", [None, (1, 2), Linear(**W).forward(np.ones((1, 2)))])
def test_what_the_layer_did_not_save_is_refused(layer, saved):
    name = type(layer).__name__
    with pytest.raises(TypeError, match=rf"{name}\.backward takes what {name}\.forward saved; got "):
        layer.backward(np.ones((1, 1, 2)), saved)
