"""ProtoCLIP's loss: each modality learns the other one's clusters (methods 6.2, 6.3).

A student's logits are its similarities to K prototypes in its own space; the target is the other modality's cluster, made
soft by how alike that modality's centroids are. With Prototype Back Translation the student's prototypes are the means of
its own features over the teacher's clusters; without it they are the teacher's centroids themselves.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch.nn import functional as F

from protoclip_scale.objectives.base import Objective, Targets, between_warmup_and_ending
from protoclip_scale.recipe.schema import ObjectiveSettings


class Settings(ObjectiveSettings):
    """Prototype discrimination between images and texts."""

    targets: Literal["soft", "hard"] = Field("soft", description="soft: similarities between the teacher's centroids; hard: the cluster's index.")
    temperature: float | None = Field(None, gt=0, description="Temperature of soft targets; the paper's 0.01 if not given. 0.1 collapsed in our trial.")
    back_translation: bool = Field(True, description="Prototype Back Translation; off compares with the other modality's raw centroids.")

    @model_validator(mode="after")
    def _temperature_has_an_effect(self):
        if self.targets == "hard" and self.temperature is not None:
            raise ValueError("objectives.prototype.temperature has no effect with objectives.prototype.targets hard; remove it or set targets to soft")
        return self

    @property
    def soft_temperature(self) -> float:
        return 0.01 if self.temperature is None else self.temperature


def soft_targets(centroids_KP: torch.Tensor, labels_B: torch.Tensor, temperature: float) -> torch.Tensor:
    """softmax(C_y C' / temperature) [B, K] without gradient. Centroids are means, not unit vectors: the argmax need not be y."""
    with torch.no_grad():
        return torch.softmax(centroids_KP[labels_B] @ centroids_KP.T / temperature, dim=-1)


def prototype_loss(student_BP: torch.Tensor, scale: torch.Tensor, prototypes_KP: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of s Z C' [B, K] with class indices [B] or probabilities [B, K]; prototypes are constants.

    A zero prototype (empty cluster) keeps its place in the softmax, as in the reference.
    """
    return F.cross_entropy(scale * student_BP @ prototypes_KP.detach().T, target)


class Prototypical(Objective):
    """Image rows against text clusters and text rows against image clusters, halved."""

    needs = frozenset({"image_prototype", "text_prototype", "prototype_scale"})
    clusters = ("image", "text")

    def active(self, episode: int) -> bool:
        return super().active(episode) and between_warmup_and_ending(self.recipe, episode)

    def soft_target_temperatures(self) -> dict[str, float]:
        return {} if self.settings.targets == "hard" else dict.fromkeys(self.clusters, self.settings.soft_temperature)

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        terms = []
        for student, teacher in (("image", "text"), ("text", "image")):
            teacher_KP, labels_B = targets.episode[f"{teacher}_centroids"], targets.labels[teacher]
            prototypes_KP = targets.episode[f"{student}_from_{teacher}"] if self.settings.back_translation else teacher_KP
            target = labels_B if self.settings.targets == "hard" else soft_targets(teacher_KP, labels_B, self.settings.soft_temperature)
            terms.append(prototype_loss(features[f"{student}_prototype"], features["prototype_scale"], prototypes_KP, target))
        return 0.5 * (terms[0] + terms[1])


build = Prototypical
