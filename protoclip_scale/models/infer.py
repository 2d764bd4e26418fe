"""Which timm model a published image tower is, found by its sizes."""

import functools
from collections.abc import Mapping
from typing import Any

import timm
import torch
from timm.layers import QuickGELU

from protoclip_scale.errors import UserError

# blocks of each stage, width of the stem's output -> CLIP's ResNets
RESNETS = {
    ((3, 4, 6, 3), 64): "resnet50_clip",
    ((3, 4, 23, 3), 64): "resnet101_clip",
    ((4, 6, 10, 6), 80): "resnet50x4_clip",
    ((6, 8, 18, 8), 96): "resnet50x16_clip",
    ((3, 15, 36, 10), 128): "resnet50x64_clip",
}
_HEAD_WIDTH = 64


def clip_vit(width: int, depth: int, patch: int, size: int, quick_gelu: bool, heads: int | None = None) -> str:
    """timm's name of a CLIP vision transformer. ``heads``: None is one for 64 of the width. Raises UserError if timm has none of these sizes."""
    heads = heads or width // _HEAD_WIDTH
    for name in timm.list_models(f"vit_*patch{patch}_clip_*"):
        if _sizes(name) == (width, depth, patch, heads, quick_gelu) and _input_size(name) == size:
            return name
    for name in timm.list_models(f"vit_*patch{patch}_clip_*"):  # at another resolution: position embeddings of any size load
        if _sizes(name) == (width, depth, patch, heads, quick_gelu):
            return name
    activation = "quick_gelu" if quick_gelu else "gelu"
    raise UserError(f"timm has no CLIP vision transformer of width {width}, {depth} layers, {heads} heads and patches of {patch} with {activation}; such weights cannot be read as a model")


def timm_name_of(vision: Mapping[str, Any]) -> str:
    """Of the vision configuration of a transformers CLIP, which leaves out what is ViT-B/32's."""
    get = vision.get
    return clip_vit(
        get("hidden_size", 768), get("num_hidden_layers", 12), get("patch_size", 32), get("image_size", 224), get("hidden_act", "quick_gelu") == "quick_gelu", get("num_attention_heads", 12)
    )


def _input_size(name: str) -> int:
    return timm.get_pretrained_cfg(name).input_size[-1]


@functools.cache
def _sizes(name: str) -> tuple[int, int, int, int, bool]:
    with torch.device("meta"):
        trunk = timm.create_model(name)
    block = trunk.blocks[0]
    return trunk.embed_dim, len(trunk.blocks), trunk.patch_embed.patch_size[0], block.attn.num_heads, isinstance(getattr(block.mlp, "act", None), QuickGELU)
