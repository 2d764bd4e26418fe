"""Held-out sets: which rows count, their captions and class names; image bytes are read block by block when needed."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field

import fsspec
import numpy as np
import pyarrow.parquet as pq

from protoclip_scale.data.blocks import BlockReader
from protoclip_scale.data.captions import clean_caption
from protoclip_scale.errors import UserError
from protoclip_scale.recipe.schema import EvaluationSet, Source


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

    def __len__(self) -> int:
        return len(self.captions)

    def image_bytes(self, rows: range) -> list[bytes]:
        """The encoded images of these rows, in their order; None stands as b"". Reads each block that they touch once."""
        places = self.places[rows.start : rows.stop]
        images: list[bytes] = []
        for block in dict.fromkeys(places[:, 0].tolist()):
            column = self.reader.read(block, [self.settings.columns.image]).column(self.settings.columns.image)
            for row in places[places[:, 0] == block, 1].tolist():
                value = column[row].as_py()
                images.append((value.get("bytes") if isinstance(value, dict) else value) or b"")
        return images


def load_set(settings: EvaluationSet, root: str, retry_seconds: float = 300) -> HeldOutRows:
    """Read a set's captions and class names (not its images).

    Several captions of a row all count, each distinct text once. Raises UserError for missing files and columns, and for a
    set in which no row is left.
    """
    source = Source(files=settings.files, columns=settings.columns.model_dump(), name=settings.name)
    reader = BlockReader(source, root, retry_seconds)
    label_columns = list(dict.fromkeys((*settings.classify, *settings.exclude)))
    captions: list[list[str]] = []
    classes: dict[str, list[str]] = {column: [] for column in settings.classify}
    places: list[tuple[int, int]] = []
    for block, table in enumerate(_texts_by_block(reader, settings, label_columns)):
        labels = {column: [_text(value) for value in table.column(column).to_pylist()] for column in label_columns}
        for row, value in enumerate(table.column(settings.columns.caption).to_pylist()):
            if any(labels[column][row] in values for column, values in settings.exclude.items()):
                continue
            captions.append(_distinct(value))
            places.append((block, row))
            for column, names in classes.items():
                names.append(labels[column][row])
    if not captions:
        raise UserError(f"evaluation set {settings.name}: no row is left of {settings.files} after exclude {settings.exclude}; change files or exclude")
    return HeldOutRows(settings, reader, captions, classes, np.asarray(places, dtype=np.int64))


def _texts_by_block(reader: BlockReader, settings: EvaluationSet, label_columns: list[str]) -> Iterator:
    """The caption and label columns of each row group, in the order of the reader's blocks."""
    for file in reader.files:
        with fsspec.open(file, "rb") as opened:
            parquet = pq.ParquetFile(opened)
            for column in label_columns:
                if column not in parquet.schema_arrow.names:
                    raise UserError(
                        f"evaluation set {settings.name}: {file} has no column {column!r} (classify or exclude); its columns are {', '.join(parquet.schema_arrow.names)}"
                    )
            for group in range(parquet.metadata.num_row_groups):
                yield parquet.read_row_group(group, columns=list(dict.fromkeys((settings.columns.caption, *label_columns))))


@functools.lru_cache(maxsize=64)
def _load_cached(settings_json: str, root: str, retry_seconds: float) -> HeldOutRows:
    return load_set(EvaluationSet.model_validate_json(settings_json), root, retry_seconds)


def cached_set(settings: EvaluationSet, root: str, retry_seconds: float = 300) -> HeldOutRows:
    """``load_set``, once per process and setting; and the identity under which its pixels are kept."""
    return _load_cached(settings.model_dump_json(), root, retry_seconds)


def _text(value) -> str:
    return "" if value is None else clean_caption(str(value))


def _distinct(value) -> list[str]:
    texts = value if isinstance(value, list) else [value]
    return [text for text in dict.fromkeys(map(_text, texts)) if text]
