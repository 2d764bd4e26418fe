"""ProtoCLIP's external teacher: both modalities learn the clusters of another model's text features (methods 6.2.5, 6.3).

The teacher's clusters are translated into each student's space; labels are hard.
"""

from typing import Literal

import torch
from pydantic import Field

from protoclip_scale.objectives.base import Objective, Targets, between_warmup_and_ending
from protoclip_scale.prototypes.loss import Contrasts, prototype_loss
from protoclip_scale.recipe.schema import ObjectiveSettings, Recipe


class Settings(ObjectiveSettings):
    """Prototype discrimination against an external teacher's clusters."""

    features: str = Field(description="Store of teacher features made by tools/extract_teacher.py, relative to the recipe's folder; {root} stands for data.root.")
    refresh: Literal["episode", "once"] = Field("episode", description="episode: the features of each episode's rows are clustered before it, as the paper; once: those of all rows, before the first episode.")
    empty_clusters: Literal["zero", "masked"] = Field(
        "zero", description="Prototypes of clusters without rows. zero: a zero row of the softmax, as in the published code; masked: not in it, nor are rows of such a cluster."
    )


class ExternalTeacher(Objective):
    """Image rows and text rows against the teacher's clusters, halved."""

    needs = frozenset({"image_prototype", "text_prototype", "prototype_scale"})
    clusters = ("teacher",)

    def __init__(self, settings: Settings, recipe: Recipe):
        super().__init__(settings, recipe)
        self._contrasts = Contrasts(mask_empty=settings.empty_clusters == "masked")

    def active(self, episode: int) -> bool:
        return super().active(episode) and between_warmup_and_ending(self.recipe, episode)

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        image, text = (
            prototype_loss(
                features[f"{student}_prototype"],
                features["prototype_scale"],
                self._contrasts.of(student, targets.episode[f"{student}_from_teacher"]),
                targets.labels["teacher"],
            )
            for student in ("image", "text")
        )
        return 0.5 * (image + text)


build = ExternalTeacher
