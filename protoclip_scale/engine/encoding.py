"""Features of an episode's rows with as little work as gives the same numbers: batch norm folded, batches together, captions of like length together."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch

from protoclip_scale.data.batches import Batch
from protoclip_scale.engine.strategy import Strategy
from protoclip_scale.models.folding import foldable, folded

FEATURES = {"image": "image_prototype", "text": "text_prototype"}  # column of the episode's store -> feature of the model
BLOCK_ROWS = 512  # a block's captions are sorted by length
IMAGES_TOGETHER, CAPTIONS_TOGETHER = 256, 128  # larger ones are hardly faster, and images need memory
EXAMPLE_ROWS = 2
NOTHING = torch.empty(0)


def batches_together(batch_rows: int) -> int:
    """How many batches of a rank make a block: those of about ``BLOCK_ROWS`` rows, at least one."""
    return max(1, BLOCK_ROWS // batch_rows)


def blocks(batches: Iterable[Batch], num_batches: int) -> Iterator[list[Batch]]:
    """Lists of ``num_batches`` consecutive batches; the last one may be shorter."""
    remaining = iter(batches)
    while block := list(islice(remaining, num_batches)):
        yield block


class Encoder:
    """Prototype-space features of images and captions under the strategy's weights as they are now; the model must be in evaluation mode.

    A row's features are ``DualEncoder.forward``'s up to rounding, whatever rows stand beside it. Cost: a forward pass without the batch norms behind
    convolutions and linear layers and without most of the padding, and memory for the weights that batch norms are folded into.
    """

    @torch.inference_mode()
    def __init__(self, strategy: Strategy, example: Batch):
        self.strategy = strategy
        few = (each[:EXAMPLE_ROWS].to(strategy.device) for each in (example.images, example.token_ids, example.token_lengths))
        model = strategy.bare_model
        self.model = folded(model, foldable(model, *few, wants=frozenset(FEATURES.values())))

    @torch.inference_mode()
    def __call__(self, block: list[Batch]) -> list[dict[str, np.ndarray]]:
        """float32 [B, P] by column of ``FEATURES``, for each batch of the block."""
        images, token_ids, lengths = (torch.cat([getattr(batch, name) for batch in block]) for name in ("images", "token_ids", "token_lengths"))
        by_length = lengths.argsort(stable=True)
        features = {
            "image": torch.cat([self._features("image", images=piece) for piece in images.split(IMAGES_TOGETHER)]),
            "text": torch.cat([self._features("text", token_ids=token_ids[rows], lengths=lengths[rows]) for rows in by_length.split(CAPTIONS_TOGETHER)])[by_length.argsort()],
        }
        ends = np.cumsum([len(batch.positions) for batch in block])[:-1]
        parts = [np.split(each.numpy(), ends) for each in features.values()]
        return [dict(zip(features, arrays, strict=True)) for arrays in zip(*parts, strict=True)]

    def _features(self, column: str, images: torch.Tensor = NOTHING, token_ids: torch.Tensor = NOTHING, lengths: torch.Tensor = NOTHING) -> torch.Tensor:
        """float32 [B, P] on the CPU. The model looks only at what the column is made of, and cuts captions behind the longest."""
        inputs = (each.to(self.strategy.device, non_blocking=True) for each in (images, token_ids, lengths))
        with self.strategy.precision.autocast():
            return self.model(*inputs, wants=frozenset({FEATURES[column]}))[FEATURES[column]].float().cpu()
