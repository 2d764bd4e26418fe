"""Folders of images in Hugging Face's imagefolder layout. A block is 1,000 rows.

With one file ``metadata.csv``, ``metadata.jsonl`` or ``metadata.parquet`` in the folder: its rows, images at ``file_name`` under the
folder. Without: every image in the folder and the folders in it, sorted by path, with the text of the ``.txt`` of the same stem beside it;
no such file, no caption.

Hidden files and folders are skipped. Symbolic links to folders are not followed, and images that lie outside the folder, by a link or by
``..``, do not count: in metadata they are bad rows, else they are skipped.
"""

import hashlib
import os
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from protoclip_scale.data.sources.cells import assemble, check_extra, check_names
from protoclip_scale.data.sources.columns import captions_column, extra_column, is_caption, is_text
from protoclip_scale.data.sources.filesystems import without_query
from protoclip_scale.data.sources.formats import BLOCK_LINES, FileScan, Images, Place, SourceLimits, register
from protoclip_scale.data.sources.image_files import IMAGE_SUFFIXES, ImageRoot, refuse_urls, within
from protoclip_scale.data.sources.json_tables import JsonLines, JsonTable
from protoclip_scale.data.sources.ranges import is_local, open_forward
from protoclip_scale.data.sources.tables import Table
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

MAX_TEXT_BYTES = 1 << 20  # of a .txt
FILE_NAME, TEXT = schema.FORMAT_COLUMNS["folder"]  # the columns of a folder without metadata
FOLDER = "folder"  # a further one: the name of the folder that an image lies in, which is its class in many collections


class ParquetMetadata:
    """metadata.parquet: blocks are parts of row groups, so that one holds no more than BLOCK_LINES images."""

    def scan(self, place: Place, source: schema.Source, limits: SourceLimits) -> FileScan:
        """From the footer and the column of file names; the digest is the hash of the footer and these."""
        with open_forward(place) as opened, _parquet(opened, place) as file:
            names = file.schema_arrow.names
            check_names(names, place, source)
            digest = hashlib.sha256(str(file.schema_arrow.remove_metadata()).encode())
            rows, starts, some_images = [], [0], []
            for number in range(file.metadata.num_row_groups):
                images = file.read_row_group(number, columns=[source.columns.image]).column(0)
                for first in range(0, len(images), BLOCK_LINES):
                    block = _image_names(images.slice(first, BLOCK_LINES), place, source)
                    digest.update("\n".join(name or "" for name in block).encode())
                    rows.append(len(block))
                    starts.append(starts[-1] + len(block))
                    some_images.append(block[0])
            columns = file.schema_arrow.remove_metadata()
        mean = ImageRoot(place.filesystem, posixpath.dirname(place.path), confined=True).mean_size(some_images)
        return FileScan(tuple(rows), tuple(count * mean for count in rows), columns, digest.hexdigest()[:32], tuple(starts))

    def check(self, scan: FileScan, place: Place, source: schema.Source) -> None:
        """All used columns are there; captions are strings or lists of them."""
        check_names(scan.columns.names, place, source)
        for name in source.columns.captions:
            kind = scan.columns.field(name).type
            if not is_caption(kind):
                raise UserError(f"column {name!r} of {place.url} is {kind}; it must hold a string or a list of strings")
        check_extra(scan.columns, place, source)

    def read_rows(
        self, place: Place, scan: FileScan, block: int, source: schema.Source, images: Images, limits: SourceLimits, root: ImageRoot
    ) -> pa.Table:
        """Decodes the used columns of the row group that holds the block: with row groups of a million rows, about a second a block."""
        first, used = scan.offsets[block], (source.columns.image, *source.columns.captions, *source.columns.extra)
        with open_forward(place) as opened, _parquet(opened, place) as file:
            for number in range(file.metadata.num_row_groups):
                count = file.metadata.row_group(number).num_rows
                if first < count:
                    break
                first -= count
            else:
                raise UserError(f"{place.url} changed while it was in use: it has fewer rows; start the run again")
            table = file.read_row_group(number, columns=list(used)).slice(first, scan.rows[block])
        captions = captions_column([table.column(name) for name in source.columns.captions], table.num_rows)
        extras = {name: extra_column(table.column(name)) for name in source.columns.extra}
        return assemble(source, _image_names(table.column(source.columns.image), place, source), captions, extras, root, images, limits)


def _parquet(opened, place: Place) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(opened)
    except pa.ArrowException as error:
        raise UserError(f"{place.url} is no parquet file, or is corrupt: {' '.join(str(error).split())}") from error


def _image_names(column: pa.ChunkedArray, place: Place, source: schema.Source) -> list[str | None]:
    if not is_text(column.type):
        raise UserError(f"column {source.columns.image!r} of {place.url} is {column.type}; it must hold the paths of image files")
    names = column.to_pylist()
    refuse_urls(names, place, source)
    return names


METADATA: dict[str, Any] = {
    "metadata.csv": Table(".csv", ","),
    "metadata.jsonl": JsonTable(".jsonl", JsonLines()),
    "metadata.parquet": ParquetMetadata(),
}


@dataclass(frozen=True)
class Found:
    """A file of a folder."""

    name: str  # path in the folder
    size: int | None  # None where the listing does not tell


class Folder:
    """See ``formats.Format``. FileScan.names holds the images of a folder without metadata, in order; of one with metadata, which has
    offsets, the name of that file."""

    suffixes = ()
    block_noun = "block of files"
    images_apart = True
    cacheable = False  # the time of a folder does not change with the files in the folders in it
    text_cells = False

    def scan(self, place: Place, source: schema.Source, limits: SourceLimits) -> FileScan:
        """With metadata, what scanning it costs; without, a listing with sizes: 10 microseconds a file on a local disk, some requests
        remotely. The digest without metadata is made from names and sizes: a file that changes and keeps its size is not noticed."""
        metadata = self._metadata(place)
        if metadata is not None:
            inner = _inside(place, metadata)
            scan = METADATA[metadata].scan(inner, source, limits)
            return replace(scan, names=pa.array([metadata], pa.string()))
        files = sorted(_walk(place), key=lambda found: found.name)
        texts = {found.name: found.size for found in files if found.name.endswith(".txt")}
        images = [found for found in files if _suffix(found.name) in IMAGE_SUFFIXES]
        odd = next((found.name for found in images if not _is_utf8(found.name)), None)
        if odd is not None:
            raise UserError(f"{place.url}: the file name {ascii(odd)} is not UTF-8; rename it")
        if not images:
            raise UserError(f"{place.url} holds no images and no {', '.join(METADATA)}; links to places outside of it do not count")
        if source.columns.captions and not any(_text_of(found.name) in texts for found in images):
            raise UserError(
                f"{place.url} holds {len(images)} images but no captions: neither {', '.join(METADATA)} nor a .txt beside an image"
            )
        digest = hashlib.sha256("\n".join(f"{found.name}|{found.size}|{texts.get(_text_of(found.name))}" for found in images).encode())
        blocks = [images[first : first + BLOCK_LINES] for first in range(0, len(images), BLOCK_LINES)]
        unknown = any(found.size is None for found in images)
        mean = ImageRoot(place.filesystem, place.path).mean_size([found.name for found in images]) if unknown else 0
        return FileScan(
            tuple(len(block) for block in blocks),
            tuple(
                sum((mean if found.size is None else found.size) + (texts.get(_text_of(found.name)) or 0) for found in block)
                for block in blocks
            ),
            pa.schema([(FILE_NAME, pa.string()), (TEXT, pa.string()), (FOLDER, pa.string())]),
            digest.hexdigest()[:32],
            names=pa.array([found.name for found in images], pa.string()),
        )

    def check(self, scan: FileScan, place: Place, source: schema.Source) -> None:
        """All used columns are there; without metadata these are file_name, text and folder."""
        if scan.offsets:
            metadata = scan.names[0].as_py()
            METADATA[metadata].check(scan, _inside(place, metadata), source)
        else:
            check_names(scan.columns.names, place, source, f": a folder without {', '.join(METADATA)} has no others")

    def read(self, place: Place, scan: FileScan, block: int, source: schema.Source, images: Images, limits: SourceLimits) -> pa.Table:
        """1,000 files read in parallel, or 2,000 with texts."""
        root = ImageRoot(place.filesystem, place.path, confined=True)
        if scan.offsets:
            metadata = scan.names[0].as_py()
            return METADATA[metadata].read_rows(_inside(place, metadata), scan, block, source, images, limits, root)
        first = sum(scan.rows[:block])
        names = scan.names.slice(first, scan.rows[block]).to_pylist()
        root = replace(root, confined=False)  # the scan has seen to it
        texts = root.read([_text_of(name) for name in names], MAX_TEXT_BYTES) if source.columns.captions else [None] * len(names)
        extras = {FOLDER: pa.array([posixpath.basename(posixpath.dirname(name)) for name in names], pa.string())}
        captions = [[] if text is None else [text.decode("utf-8-sig", "replace")] for text in texts]
        return assemble(source, names, captions, extras, root, images, limits)

    def _metadata(self, place: Place) -> str | None:
        """The metadata file in the folder, or None."""
        present = sorted(METADATA.keys() & set(_top_level(place)))
        if len(present) > 1:
            raise UserError(f"{place.url} holds {' and '.join(present)}; keep one")
        return present[0] if present else None


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1][1:].lower()


def _text_of(name: str) -> str:
    return posixpath.splitext(name)[0] + ".txt"


def _inside(place: Place, name: str) -> Place:
    """A file of the folder as a place of its own."""
    relative = posixpath.join(place.relative, name)
    return Place(posixpath.join(place.url, name), place.filesystem, posixpath.join(without_query(place.path), name), relative)


def _top_level(place: Place) -> Sequence[str]:
    if is_local(place.filesystem):
        return os.listdir(place.path)
    return [posixpath.basename(without_query(path)) for path in place.filesystem.ls(place.path, detail=False)]


def _walk(place: Place) -> Iterator[Found]:
    """The files of a folder and the folders in it, without hidden ones and those that links show outside."""
    if is_local(place.filesystem):
        for folder, folders, _ in os.walk(place.path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            prefix = os.path.relpath(folder, place.path)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or (entry.is_symlink() and not within(place.path, entry.path)) or not entry.is_file():
                        continue
                    yield Found(entry.name if prefix == "." else f"{prefix}/{entry.name}", entry.stat().st_size)
        return
    base = place.path.rstrip("/") + "/"
    for path, entry in place.filesystem.find(place.path, detail=True).items():
        name = path.removeprefix(base)
        if not any(part.startswith(".") for part in name.split("/")):
            yield Found(name, entry.get("size"))


register("folder", Folder())
