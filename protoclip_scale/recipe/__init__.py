"""Recipes: what a run is, as one checked YAML file."""

from protoclip_scale.recipe.load import diff, dump, load_recipe
from protoclip_scale.recipe.schema import Recipe

__all__ = ["Recipe", "diff", "dump", "load_recipe"]
