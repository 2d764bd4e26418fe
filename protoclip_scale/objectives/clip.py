"""CLIP's contrastive loss: InfoNCE between images and texts of the global batch (methods 1.2)."""

import torch

from protoclip_scale.objectives.base import Objective, Targets
from protoclip_scale.objectives.tiled import tiled_cross_entropy
from protoclip_scale.recipe.schema import ObjectiveSettings


class Settings(ObjectiveSettings):
    """The contrastive loss between images and captions."""


def clip_loss(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    all_image_ND: torch.Tensor,
    all_text_ND: torch.Tensor,
    scale: torch.Tensor,
    columns_B: torch.Tensor,
) -> torch.Tensor:
    """(CE(s I T*', y) + CE(s T I*', y)) / 2 over the local rows B and the gathered columns N, in fp32 at least.

    ``columns_B`` holds the column of each row's own partner. Memory is linear in the batch (see ``tiled_cross_entropy``).
    """
    return 0.5 * (tiled_cross_entropy(image_BD, all_text_ND, scale, columns_B) + tiled_cross_entropy(text_BD, all_image_ND, scale, columns_B))


class Contrastive(Objective):
    """CLIP's loss; active in every episode."""

    needs = frozenset({"image", "text", "logit_scale"})
    gathers = ("image", "text")

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        return clip_loss(
            features["image"], features["text"], gathered["image"], gathered["text"], features["logit_scale"], targets.columns_B
        )


build = Contrastive
