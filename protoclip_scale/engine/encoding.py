"""Features of an episode's rows with as little work as gives the same numbers: batch norm folded, batches together."""

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch

from protoclip_scale.data.batches import Batch
from protoclip_scale.engine.strategy import Strategy
from protoclip_scale.models.folding import foldable, folded

FEATURES = {"image": "image_prototype", "text": "text_prototype"}  # column of the episode's store -> feature of the model
BLOCK_ROWS = 512
ROWS_TOGETHER = 256  # more are hardly faster, and images need memory
EXAMPLE_ROWS = 2


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
    convolutions and linear layers and without most of the padding, and memory for the weights that batch norms are folded into. Where a rank holds parts
    of the weights, batch norms stay as they are, and all ranks encode equally many blocks of equally many rows.
    """

    def __init__(self, strategy: Strategy, example: Batch):
        self.strategy = strategy
        self.model = strategy.bare_model
        if strategy.whole:
            few = (each[:EXAMPLE_ROWS].to(strategy.device) for each in (example.images, example.token_ids, example.token_lengths))
            with torch.inference_mode():
                self.model = folded(self.model, foldable(self.model, *few, wants=frozenset(FEATURES.values())))

    @torch.no_grad()
    def __call__(self, block: list[Batch]) -> list[dict[str, np.ndarray]]:
        """float32 [B, P] by column of ``FEATURES``, for each batch of the block."""
        device = self.strategy.device
        images, token_ids, lengths = (torch.cat([getattr(batch, name) for batch in block]) for name in ("images", "token_ids", "token_lengths"))
        inputs = images.to(device, non_blocking=True), token_ids.to(device, non_blocking=True), lengths
        with torch.inference_mode(self.strategy.whole):
            features = self.model(*inputs, wants=frozenset(FEATURES.values()), microbatch=ROWS_TOGETHER)
        ends = np.cumsum([len(batch.positions) for batch in block])[:-1]
        parts = [np.split(features[name].float().cpu().numpy(), ends) for name in FEATURES.values()]
        return [dict(zip(FEATURES, arrays, strict=True)) for arrays in zip(*parts, strict=True)]
