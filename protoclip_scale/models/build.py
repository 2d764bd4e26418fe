"""From a recipe, or an export, to a model with weights."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import CLIPTextConfig

from protoclip_scale.errors import UserError
from protoclip_scale.models.dual_encoder import NORMALIZATION, DualEncoder
from protoclip_scale.models.heads import Head
from protoclip_scale.models.infer import timm_name_of
from protoclip_scale.models.initial_weights import Read, load_folder, load_initial_weights, read_open_clip_folder
from protoclip_scale.models.transformers_folder import IMAGE, PROJECTIONS, TEXT, config_of, form_of
from protoclip_scale.recipe import schema

EMBEDDING = frozenset({"image", "text", "logit_scale"})


def build_model(
    recipe: schema.Recipe,
    features: frozenset[str],
    seed: int,
    fresh: bool = True,
    read_run: Read | None = None,
    heads: Mapping[str, Head] | None = None,
    read_heads: Read | None = None,
) -> DualEncoder:
    """The recipe's model on the CPU, a function of the seed alone; the global random state is left as it was.

    Towers start alike whatever ``features`` and ``heads`` of objectives are built. ``fresh`` false skips ``pretrained`` and ``init_from``: for a
    model whose weights come from a checkpoint. ``read_run`` is needed where ``init_from`` is a run directory: it maps the directory to
    the state dict of its latest checkpoint. ``read_heads`` maps that of an export to its heads' weights; without it they stay as drawn. Raises UserError for towers or
    weights that cannot be had.
    """
    pretrained = None if fresh and recipe.model.init_from is None else False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DualEncoder(recipe.model, frozenset(features), pretrained, heads)
    if fresh and recipe.model.init_from is not None:
        load_initial_weights(model, recipe.model, read_run, read_heads)
    return model


def is_export(folder: Path) -> bool:
    """Whether a folder is one that ``load_export`` reads."""
    return (folder / "open_clip_config.json").is_file() or form_of(folder) is not None


def load_export(folder: str | Path, heads: Mapping[str, Head] | None = None) -> tuple[schema.Model, DualEncoder]:
    """The settings and the model (features image, text, logit_scale; in evaluation mode, float32) of an export of either layout, of a transformers CLIP
    directory, or of an open_clip one with a timm tower. ``heads`` are built besides, as they start. Raises UserError for anything else."""
    folder = Path(folder)
    if (folder / "open_clip_config.json").is_file():
        return load_open_clip_export(folder, heads)
    form = form_of(folder)
    if form is None:
        raise UserError(f"{folder} is no export: it holds neither open_clip_config.json nor a config.json of a CLIP, nor projections.safetensors")
    settings = _settings_of_folder(folder, form)
    with torch.random.fork_rng(devices=[]):
        model = DualEncoder(settings, EMBEDDING | frozenset(heads or ()), pretrained=False, heads=heads)
    load_folder(model, folder)
    return settings, model.eval()


def _settings_of_folder(folder: Path, form: str) -> schema.Model:
    """As its configuration and its image processor say."""
    config = config_of(folder) if form != "folders" else {}
    vision = config["vision_config"] if config else config_of(folder / IMAGE)
    processor = _preprocessing(folder / IMAGE if form == "folders" else folder)
    size = vision.get("image_size", 224) if form == "clip" else processor.get("crop_size", {}).get("height", 224)
    name = timm_name_of(vision) if form == "clip" else vision["architecture"]
    image = {"name": name, "size": size, "normalization": _normalization(processor.get("image_mean", NORMALIZATION["clip"][0]), folder)}
    if form == "folders":
        text = {"name": str(folder / TEXT), "context_length": _tokens_of(folder / TEXT)}
        embed_dim = _rows_of(folder / PROJECTIONS, "visual_projection.weight")
    else:
        theirs = CLIPTextConfig(**config.get("text_config", {})).to_dict()  # which leaves out what is CLIP's default
        ours = {"context_length": "max_position_embeddings", "width": "hidden_size", "heads": "num_attention_heads", "layers": "num_hidden_layers", "activation": "hidden_act"}
        text, embed_dim = {key: theirs[name] for key, name in ours.items()}, config.get("projection_dim", 512)
    return schema.Model(embed_dim=embed_dim, image=image, text=text, init_from=str(folder))


def _preprocessing(folder: Path) -> dict:
    """Of the image processor, in either of the files that transformers writes it to."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            return found.get("image_processor", found)
    return {}


def _tokens_of(folder: Path) -> int:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    return min(int(config.get("model_max_length", 77)), config_of(folder).get("max_position_embeddings", 77))


def _rows_of(path: Path, name: str) -> int:
    with safe_open(path, framework="pt") as file:
        return file.get_slice(name).get_shape()[0]


def _normalization(mean: Sequence[float], folder: Path) -> str:
    found = next((name for name, (known, _) in NORMALIZATION.items() if tuple(mean) == tuple(known)), None)
    if found is None:
        raise UserError(f"{folder}: its images are normalised by the mean {tuple(mean)}, neither CLIP's nor ImageNet's; it cannot be read as a model")
    return found


def load_open_clip_export(folder: str | Path, heads: Mapping[str, Head] | None = None) -> tuple[schema.Model, DualEncoder]:
    """The settings and the model (features image, text, logit_scale; in evaluation mode) of an open_clip export with a timm tower."""
    _, config = read_open_clip_folder(Path(folder))
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" not in vision:
        raise UserError(f"{folder} has an image tower of open_clip's own; only exports with a timm tower can be read as a model")
    normalization = _normalization(config["preprocess_cfg"].get("mean", NORMALIZATION["clip"][0]), Path(folder))
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
        model = DualEncoder(settings, EMBEDDING | frozenset(heads or ()), pretrained=False, heads=heads)
    load_initial_weights(model, settings)
    return settings, model.eval()
