"""Names of weights: ours, open_clip's and transformers' CLIP. Pure renaming, both directions share one table."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

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


class Made(NamedTuple):
    """A tensor under another name: ``make`` of the tensors that are named ``sources`` here. So it can be made when its turn comes, with no more in memory."""

    sources: tuple[str, ...]
    make: Callable[..., torch.Tensor] = lambda tensor: tensor


def make_all(made: Mapping[str, Made], state: Mapping[str, torch.Tensor]) -> State:
    """All of them at once."""
    return {name: each.make(*(state[source] for source in each.sources)) for name, each in made.items()}


def _joined(*pieces: torch.Tensor) -> torch.Tensor:
    return torch.cat(pieces)


def _blocks(names: Iterable[str], table: Mapping[str, str], old: str, new: str, fused: str) -> dict[str, Made]:
    """Transformer blocks renamed; query, key and value become one tensor named ``fused`` + weight or bias."""
    renamed = {}
    for name in names:
        match = re.fullmatch(re.escape(old) + r"(\d+)\.(.+)\.(weight|bias)", name)
        if not match:
            continue
        block, part, kind = match.groups()
        if part == "self_attn.q_proj":
            renamed[f"{new}{block}.{fused}{kind}"] = Made(tuple(f"{old}{block}.self_attn.{letter}_proj.{kind}" for letter in "qkv"), _joined)
        elif part in table:
            renamed[f"{new}{block}.{table[part]}.{kind}"] = Made((name,))
    return renamed


def text_to_open_clip(names: Iterable[str]) -> dict[str, Made]:
    """open_clip's text weights, made of a transformers CLIPTextModel's, whose ``names`` these are."""
    return {new: Made((old,)) for old, new in _TEXT.items()} | _blocks(names, _TEXT_BLOCK, "encoder.layers.", "transformer.resblocks.", "attn.in_proj_")


def vision_to_transformers(names: Iterable[str]) -> dict[str, Made]:
    """The weights of a transformers CLIPVisionModel, made of those of timm's VisionTransformer, whose ``names`` these are. What it has no place for is left out."""
    names = list(names)
    made = {old: Made((new,)) for old, new in _VISION.items() if new in names}
    for old, shaped in (("embeddings.class_embedding", _flat), ("embeddings.position_embedding.weight", _first)):
        made |= {old: Made((_VISION[old],), shaped)} if old in made else {}
    ours = {new: old for old, new in _VISION_BLOCK.items()}
    for name in names:
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if not match:
            continue
        block, part, kind = match.groups()
        if part == "attn.qkv":
            for number, letter in enumerate("qkv"):
                made[f"encoder.layers.{block}.self_attn.{letter}_proj.{kind}"] = Made((name,), functools.partial(_third, number))
        elif part in ours:
            made[f"encoder.layers.{block}.{ours[part]}.{kind}"] = Made((name,))
    return made


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1)


def _first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[0]


def _third(number: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.chunk(3)[number]


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
    return renamed | make_all(_blocks(state, _VISION_BLOCK, "encoder.layers.", "blocks.", "attn.qkv."), state)
