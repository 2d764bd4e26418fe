"""``model.init_from``: weights of a run, an open_clip model or export, or a transformers CLIP, under our names."""

import json
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from timm.layers import QuickGELU
from timm.models.vision_transformer import VisionTransformer

from protoclip_scale.errors import UserError
from protoclip_scale.models.attention_pool import fold_projection_bias
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.open_clip_keys import State, below, text_from_open_clip, vision_from_transformers
from protoclip_scale.models.scale import LogitScale
from protoclip_scale.models.text import CLIP_VOCABULARY, MASK_ID, with_mask_row, without_mask_row
from protoclip_scale.models.transformers_folder import form_of, read_parts
from protoclip_scale.recipe import schema

Read = Callable[[Path], Mapping[str, torch.Tensor]]
OPEN_CLIP = "open_clip:"
WHAT = "a run directory, an export of either layout, open_clip:NAME/TAG, or the folder or hub name of a transformers CLIP"


def load_initial_weights(model: DualEncoder, settings: schema.Model, read_run: Read | None = None, read_heads: Read | None = None) -> None:
    """Replace the towers' weights, projections and logit scale (of a run or an export: the heads too, where both have them).

    ``read_run`` maps a run directory to the state dict of its latest checkpoint, ``read_heads`` an export to heads' weights that lie beside those of its layout.
    Raises UserError, one line, if the source is none of ``WHAT`` or its towers are not those of the recipe.
    """
    source = settings.init_from
    assert source is not None
    folder = Path(source)
    heads = dict(read_heads(folder)) if read_heads and model.heads else {}
    if source.startswith(OPEN_CLIP):
        state, text_activation, image_activation = _open_clip_tag(source)
        _check_activations(model, settings, text_activation, image_activation)
        _load(model, _from_open_clip(model, state), source)
    elif (folder / "checkpoints").is_dir():
        assert read_run is not None, "the caller must bring the reader of run directories"
        _load(model, dict(read_run(folder)), source)
    elif (folder / "open_clip_config.json").is_file():
        state, config = read_open_clip_folder(folder)
        quick = "quick_gelu" if config.get("quick_gelu") else "gelu"
        _check_activations(model, settings, quick, None if "timm_model_name" in config["vision_cfg"] else quick)
        _load(model, _from_open_clip(model, state) | heads, source)
    elif form_of(folder) in ("dual_encoder", "folders"):
        load_folder(model, folder, heads)
    elif (folder / "config.json").is_file() or (not folder.exists() and source.count("/") <= 1 and not source.startswith((".", "/"))):
        _load_transformers(model, settings, source, heads)
    else:
        raise UserError(f"model.init_from: {source} is not {WHAT}; {'it has no checkpoints, open_clip_config.json or config.json' if folder.is_dir() else 'there is no such folder'}")


def read_open_clip_folder(folder: Path) -> tuple[State, dict]:
    """Weights and ``model_cfg`` (with ``preprocess_cfg`` beside its own keys) of an open_clip folder, safetensors only."""
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        model_config = config["model_cfg"] | {"preprocess_cfg": config.get("preprocess_cfg", {})}
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{folder / 'open_clip_config.json'} is no open_clip configuration ({error!r}); export the model again") from error
    files = sorted(folder.glob("open_clip*.safetensors")) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{folder} has open_clip_config.json but no .safetensors weights; other formats are not read")
    try:
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in load_file(files[0]).items()}, model_config
    except Exception as error:
        raise UserError(f"{files[0]} cannot be read ({' '.join(str(error).split())}); export the model again") from error


def _open_clip_tag(source: str) -> tuple[State, str, str | None]:
    import open_clip

    name, _, tag = source.removeprefix(OPEN_CLIP).partition("/")
    config = open_clip.get_model_config(name)
    if config is None or not tag:
        raise UserError(f"model.init_from: {source} names no open_clip model; write {OPEN_CLIP}NAME/TAG as open_clip.list_pretrained() lists them")
    # open_clip reports what it also raises through the root logger
    logging.disable(logging.ERROR)
    try:
        other = open_clip.create_model(name, pretrained=tag)
    except Exception as error:
        raise UserError(f"model.init_from: open_clip cannot load {name} with {tag} ({' '.join(str(error).split())[:300]}); see open_clip.list_pretrained(), or give a weights file as TAG") from error
    finally:
        logging.disable(logging.NOTSET)
    quick = (open_clip.get_pretrained_cfg(name, tag) or config).get("quick_gelu", config.get("quick_gelu", False))
    activation = "quick_gelu" if quick else "gelu"
    is_transformer = "timm_model_name" not in config["vision_cfg"] and not isinstance(config["vision_cfg"].get("layers"), list)
    return other.state_dict(), activation, activation if is_transformer else None


def _from_open_clip(model: DualEncoder, state: Mapping[str, torch.Tensor]) -> State:
    trunk = model.image_tower.trunk
    if any(name.startswith("visual.trunk.") for name in state):
        vision = below(state, "visual.trunk.")
        projection = {kind: state[f"visual.head.proj.{kind}"] for kind in ("weight", "bias") if f"visual.head.proj.{kind}" in state}
    else:
        convert = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
        vision = dict(convert(dict(state), trunk)) if convert else below(state, "visual.")
        projection = {}
    classifier = trunk.pretrained_cfg["classifier"]
    for kind in ("weight", "bias"):
        if not projection.get(kind, torch.empty(0)).numel() and f"{classifier}.{kind}" in vision:
            projection[kind] = vision.pop(f"{classifier}.{kind}")
    if "text.transformer.embeddings.word_embeddings.weight" in state or any(name.startswith("text.transformer.encoder.") for name in state):
        text, text_projection = below(state, "text.transformer."), state.get("text.proj.weight")
    else:
        text = text_from_open_clip(state)
        text_projection = next((state[name].T for name in ("text_projection", "text.text_projection") if name in state), None)
    return _assemble(model, vision, projection, text, text_projection, state["logit_scale"])


def _load_transformers(model: DualEncoder, settings: schema.Model, source: str, heads: State) -> None:
    from transformers import CLIPConfig, CLIPModel

    try:
        config = CLIPConfig.from_pretrained(source)
        other = CLIPModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
    except Exception as error:
        raise UserError(f"model.init_from: transformers cannot load a CLIP from {source} ({' '.join(str(error).split())[:300]}); give {WHAT}") from error
    trunk = model.image_tower.trunk
    if not isinstance(trunk, VisionTransformer) or settings.text.name != "clip":
        raise UserError(f"model.init_from: {source} is a transformers CLIP; it needs model.image.name vit_*_clip_* (here {settings.image.name}) and model.text.name clip (here {settings.text.name})")
    _check_activations(model, settings, config.text_config.hidden_act, config.vision_config.hidden_act)
    state = other.state_dict()
    vision, text = vision_from_transformers(below(state, "vision_model.")), below(state, "text_model.")
    projection = {"weight": state["visual_projection.weight"]}
    _load(model, _assemble(model, vision, projection, text, state["text_projection.weight"], state["logit_scale"]) | heads, source)


def load_folder(model: DualEncoder, folder: Path, heads: State | None = None) -> None:
    """Replace the model's weights by those of a transformers folder, whose towers it was built for, and of ``heads``. Raises UserError if they are others."""
    parts = read_parts(folder)
    _load(model, _assemble(model, parts.vision, {"weight": parts.projection}, parts.text, parts.text_projection, parts.logit_scale) | (heads or {}), str(folder))


def load_tensors(model: DualEncoder, state: Mapping[str, torch.Tensor], source: str) -> None:
    """Replace the model's weights by others under open_clip's names. Raises UserError if they are of other towers."""
    _load(model, _from_open_clip(model, state), source)


def _assemble(model: DualEncoder, vision: State, projection: State, text: State, text_projection: torch.Tensor | None, logit_scale: torch.Tensor) -> State:
    bias = projection.pop("bias", None)
    if bias is not None and bias.any():
        folded = fold_projection_bias(model.image_tower.trunk, vision, projection["weight"], bias)
        vision, projection = (folded, projection) if folded else (vision, projection | {"bias": bias})  # which is reported as not fitting
    ours = {f"image_tower.trunk.{name}": tensor for name, tensor in vision.items()}
    ours |= {f"image_projection.{name}": tensor for name, tensor in projection.items()}
    ours |= {f"text_tower.encoder.{name}": tensor for name, tensor in text.items()}
    if text_projection is not None:
        ours["text_projection.weight"] = text_projection
    return ours | {"logit_scale.log": logit_scale.reshape(1)}


def _check_activations(model: DualEncoder, settings: schema.Model, text: str, image: str | None) -> None:
    if settings.text.name == "clip" and settings.text.activation != text:
        raise UserError(f"model.init_from: {settings.init_from} was trained with {text}, model.text.activation is {settings.text.activation}; set it to {text}")
    trunk = model.image_tower.trunk
    if image is not None and isinstance(trunk, VisionTransformer) and isinstance(trunk.blocks[0].mlp.act, QuickGELU) != (image == "quick_gelu"):
        raise UserError(f"model.init_from: {settings.init_from} was trained with {image} in the image tower, {settings.image.name} has another activation; timm's names with quickgelu have quick_gelu")


TOKENS = "text_tower.encoder.embeddings.token_embedding.weight"


def _with_the_same_tokens(own: State, state: State) -> State:
    """The state with a table of tokens as the model has it: with a row for the mask token, its own where the source has none, or without."""
    table = state.get(TOKENS)
    if table is None or len(own.get(TOKENS, table)) == len(table) or {len(table), len(own[TOKENS])} != {CLIP_VOCABULARY, CLIP_VOCABULARY + 1}:
        return state
    return state | {TOKENS: without_mask_row(table) if len(table) > CLIP_VOCABULARY else with_mask_row(table, own[TOKENS][MASK_ID : MASK_ID + 1])}


def _load(model: DualEncoder, state: State, source: str) -> None:
    """Copy by name; towers and projections must fit exactly, heads and scales are taken where both have them."""
    own = model.state_dict()
    state = _with_the_same_tokens(own, state)
    required = [name for name in own if name.split(".")[0] in ("image_tower", "image_projection", "text_tower", "text_projection")]
    tower_parts = ("image_tower.", "image_projection.", "text_tower.", "text_projection.")
    # a counter that some formats leave out and none of our computations reads
    missing = [name for name in required if name not in state and not name.endswith("num_batches_tracked")]
    foreign = [name for name in state if name.startswith(tower_parts) and name not in own and not name.endswith("position_ids")]
    other_shape = [name for name in own if name in state and own[name].shape != state[name].shape]
    fix = "make model.image, model.text and model.embed_dim those of the source"
    if other_shape:
        name = other_shape[0]
        if not name.startswith(tower_parts):
            fix = "give that head the widths of the source, in objectives or model.prototype_heads"
        raise UserError(f"model.init_from: {source} does not fit: {name} is {list(state[name].shape)} there and {list(own[name].shape)} here ({len(other_shape)} such); {fix}")
    if missing or foreign:
        raise UserError(f"model.init_from: {source} does not fit: {len(missing)} weights are missing there and {len(foreign)} unknown here, first {(missing + foreign)[0]}; {fix}")
    model.load_state_dict({name: state[name].to(own[name].dtype) for name in own if name in state}, strict=False)
    for scale in (module for module in model.modules() if isinstance(module, LogitScale)):
        with torch.no_grad():
            scale.log.clamp_(scale.minimum, scale.maximum)
