"""Parts of named tensors: what each rank gives to a checkpoint, so that no rank ever holds a tensor that it has not in training."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from protoclip_scale import collectives

WEIGHTS = {"live": "model/", "ema": "ema/"}  # the weights that train and their averages: what stands before a weight's name in a checkpoint
_SMALL = 65_536  # values; what is cut smaller costs more in reading than its balance is worth


@dataclass(frozen=True)
class Piece:
    """``values`` (1-D, on any device) stand at ``start`` and after it in the flattened tensor ``name``, whose whole shape is ``shape``."""

    name: str
    start: int
    values: torch.Tensor
    shape: tuple[int, ...]


def ranges(index: int, numel: int, world: int) -> list[tuple[int, int]]:
    """[start, stop) of a flattened tensor for each rank: small tensors go whole to one, large ones are cut evenly over as many as it is worth.

    ``index``: the tensor's number, by which they go round the ranks.
    """
    parts = max(1, min(world, numel // _SMALL))
    given = [(0, 0)] * world
    for part in range(parts):
        given[(index + part) % world] = (numel * part // parts, numel * (part + 1) // parts)
    return given


def replicated_views(tensors: dict[str, torch.Tensor]) -> Iterator[Piece]:
    """``replicated_pieces`` whose values are the tensors' own memory."""
    strided = [name for name, tensor in tensors.items() if not tensor.is_contiguous()]
    assert not strided, f"{strided[0]} is not contiguous, so a piece of it would be a copy"
    return replicated_pieces(tensors)


def replicated_pieces(tensors: dict[str, torch.Tensor]) -> Iterator[Piece]:
    """This rank's share of tensors that are the same on all ranks: every value is given by one rank."""
    rank, world = collectives.rank(), collectives.world_size()
    for index, (name, tensor) in enumerate(sorted(tensors.items())):
        start, stop = ranges(index, tensor.numel(), world)[rank]
        if stop > start or (tensor.numel() == 0 and index % world == rank):
            yield Piece(name, start, tensor.detach().reshape(-1)[start:stop], tuple(tensor.shape))
