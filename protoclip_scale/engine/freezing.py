"""Which parameters train in an episode: those that an objective uses, without the parts that the recipe keeps frozen. It changes at episode boundaries only: the model is then wrapped again and its optimiser made anew from a checkpoint,
by the code that resumes, and what enters training there starts with fresh moments."""

from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.models.parts import parameters_of
from protoclip_scale.objectives import Objective
from protoclip_scale.objectives.base import is_locked
from protoclip_scale.objectives.shared.inputs import is_input
from protoclip_scale.recipe.schema import Recipe

IMAGE_SIDE = ("image_tower.", "image_projection.")


def active_objectives(objectives: dict[str, Objective], episode: int) -> dict[str, Objective]:
    return {name: objective for name, objective in objectives.items() if objective.active(episode)}


def features_wanted(objectives: dict[str, Objective]) -> frozenset[str]:
    """What the model computes for these objectives together."""
    return frozenset(name for objective in objectives.values() for name in objective.needs if not is_input(name))


def locks_image(recipe: Recipe, episode: int) -> bool:
    """Whether the image tower stands still in an episode (methods 6.4); the published code left it in training at a learning rate of 0."""
    lit = recipe.episodes.lit
    return lit is not None and lit.variant == "paper" and is_locked(recipe, episode)


def trained_parameters(model: DualEncoder, recipe: Recipe, objectives: dict[str, Objective], episode: int) -> frozenset[str]:
    """Names of the parameters that an active objective uses and nothing locks. Raises UserError for a frozen part that the model has not."""
    wants = features_wanted(active_objectives(objectives, episode))
    names = {name for name, _ in model.named_parameters()} - set(model.head_parameters(model.features - wants))
    names -= set().union(*(parameters_of(model, part) for part in recipe.model.frozen))
    return frozenset(name for name in names if not (locks_image(recipe, episode) and name.startswith(IMAGE_SIDE)))
