"""One page per norm: the formula, its backward pass, and what is communicated when its features are split."""

from npnorm.norms.layer_norm import LayerNorm
from npnorm.norms.rms_norm import RMSNorm

__all__ = ["LayerNorm", "RMSNorm"]
