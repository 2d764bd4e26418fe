"""What a layout of files must answer to be read as a source, and the registry of those that do.

A format is one object in a module of its own that calls ``register``; the package imports the modules, so FORMATS is full for whoever reads it.
"""

from dataclasses import dataclass
from typing import Protocol

import fsspec
import pyarrow as pa

from protoclip_scale.recipe import schema

BLOCK_LINES = 1000  # rows of a block where the layout has no blocks of its own: tables, JSON, folders
ROWS_AT_ONCE, BYTES_AT_ONCE = 256, 64_000_000  # how much is held of images that are files of their own
CAPTIONS = pa.list_(pa.string())  # type of the column `captions` that every read returns
IMAGE = pa.large_binary()  # type of the column `image`


Images = bool | frozenset[int]  # of all rows, of none, or of these rows of the block


@dataclass(frozen=True)
class SourceLimits:
    """What a source may not exceed. max_bytes: of one encoded image. max_members: of one tar shard."""

    max_bytes: int = schema.Data.model_fields["max_bytes"].default
    max_members: int = schema.Data.model_fields["max_members"].default


@dataclass(frozen=True)
class Place:
    """One file; for the format folder, one folder."""

    url: str  # what messages say
    filesystem: fsspec.AbstractFileSystem
    path: str  # in the filesystem
    relative: str  # under data.root, for fingerprints; the url if it does not lie under it
    size: int | None = None  # bytes, as listed
    stamp: str = ""  # modification time or ETag, as listed; empty if there is none


@dataclass(frozen=True)
class FileScan:
    """What one look at a file says about it; kept in the cache of scans."""

    rows: tuple[int, ...]  # of each block
    bytes: tuple[int, ...]  # of each block: the used columns decompressed, images that tables name included; an estimate will do
    columns: pa.Schema  # all columns and their types; for tar the members' suffixes
    digest: str  # changes when the content changes, as far as can be known cheaply
    offsets: tuple[int, ...] = ()  # line formats: byte offset of each block, and the end
    names: pa.Array | None = None  # folder without metadata: file names in order


class Format(Protocol):
    """How one layout is scanned and read. Formats know nothing of retries: whatever a filesystem raises goes to the reader, which tries again.
    They ask ``source`` for columns and settings, never for its ``format``, which is hub for a dataset of the Hub."""

    suffixes: tuple[str, ...]  # of the files taken when a pattern names a folder; empty if a place is itself a folder
    block_noun: str  # what messages call a block: 'row group', 'shard', 'lines'
    images_apart: bool  # images are files of their own: ``read`` opens only those of the rows that ``images`` names
    cacheable: bool  # whether size and time of a place tell that its scan still holds
    text_cells: bool  # extra columns are cast from text: one that is a number in some files only is a string in all

    def scan(self, place: Place, source: schema.Source, limits: SourceLimits) -> FileScan:
        """Blocks, columns and digest of one file. UserError for content that no retry mends."""

    def check(self, scan: FileScan, place: Place, source: schema.Source) -> None:
        """UserError if a column is missing or unusable, naming those that are there."""

    def read(self, place: Place, scan: FileScan, block: int, source: schema.Source, images: Images, limits: SourceLimits) -> pa.Table:
        """One block: ``image`` large_binary (left out without ``images``; null or empty where the file of an image is missing or, with ``images_apart``,
        not wanted), ``captions``
        list<string> (all caption columns in one list, nulls left out), then each of ``source.columns.extra`` under its own name. The file's row order,
        ``scan.rows[block]`` rows."""


FORMATS: dict[str, Format] = {}


def register(name: str, layout: Format) -> None:
    """Enter a format under the name that ``data.sources.format`` gives it."""
    assert name not in FORMATS, f"format {name} is registered twice"
    FORMATS[name] = layout
