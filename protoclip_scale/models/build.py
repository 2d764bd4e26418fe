"""From a recipe, or an export, to a model with weights."""

from collections.abc import Mapping
from pathlib import Path

import torch

from protoclip_scale.errors import UserError
from protoclip_scale.models.dual_encoder import NORMALIZATION, DualEncoder
from protoclip_scale.models.heads import Head
from protoclip_scale.models.initial_weights import ReadRun, load_initial_weights, read_open_clip_folder
from protoclip_scale.recipe import schema


def build_model(
    recipe: schema.Recipe, features: frozenset[str], seed: int, fresh: bool = True, read_run: ReadRun | None = None, heads: Mapping[str, Head] | None = None
) -> DualEncoder:
    """The recipe's model on the CPU, a function of the seed alone; the global random state is left as it was.

    Towers start alike whatever ``features`` and ``heads`` of objectives are built. ``fresh`` false skips ``pretrained`` and ``init_from``: for a
    model whose weights come from a checkpoint. ``read_run`` is needed where ``init_from`` is a run directory: it maps the directory to
    the state dict of its latest checkpoint. Raises UserError for towers or weights that cannot be had.
    """
    pretrained = None if fresh and recipe.model.init_from is None else False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DualEncoder(recipe.model, frozenset(features), pretrained, heads)
    if fresh and recipe.model.init_from is not None:
        load_initial_weights(model, recipe.model, read_run)
    return model


def load_open_clip_export(folder: str | Path) -> tuple[schema.Model, DualEncoder]:
    """The settings and the model (features image, text, logit_scale; in evaluation mode) of an open_clip export with a timm tower."""
    _, config = read_open_clip_folder(Path(folder))
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" not in vision:
        raise UserError(f"{folder} has an image tower of open_clip's own; only exports with a timm tower can be read as a model")
    mean = tuple(config["preprocess_cfg"].get("mean", NORMALIZATION["clip"][0]))
    normalization = next((name for name, (known, _) in NORMALIZATION.items() if mean == tuple(known)), None)
    if normalization is None:
        raise UserError(f"{folder}: preprocess_cfg.mean {mean} is neither CLIP's nor ImageNet's; it cannot be read as a model")
    if "hf_model_name" in text:
        text_settings = {"name": text["hf_model_name"], "context_length": text.get("context_length", 77)}
    else:
        text_settings = {name: text[name] for name in ("context_length", "width", "heads", "layers")}
        text_settings["activation"] = "quick_gelu" if config.get("quick_gelu") else "gelu"
    settings = schema.Model(
        embed_dim=config["embed_dim"],
        image={"name": vision["timm_model_name"], "size": vision["image_size"], "normalization": normalization},
        text=text_settings,
        init_from=str(folder),
    )
    with torch.random.fork_rng(devices=[]):
        model = DualEncoder(settings, frozenset({"image", "text", "logit_scale"}), pretrained=False)
    load_initial_weights(model, settings)
    return settings, model.eval()
