"""The rows of all sources in one order that does not change: source after source, block after block. Row n is a name for good."""

import os
import posixpath
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from protoclip_scale.data.sources.formats import FORMATS
from protoclip_scale.data.sources.reader import BlockReader
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

ROWS_AT_ONCE = 64  # turned into Python values together


class InputRow(NamedTuple):
    number: int
    key: str
    image: bytes | None
    captions: list[str]
    extra: dict[str, Any]


class InputRows:
    """Rows of readers, by number. Keeps the last block it read, since neighbouring shards share one."""

    def __init__(self, readers: Sequence[BlockReader], limit: int | None = None):
        self.readers = list(readers)
        sizes = np.concatenate([reader.block_rows for reader in readers])
        self._blocks = [(source, block) for source, reader in enumerate(readers) for block in range(len(reader.block_rows))]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self.num_rows = int(min(self._starts[-1], limit or self._starts[-1]))
        self.largest_block = int(sizes.max())
        self.extra = _common_extra(self.readers)
        self._prefix = _common_folder([file for reader in readers for file in reader.files])
        self._held: tuple[int, pa.Table] | None = None
        self._names: tuple[int, list[str | None]] | None = None

    def __getstate__(self):
        return {**self.__dict__, "_held": None, "_names": None}

    @property
    def bytes_per_row(self) -> float:
        """About how many encoded bytes a row holds."""
        return sum(float(reader.block_bytes.sum()) for reader in self.readers) / max(1, int(self._starts[-1]))

    def rows(self, numbers: range) -> Iterator[InputRow]:
        """Rows with these numbers, in order. Memory: the one block they lie in, or some of its images if these are files. A missing image is None."""
        at = numbers.start
        while at < numbers.stop:
            block = self._block_of(at)
            first = at - int(self._starts[block])
            last = min(numbers.stop, int(self._starts[block + 1])) - int(self._starts[block])
            source, number = self._blocks[block]
            at_once = self.readers[source].rows_at_once(number)
            for start in range(first, last, at_once or ROWS_AT_ONCE):
                some = range(start, min(start + (at_once or ROWS_AT_ONCE), last))
                for row in self._table(block, some if at_once else None).slice(some.start, len(some)).to_pylist():
                    image, captions = row.pop("image"), row.pop("captions") or []
                    yield InputRow(at, self.key(at), image, captions, row)
                    at += 1

    def _table(self, block: int, rows: range | None) -> pa.Table:
        """A block with the images of some rows, or, where they lie in the block itself, as a whole."""
        source, number = self._blocks[block]
        if rows is not None:
            return self.readers[source].read(number, images=frozenset(rows))
        if self._held is None or self._held[0] != block:
            self._held = None  # two blocks at once would double the peak
            self._held = block, self.readers[source].read(number)
        return self._held[1]

    def key(self, number: int) -> str:
        """Where a row comes from: its file, without the folder that all share, and its place there counted from 0."""
        block = self._block_of(number)
        source, in_source = self._blocks[block]
        file, in_file = self.readers[source].file_of_block(in_source)
        return f"{file.removeprefix(self._prefix)}#{number - int(self._starts[block - in_file])}"

    def image_name(self, number: int) -> str | None:
        """What a table or folder calls the image of a row; None where images have no names. Reads the row's block of a table once more, without its images."""
        block = self._block_of(number)
        if self._names is None or self._names[0] != block:
            self._names = block, self._names_of(block)
        return self._names[1][number - int(self._starts[block])]

    def _names_of(self, block: int) -> list[str | None]:
        source, in_source = self._blocks[block]
        reader = self.readers[source]
        file, in_file = reader.file_of_block(in_source)
        place = reader.files.index(file)
        scan, num_rows = reader.scans[place], int(reader.block_rows[in_source])
        if reader.layout == "folder" and not scan.offsets:
            return scan.names.slice(sum(scan.rows[:in_file]), num_rows).to_pylist()
        if reader.layout not in (*schema.TABLES, "folder"):
            return [None] * num_rows
        columns = schema.SourceColumns(image=reader.source.columns.image, caption=reader.source.columns.image)  # the paths are read as texts
        table = FORMATS[reader.layout].read(reader.places[place], scan, in_file, reader.source.model_copy(update={"columns": columns}), False, reader.limits)
        return [names[0] if names else None for names in table.column("captions").to_pylist()]

    def _block_of(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1


def _common_folder(files: list[str]) -> str:
    common = os.path.commonprefix([posixpath.dirname(file) + "/" for file in files])
    return common[: common.rfind("/") + 1]


def _common_extra(readers: list[BlockReader]) -> pa.Schema:
    """The extra columns, which all sources must have alike."""
    first = readers[0]
    for reader in readers[1:]:
        if reader.extra_types != first.extra_types:
            raise UserError(
                f"the extra columns of {reader.name} are {_shown(reader)}, those of {first.name} are {_shown(first)}; shards hold one set of columns: prepare the sources one by one"
            )
    for name in ("caption", "image"):
        if name in first.extra_types:
            raise UserError(f"--extra {name} would stand beside the shards' own column {name}; rename the column, or leave it out")
    return pa.schema(list(first.extra_types.items()))


def _shown(reader: BlockReader) -> str:
    return ", ".join(f"{name} {kind}" for name, kind in reader.extra_types.items()) or "none"
