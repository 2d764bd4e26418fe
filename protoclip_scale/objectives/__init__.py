"""Objectives: one file each, found by name (see ``protoclip_scale.recipe.names``), and what the ones of a recipe need together."""

from dataclasses import fields

from protoclip_scale.data.views import Views
from protoclip_scale.errors import UserError
from protoclip_scale.models.heads import Head
from protoclip_scale.objectives.base import Objective, Targets
from protoclip_scale.objectives.shared.inputs import is_input
from protoclip_scale.recipe.names import objective_module
from protoclip_scale.recipe.schema import Recipe

__all__ = ["Objective", "Targets", "build_objectives", "check_ranks", "features_of", "heads_of", "used", "views_of"]


def build_objectives(recipe: Recipe) -> dict[str, Objective]:
    """The recipe's objectives by name, in its order."""
    return {name: objective_module(name).build(settings, recipe) for name, settings in recipe.objectives.items()}


def used(objectives: dict[str, Objective]) -> dict[str, Objective]:
    """Those with a weight: nothing is built or made for the others."""
    return {name: objective for name, objective in objectives.items() if objective.settings.weight > 0}


def features_of(objectives: dict[str, Objective]) -> frozenset[str]:
    """The features a model must be able to give: those of every objective that is ever used, and the embeddings."""
    return frozenset({"image", "text"}) | {name for objective in used(objectives).values() for name in objective.needs if not is_input(name)}


def heads_of(objectives: dict[str, Objective]) -> dict[str, Head]:
    """The parts that objectives add to the model, by kind."""
    found: dict[str, Head] = {}
    for objective in used(objectives).values():
        for kind, head in objective.heads().items():
            assert found.setdefault(kind, head) == head, f"two objectives declare different heads {kind}"
    return found


def check_ranks(objectives: dict[str, Objective], world: int) -> None:
    """UserError where one with a weight cannot be computed by so many ranks."""
    for objective in used(objectives).values():
        objective.check_ranks(world)


def views_of(objectives: dict[str, Objective]) -> Views:
    """All further views that objectives ask for. UserError where two mean different things by one name."""
    merged: dict[str, dict] = {"images": {}, "texts": {}}
    masked: list[str] = []
    said: dict[tuple[str, str], str] = {}
    for name, objective in used(objectives).items():
        for what, views in merged.items():
            for view, how in getattr(objective.views, what).items():
                if views.setdefault(view, how) != how:
                    raise UserError(f"objectives.{said[what, view]} and objectives.{name} share the view {view}, but ask for the augmentations {views[view]} and {how}; give both the same")
                said.setdefault((what, view), name)
        masked += [view for view in objective.views.masked if view not in masked]
    assert {each.name for each in fields(Views)} == {*merged, "masked"}
    return Views(**merged, masked=tuple(masked))
