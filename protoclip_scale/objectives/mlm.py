"""Masked language modelling on the text tower (methods 3.2, item 3): the true token at each selected place of a masked caption, from the tower's state there."""

import torch
import torch.nn.functional as F
from torch import nn

from protoclip_scale.data.masking import IGNORED
from protoclip_scale.data.views import Views
from protoclip_scale.models.heads import Head, Widths
from protoclip_scale.objectives.base import Objective, Targets
from protoclip_scale.recipe import schema
from protoclip_scale.recipe.schema import ObjectiveSettings

LOSS, COUNT = "mlm@masked", "selected@masked"


class Settings(ObjectiveSettings):
    """Masked language modelling: tokens of the caption are hidden and told from the text tower's states. Needs model.text.mask_token."""


class MaskedTokenHead(nn.Module):
    """Token states [B, T, D], mask and labels int64 [B, C] -> [B]: the cross-entropy at a row's selected tokens, summed; 0 where there are none.

    Logits exist for selected tokens alone, [selected, vocabulary] of one micro-batch.
    """

    def __init__(self, width: int, vocabulary: int):
        super().__init__()
        self.words = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        labels = labels[:, : tokens.shape[1]]
        places = (labels != IGNORED).nonzero()  # on the CPU, where labels lie: on a GPU this would wait for it
        rows, columns = places.to(tokens.device, non_blocking=True).unbind(1)
        expected = labels[places[:, 0], places[:, 1]].to(tokens.device, non_blocking=True)
        logits = self.words(tokens[rows, columns])
        losses = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), expected, reduction="none")
        return losses.new_zeros(len(tokens)).index_add(0, rows, losses)


def _head(widths: Widths, model: schema.Model) -> nn.Module:
    return MaskedTokenHead(widths.text_tokens, widths.vocabulary)


class MaskedLanguage(Objective):
    """The mean over all selected tokens of the global batch; 0 if there are none."""

    needs = frozenset({LOSS, COUNT})
    gathers_constant = (COUNT,)
    views = Views(masked=("masked",))

    def heads(self) -> dict[str, Head]:
        return {"mlm": Head(("text_tokens", "labels"), _head, in_parts=True, precise=False)}

    def coupled(self, features: dict[str, torch.Tensor], gathered: dict[str, torch.Tensor], targets: Targets) -> torch.Tensor:
        ranks = targets.num_columns / len(features[LOSS])  # the mean over ranks divides by them
        return features[LOSS].sum() * ranks / gathered[COUNT].sum().clamp(min=1)


build = MaskedLanguage
