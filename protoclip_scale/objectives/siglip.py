"""SigLIP's loss: each pair of an image and a text of the global batch is a yes-or-no question of its own (Zhai et al. 2023, arXiv 2303.15343)."""

import math

import torch
from pydantic import Field
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from protoclip_scale.models.heads import Head, temperature
from protoclip_scale.objectives.base import Objective, Targets
from protoclip_scale.objectives.shared.tiled import tile_rows
from protoclip_scale.recipe.schema import LogitScale, ObjectiveSettings


class Temperature(LogitScale):
    """SigLIP's inverse temperature, as a logarithm; bounded in the forward pass, which is not published."""

    init: float = Field(math.log(10), description="Initial value of the logarithm, ln 10 as published.")


class Settings(ObjectiveSettings):
    """The sigmoid loss between images and captions, with a temperature and a bias of its own."""

    logit_scale: Temperature = Field(Temperature(), description="Start and bounds of its temperature.")
    init_bias: float = Field(-10.0, description="Initial value of the learned bias, as published: at first nearly every pair is taken for a negative, as nearly all are.")


class _SigmoidLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_BD, columns_ND, scale, bias, partners_B):
        dtype = torch.promote_types(rows_BD.dtype, torch.float32)
        wanted = any(ctx.needs_input_grad)
        with torch.autocast(rows_BD.device.type, enabled=False):
            rows, columns = rows_BD.to(dtype), columns_ND.to(dtype)
            loss = rows.new_zeros(())
            row_slopes = torch.empty_like(rows) if wanted else None
            column_slopes = torch.zeros_like(columns) if wanted else None
            bias_slope = torch.zeros_like(loss)
            step = tile_rows(len(rows), len(columns), rows.device.type)
            for start in range(0, len(rows), step):
                tile = slice(start, start + step)
                queries, partners = rows[tile] * scale, partners_B[tile, None]
                logits = torch.addmm(bias.to(dtype), queries, columns.T)
                loss -= F.logsigmoid(-logits).sum() + logits.gather(1, partners).sum()
                if not wanted:
                    continue
                slopes = logits.sigmoid_().scatter_add_(1, partners, logits.new_full(partners.shape, -1.0))
                torch.mm(slopes, columns, out=row_slopes[tile])
                column_slopes.addmm_(slopes.T, queries)
                bias_slope += slopes.sum()
            if wanted:
                ctx.save_for_backward(row_slopes, column_slopes, scale, (row_slopes * rows).sum(), bias, bias_slope)
                ctx.dtypes, ctx.num_rows = (rows_BD.dtype, columns_ND.dtype), len(rows)
            return loss / len(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        row_slopes, column_slopes, scale, scale_slope, bias, bias_slope = ctx.saved_tensors
        gradient = gradient / ctx.num_rows
        return (
            (row_slopes * (gradient * scale)).to(ctx.dtypes[0]),
            (column_slopes * gradient).to(ctx.dtypes[1]),
            (gradient * scale_slope).to(scale.dtype).expand_as(scale),
            (gradient * bias_slope).to(bias.dtype).expand_as(bias),
            None,
        )


def siglip_loss(image_BD: torch.Tensor, all_text_ND: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor, columns_B: torch.Tensor) -> torch.Tensor:
    """-1/B sum_i sum_j log sigmoid(z_ij (s I_i T_j + b)) over the local images B and all texts N, z_ij = 1 where j is i's own text and -1 elsewhere; fp32 at least.

    A sum over the texts and a mean over the images, as published: the mean over ranks is the loss of the whole batch. One product of B x N, where the contrastive
    loss needs two: no softmax, so nothing is normalised over the other direction. Gradients reach images, texts, scale and bias (one number each). Costs 6 B N D
    operations; holds [B, D] and [N, D] for the backward pass and, while it runs, two tiles of ``tile_rows`` x N.
    """
    return _SigmoidLoss.apply(image_BD, all_text_ND, scale, bias, columns_B)


class Bias(nn.Module):
    """A learned number, shape (1,)."""

    def __init__(self, init: float):
        super().__init__()
        self.value = nn.Parameter(torch.full((1,), init))

    def forward(self) -> torch.Tensor:
        return self.value * 1  # not the parameter itself, which a sharded strategy releases


class Sigmoid(Objective):
    """SigLIP's loss; active in every episode."""

    needs = frozenset({"image", "text", "siglip_scale", "siglip_bias"})
    gathers = ("text",)
    logits = ("siglip_scale", "siglip_bias")

    def heads(self) -> dict[str, Head]:
        settings = self.settings
        return {
            "siglip_scale": temperature(settings=settings.logit_scale),
            "siglip_bias": Head((), lambda widths, model: Bias(settings.init_bias), decays=False),
        }

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        return siglip_loss(features["image"], gathered["text"], features["siglip_scale"], features["siglip_bias"], targets.columns_B)


build = Sigmoid
