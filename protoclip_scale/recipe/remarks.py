"""What a recipe may ask for, but few would mean to: notes of ``--check``. What contradicts itself is refused by ``rules``."""

from collections.abc import Iterator

from protoclip_scale.recipe.schema import Recipe


def remarks_on(recipe: Recipe) -> list[str]:
    """One line each."""
    return [line for remark in (_variant, _masked_for_nothing, _main_pairs) for line in remark(recipe)]


def _variant(recipe: Recipe) -> Iterator[str]:
    if recipe.variant == "reference" or (recipe.episodes.lit and recipe.episodes.lit.variant == "reference"):
        yield "variant reference repeats a deviation of the published code; the recipe's notes and docs/methods.md name it"


def _masked_for_nothing(recipe: Recipe) -> Iterator[str]:
    objectives = {name: settings for name, settings in recipe.objectives.items() if settings.weight > 0}
    for name, settings in objectives.items():
        if getattr(settings, "masked_text", False) and "mlm" not in objectives:
            yield f"objectives.{name}.masked_text true takes captions with hidden tokens, and no objectives.mlm guesses them; the published FILIP did so by mistake"


def _main_pairs(recipe: Recipe) -> Iterator[str]:
    """How often the main image view meets the main text in a loss."""
    weights = {name: settings.weight for name, settings in recipe.objectives.items()}
    if not weights.get("multiview"):
        return
    if recipe.objectives["multiview"].variant == "reference" and weights.get("clip"):
        yield "objectives.multiview.variant reference has the main pair of views, and objectives.clip has it, too; as published, clip's weight is 0 beside it"
    if recipe.objectives["multiview"].variant == "paper" and not weights.get("clip"):
        yield "objectives.multiview.variant paper leaves the main pair of views to objectives.clip, which has no weight, so it is in no loss"
