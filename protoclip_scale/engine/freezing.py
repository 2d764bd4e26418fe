"""Which parameters train in an episode: those that an objective uses, without the parts that the recipe keeps frozen. It changes at episode boundaries only: the model is then wrapped again and its optimiser made anew from a checkpoint,
by the code that resumes, and what enters training there starts with fresh moments."""

from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.parts import parameters_of
from protoclip_scale.objectives import Objective
from protoclip_scale.objectives.base import locked_from
from protoclip_scale.recipe.schema import Recipe

IMAGE_SIDE = ("image_tower.", "image_projection.")


def active_objectives(objectives: dict[str, Objective], episode: int) -> dict[str, Objective]:
    return {name: objective for name, objective in objectives.items() if objective.active(episode)}


def locks_image(recipe: Recipe, episode: int) -> bool:
    """Whether the image tower stands still in an episode (methods 6.4); the published code left it in training at a learning rate of 0."""
    lit, locked = recipe.episodes.lit, locked_from(recipe)
    return lit is not None and lit.variant == "paper" and episode >= locked


def trained_parameters(model: DualEncoder, recipe: Recipe, objectives: dict[str, Objective], episode: int) -> frozenset[str]:
    """Names of the parameters that an active objective uses and nothing locks. Raises UserError for a frozen part that the model has not."""
    wants = frozenset().union(*(objective.needs for objective in active_objectives(objectives, episode).values()))
    names = {name for name, _ in model.named_parameters()} - set(model.head_parameters(model.features - wants))
    names -= set().union(*(parameters_of(model, part) for part in recipe.model.frozen))
    return frozenset(name for name in names if not (locks_image(recipe, episode) and name.startswith(IMAGE_SIDE)))
