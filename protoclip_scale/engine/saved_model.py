"""A trained model, from its run directory."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from protoclip_scale.engine.checkpoint import Reader, Weights, list_checkpoints, open_weights, prototypes_folder, prototypes_manifest
from protoclip_scale.errors import UserError
from protoclip_scale.export.logits import logits_of
from protoclip_scale.export.source import Embeddings, Probe, Source, embeddings_of, round_weights, structure_of
from protoclip_scale.export.token_heads import token_heads_of
from protoclip_scale.models.build import build_model
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives import build_objectives, features_of, heads_of
from protoclip_scale.recipe import Recipe, load_recipe

CENTROIDS = "prototypes/centroids/"
HEADS = ("image_prototype_head.", "text_prototype_head.", "prototype_logit_scale.")


class SavedModel(NamedTuple):
    """A run's recipe, its model in evaluation mode on the CPU, and whose weights it has: ``live`` or ``ema``."""

    recipe: Recipe
    model: DualEncoder
    weights: str


def load_model(run_dir: Path | str, chosen: str = "latest", weights: str | None = None) -> SavedModel:
    """The model of a run's checkpoint; a collective. ``weights``: live or ema; None takes the average if there is one.

    Holds one parameter besides the model. Raises UserError if there is no run, no sound checkpoint, or no average where one is asked for.
    """
    recipe = recipe_of(run_dir)
    opened = open_weights(run_dir, chosen, weights)
    return SavedModel(recipe, _model_with(recipe, opened), opened.kind)


def recipe_of(run_dir: Path | str) -> Recipe:
    """Raises UserError if there is no run."""
    if not (Path(run_dir) / "recipe.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory: it holds no recipe.yaml")
    return load_recipe(Path(run_dir) / "recipe.yaml")


def source_of_run(recipe: Recipe, weights: Weights) -> Source:
    """A checkpoint to export. Its model is loaded when its embeddings are asked for, and let go after."""

    def embed(probe: Probe, dtype: torch.dtype) -> Embeddings:
        model = _model_with(recipe, weights)
        round_weights(model, dtype)
        return embeddings_of(model, probe)

    return Source(recipe.model, structure_of(recipe.model), weights.read, embed, logits_of(recipe), token_heads_of(recipe))


def prototypes_of(weights: Weights) -> dict[str, torch.Tensor]:
    """The prototypes that a checkpoint's weights were trained with last, and the heads and temperature that go with them. Raises UserError if there are none."""
    reader = next((each for each in _with_prototypes(weights.reader) if each.names(CENTROIDS)), None)
    if reader is None:
        raise UserError(f"--prototypes: there are none at {weights.reader.folder} nor at a step before it: the recipe has none, or it stands before the first clustering; leave --prototypes away")
    found = {f"centroids.{name.removeprefix(CENTROIDS)}": reader.tensor(name) for name in reader.names(CENTROIDS)}
    return found | {name: weights.read(name) for name in weights.names if name.startswith(HEADS)}


def _with_prototypes(reader: Reader) -> Iterator[Reader]:
    """The checkpoint, then what clusterings have left beside those before it, the newest first: the end of an episode keeps none of its own."""
    yield reader
    for folder in reversed(list_checkpoints(reader.folder.parent.parent)):
        if folder.name < reader.folder.name and (manifest := prototypes_manifest(folder)):
            yield Reader(prototypes_folder(folder), manifest)


def _model_with(recipe: Recipe, weights: Weights) -> DualEncoder:
    objectives = build_objectives(recipe)
    model = build_model(recipe, features_of(objectives), recipe.run.seed, fresh=False, heads=heads_of(objectives))
    state = model.state_dict()
    if differing := sorted(state.keys() ^ set(weights.names)):
        raise UserError(f"checkpoint {weights.reader.folder}: {differing[0]} is in the model or in the checkpoint alone ({len(differing)} such weights); use the release that wrote it")
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(weights.read(name))
    return model.eval()
