"""A trained model, from its run directory."""

from pathlib import Path
from typing import NamedTuple

from protoclip_scale.engine.checkpoint import read_weights
from protoclip_scale.errors import UserError
from protoclip_scale.models.build import build_model
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives import build_objectives, features_of, heads_of
from protoclip_scale.recipe import Recipe, load_recipe


class SavedModel(NamedTuple):
    """A run's recipe, its model in evaluation mode on the CPU, and whose weights it has: ``live`` or ``ema``."""

    recipe: Recipe
    model: DualEncoder
    weights: str


def load_model(run_dir: Path | str, chosen: str = "latest", weights: str | None = None) -> SavedModel:
    """The model of a run's checkpoint; a collective. ``weights``: live or ema; None takes the average if there is one.

    Raises UserError if there is no run, no sound checkpoint, or no average where one is asked for.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory: it holds no recipe.yaml")
    recipe = load_recipe(run_dir / "recipe.yaml")
    weights, tensors = read_weights(run_dir, chosen, weights)
    objectives = build_objectives(recipe)
    model = build_model(recipe, features_of(objectives), recipe.run.seed, fresh=False, heads=heads_of(objectives))
    model.load_state_dict(tensors, strict=True)
    return SavedModel(recipe, model.eval(), weights)
