"""The contract between an objective and the engine.

An objective sees tensors only: no ranks, no autocast, no optimiser. The engine computes the union of what the active
objectives need, gathers what they ask for with gradient, and adds up their weighted losses.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch

from protoclip_scale.recipe.schema import ObjectiveSettings, Recipe


@dataclass(frozen=True)
class Targets:
    """What a batch is trained towards, besides its features.

    ``columns_B``: for each local row, its column among the gathered rows. ``episode``: the episode's prototype tensors
    by name (centroids [K, P], constants); ``labels``: per local row cluster indices [B] by name.
    """

    columns_B: torch.Tensor
    episode: dict[str, torch.Tensor] = field(default_factory=dict)
    labels: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(ABC):
    """One named loss.

    ``needs``: features of the dual encoder it reads; ``gathers``: those it needs from the whole batch, with gradient;
    ``clusters``: the labelings an episode must hand to it ("image", "text", "teacher"), empty if none.
    """

    needs: frozenset[str] = frozenset()
    gathers: tuple[str, ...] = ()
    clusters: tuple[str, ...] = ()

    def __init__(self, settings: ObjectiveSettings, recipe: Recipe):
        self.settings = settings
        self.recipe = recipe

    def active(self, episode: int) -> bool:
        """Whether the objective takes part in an episode (counted from 0)."""
        return self.settings.weight > 0

    @abstractmethod
    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        """The unweighted loss of the local rows, a mean over them; equal batches per rank make the mean of ranks global."""

    def soft_target_temperatures(self) -> dict[str, float]:
        """Labelings whose centroids are turned into soft targets, with the temperature; for the collapse warning."""
        return {}


def locked_from(recipe: Recipe) -> int | None:
    """The first episode (counted from 0) of the locked-image ending, or None."""
    return recipe.episodes.lit.start - 1 if recipe.episodes.lit else None


def between_warmup_and_ending(recipe: Recipe, episode: int) -> bool:
    """Whether prototypes are trained in this episode: after the warm-up, before the locked-image ending (methods 6.3, 6.4)."""
    locked = locked_from(recipe)
    return episode >= recipe.episodes.warmup and (locked is None or episode < locked)
