"""Averaged weights (``optim.ema``): every rank averages the weights that it owns under its strategy, and nothing else; 4 bytes for each of them.

Parameters that do not train in an episode and buffers are averaged like all others, so the average is that of the whole model, whatever trains when.
"""

from collections.abc import Iterable, Iterator

import torch

from protoclip_scale.engine.checkpoint import Piece, Reader, replicated_pieces
from protoclip_scale.engine.checkpoint.pieces import WEIGHTS
from protoclip_scale.recipe.schema import Ema

UPDATES = "ema_updates"  # in a checkpoint: how many weights the average is made of


def share_left(settings: Ema, updates: int) -> float:
    """Of an average that has taken ``updates`` weights in, what the next ones leave."""
    return min(settings.decay, (1 + updates) / (10 + updates)) if settings.warmup else settings.decay


class WeightAverage:
    """average <- d average + (1 - d) weights after every step that was taken, d = ``share_left``; whole numbers (batch norm's counters) are copied.

    ``pieces``: this rank's weights and buffers, as the memory that steps change. ``reader``: a checkpoint to go on from, whatever world size and strategy
    it comes from; without an average in it, this one starts from the weights as they are.
    """

    @torch.no_grad()
    def __init__(self, settings: Ema, pieces: Iterable[Piece], reader: Reader | None = None):
        self.settings = settings
        self.updates = 0
        self._live = list(pieces)
        self._own = [piece.values.clone() for piece in self._live]
        if reader and UPDATES in reader:
            self.updates = int(reader.tensor(UPDATES))
            for piece, average in zip(self._live, self._own, strict=True):
                average.copy_(reader.slice(_named(piece), piece.start, piece.start + piece.values.numel()))
        pairs = [(average, piece.values) for piece, average in zip(self._live, self._own, strict=True)]
        self._averaged = _columns(pair for pair in pairs if pair[0].is_floating_point())
        self._copied = _columns(pair for pair in pairs if not pair[0].is_floating_point())

    @torch.no_grad()
    def update(self) -> None:
        """After a step that was taken. Reads and writes this rank's pieces once."""
        if self._averaged:
            torch._foreach_lerp_(*self._averaged, 1 - share_left(self.settings, self.updates))
        if self._copied:
            torch._foreach_copy_(*self._copied)
        self.updates += 1

    def weights(self) -> Iterator[Piece]:
        """The averages as pieces of the model's weights."""
        for piece, average in zip(self._live, self._own, strict=True):
            yield Piece(piece.name, piece.start, average, piece.shape)

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of ``ema/NAME``, and how many weights they are made of, for a checkpoint."""
        for piece in self.weights():
            yield Piece(_named(piece), piece.start, piece.values, piece.shape)
        yield from replicated_pieces({UPDATES: torch.tensor(self.updates)})


def _columns(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> tuple[list[torch.Tensor], ...]:
    """Averages, and the weights they belong to; empty if there are none: a rank of many may own nothing of a kind."""
    return tuple(list(each) for each in zip(*pairs, strict=True))


def _named(piece: Piece) -> str:
    return WEIGHTS["ema"] + piece.name.removeprefix(WEIGHTS["live"])


def change_on_resume(settings: Ema | None, reader: Reader) -> str | None:
    """What a run that goes on from a checkpoint should say of its average: that it begins, or ends."""
    if settings and UPDATES not in reader:
        return "optim.ema: the checkpoint holds no averaged weights; the average starts from its weights"
    if not settings and UPDATES in reader:
        return "optim.ema is null: the averaged weights of the checkpoint are not carried on"
    return None
