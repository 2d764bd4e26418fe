"""Features that are made of a batch's tokens alone: no tower runs for them, and no gradient reaches them."""

from collections.abc import Callable

import torch

from protoclip_scale.data.masking import IGNORED
from protoclip_scale.models.features import parse
from protoclip_scale.objectives.shared.equal import caption_keys


def num_selected(token_ids: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """[B]: how many tokens of a masked text are to be told."""
    return (labels != IGNORED).sum(1)


# kind -> function of the ids [B, C], lengths [B] and, of masked texts, labels [B, C] of the view
INPUT_FEATURES: dict[str, Callable[..., torch.Tensor]] = {"caption_key": caption_keys, "selected": num_selected}


def is_input(name: str) -> bool:
    """Whether a feature is one of these."""
    return parse(name).kind in INPUT_FEATURES
