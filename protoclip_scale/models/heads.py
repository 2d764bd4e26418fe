"""Heads: parts of the model behind the towers. The MLPs into the space of the prototypes are here; objectives declare their own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from protoclip_scale.models.batch_norm import GroupBatchNorm
from protoclip_scale.models.scale import LogitScale
from protoclip_scale.recipe import schema


class Widths(NamedTuple):
    """Sizes of what heads read: of a row, or of a token. ``image_prefix_tokens``: class and
    register tokens, which stand before those of patches; ``context_length``: tokens of the longest caption; ``vocabulary``: of the text tower."""

    image_pooled: int
    text_pooled: int
    image_projected: int
    text_projected: int
    image_tokens: int
    text_tokens: int
    image_prefix_tokens: int
    context_length: int
    vocabulary: int


@dataclass(frozen=True)
class Head:
    """A part of the model that computes the feature of its kind, of any view.

    ``reads``: what its ``forward`` takes, in this order; nothing for a temperature.

    - ``image_pooled``, ``text_pooled`` [B, D]: what a tower pools, before the projection;
    - ``image_projected``, ``text_projected`` [B, embed_dim]: behind the projection, before they are scaled to unit length;
    - ``image_tokens`` [B, T, D] after the last norm; ``text_tokens`` likewise, followed by a mask [B, T], true before the caption's end;
    - ``labels`` int64 [B, context_length] of a masked text, on the CPU: the true id of a selected token, -100 elsewhere;
    - another head's kind: its output of the same view.

    ``build(widths, model)`` makes the module; its weights are a function of the run's seed and the kind alone. ``in_parts``: it works row by row, so it runs inside a
    micro-batch with its tower, and what it reads lives no longer than that; heads that read tokens must. Captions are trimmed, so T differs from call to call, and a head that
    gives tokens pads them to ``context_length``. Other heads see all rows of a view at once, each view in a call of its own. ``decays``: whether its matrices
    have weight decay. ``precise``: computed in fp32 at least, whatever autocast the towers run in. ``unit``: its rows are scaled to unit length. ``twin``: the kind it starts as a
    copy of. ``name``: of the attribute, by default ``KIND_head``. Outputs come in fp32 at least.
    """

    reads: tuple[str, ...]
    build: Callable[[Widths, schema.Model], nn.Module]
    in_parts: bool = False
    decays: bool = True
    precise: bool = True
    unit: bool = False
    twin: str = ""
    name: str = ""

    def __post_init__(self):
        assert self.in_parts or not {"image_tokens", "text_tokens", "labels"} & set(self.reads), "a head that reads tokens runs inside micro-batches"

    def __deepcopy__(self, memo: dict) -> "Head":  # with a model: ``build`` may belong to an objective, whose state is not the model's
        return self

    def part(self, kind: str) -> str:
        return self.name or f"{kind}_head"


class MlpHead(nn.Module):
    """[B, in_dim] -> [B, dim]: hidden layers of Linear, batch norm, ReLU, then Linear."""

    def __init__(self, in_dim: int, hidden_dim: int, hidden_layers: int, dim: int, groups: int):
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(hidden_layers):
            layers += [nn.Linear(in_dim, hidden_dim), GroupBatchNorm(hidden_dim, groups), nn.ReLU()]
            in_dim = hidden_dim
        self.layers = nn.Sequential(*layers, nn.Linear(in_dim, dim))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features)


def _prototype_head(widths: Widths, model: schema.Model) -> nn.Module:
    """The MLP into the space of the prototypes (methods 6.1), of un-normalised projected outputs."""
    settings = model.prototype_heads
    return MlpHead(widths.text_projected, settings.hidden_dim, settings.hidden_layers, settings.dim, model.norm_groups)


def temperature(name: str = "", settings: schema.LogitScale | None = None) -> Head:
    """A learned inverse temperature (1,) with a start and bounds, by default those of ``model.logit_scale``."""
    return Head((), lambda widths, model: LogitScale(settings or model.logit_scale), decays=False, name=name)


# heads that clustering uses, whichever objective does; they are built in this order, before all others
PROTOTYPE_HEADS = {
    "text_prototype": Head(("text_projected",), _prototype_head, decays=False, unit=True),
    "image_prototype": Head(("image_projected",), _prototype_head, decays=False, unit=True, twin="text_prototype"),
    "prototype_scale": temperature("prototype_logit_scale"),
}
