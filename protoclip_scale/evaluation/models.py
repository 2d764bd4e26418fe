"""Any model to be evaluated, from one name: a run, an export, a model of open_clip's, or a CLIP of transformers'; each with its own preprocessing and tokenizer."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from protoclip_scale import collectives
from protoclip_scale.data.tokenizers import tokenizer_for
from protoclip_scale.data.transforms import NORMALIZATION
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.others import open_clip_model, preprocessing_of_open_clip, transformers_model
from protoclip_scale.evaluation.pixels import Preprocessing, own_preprocessing
from protoclip_scale.evaluation.suites import Suite, suite_of_recipe
from protoclip_scale.export.token_heads import FILE as TOKEN_HEADS
from protoclip_scale.export.token_heads import load_with_tokens
from protoclip_scale.models.transformers_folder import form_of
from protoclip_scale.objectives.compared import Compared, compared_by

OPEN_CLIP, HUB = "open_clip:", "hf:"
KINDS = f"a run directory, an export, {OPEN_CLIP}NAME[:PRETRAINED], a folder of transformers with a CLIP in it, or {HUB}ORG/NAME"


class Candidate(NamedTuple):
    """A model to evaluate, on the CPU and in evaluation mode: unit rows from ``encode_image`` (uint8) and ``encode_text``.

    step, own_suite, weights (live or ema): of a run's checkpoint, else None. compared: what is to be measured of it.
    """

    name: str
    model: torch.nn.Module
    preprocessing: Preprocessing
    tokenizer: Callable
    step: int | None = None
    own_suite: Suite | None = None
    weights: str | None = None
    compared: Compared = Compared()


def load_any(spec: str, checkpoint: str = "latest", weights: str | None = None) -> Iterator[Candidate]:
    """The models that ``spec`` names, each loaded when its turn comes; a collective.

    ``spec``: see KINDS. ``checkpoint``, of a run: a step, latest, or all, oldest first; ``weights``, of a run: live, ema, or None for the average if there is one.
    Raises UserError for what is none of these, cannot be loaded, or is given a checkpoint or weights that it has not.
    """
    folder = Path(spec).expanduser()
    if not spec.startswith((OPEN_CLIP, HUB)) and (folder / "checkpoints").is_dir():
        yield from _of_run(folder, checkpoint, weights)
        return
    for option, value, default in (("--checkpoint", checkpoint, "latest"), ("--weights", weights, None)):
        if value != default:
            raise UserError(f"{option} {value}: {spec} is an export or another library's model, which is one model; leave {option} away")
    if spec.startswith(OPEN_CLIP):
        yield _of_open_clip(*spec.removeprefix(OPEN_CLIP).partition(":")[::2])
    elif spec.startswith(HUB):
        yield Candidate(spec, *transformers_model(spec.removeprefix(HUB)))
    elif (folder / "open_clip_config.json").is_file():
        yield _of_export(folder)
    elif folder.is_dir() and form_of(folder) in ("clip", "dual_encoder") and not (folder / TOKEN_HEADS).is_file():
        yield Candidate(folder.name, *transformers_model(str(folder)))
    elif folder.is_dir() and form_of(folder):  # token heads, or two towers in folders of their own: no class of transformers holds them
        yield _ours(folder)
    else:
        what = "is neither a run directory (no checkpoints/) nor an export (no open_clip_config.json, no config.json of a CLIP)" if folder.is_dir() else "does not exist"
        raise UserError(f"--model {spec} {what}; name {KINDS}")


def _of_run(folder: Path, checkpoint: str, weights: str | None) -> Iterator[Candidate]:
    from protoclip_scale.engine.checkpoint import find, list_checkpoints
    from protoclip_scale.engine.saved_model import load_model

    # Rank 0 chooses: a run that is still training may publish between two ranks' looks.
    found = collectives.from_rank_zero(lambda: list_checkpoints(folder) if checkpoint == "all" else [find(folder, checkpoint)[0]])
    if not found:
        raise UserError(f"--model {folder}: it holds no checkpoint yet; train it first")
    for path in found:
        step = int(path.name.removeprefix("step-"))
        recipe, model, kind = load_model(folder, str(step), weights)
        name = f"{recipe.name}, step {step}{', averaged weights' if kind == 'ema' else ''}"
        yield Candidate(name, model, own_preprocessing(recipe.model.image), tokenizer_for(recipe.model.text), step, suite_of_recipe(recipe), kind, compared_by(recipe))


def _of_export(folder: Path) -> Candidate:
    """Our own model where the towers are timm's, else open_clip's."""
    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        timm_tower = "timm_model_name" in config["model_cfg"]["vision_cfg"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / 'open_clip_config.json'} cannot be read ({error}); export the model again") from error
    known = tuple(config.get("preprocess_cfg", {}).get("mean", NORMALIZATION["clip"][0])) in {tuple(mean) for mean, _ in NORMALIZATION.values()}
    if not (folder / TOKEN_HEADS).is_file() and not (timm_tower and known):
        return Candidate(folder.name, *open_clip_model(f"local-dir:{folder}"))
    found = _ours(folder)
    return found._replace(preprocessing=preprocessing_of_open_clip({**config.get("preprocess_cfg", {}), "size": found.preprocessing.size}, str(folder)))


def _ours(folder: Path) -> Candidate:
    settings, model, compared, _ = load_with_tokens(folder)
    return Candidate(folder.name, model, own_preprocessing(settings.image), tokenizer_for(settings.text), compared=compared)


def _of_open_clip(name: str, tag: str) -> Candidate:
    return Candidate(f"{name} ({tag or 'random weights'})", *open_clip_model(name, tag or None))
