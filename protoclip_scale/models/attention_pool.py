"""The bias that CLIP's published ResNets have in their image projection, moved to where our projections, which have none, can do without it."""

import torch
from timm.layers import AttentionPool2d, RotAttentionPool2d
from torch import nn

from protoclip_scale.models.open_clip_keys import State

_LEFT = 1e-5  # of the bias: more than rounding means that no change of the values gives it


def fold_projection_bias(trunk: nn.Module, vision: State, weight_ED: torch.Tensor, bias_E: torch.Tensor) -> State | None:
    """The trunk's weights (timm's names) with which ``weight_ED`` alone gives what it gave with ``bias_E``, or None if there are none.

    Attention weights sum to one, so what is added to the pool's values is added to its output: values + x with W x = b, the shortest such x.
    In float64; exact to rounding where the embedding is not wider than the pool.
    """
    pool = getattr(trunk, "head", None)
    if not isinstance(pool, AttentionPool2d | RotAttentionPool2d):
        return None
    weight, bias = weight_ED.double(), bias_E.double()
    shift_D = torch.linalg.lstsq(weight, bias[:, None], driver="gelsd").solution[:, 0]
    if (weight @ shift_D - bias).norm() > _LEFT * bias.norm():
        return None
    name = "head.v.bias" if pool.qkv is None else "head.qkv.bias"
    values = vision[name].double()
    values[-len(shift_D) :] += shift_D
    return vision | {name: values.to(vision[name].dtype)}
