"""Published CLIP-like checkpoints as models of ours: for each family a table of names, and the towers that its sizes tell.

The tables lead to open_clip's names, which ``initial_weights`` reads. Sources: openai/CLIP clip/model.py, mlfoundations/open_clip, facebookresearch/SLIP models.py,
Sense-GVT/DeCLIP prototype/model, megvii-research/protoclip src/open_clip/model.py.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from protoclip_scale.errors import UserError
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.infer import RESNETS, clip_vit
from protoclip_scale.models.initial_weights import load_tensors
from protoclip_scale.models.open_clip_keys import State
from protoclip_scale.models.text import CLIP_VOCABULARY
from protoclip_scale.recipe import schema

_HEAD_WIDTH = 64  # of all text towers here
_SLIP_VITS = {(768, 12): "vit_base_patch16_224", (1024, 24): "vit_large_patch16_224"}  # width, depth


class Family(NamedTuple):
    """``renamed``: pattern -> open_clip's name, the first that fits the whole name; ``transposed``: of the new names; ``left_out``: what is no part of the towers.
    ``image_name``: timm's name, from open_clip's names; ``activation``: of the transformers of CLIP's kind; ``normalization``: what images were normalised with."""

    normalization: str
    activation: str
    image_name: Callable[[State, str], str]
    renamed: tuple[tuple[str, str], ...] = ()
    transposed: frozenset[str] = frozenset()
    left_out: str = "(?!)"


def _count(state: Mapping[str, Any], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _clip_tower(state: State, activation: str) -> str:
    """OpenAI's vision transformers and ResNets, by their sizes."""
    if "visual.proj" in state:
        width, _, _, patch = state["visual.conv1.weight"].shape
        return clip_vit(width, _count(state, r"visual\.transformer\.resblocks\.(\d+)\."), patch, _image_size(state), activation == "quick_gelu")
    if "visual.attnpool.c_proj.weight" not in state:
        raise UserError("the image tower is neither CLIP's vision transformer nor its ResNet; name timm's model with --image-name")
    sizes = tuple(_count(state, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)), len(state["visual.layer1.0.conv1.weight"])
    if sizes not in RESNETS:
        raise UserError(f"the image tower is a ResNet of {sizes[0]} blocks and width {sizes[1]}, which timm does not have; such weights cannot be read")
    return RESNETS[sizes]


def _slip_tower(state: State, activation: str) -> str:
    width, depth = state["visual.trunk.cls_token"].shape[-1], _count(state, r"visual\.trunk\.blocks\.(\d+)\.")
    if (width, depth) not in _SLIP_VITS:
        raise UserError(f"the image tower is a ViT of width {width} with {depth} blocks; only SLIP's ViT-B and ViT-L are read (its ViT-S has 12 heads, timm's has 6)")
    return _SLIP_VITS[width, depth]


def _image_size(state: State) -> int:
    """Pixels, by the position embeddings."""
    for name, patch in (("visual.positional_embedding", None), ("visual.attnpool.positional_embedding", 32), ("visual.trunk.pos_embed", None)):
        if name in state:
            side = round((state[name].shape[-2] - 1) ** 0.5)
            kernel = state.get("visual.conv1.weight", state.get("visual.trunk.patch_embed.proj.weight"))
            return side * (patch or kernel.shape[-1])
    raise UserError("the weights tell no size of the images; name it with --image-size")


_OF_OPENAI = r"input_resolution|context_length|vocab_size|attn_mask"
FAMILIES = {
    "openai": Family("clip", "quick_gelu", _clip_tower, left_out=_OF_OPENAI),
    "open_clip": Family("clip", "gelu", _clip_tower, left_out=_OF_OPENAI),
    "protoclip": Family("clip", "quick_gelu", _clip_tower, left_out=rf"{_OF_OPENAI}|(image|text)_projection_head\..*|logit_scale_proto"),
    "slip": Family(
        "imagenet",
        "quick_gelu",
        _slip_tower,
        renamed=((r"visual\.(.*)", r"visual.trunk.\1"), (r"image_projection", "visual.head.proj.weight")),
        transposed=frozenset({"visual.head.proj.weight"}),
        left_out=r"image_mlp\..*",
    ),
    "declip": Family(
        "imagenet",
        "quick_gelu",
        _clip_tower,
        renamed=((r"encode_text\.text_projection\.weight", "text_projection"), (r"encode_text\.text_projection\.bias", "text_projection.bias"), (r"encode_text\.(.*)", r"\1")),
        transposed=frozenset({"text_projection"}),
        left_out=r"(projector|predictor|text_label_predictor|nn_replacer)\w*\..*|visual\.fc\..*",
    ),
}


def import_model(state: State, family: str, source: str, image_name: str | None = None, image_size: int | None = None, activation: str | None = None) -> tuple[schema.Model, DualEncoder]:
    """The settings and the model (in evaluation mode) of a published state dict. What is given besides is for weights that do not tell it.

    Raises UserError, one line, for towers that cannot be built or weights that are left over.
    """
    about = FAMILIES[family]
    activation = activation or about.activation
    state = _renamed(state, about)
    try:
        state = _fold_text_bias(state)
        settings = _settings(state, about, image_name or about.image_name(state, activation), image_size or _image_size(state), activation, source)
    except KeyError as error:
        raise UserError(f"{source}: it has no {error.args[0]}, so these are no weights of the family {family}; the families are {', '.join(FAMILIES)}") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    with torch.random.fork_rng(devices=[]):
        model = DualEncoder(settings, frozenset({"image", "text", "logit_scale"}), pretrained=False)
    load_tensors(model, state, source)
    return settings.model_copy(update={"init_from": None}), model.eval()


def _renamed(state: State, about: Family) -> State:
    renamed = {}
    for name, tensor in state.items():
        if re.fullmatch(about.left_out, name):
            continue
        new = next((re.sub(pattern, place, name) for pattern, place in about.renamed if re.fullmatch(pattern, name)), name)
        renamed[new] = tensor.T if new in about.transposed else tensor
    return renamed


def _settings(state: State, about: Family, image_name: str, image_size: int, activation: str, source: str) -> schema.Model:
    prefix = "text." if "text.token_embedding.weight" in state else ""
    if any(name.startswith(("text.transformer.embeddings.", "pretrained_text.", "text.transformer.encoder.")) for name in state):
        raise UserError("its text tower is a transformers encoder; export it with the library that wrote it, and load that folder")
    tokens, width = state[f"{prefix}token_embedding.weight"].shape
    if tokens not in (CLIP_VOCABULARY, CLIP_VOCABULARY + 1):  # one more is DeCLIP's mask token, which is left out when the weights are loaded
        raise UserError(f"its text tower has {tokens:,} tokens, CLIP's vocabulary {CLIP_VOCABULARY:,}; other tokenizers are not read")
    text = {
        "context_length": len(state[f"{prefix}positional_embedding"]),
        "width": width,
        "heads": width // _HEAD_WIDTH,
        "layers": _count(state, rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\."),
        "activation": activation,
    }
    image = {"name": image_name, "size": image_size, "normalization": about.normalization}
    return schema.Model(embed_dim=state[f"{prefix}text_projection"].shape[1], image=image, text=text, init_from=source)


def _fold_text_bias(state: State) -> State:
    """DeCLIP's text projection has a bias b, ours none: what the last norm adds becomes the shortest x more with W x = b. In float64."""
    state = dict(state)
    bias = state.pop("text_projection.bias", None)
    if bias is None:
        return state
    weight_ED, wanted = state["text_projection"].T.double(), bias.double()
    shift = torch.linalg.lstsq(weight_ED, wanted[:, None], driver="gelsd").solution[:, 0]
    left = ((weight_ED @ shift - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()
    if left > 1e-5:
        width, embed_dim = state["text_projection"].shape
        raise UserError(f"its text projection to {embed_dim} numbers has a bias that {width} inputs cannot replace ({left:.0%} of it would be left); layouts of open_clip and transformers have no place for it")
    return state | {"ln_final.bias": (state["ln_final.bias"].double() + shift).to(bias.dtype)}
