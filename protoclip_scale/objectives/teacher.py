"""ProtoCLIP's external teacher: both modalities learn the clusters of another model's text features (methods 6.2.5, 6.3).

The teacher's clusters are translated into each student's space; labels are hard.
"""

import torch
from pydantic import Field

from protoclip_scale.objectives.base import Objective, Targets, between_warmup_and_ending
from protoclip_scale.objectives.prototype import prototype_loss
from protoclip_scale.recipe.schema import ObjectiveSettings


class Settings(ObjectiveSettings):
    """Prototype discrimination against an external teacher's clusters."""

    features: str = Field(description="Store of teacher features made by tools/extract_teacher.py, relative to the recipe's folder; {root} stands for data.root.")


class ExternalTeacher(Objective):
    """Image rows and text rows against the teacher's clusters, halved."""

    needs = frozenset({"image_prototype", "text_prototype", "prototype_scale"})
    clusters = ("teacher",)

    def active(self, episode: int) -> bool:
        return super().active(episode) and between_warmup_and_ending(self.recipe, episode)

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        image, text = (
            prototype_loss(
                features[f"{student}_prototype"],
                features["prototype_scale"],
                targets.episode[f"{student}_from_teacher"],
                targets.labels["teacher"],
            )
            for student in ("image", "text")
        )
        return 0.5 * (image + text)


build = ExternalTeacher
