"""ProtoCLIP's loss: each modality learns the other one's clusters (methods 6.2, 6.3).

A student's logits are its similarities to K prototypes in its own space; the target is the other modality's cluster, made
soft by how alike that modality's centroids are. With Prototype Back Translation the student's prototypes are the means of
its own features over the teacher's clusters; without it they are the teacher's centroids themselves.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator

from protoclip_scale.objectives.base import Objective, Targets, between_warmup_and_ending
from protoclip_scale.prototypes.loss import Contrasts, prototype_loss
from protoclip_scale.recipe.schema import ObjectiveSettings, Recipe


class Settings(ObjectiveSettings):
    """Prototype discrimination between images and texts."""

    targets: Literal["soft", "hard"] = Field("soft", description="soft: similarities between the teacher's centroids; hard: the cluster's index.")
    temperature: float | None = Field(None, gt=0, description="Temperature of soft targets; the paper's 0.01 if not given. 0.1 collapsed in our trial.")
    back_translation: bool = Field(True, description="Prototype Back Translation; off compares with the other modality's raw centroids.")
    empty_clusters: Literal["zero", "masked"] = Field(
        "zero", description="Prototypes of clusters without rows. zero: a zero row of the softmax, as in the published code; masked: not in it, nor are rows of such a cluster."
    )

    @model_validator(mode="after")
    def _settings_have_an_effect(self):
        if self.targets == "hard" and self.temperature is not None:
            raise ValueError("objectives.prototype.temperature has no effect with objectives.prototype.targets hard; remove it or set targets to soft")
        if self.empty_clusters == "masked" and not self.back_translation:
            raise ValueError("objectives.prototype.empty_clusters masked has no effect with objectives.prototype.back_translation off: raw centroids are never empty; remove it")
        return self

    @property
    def soft_temperature(self) -> float:
        return 0.01 if self.temperature is None else self.temperature


class Prototypical(Objective):
    """Image rows against text clusters and text rows against image clusters, halved."""

    needs = frozenset({"image_prototype", "text_prototype", "prototype_scale"})
    clusters = ("image", "text")

    def __init__(self, settings: Settings, recipe: Recipe):
        super().__init__(settings, recipe)
        self._contrasts = Contrasts(mask_empty=settings.empty_clusters == "masked")

    def active(self, episode: int) -> bool:
        return super().active(episode) and between_warmup_and_ending(self.recipe, episode)

    def soft_target_temperatures(self) -> dict[str, float]:
        return {} if self.settings.targets == "hard" else dict.fromkeys(self.clusters, self.settings.soft_temperature)

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        terms = []
        for student, teacher in (("image", "text"), ("text", "image")):
            teacher_KP = targets.episode[f"{teacher}_centroids"]
            prototypes_KP = targets.episode[f"{student}_from_{teacher}"] if self.settings.back_translation else teacher_KP
            contrast = self._contrasts.of(student, prototypes_KP, None if self.settings.targets == "hard" else teacher_KP, self.settings.soft_temperature)
            terms.append(prototype_loss(features[f"{student}_prototype"], features["prototype_scale"], contrast, targets.labels[teacher]))
        return 0.5 * (terms[0] + terms[1])


build = Prototypical
