"""DeCLIP's multi-view contrast: CLIP's loss between two views of the images and two of the texts (methods 3.2.1)."""

from typing import Literal

import torch
from pydantic import Field

from protoclip_scale.objectives.base import Objective, Targets
from protoclip_scale.objectives.clip import clip_loss
from protoclip_scale.objectives.shared.pairs import IMAGES, main_text, two_views
from protoclip_scale.recipe.schema import ObjectiveSettings, Recipe


class Settings(ObjectiveSettings):
    """Contrast between two views of the images (both with data.augmentation) and two of the texts (the second edited by EDA)."""

    variant: Literal["paper", "reference"] = Field(
        "paper",
        description="paper: the mean over the three pairs with a further view; the main pair is objectives.clip, with a weight of its own. reference: the mean over all "
        "four pairs, as the published code (weight 0.4), so objectives.clip beside it counts the main pair once more.",
    )
    masked_text: bool = Field(False, description="The text masked for objectives.mlm stands for the main one, as in the published code: one text pass less.")


def multiview_terms(
    images: list[torch.Tensor],
    texts: list[torch.Tensor],
    all_images: list[torch.Tensor],
    all_texts: list[torch.Tensor],
    scale: torch.Tensor,
    columns_B: torch.Tensor,
) -> list[torch.Tensor]:
    """CLIP(u_a, w_b) for each image view a and each text view b, the texts running faster: with two of each (u1, t), (u1, t'), (u2, t), (u2, t').

    ``images``, ``texts``: local rows [B, D] by view; ``all_images``, ``all_texts``: gathered columns [N, D]. One shared scale.
    """
    return [
        clip_loss(image, text, all_image, all_text, scale, columns_B)
        for image, all_image in zip(images, all_images, strict=True)
        for text, all_text in zip(texts, all_texts, strict=True)
    ]


def multiview_loss(images, texts, all_images, all_texts, scale: torch.Tensor, columns_B: torch.Tensor, variant: str) -> torch.Tensor:
    """The mean of ``multiview_terms``: of all (reference), or of all but the first, the main pair (paper: L_MVS, beside (1-a-b-c) L_CLIP)."""
    if variant == "reference":
        return torch.stack(multiview_terms(images, texts, all_images, all_texts, scale, columns_B)).mean()
    (first, *further), (all_first, *all_further) = images, all_images
    beside_main = multiview_terms([first], texts[1:], [all_first], all_texts[1:], scale, columns_B)
    return torch.stack(beside_main + multiview_terms(further, texts, all_further, all_texts, scale, columns_B)).mean()


class Multiview(Objective):
    """Active in every episode."""

    logits = ("logit_scale", None)
    finds_partners = True

    def __init__(self, settings: Settings, recipe: Recipe):
        super().__init__(settings, recipe)
        self._texts = (main_text(settings.masked_text), "text@eda")
        self.needs = frozenset({*IMAGES, *self._texts, "logit_scale"})
        self.gathers = (*IMAGES, *self._texts)
        self.views = two_views(recipe, settings.masked_text)

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        views = ([source[name] for name in names] for source in (features, gathered) for names in (IMAGES, self._texts))
        return multiview_loss(*views, features["logit_scale"], targets.columns_B, self.settings.variant)

    def loss_products(self, batch: int, sizes: dict[str, int]) -> int:
        """Each pair of views has two directions."""
        pairs = 4 if self.settings.variant == "reference" else 3
        return pairs * batch * (sizes["image"] + sizes["text"])


build = Multiview
