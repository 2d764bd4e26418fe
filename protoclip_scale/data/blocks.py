"""Reading: the blocks of a source, one at a time, by number. The only module that reads through ``datasets``.

Files are listed through fsspec (a local path or any URL), their rows are counted from footers. A block is a parquet row group. It is read by a
one-shard streaming dataset of its own, so no stream has a state that could be wrong after a resume.
"""

import glob
import hashlib
import os
import posixpath
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

NUM_LISTING_THREADS = 16


@dataclass(frozen=True)
class FileBlocks:
    """What a footer says about one file."""

    rows: tuple[int, ...]  # of each block
    bytes: tuple[int, ...]  # of each block: the used columns, decompressed
    columns: pa.Schema  # all columns


@dataclass(frozen=True)
class Format:
    """How a layout of files is scanned and read: one entry of FORMATS."""

    scan: Callable[[Any, tuple[str, ...]], FileBlocks]  # (open file, columns) -> its blocks
    open: Callable[[list[str], tuple[str, ...]], Any]  # (files, columns) -> a streaming dataset with one shard per block


def scan_parquet(file, columns: tuple[str, ...]) -> FileBlocks:
    """Row groups of a parquet file, from its footer."""
    footer = pq.ParquetFile(file)
    groups = [footer.metadata.row_group(number) for number in range(footer.metadata.num_row_groups)]
    parts = range(footer.metadata.num_columns)
    sizes = [
        sum(group.column(part).total_uncompressed_size for part in parts if group.column(part).path_in_schema.split(".")[0] in columns)
        for group in groups
    ]
    return FileBlocks(tuple(group.num_rows for group in groups), tuple(sizes), footer.schema_arrow)


def open_parquet(files: list[str], columns: tuple[str, ...]):
    """A streaming dataset with one shard per row group, in file order."""
    import datasets  # here, because loader processes import this package and never read blocks

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors reach the user as one line of ours
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else every process asks a server, for up to 3 s
    patterns = [glob.escape(file) for file in files]
    return (
        datasets.load_dataset("parquet", data_files=patterns, split="train", streaming=True, columns=list(columns))
        .reshard()
        .with_format("arrow")
    )


FORMATS: dict[str, Format] = {"parquet": Format(scan_parquet, open_parquet)}


def is_url(path: str) -> bool:
    return "://" in path


def join(root: str, pattern: str) -> str:
    """``pattern`` under ``root``; an absolute path or a URL stays what it is."""
    if is_url(pattern) or os.path.isabs(pattern):
        return pattern
    return posixpath.join(root, pattern) if is_url(root) else os.path.normpath(os.path.join(root, pattern))


def list_files(patterns: tuple[str, ...], root: str) -> list[str]:
    """Sorted files that the patterns match, each once; a folder stands for the parquet files in it. UserError if one matches nothing."""
    found: set[str] = set()
    for pattern in patterns:
        place = join(root, pattern)
        filesystem, path = fsspec.core.url_to_fs(place)
        if not path.endswith(".parquet") and not glob.has_magic(path) and filesystem.isdir(path):
            path = posixpath.join(path, "*.parquet")
        plain = not glob.has_magic(path) or filesystem.isfile(path)
        matches = [path] if plain and filesystem.exists(path) else [] if plain else filesystem.glob(path)
        if not matches:
            raise UserError(
                f"no files match {pattern!r} under data.root {root!r}: check the path, set data.root, or prepare the data first"
            )
        found.update(str(filesystem.unstrip_protocol(match)) if is_url(place) else str(match) for match in matches)
    return sorted(found)


class BlockReader:
    """The blocks of one source.

    files: sorted paths or URLs of those with rows. block_rows, block_bytes: int64 [blocks], rows and decompressed bytes of the used columns. fingerprint: hash of file
    names relative to the root, file sizes, rows of the row groups and types of the used columns.
    Raises UserError: no files, a missing or unusable column, a file that is not readable, reads that fail for ``retry_seconds``.
    """

    def __init__(self, source: schema.Source, root: str, retry_seconds: float = 0.0):
        self.source = source
        self.root = root
        self.retry_seconds = retry_seconds
        self.name = source.label
        self.columns = (source.columns.image, source.columns.caption)
        self._format = FORMATS[source.format]
        self._dataset = None
        listed = self._retry(lambda: list_files(source.patterns, root), f"listing {self.name!r}", join(root, source.patterns[0]))
        with ThreadPoolExecutor(NUM_LISTING_THREADS) as pool:
            scanned = list(zip(listed, pool.map(self._scan, listed), strict=True))
        used = [(file, scan) for file, scan in scanned if sum(scan[1].rows)]  # a file without rows may lack types too
        if not used:
            raise UserError(f"the {len(listed)} files of {self.name!r} under {root!r} hold no rows; remove the source or prepare its data")
        self.files, scans = [file for file, _ in used], [scan for _, scan in used]
        self._check_columns([blocks.columns for _, blocks in scans])
        per_file = [len(blocks.rows) for _, blocks in scans]
        self._first_block = np.concatenate([[0], np.cumsum(per_file)]).astype(np.int64)
        self.block_rows = np.array([rows for _, blocks in scans for rows in blocks.rows], dtype=np.int64)
        self.block_bytes = np.array([size for _, blocks in scans for size in blocks.bytes], dtype=np.int64)
        self.fingerprint = self._hash(scans)

    def __getstate__(self):
        return {**self.__dict__, "_dataset": None, "_format": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._format = FORMATS[self.source.format]

    def file_of_block(self, block: int) -> tuple[str, int]:
        """(file, number of the block in it)."""
        file = int(np.searchsorted(self._first_block, block, side="right")) - 1
        return self.files[file], block - int(self._first_block[file])

    def read(self, block: int, columns: tuple[str, ...] | None = None) -> pa.Table:
        """One block as a table of the given columns (default: image and caption), cast to nothing. Costs about 2 ms beside its bytes."""
        columns = columns or self.columns
        file, number = self.file_of_block(block)
        table = self._retry(lambda: self._read(block), f"reading row group {number}", file)
        if table.num_rows != self.block_rows[block]:
            raise UserError(
                f"{file} changed while it was in use: row group {number} has {table.num_rows} rows, not {self.block_rows[block]}; start again"
            )
        return table.select(list(columns))

    def _read(self, block: int) -> pa.Table:
        if self._dataset is None:
            dataset = self._format.open(self.files, self.columns)
            if dataset.num_shards != len(self.block_rows):
                raise UserError(
                    f"the files of {self.name!r} under {self.root!r} changed while they were in use: {dataset.num_shards} blocks, not {len(self.block_rows)}"
                )
            self._dataset = dataset
        shard = self._dataset.shard(num_shards=len(self.block_rows), index=block)
        return pa.concat_tables(list(shard.iter(batch_size=int(self.block_rows[block]))))

    def _scan(self, file: str) -> tuple[int, FileBlocks]:
        def scan() -> tuple[int, FileBlocks]:
            filesystem, path = fsspec.core.url_to_fs(file)
            with filesystem.open(path, "rb") as opened:
                return int(filesystem.size(path)), self._format.scan(opened, self.columns)

        return self._retry(scan, "reading the footer", file)

    def _check_columns(self, schemas: list[pa.Schema]) -> None:
        image, caption = self.columns
        for file, columns in zip(self.files, schemas, strict=True):
            for column, key in ((image, "image"), (caption, "caption")):
                if column not in columns.names:
                    raise UserError(
                        f"{file} has no column {column!r} (columns.{key} of source {self.name!r}); its columns are {', '.join(columns.names)}"
                    )
                if columns.field(column).type != schemas[0].field(column).type:
                    raise UserError(
                        f"column {column!r} is {columns.field(column).type} in {file} but {schemas[0].field(column).type} in {self.files[0]}; list them as two sources"
                    )
        kind = schemas[0].field(image).type
        if pa.types.is_struct(kind):
            kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else kind
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise UserError(
                f"column {image!r} of {self.files[0]} is {kind}; it must hold encoded images, as bytes or a struct with `bytes`"
            )
        kind = schemas[0].field(caption).type
        kind = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else kind
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(
                f"column {caption!r} of {self.files[0]} is {schemas[0].field(caption).type}; it must hold a string or a list of strings"
            )

    def _hash(self, scans: list[tuple[int, FileBlocks]]) -> str:
        digest = hashlib.sha256(self.source.format.encode())
        root = self.root if is_url(self.root) else os.path.abspath(self.root)
        prefix = fsspec.core.url_to_fs(root)[1].rstrip("/") + "/"
        for file, (size, blocks) in zip(self.files, scans, strict=True):
            path = fsspec.core.url_to_fs(file)[1]
            digest.update(f"\n{path.removeprefix(prefix)}|{size}|{blocks.rows}".encode())
        for column in self.columns:
            digest.update(f"\n{column}: {scans[0][1].columns.field(column).type}".encode())
        return digest.hexdigest()

    def _retry(self, action: Callable[[], Any], doing: str, place: str) -> Any:
        """Runs ``action`` until it succeeds; errors that waiting cannot mend, and all after ``retry_seconds``, become a UserError."""
        started, delay = time.monotonic(), 0.5
        while True:
            try:
                return action()
            except (UserError, AssertionError):
                raise
            except Exception as error:
                message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                left = self.retry_seconds - (time.monotonic() - started)
                if not _may_pass(error, place):
                    raise UserError(f"{place}: {doing} failed; the file is missing, unreadable or corrupt: {message}") from error
                if left <= 0:
                    raise UserError(
                        f"{place}: {doing} failed for {self.retry_seconds:g} s (data.retry_seconds); the last error was {message}"
                    ) from error
                time.sleep(min(left, delay * random.uniform(0.5, 1.5)))  # jitter: all ranks fail at the same moment
                delay = min(delay * 2, 30.0)


def _may_pass(error: Exception, place: str) -> bool:
    """Whether waiting may help: anything over a network, and locally only errors of the operating system (Arrow's own OSErrors carry no number)."""
    if is_url(place) and not place.startswith("file://"):
        return True
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, (FileNotFoundError, PermissionError))
