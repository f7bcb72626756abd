"""The norms of the catalogue by torch; what torch has no function for is written down."""

import torch
import torch.nn.functional as F

from tests.norms.catalogue import MEAN_AND_VAR


def affine(y, weight=None, bias=None):
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def layer_norm(x, eps, weight=None, bias=None, shape=None):
    shape = shape or (x.shape[-1:] if weight is None else weight.shape)
    return F.layer_norm(x, shape, weight, bias, **({} if eps is None else {"eps": eps}))


def rms_norm(x, eps, weight=None, bias=None, offset=0):
    weight = None if weight is None else weight + offset
    y = F.rms_norm(x, x.shape[-1:] if weight is None else weight.shape, eps=1e-6 if eps is None else eps)
    return affine(y, weight, bias)


def partial_rms_norm(k):
    return lambda x, eps, **params: affine(x * torch.rsqrt(x[..., :k].square().mean(-1, True) + eps), **params)


def group_norm(groups):
    def torch_does(x, eps, weight=None, bias=None):
        weight = torch.ones(x.shape[1], dtype=x.dtype) if weight is None else weight  # else it takes no bias
        return F.group_norm(x, groups, weight, bias, **({} if eps is None else {"eps": eps}))

    return torch_does


def instance_norm(x, eps, **params):
    return F.instance_norm(x, **params, **({} if eps is None else {"eps": eps}))


def batch_norm(x, eps, **params):
    return F.batch_norm(x, None, None, **params, training=True, **({} if eps is None else {"eps": eps}))


def inference(x, eps, **params):
    return F.batch_norm(x, *map(torch.tensor, MEAN_AND_VAR), **params, eps=eps)


def gated(x, eps, weight, gate):
    return rms_norm(x, eps, weight) * F.silu(gate)


def gated_in_groups(x, eps, weight, gate):
    u = x * F.silu(gate)
    return rms_norm(u.unflatten(-1, (2, -1)), eps).flatten(-2) * weight


def add_rms_norm(x, eps, weight, bias, residual):
    return torch.stack([rms_norm(x + residual, eps, weight, bias), x + residual])


def adaptive(norm):
    def torch_does(x, eps, scale, shift):
        each = (x.shape[0], *[1] * (x.ndim - 2), -1)
        return norm(x, eps) * (1 + scale.reshape(each)) + shift.reshape(each)

    return torch_does


def qk_norm(x, eps, q_weight, k_weight, k):
    return torch.stack([rms_norm(x, eps, q_weight), rms_norm(k, eps, k_weight)])


def normalize(x, eps, weight=None):
    return affine(F.normalize(x, dim=-1, eps=1e-12 if eps is None else eps), weight)


BY_TORCH = {
    # by the name of the entry: (x, eps, **params) -> y, of tensors; with eps=None that of torch, if it has the norm
    "LayerNorm": layer_norm,
    "LayerNorm of wide rows": layer_norm,
    "LayerNorm over two axes": layer_norm,
    "LayerNorm without parameters over two axes": lambda x, eps: layer_norm(x, eps, shape=(3, 4)),
    "RMSNorm": rms_norm,
    "RMSNorm of wide rows": rms_norm,
    "RMSNorm over three axes": rms_norm,
    "RMSNorm with offset": lambda x, eps, **params: rms_norm(x, eps, **params, offset=1),
    "CastRMSNorm of Llama": rms_norm,
    "CastRMSNorm of Gemma": lambda x, eps, **params: rms_norm(x, eps, **params, offset=1),
    "PartialRMSNorm": partial_rms_norm(3),
    "PartialRMSNorm of all": rms_norm,
    "GroupNorm": group_norm(3),
    "GroupNorm of much space": group_norm(3),
    "GroupNorm of one group": group_norm(1),
    "GroupNorm without space": group_norm(2),
    "InstanceNorm": instance_norm,
    "BatchNorm": batch_norm,
    "BatchNorm of much space": batch_norm,
    "BatchNorm without space": batch_norm,
    "BatchNorm in inference": inference,
    "GatedRMSNorm, norm first": gated,
    "GatedRMSNorm, gate first, groups": gated_in_groups,
    "AddRMSNorm": add_rms_norm,
    "AdaptiveNorm of LayerNorm": adaptive(layer_norm),
    "AdaptiveNorm of RMSNorm": adaptive(rms_norm),
    "QKNorm per head": qk_norm,
    "QKNorm over the full width": qk_norm,
    "ScaleNorm": normalize,
    "ScaleNorm of short rows": normalize,
    "L2Norm": normalize,
    "WeightNorm": lambda v, _, weight_g: torch._weight_norm(v, weight_g, 0),
    "DyT": lambda x, _, alpha, **params: affine(torch.tanh(alpha * x), **params),
    "Derf": lambda x, _, alpha, shift, **params: affine(torch.erf(alpha * x + shift), **params),
}
