"""Models of open_clip and of transformers, seen as ours are: uint8 images and tokens in, unit rows out. Their own preprocessing and tokenizer, no code of theirs but the libraries'."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from protoclip_scale.data.tokenizers import Tokens
from protoclip_scale.data.transforms import NORMALIZATION, normalize
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.pixels import Preprocessing

INTERPOLATIONS = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}  # Pillow's numbers, and names
Loaded = tuple[nn.Module, Preprocessing, Callable[[list[str]], Tokens]]


class Unit(nn.Module):
    """A dual encoder of another library: ``encode_image`` of uint8 [B, 3, S, S], ``encode_text`` of padded ids, both giving unit rows [B, D] in float32."""

    def __init__(self, model: nn.Module, preprocessing: Preprocessing, image: Callable, text: Callable):
        super().__init__()
        self.model = model.eval()
        self.preprocessing, self._image, self._text = preprocessing, image, text

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        pixels = normalize(images, self.preprocessing.mean, self.preprocessing.std).contiguous()
        return F.normalize(self._image(self.model, pixels).float(), dim=-1)

    def encode_text(self, token_ids: torch.Tensor, token_lengths: torch.Tensor) -> torch.Tensor:
        return F.normalize(self._text(self.model, token_ids, token_lengths).float(), dim=-1)


def open_clip_model(name: str, tag: str | None = None) -> Loaded:
    """A model of open_clip by its name and a pretrained tag (random weights without one), or of ``local-dir:FOLDER``.

    Weights come as safetensors or by torch's loader for weights alone. UserError if there is no such model or its weights cannot be had.
    """
    import open_clip

    logging.disable(logging.WARNING)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = open_clip.create_model(name, pretrained=tag, weights_only=True, pretrained_text=False)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--model: open_clip cannot load {name}{f' with {tag!r}' if tag else ''} ({reason}); open_clip.list_pretrained() lists names and tags, and their weights need the Hub once") from error
    finally:
        logging.disable(logging.NOTSET)
    preprocessing = preprocessing_of_open_clip(open_clip.get_model_preprocess_cfg(model), name)

    def tokens(texts: list[str]) -> Tokens:
        ids = tokenizer(texts)
        return Tokens(ids, torch.full((len(ids),), ids.shape[1]))

    return Unit(model, preprocessing, lambda model, pixels: model.encode_image(pixels), lambda model, ids, lengths: model.encode_text(ids)), preprocessing, tokens


def preprocessing_of_open_clip(config: Mapping[str, Any], name: str) -> Preprocessing:
    """From open_clip's ``preprocess_cfg``. UserError for one that is not square, or resizes as ours cannot."""
    clip_mean, clip_std = NORMALIZATION["clip"]
    mode = config.get("resize_mode") or "shortest"
    if mode not in ("shortest", "squash"):
        raise UserError(f"--model {name}: its preprocess_cfg.resize_mode {mode} is not supported; only shortest and squash are")
    size, interpolation = _square(config["size"], name), _interpolation(config.get("interpolation") or "bicubic", name)
    return Preprocessing(size, None, interpolation, mode == "squash", tuple(config.get("mean") or clip_mean), tuple(config.get("std") or clip_std))


def transformers_model(place: str) -> Loaded:
    """A CLIPModel or VisionTextDualEncoderModel from a folder or a Hub id: safetensors only, no remote code.

    UserError for other kinds of models, missing or unusable files, and preprocessing that ours cannot do.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel, VisionTextDualEncoderModel

    classes = {"clip": CLIPModel, "vision-text-dual-encoder": VisionTextDualEncoderModel}
    try:
        kind = AutoConfig.from_pretrained(place, trust_remote_code=False).model_type
        if kind not in classes:
            raise UserError(f"--model {place} is a {kind} of transformers; only {' and '.join(classes)} are evaluated")
        model = classes[kind].from_pretrained(place, use_safetensors=True, trust_remote_code=False)
        processor = AutoImageProcessor.from_pretrained(place, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--model {place}: transformers cannot load it ({' '.join(str(error).split())[:300]}); it needs config, safetensors, preprocessor and tokenizer files") from error
    preprocessing = _preprocessing_of_processor(processor, place)
    most = getattr(model.config.text_config, "max_position_embeddings", None) or tokenizer.model_max_length
    length = min(most, tokenizer.model_max_length)

    def tokens(texts: list[str]) -> Tokens:
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt", padding_side="right")
        return Tokens(encoded["input_ids"], encoded["attention_mask"].sum(1))

    def text(model: nn.Module, ids: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths.to(ids.device)[:, None]).long()
        return _features(model.get_text_features(input_ids=ids, attention_mask=mask))

    return Unit(model, preprocessing, lambda model, pixels: _features(model.get_image_features(pixel_values=pixels)), text), preprocessing, tokens


def _features(output: Any) -> torch.Tensor:
    """transformers 5 wraps projected features in an output whose ``pooler_output`` they are."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output


def _preprocessing_of_processor(processor: Any, place: str) -> Preprocessing:
    """From an image processor of transformers, whose fields differ by model."""
    size = dict(processor.size or {})
    shortest = size.get("shortest_edge")
    resize = shortest or _square((size.get("height"), size.get("width")), place)
    crop = dict(processor.crop_size or {}) if getattr(processor, "do_center_crop", False) else {}
    cropped = _square((crop["height"], crop["width"]), place) if "height" in crop else resize
    if shortest and not crop:
        raise UserError(f"--model {place}: its image processor leaves images of any shape (no center crop), which is not supported")
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    if not mean or not std or not getattr(processor, "do_normalize", True):
        raise UserError(f"--model {place}: its image processor names no image_mean and image_std; add them to preprocessor_config.json")
    return Preprocessing(cropped, resize, _interpolation(getattr(processor, "resample", 3), place), not shortest, tuple(mean), tuple(std))


def _square(size: Any, name: str) -> int:
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or sides[0] != sides[1] or not sides[0]:
        raise UserError(f"--model {name}: it wants images of {sides}; only square ones are supported")
    return int(sides[0])


def _interpolation(value: Any, name: str) -> str:
    found = INTERPOLATIONS.get(value if isinstance(value, str) else int(value))
    if found is None:
        raise UserError(f"--model {name}: it resizes by {value}; only bilinear and bicubic are supported")
    return found
