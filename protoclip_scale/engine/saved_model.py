"""A trained model, from its run directory."""

from pathlib import Path

from protoclip_scale.engine.checkpoint import read_weights
from protoclip_scale.errors import UserError
from protoclip_scale.models.build import build_model
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives import build_objectives, features_of
from protoclip_scale.recipe import Recipe, load_recipe


def load_model(run_dir: Path | str, chosen: str = "latest") -> tuple[Recipe, DualEncoder]:
    """A run's recipe and its model in evaluation mode, on the CPU. Raises UserError if there is no run or no sound checkpoint."""
    run_dir = Path(run_dir)
    if not (run_dir / "recipe.yaml").is_file():
        raise UserError(f"{run_dir} is no run directory: it holds no recipe.yaml")
    recipe = load_recipe(run_dir / "recipe.yaml")
    weights = read_weights(run_dir, chosen)
    model = build_model(recipe, features_of(build_objectives(recipe)), recipe.run.seed, fresh=False)
    model.load_state_dict(weights, strict=True)
    return recipe, model.eval()
