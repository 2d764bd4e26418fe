"""A tower over more rows than its activations fit for: exact micro-batches (cached gradients).

A contrastive loss couples all rows, so its gradient is no sum over micro-batches. But given its gradient in a tower's outputs, what remains is
row by row. So a tower runs over the micro-batches, with the heads that read its tokens, and keeps their outputs alone; other heads and losses see all rows at once; and in the backward pass each
micro-batch runs again, with the random state it had, when the gradient of its outputs is known. That is activation checkpointing of a whole
tower, one micro-batch at a time: one loss and one backward pass, in which every parameter gets the sum over micro-batches at once, so that
strategies see a step like any other.
"""

import math
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint

Outputs = torch.Tensor | tuple[torch.Tensor, ...]


def num_microbatches(num_rows: int, microbatch: int | None) -> int:
    """Of a rank: a function of its rows alone, so all ranks call their towers equally often."""
    return math.ceil(num_rows / (microbatch or num_rows))


def in_microbatches(encode: Callable[..., Outputs], microbatch: int | None, *inputs: torch.Tensor) -> Outputs:
    """``encode(*inputs)``, a tensor [B, ...] or a tuple of them, of inputs [B, ...], by at most ``microbatch`` rows at once (null: all), which must not influence each other.

    Costs one more run of ``encode`` where there is a backward pass; what lives at once are the activations of one micro-batch.
    """
    if num_microbatches(len(inputs[0]), microbatch) == 1:
        return encode(*inputs)
    pieces = zip(*(each.split(microbatch) for each in inputs), strict=True)
    if not torch.is_grad_enabled():
        return joined([encode(*piece) for piece in pieces])
    # The second run must stop where nothing is saved any more (early_stop, the default), before the hook behind the last module: ZeRO-3's would let go of
    # weights that this module's backward pass, which called for the second run, is about to need.
    return joined([checkpoint(encode, *piece, use_reentrant=False, early_stop=True) for piece in pieces])


def joined(pieces: list[Outputs]) -> Outputs:
    """The rows of all pieces, tensor by tensor."""
    if isinstance(pieces[0], torch.Tensor):
        return torch.cat(pieces)
    return tuple(torch.cat(each) for each in zip(*pieces, strict=True))
