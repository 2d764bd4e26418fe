"""Objectives: one file each, found by name (see ``protoclip_scale.recipe.names``)."""

from protoclip_scale.objectives.base import Objective, Targets
from protoclip_scale.recipe.names import objective_module
from protoclip_scale.recipe.schema import Recipe

__all__ = ["Objective", "Targets", "build_objectives", "features_of"]


def build_objectives(recipe: Recipe) -> dict[str, Objective]:
    """The recipe's objectives by name, in its order."""
    return {name: objective_module(name).build(settings, recipe) for name, settings in recipe.objectives.items()}


def features_of(objectives: dict[str, Objective]) -> frozenset[str]:
    """The features a model must be able to give: those of every objective that is ever used, and the embeddings."""
    used = [objective.needs for objective in objectives.values() if objective.settings.weight > 0]
    return frozenset({"image", "text"}).union(*used)
