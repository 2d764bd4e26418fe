"""Folders that transformers loads, read as weights of ours: CLIPModel, VisionTextDualEncoderModel over timm, or two towers with their projections."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from protoclip_scale.errors import UserError
from protoclip_scale.models.open_clip_keys import State, below, vision_from_transformers

IMAGE, TEXT, PROJECTIONS, WEIGHTS = "image", "text", "projections.safetensors", "model.safetensors"
_FORMS = {"clip": "clip", "vision-text-dual-encoder": "dual_encoder"}  # model_type -> form


class Parts(NamedTuple):
    """Weights under the names of timm's trunk and of transformers' text encoder; projections [embed_dim, width]; the logarithm of the temperature."""

    vision: State
    projection: torch.Tensor
    text: State
    text_projection: torch.Tensor
    logit_scale: torch.Tensor


def form_of(folder: Path) -> str | None:
    """clip, dual_encoder or folders; None for anything else."""
    if (folder / PROJECTIONS).is_file():
        return "folders"
    return _FORMS.get(config_of(folder).get("model_type")) if (folder / "config.json").is_file() else None


def config_of(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder. Raises UserError if it cannot be read."""
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}); export the model again, or download it again") from error


def read_parts(folder: Path) -> Parts:
    """The weights of a folder of any form, in float32 where they are floats. Raises UserError for towers of other kinds and damaged files."""
    form = form_of(folder)
    if form == "folders":
        state, projections = read_file(folder / IMAGE / WEIGHTS), read_file(folder / PROJECTIONS)
        return _parts(below(state, "timm_model."), read_file(folder / TEXT / WEIGHTS), projections)
    state = read_file(folder / WEIGHTS)
    vision = below(state, "vision_model.")
    if form == "clip":
        vision = vision_from_transformers(vision)
    elif not any(name.startswith("timm_model.") for name in vision):
        raise UserError(f"{folder}: its image tower is a {config_of(folder).get('vision_config', {}).get('model_type')}; of dual encoders only those over timm (timm_wrapper) are read")
    return _parts(vision if form == "clip" else below(vision, "timm_model."), below(state, "text_model."), state)


def _parts(vision: State, text: State, state: Mapping[str, torch.Tensor]) -> Parts:
    try:
        return Parts(vision, state["visual_projection.weight"], text, state["text_projection.weight"], state["logit_scale"])
    except KeyError as error:
        raise UserError(f"weights of a transformers model lack {error}; export the model again, or download it again") from error


def read_file(path: Path) -> State:
    """A safetensors file, floats of any width as float32."""
    try:
        state = load_file(path)
    except Exception as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:200]}); only whole safetensors files are, export or download the model again") from error
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
