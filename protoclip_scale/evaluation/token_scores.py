"""Late interaction between all images of a set and many texts, shared out over ranks; token features are never held for more than a part of either."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from protoclip_scale import collectives, standing
from protoclip_scale.evaluation.encode import batch_starts, evaluating, nothing
from protoclip_scale.evaluation.late_interaction import Questions, add_similarities
from protoclip_scale.models.dual_encoder import DualEncoder
from protoclip_scale.objectives.shared.late_interaction import Tokens, present

BUDGET_BYTES = 1 << 30  # of image tokens that a rank holds at once


class TokenEncoder(NamedTuple):
    """``kinds``: of ``Compared.tokens``; ``batch``: images and texts of a pass; ``precision``: of the towers; ``meanwhile``: called after each pass, on all ranks alike."""

    model: DualEncoder
    kinds: tuple[str, str]
    tokenizer: Callable
    batch: int
    device: torch.device
    precision: str = "fp32"
    meanwhile: Callable[[], None] = nothing

    def images(self, pixels: torch.Tensor) -> Tokens:
        """Of uint8 [b, 3, S, S]."""
        return present(self.model(pixels.to(self.device), wants=frozenset(self.kinds[:1]))[self.kinds[0]].float())

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        """[b, context, D] float32, rows of zeros where no token counts."""
        ids, lengths = self.tokenizer(list(texts))
        return self.model(None, ids.to(self.device), lengths.to(self.device), wants=frozenset(self.kinds[1:]))[self.kinds[1]].float()


def late_scores(
    encoder: TokenEncoder, pixels: Callable[[range], tuple[torch.Tensor, torch.Tensor]], num_images: int, asked: Sequence[Questions], budget_bytes: int = BUDGET_BYTES
) -> list[list[torch.Tensor]]:
    """The answers to each of ``asked``, S^I and, where both are wanted, S^T: [num_images, num_columns] float32 on rank 0, nothing elsewhere; a collective.

    ``pixels``: see ``encode_images``. Images and texts are cut into batches as in ``encode_sharded``, each pair of batches is compared by one rank, and no figure depends on W.

    Memory: a rank holds tokens of as many of its image batches as go into ``budget_bytes`` (one at least), and of W batches of texts at once, cut to the longest;
    rank 0 the answers besides, 8 bytes for each pair of an image and a text of retrieval, 4 for each of an image and a class; another rank its own images' share of one of
    ``asked``'s, and while they go to rank 0 each has those of a batch. Texts are encoded again for each such part of the images. Cost: a pass over the images, one over the
    texts for each part, and 2 T_image T_text D operations for each pair and direction, shared out over ranks.
    """
    starts, on_zero = batch_starts(num_images, encoder.batch), collectives.rank() == 0
    answers = [[torch.zeros(num_images, each.num_columns) for _ in range(1 + each.both)] if on_zero else [] for each in asked]
    with evaluating(encoder.model, encoder.device, encoder.precision):
        for part in _parts(encoder, pixels, starts, num_images, budget_bytes):
            for questions, whole in zip(asked, answers, strict=True):
                _compare(encoder, part, questions, whole, starts)
            part.clear()  # before the next one is encoded
    return answers


def _compare(encoder: TokenEncoder, part: list[tuple[int, Tokens]], questions: Questions, whole: list[torch.Tensor], starts: list[int]) -> None:
    own = [_own_rows(questions, whole, starts[first], first * encoder.batch, len(images.rows)) for first, images in part]
    for texts, places in _text_tiles(encoder, questions.texts):
        for (_, images), found in zip(part, own, strict=True):
            add_similarities(found, images, texts, questions.columns[places], questions.shares[places])
    if collectives.world_size() > 1:
        for (first, _), found in zip(part, own, strict=True):
            for direction, rows in enumerate(found):
                _to_rank_zero(encoder, rows, whole[direction] if whole else None, starts, first)


def _own_rows(questions: Questions, whole: list[torch.Tensor], start: int, begin: int, num_rows: int) -> list[torch.Tensor]:
    """Where the answers of a rank's batch of images are summed up: on rank 0 in their place, without the rows that came before ``begin``."""
    return [each[begin : start + num_rows] for each in whole] or [torch.zeros(num_rows, questions.num_columns) for _ in range(1 + questions.both)]


def _to_rank_zero(encoder: TokenEncoder, rows: torch.Tensor, whole: torch.Tensor | None, starts: list[int], first: int) -> None:
    """All ranks' answers of a round into the ``whole`` of rank 0, as many rows at a time as make one batch together."""
    if whole is not None:  # its own stand there, which are as many as the others' with those of the batch before
        rows = whole[starts[first] : starts[first] + encoder.batch]
    step = -(-len(rows) // collectives.world_size())
    for begin in range(0, len(rows), step):
        sent = rows[begin : begin + step].to(encoder.device)
        gathered = collectives.all_gather(sent).split(len(sent))
        for number in range(first, min(first + len(gathered), len(starts))) if whole is not None else ():
            place, fresh = starts[number] + begin, number * encoder.batch
            got = gathered[number - first][max(0, fresh - place) :]
            whole[max(fresh, place) : max(fresh, place) + len(got)] = got.cpu()


def _parts(encoder: TokenEncoder, pixels: Callable, starts: list[int], num_images: int, budget_bytes: int) -> Iterator[list[tuple[int, Tokens]]]:
    """This rank's batches of images, as many at a time as ``budget_bytes`` hold: with each the number of the round's first batch. All ranks make equally many passes of equally many rows."""
    part: list[tuple[int, Tokens]] = []
    for first in range(0, len(starts), collectives.world_size()):
        if part and (len(part) + 1) * part[0][1].rows.nbytes > budget_bytes:
            yield part
            part = []
        start = starts[min(first + collectives.rank(), len(starts) - 1)]
        part.append((first, encoder.images(pixels(range(start, min(start + encoder.batch, num_images)))[0])))
        standing.got_on()
        encoder.meanwhile()
    if part:
        yield part


def _text_tiles(encoder: TokenEncoder, texts: list[str]) -> Iterator[tuple[Tokens, slice]]:
    """The tokens of each batch of texts in turn, without those that came before, cut to its longest; and which texts they are. Each is encoded by one rank."""
    starts, world = batch_starts(len(texts), encoder.batch), collectives.world_size()
    for first in range(0, len(starts), world):
        start = starts[min(first + collectives.rank(), len(starts) - 1)]
        rows = encoder.texts(texts[start : start + encoder.batch])
        longest = collectives.all_reduce(_length(rows), "max").item()
        gathered = collectives.all_gather(rows[:, :longest]).split(len(rows))
        for number, tile in enumerate(gathered[: len(starts) - first], start=first):
            begin = number * encoder.batch
            fresh = tile[begin - starts[number] :]
            yield present(fresh[:, : _length(fresh).item()]), slice(begin, begin + len(fresh))
        standing.got_on()
        encoder.meanwhile()


def _length(rows_BTD: torch.Tensor) -> torch.Tensor:
    """Places up to the last one at which any row has a token, at least 1."""
    counts = (rows_BTD != 0).any(-1).any(0)
    return (counts * torch.arange(1, len(counts) + 1, device=counts.device)).max().clamp(min=1)
