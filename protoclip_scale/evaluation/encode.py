"""Embeddings of images and texts, shared out over ranks in whole batches, so that no figure depends on the number of ranks."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from protoclip_scale import collectives, standing

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Encoder(Protocol):
    """What evaluation asks of a model, a ``torch.nn.Module``: rows of unit length."""

    training: bool

    def train(self, mode: bool = True): ...

    def eval(self): ...

    def encode_image(self, images: torch.Tensor) -> torch.Tensor: ...

    def encode_text(self, token_ids: torch.Tensor, token_lengths: torch.Tensor) -> torch.Tensor: ...


def nothing() -> None:
    """What callers do between batches who have nothing to do there."""


def batch_starts(num_rows: int, batch: int) -> list[int]:
    """Where batches of ``batch`` rows begin: batch b at b*batch, the last one ``batch`` rows before the end."""
    return [max(0, min(start, num_rows - batch)) for start in range(0, num_rows, batch)]


def encode_sharded(num_rows: int, batch: int, encode: Callable[[range], torch.Tensor], meanwhile: Callable[[], None] = nothing) -> torch.Tensor:
    """Rows 0..num_rows-1 encoded ``batch`` at a time, in row order, on every rank's CPU.

    Batch b is rows [b*batch, (b+1)*batch), the last one the last ``batch`` rows, and rank b mod W encodes it: the batches are the same for every W, and so are
    the figures, bit for bit on one kind of device. All ranks encode equally many batches of equally many rows, as strategies need that gather weights in
    the forward pass (a text tower is called once for every so many rows): a rank without work in the last round repeats the last batch, which is dropped.
    ``encode`` maps a range of rows to [rows, D]; ``meanwhile`` is called after each batch, and may be a collective. Cost: ceil(batches / W) forward passes and as many gathers of W*batch rows.
    """
    starts, encoded = batch_starts(num_rows, batch), []
    for first in range(0, len(starts), collectives.world_size()):
        start = starts[min(first + collectives.rank(), len(starts) - 1)]
        own = encode(range(start, min(start + batch, num_rows))).float()
        of_ranks = collectives.all_gather(own).cpu().split(len(own))
        encoded += [rows[number * batch - starts[number] :] for number, rows in zip(range(first, len(starts)), of_ranks, strict=False)]
        standing.got_on()
        meanwhile()
    return torch.cat(encoded)


@contextlib.contextmanager
def evaluating(model: Encoder, device: torch.device, precision: str):
    """Eval mode, no gradient, and the towers' autocast; the mode the model was in comes back afterwards."""
    dtype = AUTOCAST[precision]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype) if dtype else contextlib.nullcontext():
            yield
    finally:
        model.train(was_training)


def encode_images(
    model: Encoder,
    pixels: Callable[[range], tuple[torch.Tensor, torch.Tensor]],
    num_rows: int,
    batch: int,
    device: torch.device,
    precision: str = "fp32",
    meanwhile: Callable[[], None] = nothing,
):
    """``(embeddings [n, D] float32, decodable [n] bool)``; ``pixels`` gives uint8 [b, 3, S, S] and a bool [b] for a range of rows."""

    def encode(rows: range) -> torch.Tensor:
        images, decodable = pixels(rows)
        embeddings = model.encode_image(images.to(device)).float()
        return torch.cat([embeddings, decodable.to(device, embeddings.dtype)[:, None]], dim=1)

    with evaluating(model, device, precision):
        encoded = encode_sharded(num_rows, batch, encode, meanwhile)
    return encoded[:, :-1].contiguous(), encoded[:, -1] > 0.5


def encode_texts(
    model: Encoder, tokenizer: Callable, texts: Sequence[str], batch: int, device: torch.device, precision: str = "fp32", meanwhile: Callable[[], None] = nothing
) -> torch.Tensor:
    """[len(texts), D] float32."""

    def encode(rows: range) -> torch.Tensor:
        tokens = tokenizer(list(texts[rows.start : rows.stop]))
        return model.encode_text(tokens.ids.to(device), tokens.lengths.to(device))

    with evaluating(model, device, precision):
        return encode_sharded(len(texts), batch, encode, meanwhile)
