"""The layout that transformers loads without any code of ours, in the first of three forms that holds the towers.

``clip``: a CLIPModel, where the image tower is CLIP's vision transformer and the text tower CLIP's. ``dual_encoder``: a VisionTextDualEncoderModel of
a TimmWrapperModel and CLIP's text tower. ``folders``: ``image/`` and ``text/``, each for AutoModel, and ``projections.safetensors``: transformers has no
class that pools other text encoders as ours do.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.export.source import Embeddings, Probe, Source, published
from protoclip_scale.export.tensors import Plan
from protoclip_scale.files import publish_json
from protoclip_scale.models.dual_encoder import NORMALIZATION, DualEncoder
from protoclip_scale.models.open_clip_keys import Made, vision_to_transformers
from protoclip_scale.models.text import CLIP_VOCABULARY, POOLING_MODES, pooling_of, without_mask_row
from protoclip_scale.models.transformers_folder import IMAGE, PROJECTIONS, TEXT, WEIGHTS, form_of
from protoclip_scale.recipe import schema

_ACTIVATIONS = {nn.GELU: "gelu", QuickGELU: "quick_gelu"}
_TRUNK, _ENCODER = "image_tower.trunk.", "text_tower.encoder."
_PROJECTION_OF = {"visual_projection.weight": Made(("image_projection.weight",)), "text_projection.weight": Made(("text_projection.weight",))}


class Form(NamedTuple):
    """How one of the forms is written and loaded."""

    write: Callable[[Source, Path, str], dict[str, Plan]]
    embed: Callable[[Path, Probe], Embeddings]


def reasons(settings: schema.Model, structure: DualEncoder) -> list[str]:
    """Why transformers cannot express the towers; empty if it can."""
    encoder = structure.text_tower.encoder
    if not structure.text_tower.is_clip and encoder.config.is_encoder_decoder:
        return [f"transformers loads {settings.text.name} with its decoder, and this model has the encoder alone: choose an encoder, as BERT or MPNet"]
    if structure.text_tower.is_clip and not structure.text_tower.causal:
        return ["transformers' text transformer of CLIP is causal, model.text.causal false is not: set it to true"]
    ours, theirs = structure.image_tower.trunk.state_dict(), _timm_wrapper(settings, structure).timm_model.state_dict()
    differing = sorted({name for name in ours.keys() | theirs.keys() if name not in ours or name not in theirs or ours[name].shape != theirs[name].shape})
    return [f"transformers builds model.image.name {settings.image.name} otherwise ({len(differing)} weights differ, first {differing[0]})"] if differing else []


def write_files(source: Source, folder: Path, dtype: str) -> dict[str, Plan]:
    """Write configurations, tokenizer and image processor; what each file of weights is made of. Where no dtype is named, from_pretrained loads in ``dtype``."""
    structure = source.structure
    form = "folders" if not structure.text_tower.is_clip else "clip" if _clip_vision_config(source.settings, structure) else "dual_encoder"
    return FORMS[form].write(source, folder, dtype)


def embed(folder: Path, probe: Probe) -> Embeddings:
    """What transformers computes, in float32."""
    return FORMS[form_of(folder)].embed(folder, probe)


def _clip_vision_config(settings: schema.Model, structure: DualEncoder) -> dict[str, Any] | None:
    """The configuration of a CLIPVisionModel that has a place for each of the trunk's weights, or None."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    trunk = structure.image_tower.trunk
    if not isinstance(trunk, VisionTransformer) or trunk.global_pool != "token":
        return None
    block = trunk.blocks[0]
    activation = _ACTIVATIONS.get(type(getattr(block.mlp, "act", None)))
    if activation is None or not isinstance(trunk.norm, nn.LayerNorm):
        return None
    config = {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": block.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": settings.image.size,
        "patch_size": trunk.patch_embed.patch_size[0],
        "hidden_act": activation,
        "layer_norm_eps": trunk.norm.eps,
        "projection_dim": settings.embed_dim,
    }
    with torch.device("meta"):
        theirs = CLIPVisionModel(CLIPVisionConfig(**config)).state_dict()
    made = vision_to_transformers(trunk.state_dict())
    used = {source for each in made.values() for source in each.sources}
    return config if made.keys() == theirs.keys() and used == trunk.state_dict().keys() else None


def _processor(settings: schema.Model, kind: str, folder: Path) -> None:
    """The tokenizer and the image processor as one, for AutoProcessor."""
    import transformers

    tokenizer_for(published(settings).text).save(folder)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    getattr(transformers, kind)(image_processor=_image_processor(settings.image), tokenizer=tokenizer).save_pretrained(folder)


def _image_processor(image: schema.ImageTower):
    from transformers import CLIPImageProcessor

    mean, deviation = NORMALIZATION[image.normalization]
    crop = {"height": image.size, "width": image.size}
    return CLIPImageProcessor(size={"shortest_edge": image.size}, crop_size=crop, image_mean=list(mean), image_std=list(deviation))


def _text_config(structure: DualEncoder) -> dict[str, Any]:
    return structure.text_tower.encoder.config.to_dict() | {"vocab_size": CLIP_VOCABULARY, "projection_dim": structure.embed_dim}


def _text_plan(structure: DualEncoder) -> Plan:
    plan = {f"text_model.{name}": Made((_ENCODER + name,)) for name in structure.text_tower.encoder.state_dict()}
    table = "text_model.embeddings.token_embedding.weight"
    return plan | {table: plan[table]._replace(make=without_mask_row)}


def _save_config(config: Any, architecture: str, dtype: str, folder: Path) -> None:
    config.architectures, config.dtype, config._name_or_path = [architecture], getattr(torch, dtype), ""  # no folder of this machine
    config.save_pretrained(folder)


def _write_clip(source: Source, folder: Path, dtype: str) -> dict[str, Plan]:
    from transformers import CLIPConfig

    settings, structure = source.settings, source.structure
    config = CLIPConfig(text_config=_text_config(structure), vision_config=_clip_vision_config(settings, structure), projection_dim=settings.embed_dim)
    _save_config(config, "CLIPModel", dtype, folder)
    _processor(settings, "CLIPProcessor", folder)
    vision = vision_to_transformers(structure.image_tower.trunk.state_dict())
    plan = {f"vision_model.{name}": each._replace(sources=tuple(_TRUNK + part for part in each.sources)) for name, each in vision.items()}
    return {WEIGHTS: plan | _text_plan(structure) | _PROJECTION_OF | {"logit_scale": source.logits.scale}}


def _wrapper_config(settings: schema.Model, structure: DualEncoder):
    from transformers import TimmWrapperConfig

    tower = structure.image_tower
    return TimmWrapperConfig(architecture=settings.image.name, model_args=tower.arguments, hidden_size=tower.num_features, num_labels=0)


def _timm_wrapper(settings: schema.Model, structure: DualEncoder) -> nn.Module:
    """transformers' own, without values."""
    from transformers import TimmWrapperModel

    with torch.device("meta"):
        return TimmWrapperModel(_wrapper_config(settings, structure))


def _trunk_plan(structure: DualEncoder, prefix: str) -> Plan:
    return {f"{prefix}timm_model.{name}": Made((_TRUNK + name,)) for name in structure.image_tower.trunk.state_dict()}


def _write_dual_encoder(source: Source, folder: Path, dtype: str) -> dict[str, Plan]:
    from transformers import VisionTextDualEncoderConfig

    settings, structure = source.settings, source.structure
    vision = _wrapper_config(settings, structure).to_dict()
    config = VisionTextDualEncoderConfig(vision_config=vision, text_config=_text_config(structure), projection_dim=settings.embed_dim)
    _save_config(config, "VisionTextDualEncoderModel", dtype, folder)
    _processor(settings, "VisionTextDualEncoderProcessor", folder)
    plan = _trunk_plan(structure, "vision_model.") | _text_plan(structure) | _PROJECTION_OF
    return {WEIGHTS: plan | {"logit_scale": source.logits.scale}}


def _write_folders(source: Source, folder: Path, dtype: str) -> dict[str, Plan]:
    settings, structure = source.settings, source.structure
    encoder = structure.text_tower.encoder
    for part in (IMAGE, TEXT):
        (folder / part).mkdir()
    _save_config(_wrapper_config(settings, structure), "TimmWrapperModel", dtype, folder / IMAGE)
    _image_processor(settings.image).save_pretrained(folder / IMAGE)
    _save_config(copy.deepcopy(encoder.config), type(encoder).__name__, dtype, folder / TEXT)
    tokenizer_for(settings.text).save(folder / TEXT)
    pooling = {"word_embedding_dimension": structure.text_tower.num_features} | {f"pooling_mode_{mode}": kind == structure.text_tower.pooling for kind, mode in POOLING_MODES.items()}
    publish_json(folder / TEXT / "1_Pooling" / "config.json", pooling)
    return {
        f"{IMAGE}/{WEIGHTS}": _trunk_plan(structure, ""),
        f"{TEXT}/{WEIGHTS}": {name: Made((_ENCODER + name,)) for name in encoder.state_dict()},
        PROJECTIONS: _PROJECTION_OF | {"logit_scale": source.logits.scale},
    }


@torch.no_grad()
def _embed_whole(folder: Path, probe: Probe) -> Embeddings:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    image = model.get_image_features(pixel_values=probe.images).pooler_output
    text = model.get_text_features(input_ids=probe.token_ids).pooler_output
    return Embeddings(F.normalize(image, dim=-1), F.normalize(text, dim=-1))


@torch.no_grad()
def _embed_folders(folder: Path, probe: Probe) -> Embeddings:
    from transformers import AutoModel

    image_model, text_model = (AutoModel.from_pretrained(folder / part, dtype=torch.float32).eval() for part in (IMAGE, TEXT))
    projections = {name: tensor.float() for name, tensor in load_file(folder / PROJECTIONS).items()}
    image = image_model(pixel_values=probe.images).pooler_output
    mask = (torch.arange(probe.token_ids.shape[1]) < probe.lengths[:, None]).long()
    tokens = text_model(input_ids=probe.token_ids, attention_mask=mask).last_hidden_state
    text = tokens[:, 0] if pooling_of(str(folder / TEXT)) == "first" else (tokens * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    return Embeddings(F.normalize(image @ projections["visual_projection.weight"].T, dim=-1), F.normalize(text @ projections["text_projection.weight"].T, dim=-1))


FORMS = {"clip": Form(_write_clip, _embed_whole), "dual_encoder": Form(_write_dual_encoder, _embed_whole), "folders": Form(_write_folders, _embed_folders)}
