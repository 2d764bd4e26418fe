"""Dropout and stochastic depth whose masks are functions of the row: the same for any number of ranks, workers and micro-batches (laws 1 and 2), and after any kill (law 3).

torch draws masks for a whole batch, from a generator of each process: another split of the batch gives every row another mask.
"""

import math
import zlib

import numpy as np
import torch
from timm.layers import DropPath
from torch import nn

from protoclip_scale.errors import UserError

_SPLITMIX = (30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)  # shift, multiplier as a signed number (Steele et al. 2014)
_GOLDEN = -0x61C8864680B583EB
_WAYS = 1 << 24  # that a float32 tells apart
_SHARES = 1 << 53  # of which a float64's difference from 1 is a whole number


def row_keys(row_ids: torch.Tensor, drawn: int) -> torch.Tensor:
    """int64 [B], what masks of rows are drawn from in a step. ``drawn``: 63 bits, a function of the seed and the step."""
    return _mixed(row_ids ^ drawn)


def of_view(keys_B: torch.Tensor, view: str) -> torch.Tensor:
    """Keys of a view of the same rows."""
    return _mixed(keys_B + zlib.crc32(view.encode()))


class Draws:
    """What the layers of a tower draw from now: int64 [B], set before each pass. None: nothing is dropped."""

    def __init__(self):
        self.keys_B: torch.Tensor | None = None


class RowDropout(nn.Module):
    """In training, a number (with ``whole_rows`` all numbers of a row) is 0 with probability ``p``, else divided by 1 - p, unless ``scale`` is false.

    Takes [B x n, ...], n consecutive parts of each row (windows of attention).
    """

    def __init__(self, probability: float, whole_rows: bool, scale: bool, draws: Draws, number: int):
        super().__init__()
        self.probability, self.whole_rows, self.scale = probability, whole_rows, scale
        self._draws = draws
        # what differs from block to block is in tensors: as numbers, they would make torch.compile build a graph for each block. Whole ones, which no cast of a model rounds
        for name, whole in (("number", number), ("least", math.ceil(float(np.float32(probability)) * _WAYS)), ("kept_share", round((1 - probability) * _SHARES))):
            self.register_buffer(name, torch.tensor(whole), persistent=False)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if not self.training or self._draws.keys_B is None:
            return values
        keys_B = _mixed(self._draws.keys_B.to(values.device) + self.number)
        numbers = 1 if self.whole_rows else values.numel() // len(keys_B)
        places = torch.arange(numbers, device=values.device) * _GOLDEN
        drawn = (_mixed(keys_B[:, None] + places) >> 40) & (_WAYS - 1)
        kept = (drawn >= self.least).to(torch.promote_types(values.dtype, torch.float32))
        if self.scale:
            kept = kept / (self.kept_share.double() / _SHARES).to(kept.dtype)
        kept = kept.to(values.dtype)
        if self.whole_rows:
            kept = kept.repeat_interleave(len(values) // len(keys_B), 0)
            return values * kept.view(-1, *[1] * (values.dim() - 1))
        return values * kept.view(values.shape)

    def extra_repr(self) -> str:
        return f"probability={self.probability}, whole_rows={self.whole_rows}"


def key_by_row(trunk: nn.Module, name: str) -> Draws | None:
    """Replace all that drops by chance; None where nothing does. Raises UserError for a tower with a kind that is not known here."""
    draws, found = Draws(), 0
    for parent in list(trunk.modules()):
        for place, child in list(parent.named_children()):
            probability = _probability(child)
            if not probability:
                continue
            if not isinstance(child, nn.Dropout | DropPath):
                raise UserError(f"model.image.name {name}: its {type(child).__name__} drops by chance, with masks that would depend on the number of ranks; choose another tower")
            whole_rows = isinstance(child, DropPath)
            setattr(parent, place, RowDropout(probability, whole_rows, getattr(child, "scale_by_keep", True), draws, found))
            if place == "attn_drop":  # fused attention would draw by itself
                parent.fused_attn = False
            found += 1
    return draws if found else None


def _probability(module: nn.Module) -> float:
    """With which a layer drops; 0 of others."""
    if not isinstance(module, nn.modules.dropout._DropoutNd) and "Drop" not in type(module).__name__:
        return 0.0
    return next((value for name in ("drop_prob", "p", "prob") if isinstance(value := getattr(module, name, None), int | float)), 0.0)


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """A hash of each int64 (SplitMix64's last steps)."""
    for shift, multiplier in _SPLITMIX:
        numbers = (numbers ^ ((numbers >> shift) & ((1 << (64 - shift)) - 1))) * multiplier
    return numbers ^ ((numbers >> 31) & ((1 << 33) - 1))
