"""One page per norm: the formula, its backward pass, and what is communicated when its rows are split."""

from npnorm.norms.adaptive_norm import AdaptiveNorm
from npnorm.norms.add_rms_norm import AddRMSNorm
from npnorm.norms.batch_norm import BatchNorm
from npnorm.norms.cast_rms_norm import CastRMSNorm
from npnorm.norms.derf import Derf
from npnorm.norms.dyt import DyT
from npnorm.norms.folding import centre_outputs, fold, to_rms_norm
from npnorm.norms.gated_rms_norm import GatedRMSNorm
from npnorm.norms.group_norm import GroupNorm
from npnorm.norms.instance_norm import InstanceNorm
from npnorm.norms.l2_norm import L2Norm
from npnorm.norms.layer_norm import LayerNorm
from npnorm.norms.partial_rms_norm import PartialRMSNorm
from npnorm.norms.qk_norm import QKNorm
from npnorm.norms.rms_norm import RMSNorm
from npnorm.norms.scale_norm import ScaleNorm
from npnorm.norms.weight_norm import WeightNorm

__all__ = [
    "AdaptiveNorm",
    "AddRMSNorm",
    "BatchNorm",
    "CastRMSNorm",
    "Derf",
    "DyT",
    "GatedRMSNorm",
    "GroupNorm",
    "InstanceNorm",
    "L2Norm",
    "LayerNorm",
    "PartialRMSNorm",
    "QKNorm",
    "RMSNorm",
    "ScaleNorm",
    "WeightNorm",
    "centre_outputs",
    "fold",
    "to_rms_norm",
]
