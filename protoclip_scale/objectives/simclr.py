"""SLIP's self-supervised branch: SimCLR's contrast between two further views of every image (methods 2.1)."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from protoclip_scale.data.views import Views
from protoclip_scale.models.heads import Head, MlpHead, Widths
from protoclip_scale.objectives.base import Objective, Targets
from protoclip_scale.objectives.shared.tiled import Keys, tiled_cross_entropy
from protoclip_scale.recipe import schema
from protoclip_scale.recipe.schema import ObjectiveSettings, Recipe
from protoclip_scale.recipe.schema.section import Positive

FIRST, SECOND = "simclr@ssl_a", "simclr@ssl_b"


class Settings(ObjectiveSettings):
    """SLIP's self-supervised branch: two further views of every image are told from those of all others."""

    temperature: float = Field(0.1, gt=0, description="Temperature of the softmax over views.")
    augmentation: Literal["slip_ssl", "declip", "protoclip_light"] = Field("slip_ssl", description="Of both further views, as in data.augmentation; declip is what DeCLIP's code gives to its SLIP.")
    hidden_dim: Positive = Field(4096, description="Width of the head's hidden layers.")
    hidden_layers: int = Field(2, ge=0, description="Hidden layers of the head, each with batch norm and ReLU.")
    dim: Positive = Field(256, description="Width of the head's output.")
    norm_groups: Positive | None = Field(None, description="Groups of lanes of the head's batch norm; null takes model.norm_groups.")


def simclr_loss(first_BD: torch.Tensor, second_BD: torch.Tensor, all_first_ND: torch.Tensor, all_second_ND: torch.Tensor, temperature: float, columns_B: torch.Tensor) -> torch.Tensor:
    """(l_a + l_b) / 2 over the local rows B, in fp32 at least:  l_a = CE([q_a K_b' | q_a K_a' without q_a's own column] / t, y) , and l_b with the views exchanged.

    NT-Xent: 1 positive and 2N - 2 negatives. Rows are unit vectors; ``columns_B``: the column of each row in the gathered views. No logits but those of a tile exist at once.
    """
    inverse = first_BD.new_full((1,), 1 / temperature, dtype=torch.promote_types(first_BD.dtype, torch.float32))
    others = torch.arange(len(all_first_ND), device=columns_B.device)
    # a row's own place in its own view is "as good as its partner", so it is left out of the softmax
    keys = Keys(columns_B, torch.cat((torch.full_like(others, -1), others)), shared=False)
    first = tiled_cross_entropy(first_BD, torch.cat((all_second_ND, all_first_ND)), inverse, columns_B, keys)
    return 0.5 * (first + tiled_cross_entropy(second_BD, torch.cat((all_first_ND, all_second_ND)), inverse, columns_B, keys))


class SimCLR(Objective):
    """The contrast of both views, on an MLP of what the image tower pools before its projection; each view goes through the head by itself, with batch statistics of its own."""

    needs = frozenset({FIRST, SECOND})
    gathers = (FIRST, SECOND)
    stops_when_locked = True

    def __init__(self, settings: Settings, recipe: Recipe):
        super().__init__(settings, recipe)
        self.views = Views(images={"ssl_a": settings.augmentation, "ssl_b": settings.augmentation})

    def heads(self) -> dict[str, Head]:
        return {"simclr": Head(("image_pooled",), self._head, unit=True)}

    def _head(self, widths: Widths, model: schema.Model) -> nn.Module:
        settings = self.settings
        return MlpHead(widths.image_pooled, settings.hidden_dim, settings.hidden_layers, settings.dim, settings.norm_groups or model.norm_groups)

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        return simclr_loss(features[FIRST], features[SECOND], gathered[FIRST], gathered[SECOND], self.settings.temperature, targets.columns_B)

    def loss_products(self, batch: int, sizes: dict[str, int]) -> int:
        return 4 * batch * sizes["simclr"]


build = SimCLR
