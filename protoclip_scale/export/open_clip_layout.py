"""The layout that ``open_clip.create_model_from_pretrained('local-dir:DIR')`` loads."""

import copy
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.errors import UserError
from protoclip_scale.models.dual_encoder import NORMALIZATION, DualEncoder
from protoclip_scale.models.image import ImageTower
from protoclip_scale.models.open_clip_keys import text_to_open_clip
from protoclip_scale.models.text import CLIP_VOCABULARY, MASK_ID, TextTower, clip_ids, without_mask_row
from protoclip_scale.recipe import schema

TOLERANCE = 1e-4  # of the self-test's unit embeddings; fp32 rounding stays far below, a wrong pooling far above


def check_open_clip(recipe: schema.Recipe) -> list[str]:
    """Why open_clip cannot express the recipe's towers; empty if it can. Builds the image tower twice (seconds)."""
    with torch.random.fork_rng(devices=[]):
        return _image_reasons(recipe.model) + _text_reasons(recipe.model)


def export_open_clip(model: DualEncoder, recipe: schema.Recipe, folder: str | Path) -> Path:
    """Write ``open_clip_config.json``, ``open_clip_model.safetensors`` and, for other encoders than CLIP's, the tokenizer.

    The folder appears only after open_clip has loaded it and given the model's own embeddings of made-up inputs. Returns the folder.
    Raises UserError if the folder holds files already or open_clip cannot express the towers.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"export: {folder} is not empty; choose another folder with --out or remove it")
    if reasons := check_open_clip(recipe):
        raise UserError(f"export: open_clip cannot express this model: {'; '.join(reasons)}")
    model = copy.deepcopy(model).cpu().float().eval()
    draft = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        config = {"model_cfg": _model_config(recipe.model, model.image_tower, model.text_tower), "preprocess_cfg": _preprocess_config(recipe.model.image)}
        (draft / "open_clip_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_file(_weights(model), draft / "open_clip_model.safetensors", metadata={"format": "pt"})
        if recipe.model.text.name != "clip":
            tokenizer_for(recipe.model.text).save(draft)
        difference = _difference(model, recipe.model, draft)
        if not difference <= TOLERANCE:
            raise UserError(f"export: open_clip computes other embeddings for {recipe.model.image.name} and {recipe.model.text.name} (they differ by {difference:.2g}); this tower cannot be exported to open_clip")
        if folder.exists():
            folder.rmdir()
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder


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


def _weights(model: DualEncoder) -> dict[str, torch.Tensor]:
    trunk = model.image_tower.trunk
    weights = {f"visual.trunk.{name}": tensor for name, tensor in trunk.state_dict().items()}
    place = f"visual.trunk.{trunk.pretrained_cfg['classifier']}" if model.image_tower.ends_in_projection else "visual.head.proj"
    weights |= {f"{place}.{name}": tensor for name, tensor in model.image_projection.state_dict().items()}
    text = model.text_tower.encoder.state_dict()
    if model.text_tower.is_clip:
        table = "embeddings.token_embedding.weight"
        weights |= text_to_open_clip(text | {table: without_mask_row(text[table])}) | {"text_projection": model.text_projection.weight.T}
    else:
        weights |= {f"text.transformer.{name}": tensor for name, tensor in text.items()} | {"text.proj.weight": model.text_projection.weight}
    weights["logit_scale"] = model.logit_scale.bounded_log().reshape(())
    return {name: tensor.detach().clone().contiguous() for name, tensor in weights.items()}


def _image_reasons(settings: schema.Model) -> list[str]:
    from open_clip.timm_model import TimmModel

    ours = ImageTower(settings.image, pretrained=False)
    if ours.fixed_size and not ours.own_size:
        own = ours.trunk.pretrained_cfg["input_size"][-1]
        return [f"open_clip builds {settings.image.name} for {own} pixels only: set model.image.size {own} or choose a convolutional tower"]
    vision = _vision_config(settings, ours)
    try:
        theirs = TimmModel(settings.image.name, settings.embed_dim, settings.image.size, vision["timm_pool"], vision["timm_proj"])
    except Exception as error:
        return [f"open_clip cannot build model.image.name {settings.image.name} ({' '.join(str(error).split())[:200]})"]
    classifier = str(ours.trunk.pretrained_cfg["classifier"])
    expected = {name: tensor.shape for name, tensor in ours.trunk.state_dict().items()}
    expected |= {f"{classifier}.weight": None, f"{classifier}.bias": None} if ours.ends_in_projection else {}
    found = {name: tensor.shape for name, tensor in theirs.trunk.state_dict().items()}
    differing = sorted({name for name in expected.keys() | found.keys() if name not in expected or name not in found or expected[name] not in (None, found[name])})
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


@torch.no_grad()
def _difference(model: DualEncoder, settings: schema.Model, folder: Path) -> float:
    """The largest difference between the model's and open_clip's unit embeddings of seeded noise."""
    import open_clip

    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[]):
            theirs = open_clip.create_model(f"local-dir:{folder}").eval()
    except Exception as error:
        raise UserError(f"export: open_clip cannot load what was written ({' '.join(str(error).split())[:300]}); this tower cannot be exported to open_clip") from error
    finally:
        logging.disable(logging.NOTSET)
    draws = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, settings.image.size, settings.image.size, generator=draws)
    ids, lengths = _made_up_tokens(model.text_tower, settings.text.context_length, draws)
    pairs = (
        (model.encode_image(images), F.normalize(theirs.encode_image(images), dim=-1)),
        (model.encode_text(ids, lengths), F.normalize(theirs.encode_text(clip_ids(ids) if settings.text.name == "clip" and settings.text.mask_token else ids), dim=-1)),
    )
    return max((ours - other).abs().max().item() for ours, other in pairs)


def _made_up_tokens(tower: TextTower, context_length: int, draws: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    config = tower.encoder.config
    lengths = torch.tensor([context_length, max(2, context_length // 2)])
    ids = torch.randint(1, MASK_ID if tower.is_clip else config.vocab_size - 2, (2, context_length), generator=draws)
    ids[ids == config.pad_token_id] += 1
    if tower.is_clip:
        ids[torch.arange(2), lengths - 1] = config.vocab_size - 1  # the end token has the largest id, which open_clip pools by
    return ids.masked_fill(torch.arange(context_length) >= lengths[:, None], config.pad_token_id), lengths
