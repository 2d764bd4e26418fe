"""SimSiam between two views of an image: DeCLIP's image self-supervision (methods 3.2.2; Chen & He 2021, arXiv 2011.10566)."""

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from protoclip_scale.data.views import Views
from protoclip_scale.models.batch_norm import GroupBatchNorm
from protoclip_scale.models.heads import Head
from protoclip_scale.objectives.base import Objective, Targets
from protoclip_scale.recipe.schema import ObjectiveSettings, Recipe
from protoclip_scale.recipe.schema.section import Positive


class Settings(ObjectiveSettings):
    """SimSiam between the main image view and a second one with the same augmentation."""

    dim: Positive = Field(1024, description="Width of the projector's layers and of its output.")
    predictor_dim: Positive = Field(512, description="Width of the predictor's hidden layer.")
    norm_groups: Positive | None = Field(None, description="Groups of lanes of the heads' batch norm; null takes model.norm_groups. 32 are the published 32 GPUs.")


def simsiam_loss(
    first_prediction_BD: torch.Tensor, second_prediction_BD: torch.Tensor, first_projection_BD: torch.Tensor, second_projection_BD: torch.Tensor
) -> torch.Tensor:
    """-1/2 [cos(p_1, sg(z_2)) + cos(p_2, sg(z_1))], a mean over the rows: in [-1, 1], -1 where both views agree. No gradient reaches the projections z; fp32 at least."""
    pairs = ((first_prediction_BD, second_projection_BD), (second_prediction_BD, first_projection_BD))
    return -0.5 * sum(F.cosine_similarity(_precise(p), _precise(z).detach(), dim=1).mean() for p, z in pairs)


def _precise(rows: torch.Tensor) -> torch.Tensor:
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


class Projector(nn.Sequential):
    """[B, width] -> [B, dim]: three linear maps, batch norm after each, ReLU between; no bias, which batch norm would take away."""

    def __init__(self, width: int, dim: int, groups: int):
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(width, dim, bias=False), GroupBatchNorm(dim, groups), nn.ReLU()]
            width = dim
        super().__init__(*layers[:-1])


class Predictor(nn.Sequential):
    """[B, dim] -> [B, dim] through a narrower layer with batch norm and ReLU."""

    def __init__(self, dim: int, hidden_dim: int, groups: int):
        super().__init__(nn.Linear(dim, hidden_dim, bias=False), GroupBatchNorm(hidden_dim, groups), nn.ReLU(), nn.Linear(hidden_dim, dim))


class SimSiam(Objective):
    """Active while the image tower trains; row by row but for batch norm, so nothing is gathered."""

    stops_when_locked = True
    needs = frozenset({"simsiam_projection", "simsiam_projection@second", "simsiam_prediction", "simsiam_prediction@second"})

    def __init__(self, settings: Settings, recipe: Recipe):
        super().__init__(settings, recipe)
        self.views = Views(images={"second": recipe.data.augmentation})

    def heads(self) -> dict[str, Head]:
        settings, groups = self.settings, self.settings.norm_groups or self.recipe.model.norm_groups
        return {
            "simsiam_projection": Head(("image_projected",), lambda widths, model: Projector(widths.image_projected, settings.dim, groups)),
            "simsiam_prediction": Head(("simsiam_projection",), lambda widths, model: Predictor(settings.dim, settings.predictor_dim, groups)),
        }

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        return simsiam_loss(*(features[f"simsiam_{kind}{view}"] for kind in ("prediction", "projection") for view in ("", "@second")))


build = SimSiam
