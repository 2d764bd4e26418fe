"""CLIP's contrastive loss: InfoNCE between images and texts of the global batch (methods 1.2)."""

from typing import Literal

import torch
from pydantic import Field

from protoclip_scale.objectives.base import Objective, Targets
from protoclip_scale.objectives.shared.tiled import Keys, tiled_cross_entropy
from protoclip_scale.recipe.schema import ObjectiveSettings, Recipe

COLUMNS = ("image", "text")


class Settings(ObjectiveSettings):
    """The contrastive loss between images and captions."""

    variant: Literal["paper", "reference"] = Field(
        "paper",
        description="reference: the rows of the batch that a row is compared with are constants, as in SLIP's code on several GPUs; the gradient then is not the loss's own (methods 0.2).",
    )
    equal_captions: Literal["ignore", "mask", "share"] = Field(
        "ignore",
        description="Other rows of the global batch with the same caption. ignore: negatives, as in all published code; mask: left out of the softmax; "
        "share: positives, each with an equal share of the target.",
    )


def clip_loss(
    image_BD: torch.Tensor,
    text_BD: torch.Tensor,
    all_image_ND: torch.Tensor,
    all_text_ND: torch.Tensor,
    scale: torch.Tensor,
    columns_B: torch.Tensor,
    keys: Keys | None = None,
) -> torch.Tensor:
    """(CE(s I T*', y) + CE(s T I*', y)) / 2 over the local rows B and the gathered columns N, in fp32 at least.

    ``columns_B`` holds the column of each row's own partner; ``keys`` say which other columns are as good (see ``Keys``), in both directions. Memory is linear in
    the batch (see ``tiled_cross_entropy``).
    """
    image_to_text = tiled_cross_entropy(image_BD, all_text_ND, scale, columns_B, keys)
    return 0.5 * (image_to_text + tiled_cross_entropy(text_BD, all_image_ND, scale, columns_B, keys))


class Contrastive(Objective):
    """CLIP's loss; active in every episode."""

    needs = frozenset({"image", "text", "logit_scale"})
    gathers = COLUMNS
    logits = ("logit_scale", None)
    finds_partners = True

    def __init__(self, settings: Settings, recipe: Recipe):
        super().__init__(settings, recipe)
        if settings.variant == "reference":
            self.gathers, self.gathers_constant = (), COLUMNS
        if settings.equal_captions != "ignore":
            self.needs = self.needs | {"caption_key"}
            self.gathers_constant = (*self.gathers_constant, "caption_key")

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        keys = None
        if self.settings.equal_captions != "ignore":
            keys = Keys(features["caption_key"], gathered["caption_key"], self.settings.equal_captions == "share")
        columns = [gathered[name] for name in COLUMNS]
        if self.settings.variant == "reference":  # another objective may have had them gathered with gradient
            columns = [column.detach() for column in columns]
        return clip_loss(features["image"], features["text"], *columns, features["logit_scale"], targets.columns_B, keys)

    def loss_products(self, batch: int, sizes: dict[str, int]) -> int:
        return batch * sum(sizes[name] for name in COLUMNS)


build = Contrastive
