"""The views of a row that a batch holds: the main image and text, and further ones that an objective asks for by name.

Every random draw of a view is f(seed, the view's name, epoch, row id), so asking for one more changes nothing about the others.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from protoclip_scale.data.captions import choose_caption
from protoclip_scale.data.decode import Limits, decode_image
from protoclip_scale.data.masking import mask_tokens
from protoclip_scale.data.randomness import generator
from protoclip_scale.data.text_augmentation import text_augmentation, unchanged
from protoclip_scale.data.tokenizers import Tokens
from protoclip_scale.data.transforms import augment
from protoclip_scale.recipe import schema


class Visit(NamedTuple):
    """One visit of a row: what its random draws depend on, beside the seed and the view."""

    epoch: int
    row_id: int


@dataclass(frozen=True)
class Views:
    """Further views by name. ``images``: the augmentation of each, as in ``data.augmentation``. ``texts``: likewise, as in ``data.text_augmentation``.
    ``masked``: names of texts that are the main one with tokens masked for masked language modelling."""

    images: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    masked: tuple[str, ...] = ()


class MaskedTokens(NamedTuple):
    """ids int64 [B, C] with some tokens masked; labels int64 [B, C], the true token where one was selected and -100 elsewhere."""

    ids: torch.Tensor
    labels: torch.Tensor


class RowViews(NamedTuple):
    """What ``Viewer.load`` makes of one row: uint8 [3, S, S] by view, texts by view; '' is the main one."""

    images: dict[str, torch.Tensor]
    texts: dict[str, str]


MAIN = ""


class Viewer:
    """Makes the views of rows. A pure function of its arguments, the row and its visit; pickles small, for loader processes."""

    def __init__(self, data: schema.Data, size: int, seed: int, augmentation: str, text: str, views: Views):
        self.data = data
        self.size = size
        self.seed = seed
        self.images = {MAIN: augmentation, **views.images}
        # The functions, not their names: what they need is missed here, not in a loader process, and read once.
        self.texts = {name: text_augmentation(how) for name, how in {MAIN: text, **views.texts}.items()}
        self.masked = views.masked
        self.limits = Limits(data.max_pixels, data.max_bytes)

    def caption(self, captions: list[str], visit: Visit) -> str:
        """The one of a row's captions that this visit uses; '' if it has none. The same for every view and for extraction."""
        draws = self.data.caption == "random"  # a generator costs as much as the choice
        return choose_caption(captions, self.data.caption, generator(self.seed, "caption", *visit, 0) if draws else None)

    def load(self, encoded: bytes | None, caption: str, visit: Visit) -> RowViews:
        """All views of a row. Raises BadImage."""
        image = decode_image(encoded, self.limits)
        images = {name: augment(how)(image, self.size, self._generator("augmentation", name, visit)) for name, how in self.images.items()}
        texts = {
            name: caption if edit is unchanged else edit(caption, self._generator("text augmentation", name, visit))
            for name, edit in self.texts.items()
        }
        return RowViews(images, texts)

    def mask(self, tokens: Tokens, tokenizer, visits: list[Visit]) -> dict[str, MaskedTokens]:
        """The masked views of a batch of main texts."""
        return {
            name: MaskedTokens(*mask_tokens(tokens, tokenizer, [self._generator("masking", name, visit) for visit in visits])) for name in self.masked
        }

    def _generator(self, purpose: str, view: str, visit: Visit) -> np.random.Generator:
        return generator(self.seed, f"{purpose} {view}" if view else purpose, *visit, 0)
