"""Names of weights: ours, open_clip's and transformers' CLIP. Pure renaming, both directions share one table."""

import re
from collections.abc import Mapping

import torch

State = dict[str, torch.Tensor]

# our text tower below "text_tower.encoder." -> open_clip's CLIP
_TEXT = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_TEXT_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
# transformers' CLIP vision tower -> timm's VisionTransformer
_VISION = {
    "embeddings.class_embedding": "cls_token",
    "embeddings.position_embedding.weight": "pos_embed",
    "embeddings.patch_embedding.weight": "patch_embed.proj.weight",
    "pre_layrnorm.weight": "norm_pre.weight",
    "pre_layrnorm.bias": "norm_pre.bias",
    "post_layernorm.weight": "norm.weight",
    "post_layernorm.bias": "norm.bias",
}
_VISION_BLOCK = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}


def below(state: Mapping[str, torch.Tensor], prefix: str) -> State:
    """The entries whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _blocks(state: Mapping[str, torch.Tensor], names: Mapping[str, str], old: str, new: str, fused: str) -> State:
    """Transformer blocks renamed; query, key and value become one tensor named ``fused`` + weight or bias."""
    renamed: State = {}
    for name, tensor in state.items():
        match = re.fullmatch(re.escape(old) + r"(\d+)\.(.+)\.(weight|bias)", name)
        if not match:
            continue
        block, part, kind = match.groups()
        if part == "self_attn.q_proj":
            pieces = [state[f"{old}{block}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
            renamed[f"{new}{block}.{fused}{kind}"] = torch.cat(pieces)
        elif part in names:
            renamed[f"{new}{block}.{names[part]}.{kind}"] = tensor
    return renamed


def text_to_open_clip(state: Mapping[str, torch.Tensor]) -> State:
    """A transformers CLIPTextModel's weights under open_clip's names."""
    renamed = {new: state[old] for old, new in _TEXT.items()}
    return renamed | _blocks(state, _TEXT_BLOCK, "encoder.layers.", "transformer.resblocks.", "attn.in_proj_")


def text_from_open_clip(state: Mapping[str, torch.Tensor]) -> State:
    """open_clip's text weights (top level, or below ``text.``) under transformers' names."""
    state = below(state, "text.") if "text.token_embedding.weight" in state else state
    renamed = {old: state[new] for old, new in _TEXT.items()}
    ours = {new: old for old, new in _TEXT_BLOCK.items()}
    for name, tensor in state.items():
        match = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if not match:
            continue
        block, part, kind = match.groups()
        if part == "attn.in_proj":
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                renamed[f"encoder.layers.{block}.self_attn.{letter}_proj.{kind}"] = piece.clone()
        elif part in ours:
            renamed[f"encoder.layers.{block}.{ours[part]}.{kind}"] = tensor
    return renamed


def vision_from_transformers(state: Mapping[str, torch.Tensor]) -> State:
    """A transformers CLIPVisionModel's weights under timm's names."""
    renamed = {new: state[old] for old, new in _VISION.items()}
    renamed["cls_token"] = renamed["cls_token"].view(1, 1, -1)
    renamed["pos_embed"] = renamed["pos_embed"][None]
    return renamed | _blocks(state, _VISION_BLOCK, "encoder.layers.", "blocks.", "attn.qkv.")
