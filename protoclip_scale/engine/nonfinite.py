"""Steps whose loss or gradient is not finite are skipped on all ranks; too many in a row end the run, with the rows of the last one."""

import itertools

import torch

from protoclip_scale import collectives
from protoclip_scale.data.batches import Batch
from protoclip_scale.data.rows import unpack_row_ids
from protoclip_scale.errors import UserError

ROWS_NAMED = 8
SCALE_SEARCH_STEPS = 16  # fp16's loss scale starts at 2^16 and is halved until it fits


class NonFiniteSteps:
    """Counts skipped steps: ``total`` of the run, over all its attempts."""

    def __init__(self, allowed_in_a_row: int, scales_loss: bool):
        self.allowed = allowed_in_a_row
        self.allowed_now = allowed_in_a_row + (SCALE_SEARCH_STEPS if scales_loss else 0)
        self.in_a_row = 0
        self.total = 0

    def passed(self) -> None:
        """A step was taken."""
        self.in_a_row = 0
        self.allowed_now = self.allowed

    def skipped(self, batch: Batch, step: int, loss: torch.Tensor) -> None:
        """A step was skipped on all ranks; UserError if it was one too many, which names rows of the ranks whose ``loss`` is not finite, or of all if only the
        gradient was not. A collective then."""
        self.in_a_row += 1
        self.total += 1
        if self.in_a_row <= self.allowed_now:
            return
        ranks = collectives.all_gather_objects((batch.row_ids.tolist(), bool(loss.isfinite())))
        spoilt = [row_ids for row_ids, finite in ranks if not finite] or [row_ids for row_ids, _ in ranks]
        row_ids = [row for row in itertools.chain(*itertools.zip_longest(*spoilt)) if row is not None]  # some of each rank
        places = zip(*unpack_row_ids(row_ids[:ROWS_NAMED]), strict=True)
        named = ", ".join(f"{source}/{block}/{row}" for source, block, row in places)
        raise UserError(
            f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, the last of them step {step} (optim.nonfinite_skips {self.allowed}); "
            f"lower optim.lr, use another optim.precision, or look at its rows (source/block/row): {named}, ..."
        )
