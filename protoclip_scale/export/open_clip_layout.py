"""The layout that ``open_clip.create_model_from_pretrained('local-dir:DIR')`` loads."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.export.source import Embeddings, Probe, Source
from protoclip_scale.export.tensors import Plan
from protoclip_scale.models.dual_encoder import NORMALIZATION, DualEncoder
from protoclip_scale.models.image import ImageTower
from protoclip_scale.models.open_clip_keys import Made, text_to_open_clip
from protoclip_scale.models.text import CLIP_VOCABULARY, TextTower, without_mask_row
from protoclip_scale.recipe import schema

WEIGHTS = "open_clip_model.safetensors"


def reasons(settings: schema.Model, structure: DualEncoder) -> list[str]:
    """Why open_clip cannot express the towers; empty if it can."""
    return _image_reasons(settings, structure.image_tower) + _text_reasons(settings)


def write_files(source: Source, folder: Path, dtype: str) -> dict[str, Plan]:
    """Write ``open_clip_config.json`` and, for other encoders than CLIP's, the tokenizer; what ``open_clip_model.safetensors`` is made of. Files of any dtype
    are loaded in the precision that the user names."""
    settings, model = source.settings, source.structure
    config = {"model_cfg": _model_config(settings, model.image_tower, model.text_tower), "preprocess_cfg": _preprocess_config(settings.image)}
    if source.logits.bias:
        config["model_cfg"]["init_logit_bias"] = 0.0  # or open_clip's model would have none to load
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    if settings.text.name != "clip":
        tokenizer_for(settings.text).save(folder)
    return {WEIGHTS: _weights(model) | _logits(source)}


@torch.no_grad()
def embed(folder: Path, probe: Probe) -> Embeddings:
    """What open_clip computes, in float32."""
    import open_clip

    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[]):
            model = open_clip.create_model(f"local-dir:{folder}").eval()
    finally:
        logging.disable(logging.NOTSET)
    return Embeddings(F.normalize(model.encode_image(probe.images), dim=-1), F.normalize(model.encode_text(probe.token_ids), dim=-1))


def _vision_config(settings: schema.Model, image: ImageTower) -> dict[str, Any]:
    own_projection = image.ends_in_projection
    return {
        "timm_model_name": settings.image.name,
        "timm_model_pretrained": False,
        # an empty pool leaves the model's own in place where open_clip adds the projection
        "timm_pool": image.pooling if own_projection else "",
        "timm_proj": "" if own_projection else "linear",
        "image_size": settings.image.size,
    }


def _model_config(settings: schema.Model, image: ImageTower, text: TextTower) -> dict[str, Any]:
    config = {"embed_dim": settings.embed_dim, "vision_cfg": _vision_config(settings, image)}
    if text.is_clip:
        names = ("context_length", "width", "heads", "layers")
        text_config = {name: getattr(settings.text, name) for name in names} | {"vocab_size": CLIP_VOCABULARY}
        return config | {"quick_gelu": settings.text.activation == "quick_gelu", "text_cfg": text_config}
    text_config = {
        "hf_model_name": settings.text.name,
        "hf_tokenizer_name": settings.text.name,
        "hf_proj_type": "linear",
        "hf_pooler_type": {"mean": "mean_pooler", "first": "cls_last_hidden_state_pooler"}[text.pooling],
        "context_length": settings.text.context_length,
    }
    return config | {"text_cfg": text_config}


def _preprocess_config(image: schema.ImageTower) -> dict[str, Any]:
    mean, deviation = NORMALIZATION[image.normalization]
    return {"mean": list(mean), "std": list(deviation), "interpolation": "bicubic", "resize_mode": "shortest"}


def _weights(model: DualEncoder) -> Plan:
    trunk = model.image_tower.trunk
    plan = {f"visual.trunk.{name}": Made((f"image_tower.trunk.{name}",)) for name in trunk.state_dict()}
    projection = ("image_projection.weight",)
    if model.image_tower.ends_in_projection:  # timm's classifier, which has a bias
        place = f"visual.trunk.{trunk.pretrained_cfg['classifier']}"
        plan |= {f"{place}.weight": Made(projection), f"{place}.bias": Made(projection, lambda weight: torch.zeros(len(weight), device=weight.device))}
    else:
        plan["visual.head.proj.weight"] = Made(projection)
    prefix, names = "text_tower.encoder.", model.text_tower.encoder.state_dict()
    if model.text_tower.is_clip:
        made = text_to_open_clip(names)
        made["token_embedding.weight"] = made["token_embedding.weight"]._replace(make=without_mask_row)
        plan |= {name: each._replace(sources=tuple(prefix + source for source in each.sources)) for name, each in made.items()}
        plan["text_projection"] = Made(("text_projection.weight",), lambda weight: weight.T)
    else:
        plan |= {f"text.transformer.{name}": Made((prefix + name,)) for name in names} | {"text.proj.weight": Made(("text_projection.weight",))}
    return plan


def _logits(source: Source) -> Plan:
    return {"logit_scale": source.logits.scale} | ({"logit_bias": source.logits.bias} if source.logits.bias else {})


def _image_reasons(settings: schema.Model, ours: ImageTower) -> list[str]:
    from open_clip.timm_model import TimmModel

    if ours.arguments:
        own = ours.trunk.pretrained_cfg["input_size"][-1]
        return [f"open_clip builds {settings.image.name} for {own} pixels only: set model.image.size {own} or choose a convolutional tower"]
    vision = _vision_config(settings, ours)
    try:
        with torch.device("meta"):
            theirs = TimmModel(settings.image.name, settings.embed_dim, settings.image.size, vision["timm_pool"], vision["timm_proj"])
    except Exception as error:
        return [f"open_clip cannot build model.image.name {settings.image.name} ({' '.join(str(error).split())[:200]})"]
    classifier = str(ours.trunk.pretrained_cfg["classifier"])
    expected = {name: tensor.shape for name, tensor in ours.trunk.state_dict().items()}
    found = {name: tensor.shape for name, tensor in theirs.trunk.state_dict().items()}
    if ours.ends_in_projection:
        found = {name: shape for name, shape in found.items() if name not in (f"{classifier}.weight", f"{classifier}.bias")}
    differing = sorted({name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)})
    return [f"open_clip builds model.image.name {settings.image.name} otherwise ({len(differing)} weights differ, first {differing[0]})"] if differing else []


def _text_reasons(settings: schema.Model) -> list[str]:
    name = settings.text.name
    if name == "clip":
        return [] if settings.text.causal else ["open_clip lets a text transformer that is not causal see padding, model.text.causal false does not: set it to true"]
    if Path(name).exists():
        return [f"open_clip finds text encoders by hub name, model.text.name {name} is a folder of this machine: give the encoder's hub name"]
    from open_clip.hf_configs import arch_dict
    from transformers import AutoConfig

    kind = AutoConfig.from_pretrained(name).model_type
    return [] if kind in arch_dict else [f"open_clip has no text encoders of type {kind} (model.text.name {name}), only {', '.join(arch_dict)}"]
