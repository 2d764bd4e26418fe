"""What an export says of how cosines become logits: temperature and, of SigLIP's loss, bias."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from protoclip_scale.models.open_clip_keys import Made
from protoclip_scale.objectives import build_objectives, heads_of
from protoclip_scale.objectives.compared import compared_by
from protoclip_scale.recipe import schema


class Logits(NamedTuple):
    """``scale``: the logarithm of the temperature as the model uses it, a scalar; ``bias``: a scalar, or None where there is none. Made of a run's model."""

    scale: Made
    bias: Made | None = None


def plain_logits(model: schema.Model) -> Logits:
    """Of a model that CLIP's loss trains."""
    return Logits(_bounded("logit_scale.log", model.logit_scale.minimum, model.logit_scale.maximum))


def logits_of(recipe: schema.Recipe) -> Logits:
    """Of what the recipe's losses train."""
    scale, bias = compared_by(recipe).logits
    heads = heads_of(build_objectives(recipe))
    if scale not in heads:
        return plain_logits(recipe.model)
    bounds = heads[scale].build(None, recipe.model)  # a temperature reads no widths
    made = _bounded(f"{heads[scale].part(scale)}.log", bounds.minimum, bounds.maximum)
    return Logits(made, Made((f"{heads[bias].part(bias)}.value",), lambda value: value.reshape(())) if bias else None)


def _bounded(name: str, minimum: float, maximum: float) -> Made:
    return Made((name,), lambda log: log.clamp(minimum, maximum).reshape(()))


def bias_of(logits: Logits, read: Callable[[str], torch.Tensor]) -> float | None:
    """``read``: a tensor of the model by its name."""
    return logits.bias.make(*(read(name) for name in logits.bias.sources)).item() if logits.bias else None
