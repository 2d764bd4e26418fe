"""A look at data: a seeded sample of rows, some of them with the views that training would make of them."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from PIL import Image

from protoclip_scale.data.caption_statistics import caption_statistics
from protoclip_scale.data.captions import clean_caption
from protoclip_scale.data.decode import Limits, decode_image
from protoclip_scale.data.index import open_readers
from protoclip_scale.data.randomness import permutation
from protoclip_scale.data.rows import pack_row_ids
from protoclip_scale.data.samples import draw_sample, read_sample
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.data.tokenizers import Tokens
from protoclip_scale.data.views import MAIN, Viewer, Views, Visit
from protoclip_scale.preparation.inspect_statistics import ImageFacts, SourceStatistics, image_facts, source_statistics
from protoclip_scale.preparation.source_options import pick
from protoclip_scale.recipe import schema

EVALUATION, MASKED = "evaluation", "masked"
MAX_ORIGINAL = 512  # pixels of the longer side that the sheet keeps of a picture


@dataclass(frozen=True)
class Look:
    """What to show. augmentations, texts: those of ``data.augmentation`` and ``data.text_augmentation`` to show beside the recipe's own. draws: epochs,
    from 0. source: the label of the only one to look at. seed: of the choice of rows."""

    size: int = 224
    augmentations: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    masked: bool = False
    draws: int = 2
    rows: int = 12
    sample: int = 1000
    source: str | None = None
    seed: int = 0


class Column(NamedTuple):
    """A column of views: the augmentation, and the epoch it is drawn for; None draws nothing."""

    title: str
    epoch: int | None

    @property
    def note(self) -> str:
        return "nothing drawn" if self.epoch is None else f"epoch {self.epoch}"


@dataclass(frozen=True)
class ShownRow:
    """A row of the sheet: the number of the row in its file, counted from 0. original: the picture, at most 512 pixels long, or None with a ``problem``.
    pictures: one per column. texts: (label, text)."""

    file: str
    row: int
    facts: ImageFacts
    captions: list[str]
    original: Image.Image | None
    problem: str | None = None
    pictures: list[Image.Image] = field(default_factory=list)
    texts: list[tuple[str, str]] = field(default_factory=list)


class Inspection(NamedTuple):
    """Statistics per source, and the sheet."""

    statistics: list[SourceStatistics]
    columns: list[Column]
    rows: list[ShownRow]


class _Sampled(NamedTuple):
    source: int
    row_id: int
    file: str
    row: int
    facts: ImageFacts
    captions: list[str]
    encoded: bytes | None  # of those that may be shown


def inspect(data: schema.Data, look: Look, tokenizer) -> Inspection:
    """Reads and decodes the sample, block by block; memory is one block and the rows of the sheet. ``tokenizer`` has a mask token if ``look.masked``.

    The views of ``data.augmentation`` and ``data.text_augmentation`` are those that training makes of the row in that epoch: they depend on the same
    seed and row id. Raises UserError as BlockReader does, if there is no such source, or if texts need a WordNet that is not there.
    """
    viewer = Viewer(data, look.size, data.plan.seed, data.augmentation, data.text_augmentation, _views(data, look))
    chosen = pick(data, look.source)
    readers = dict(zip(chosen, open_readers(data.model_copy(update={"sources": tuple(chosen.values())})), strict=True))
    sampled = _read(readers, look, viewer.limits)
    statistics = []
    for source, reader in readers.items():
        own = [each for each in sampled if each.source == source]
        captions = caption_statistics([each.captions for each in own], tokenizer, data.caption)
        statistics.append(source_statistics(reader, [each.facts for each in own], [f"{each.file} row {each.row}" for each in own], captions))
    columns = _columns(data, look)
    rows = [_shown(each, viewer, look, columns, tokenizer) for each in sampled if each.encoded is not None]
    return Inspection(statistics, columns, rows)


def _read(readers: dict[int, BlockReader], look: Look, limits: Limits) -> list[_Sampled]:
    """The sampled rows; ``readers`` by number of the source."""
    numbers, opened = list(readers), list(readers.values())
    samples = draw_sample(opened, look.sample, look.seed)
    total = sum(len(sample.rows) for sample in samples)
    on_sheet = set(permutation(total, look.seed, "rows of the sheet")[: look.rows].tolist())
    sampled: list[_Sampled] = []
    for sample, table in read_sample(opened, samples):
        source, reader = numbers[sample.source], opened[sample.source]
        file, number = reader.file_of_block(sample.block)
        before = int(reader.block_rows[sample.block - number : sample.block].sum())  # rows of the file in earlier blocks
        row_ids = pack_row_ids(source, sample.block, sample.rows)
        for row, row_id, image, captions in zip(sample.rows.tolist(), row_ids.tolist(), table["image"], table["captions"], strict=True):
            encoded = image.as_py() or b""
            facts = image_facts(encoded, limits)
            kept = encoded if len(sampled) in on_sheet else None
            sampled.append(_Sampled(source, row_id, file, before + row, facts, captions.as_py() or [], kept))
    return sampled


def _views(data: schema.Data, look: Look) -> Views:
    images = {name: name for name in look.augmentations if name != data.augmentation}
    texts = {name: name for name in look.texts if name != data.text_augmentation}
    return Views({EVALUATION: "none", **images}, texts, (MASKED,) if look.masked else ())


def _columns(data: schema.Data, look: Look) -> list[Column]:
    names = [] if data.augmentation == "none" else [data.augmentation]
    names += [name for name in look.augmentations if name not in (*names, "none")]
    return [Column(EVALUATION, None), *(Column(name, epoch) for name in names for epoch in range(look.draws))]


def _shown(row: _Sampled, viewer: Viewer, look: Look, columns: list[Column], tokenizer) -> ShownRow:
    captions = [text for text in map(clean_caption, row.captions) if text]
    if row.facts.problem is not None:
        return ShownRow(row.file, row.row, row.facts, captions, None, row.facts.problem)
    made: list[dict[str, torch.Tensor]] = []  # views of each epoch by their title
    texts: list[tuple[str, str]] = []
    for epoch in range(look.draws):
        visit = Visit(epoch, row.row_id)
        caption = viewer.caption(row.captions, visit)
        views = viewer.load(row.encoded, caption, visit)
        made.append({viewer.data.augmentation if name == MAIN else name: image for name, image in views.images.items()})
        texts += _texts(viewer, views.texts, visit, tokenizer)
    pictures = [_picture(made[column.epoch or 0][column.title]) for column in columns]
    original = _picture(decode_image(row.encoded, viewer.limits))
    original.thumbnail((MAX_ORIGINAL, MAX_ORIGINAL))
    return ShownRow(row.file, row.row, row.facts, captions, original, None, pictures, texts)


def _texts(viewer: Viewer, augmented: dict[str, str], visit: Visit, tokenizer) -> list[tuple[str, str]]:
    """What trains in one epoch, where it is not simply the caption."""
    own = viewer.data.text_augmentation
    labelled = [(own if name == MAIN else name, text) for name, text in augmented.items() if name != MAIN or own != "none"]
    if viewer.masked:
        tokens: Tokens = tokenizer([augmented[MAIN]])
        ids = viewer.mask(tokens, tokenizer, [visit])[MASKED].ids[0, : int(tokens.lengths[0])].tolist()
        labelled.append((MASKED, tokenizer.decode(ids)))
    return [(f"{label}, epoch {visit.epoch}", text) for label, text in labelled]


def _picture(image: torch.Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
