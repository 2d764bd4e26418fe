"""Held-out sets: which rows count, their captions and class names; image bytes are read block by block when needed."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import ValidationError

from protoclip_scale.data.captions import clean_caption
from protoclip_scale.data.sources import BlockReader
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

    def image_bytes(self, rows: Sequence[int]) -> list[bytes]:
        """The encoded images of rows in ascending order; None stands as b"". Reads each block that they touch once."""
        places = self.places[np.asarray(rows, dtype=np.int64)]
        images: list[bytes] = []
        for block in dict.fromkeys(places[:, 0].tolist()):
            column = self.reader.read(block).column("image")
            images += [column[row].as_py() or b"" for row in places[places[:, 0] == block, 1].tolist()]
        return images


def load_set(settings: EvaluationSet, root: str, retry_seconds: float = 300) -> HeldOutRows:
    """Read a set's captions and class names (not its images).

    Several captions of a row all count, each distinct text once. Raises UserError for missing files and columns, and for a
    set in which no row is left.
    """
    label_columns = list(dict.fromkeys((*settings.classify, *settings.exclude)))
    reader = _open(settings, label_columns, root, retry_seconds)
    captions: list[list[str]] = []
    classes: dict[str, list[str]] = {column: [] for column in settings.classify}
    places: list[tuple[int, int]] = []
    for block in range(len(reader.block_rows)):
        table = reader.read(block, images=False)
        texts = table.column("captions").to_pylist()
        labels = {
            column: [_text(next(iter(row), None)) for row in texts] if column == settings.columns.caption else [_text(value) for value in table.column(column).to_pylist()]
            for column in label_columns
        }
        for row, value in enumerate(texts):
            if any(labels[column][row] in values for column, values in settings.exclude.items()):
                continue
            captions.append(_distinct(value))
            places.append((block, row))
            for column, names in classes.items():
                names.append(labels[column][row])
    if not captions:
        raise UserError(f"evaluation set {settings.name}: no row is left of {settings.files} after exclude {settings.exclude}; change files or exclude")
    return HeldOutRows(settings, reader, captions, classes, np.asarray(places, dtype=np.int64))


def _open(settings: EvaluationSet, label_columns: list[str], root: str, retry_seconds: float) -> BlockReader:
    """The set's reader, which brings the label columns with each row (but for a caption column that is a label, too)."""
    extra = tuple(column for column in label_columns if column != settings.columns.caption)
    columns = {"image": settings.columns.image, "caption": settings.columns.caption, "extra": extra}
    try:
        source = Source(files=settings.files, format="parquet", columns=columns, name=settings.name)
    except ValidationError as error:
        reason = str(error.errors()[0]["msg"]).removeprefix("Value error, data.sources ").removeprefix(f"{settings.name}: ")
        raise UserError(f"evaluation set {settings.name} (classify or exclude): {reason}") from error
    try:
        return BlockReader(source, root, retry_seconds)
    except UserError as error:
        raise UserError(str(error).replace("columns.extra of source", "classify or exclude of evaluation set")) from error


@functools.lru_cache(maxsize=64)
def _load_cached(settings_json: str, root: str, retry_seconds: float) -> HeldOutRows:
    return load_set(EvaluationSet.model_validate_json(settings_json), root, retry_seconds)


def cached_set(settings: EvaluationSet, root: str, retry_seconds: float = 300) -> HeldOutRows:
    """``load_set``, once per process and setting; and the identity under which its pixels are kept."""
    return _load_cached(settings.model_dump_json(), root, retry_seconds)


def _text(value) -> str:
    return "" if value is None else clean_caption(str(value))


def _distinct(texts: list[str]) -> list[str]:
    return [text for text in dict.fromkeys(map(_text, texts)) if text]
