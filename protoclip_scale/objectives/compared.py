"""By what a model's images and texts are compared once it is trained: by what its objectives have trained."""

from typing import NamedTuple

from protoclip_scale.models.features import kinds_of
from protoclip_scale.models.heads import PROTOTYPE_HEADS
from protoclip_scale.models.passes import sources
from protoclip_scale.objectives import build_objectives, heads_of, used
from protoclip_scale.objectives.shared.inputs import is_input
from protoclip_scale.recipe.schema import Recipe


class Compared(NamedTuple):
    """``embeddings``: whether the cosine of an image's and a text's embedding means anything; ``tokens``: the kinds of features that late interaction
    compares (see ``Objective.token_kinds``), or None. One of them at least. ``logits``: see ``Objective.logits``."""

    embeddings: bool = True
    tokens: tuple[str, str] | None = None
    logits: tuple[str, str | None] = ("logit_scale", None)


def compared_by(recipe: Recipe) -> Compared:
    """Of a recipe's model. Embeddings of one with token features count where a loss reaches both projections: FILIP's alone leaves them as they were drawn."""
    objectives = used(build_objectives(recipe))
    tokens = next((each.token_kinds for each in objectives.values() if each.token_kinds), None)
    logits = sorted({each.logits for each in objectives.values() if each.logits}, key=lambda kinds: kinds[1] is not None)  # a softmax before a sigmoid
    logits = logits[0] if logits else Compared().logits
    if tokens is None:
        return Compared(logits=logits)
    heads = PROTOTYPE_HEADS | heads_of(objectives)
    kinds = kinds_of(name for each in objectives.values() for name in each.needs if not is_input(name))
    return Compared({"image_projected", "text_projected"} <= frozenset().union(*(sources(kind, heads) for kind in kinds)), tokens, logits)
