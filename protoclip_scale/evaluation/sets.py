"""Held-out sets: which rows count, their captions and class names; image bytes are read block by block when needed."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from protoclip_scale.data.rows import pack_row_ids
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation.labels import Labels, check_classes, open_source, text_of
from protoclip_scale.evaluation.suites import Suite
from protoclip_scale.prototypes.distinct import position_keys
from protoclip_scale.recipe.schema import EvaluationSet

SUBSET_SEED = (0,)  # one for all runs


class Found(NamedTuple):
    """What a set holds after ``exclude`` and before ``subset``: rows, their captions, and how many rows have none."""

    rows: int
    captions: int
    without_caption: int


@dataclass(frozen=True, eq=False)
class HeldOutRows:
    """The rows of one set that are left after ``exclude``, in file order.

    ``captions[i]`` holds the distinct captions of row i (perhaps none), ``classes[column][i]`` its class name ("" if it has
    none), ``places[i]`` its block and its row in that block.
    """

    settings: EvaluationSet
    reader: BlockReader = field(repr=False)
    captions: list[list[str]] = field(repr=False)
    classes: dict[str, list[str]] = field(repr=False)
    places: np.ndarray = field(repr=False)
    found: Found

    def __len__(self) -> int:
        return len(self.captions)

    def image_bytes(self, rows: Sequence[int]) -> list[bytes]:
        """The encoded images of rows in ascending order; None stands as b"". Reads each block that they touch once."""
        places = self.places[np.asarray(rows, dtype=np.int64)]
        images: list[bytes] = []
        for block in dict.fromkeys(places[:, 0].tolist()):
            wanted = places[places[:, 0] == block, 1].tolist()
            column = self.reader.read(block, images=frozenset(wanted)).column("image")
            images += [column[row].as_py() or b"" for row in wanted]
        return images


def load_set(settings: EvaluationSet, root: str, retry_seconds: float = 300) -> HeldOutRows:
    """Read a set's captions and class names (not its images).

    Several captions of a row all count, each distinct text once. With ``subset`` so many of the rows that ``exclude`` leaves. Raises UserError for missing files and columns, and for a
    set in which no row is left.
    """
    label_columns = list(dict.fromkeys((*settings.classify, *settings.exclude)))
    reader = open_source(settings, label_columns, root, retry_seconds)
    captioned = reader.source.columns.captions
    names_of = {column: Labels(settings, reader, column) for column in label_columns}
    num_captions = num_without = 0
    captions: list[list[str]] = []
    classes: dict[str, list[str]] = {column: [] for column in settings.classify}
    places: list[tuple[int, int]] = []
    for block in range(len(reader.block_rows)):
        table = reader.read(block, images=False)
        texts = table.column("captions").to_pylist()
        labels = {
            column: names_of[column]([next(iter(row), None) for row in texts] if column in captioned else table.column(column).to_pylist()) for column in label_columns
        }
        for row, value in enumerate(texts):
            if any(labels[column][row] in values for column, values in settings.exclude.items()):
                continue
            captions.append(_distinct(value[: settings.captions_per_image]))
            num_captions += len(value[: settings.captions_per_image])
            num_without += not captions[-1]
            places.append((block, row))
            for column, names in classes.items():
                names.append(labels[column][row])
    for column, names in classes.items():
        check_classes(settings, column, names)
    found = Found(len(captions), num_captions, num_without)
    if settings.subset:
        chosen = _subset(settings, np.asarray(places, dtype=np.int64))
        captions, places = [captions[row] for row in chosen], [places[row] for row in chosen]
        classes = {column: [names[row] for row in chosen] for column, names in classes.items()}
    if not captions:
        raise UserError(f"evaluation set {settings.name}: no row is left of {settings.files} after exclude {settings.exclude}; change files or exclude")
    return HeldOutRows(settings, reader, captions, classes, np.asarray(places, dtype=np.int64), found)


def check_size(rows: HeldOutRows, allow_subset: bool = False) -> None:
    """UserError if a set does not hold what it must by ``num_rows`` and ``num_captions``; with ``allow_subset`` only if it holds nothing to measure."""
    settings, found = rows.settings, rows.found
    if settings.chosen_metric == "mean_recall" and settings.metric and found.without_caption == found.rows:
        raise UserError(f"evaluation set {settings.name}: none of its {found.rows} rows has a caption, which {settings.metric} needs; name the caption column in columns.caption")
    if allow_subset:
        return
    for wanted, number, what in ((settings.num_rows, found.rows, "rows"), (settings.num_captions, found.captions, "captions")):
        if wanted is not None and number != wanted:
            raise UserError(f"evaluation set {settings.name}: {number:,} {what} where there must be {wanted:,}; prepare it again, or evaluate what is there with --allow-subset")
    if settings.num_captions is not None and found.without_caption:
        raise UserError(f"evaluation set {settings.name}: {found.without_caption} of {found.rows} rows have no caption; prepare it again, or evaluate the others with --allow-subset")


def checked_set(settings: EvaluationSet, suite: Suite) -> HeldOutRows:
    """``cached_set`` of a suite's set, of the size that it must have."""
    rows = cached_set(settings, suite.root, suite.retry_seconds)
    check_size(rows, suite.allow_subset)
    return rows


def _subset(settings: EvaluationSet, places: np.ndarray) -> list[int]:
    """``settings.subset`` of the rows at these places (block, row in block), ascending: those with the smallest hashes of their row ids, so that a smaller subset is
    part of a larger one. UserError if there are fewer rows."""
    if settings.subset > len(places):
        raise UserError(f"evaluation set {settings.name}: subset {settings.subset} is more than the {len(places)} rows there are; lower it, or take it away for all rows")
    keys = position_keys(SUBSET_SEED, "evaluation subset", pack_row_ids(0, places[:, 0], places[:, 1]))
    return np.sort(np.argsort(keys, kind="stable")[: settings.subset]).tolist()


@functools.lru_cache(maxsize=64)
def _load_cached(settings_json: str, root: str, retry_seconds: float) -> HeldOutRows:
    return load_set(EvaluationSet.model_validate_json(settings_json), root, retry_seconds)


def cached_set(settings: EvaluationSet, root: str, retry_seconds: float = 300) -> HeldOutRows:
    """``load_set``, once per process and setting; and the identity under which its pixels are kept."""
    return _load_cached(settings.model_dump_json(exclude_unset=True), root, retry_seconds)


def _distinct(texts: list[str]) -> list[str]:
    return [text for text in dict.fromkeys(map(text_of, texts)) if text]
