"""CLIP's contrastive loss: InfoNCE between images and texts of the global batch (methods 1.2)."""

import torch
from torch.nn import functional as F

from protoclip_scale.objectives.base import Objective, Targets
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
    """(CE(s I T*', y) + CE(s T I*', y)) / 2 over the local rows B and the gathered columns N, in the features' precision.

    Costs two [B, N] matrices. ``columns_B`` holds the column of each row's own partner.
    """
    image_logits_BN = scale * image_BD @ all_text_ND.T
    text_logits_BN = scale * text_BD @ all_image_ND.T
    return 0.5 * (F.cross_entropy(image_logits_BN, columns_B) + F.cross_entropy(text_logits_BN, columns_B))


class Contrastive(Objective):
    """CLIP's loss; active in every episode."""

    needs = frozenset({"image", "text", "logit_scale"})
    gathers = ("image", "text")

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        return clip_loss(
            features["image"], features["text"], gathered["image"], gathered["text"], features["logit_scale"], targets.columns_B
        )


build = Contrastive
