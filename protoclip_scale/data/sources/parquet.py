"""Parquet: a block is a row group; what a file holds is known from its footer alone."""

import collections
import hashlib
import json
import threading

import pyarrow as pa
import pyarrow.parquet as pq

from protoclip_scale.data.sources import streaming
from protoclip_scale.data.sources.cells import check_extra
from protoclip_scale.data.sources.columns import captions_column, extra_column, image_column, is_caption, is_image
from protoclip_scale.data.sources.formats import FileScan, Images, Place, SourceLimits, register
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

TAIL = 1 << 16  # bytes read from the end of a file at once; footers of shards with some hundred row groups fit
OPENED = 1024  # opened files that are kept, 25 kB each: lanes jump between the files of an episode


class Parquet:
    """See ``formats.Format``."""

    suffixes = (".parquet",)
    block_noun = "row group"
    images_apart = False
    cacheable = True
    text_cells = False

    def __init__(self):
        self._opened: collections.OrderedDict[tuple, object] = collections.OrderedDict()
        self._lock = threading.Lock()  # the next episode is fetched in a thread

    def scan(self, place: Place, source: schema.Source, limits: SourceLimits) -> FileScan:
        """From the footer: one request, a second one if the footer is larger than 64 kB. The digest is the hash of the footer's bytes, which hold
        offsets, sizes and statistics of all columns."""
        footer = read_footer(place)
        try:
            file = pq.ParquetFile(pa.BufferReader(footer))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{place.url} is no parquet file, or is corrupt: {' '.join(str(error).split())}") from error
        metadata, used = file.metadata, used_columns(source)
        rows, sizes = [], []
        if metadata.num_row_groups:
            first = metadata.row_group(0)
            parts = [part for part in range(metadata.num_columns) if first.column(part).path_in_schema.split(".")[0] in used]
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                rows.append(group.num_rows)
                sizes.append(sum(group.column(part).total_uncompressed_size for part in parts))
        return FileScan(tuple(rows), tuple(sizes), file.schema_arrow.remove_metadata(), hashlib.sha256(footer).hexdigest()[:32])

    def check(self, scan: FileScan, place: Place, source: schema.Source) -> None:
        """All used columns are there; image and captions have types that can be read."""
        columns = source.columns
        uses = [(columns.image, "image"), *((name, "caption") for name in columns.captions), *((name, "extra") for name in columns.extra)]
        for name, key in uses:
            if name not in scan.columns.names:
                raise UserError(
                    f"{place.url} has no column {name!r} (columns.{key} of source {source.label!r}); its columns are {', '.join(scan.columns.names)}"
                )
        kind = scan.columns.field(columns.image).type
        if not is_image(kind):
            raise UserError(f"column {columns.image!r} of {place.url} is {kind}; it must hold encoded images: bytes, or a struct with `bytes`")
        for name in columns.captions:
            kind = scan.columns.field(name).type
            if not is_caption(kind):
                raise UserError(f"column {name!r} of {place.url} is {kind}; it must hold a string or a list of strings")
        check_extra(scan.columns, place, source)

    def class_names(self, place: Place, column: str) -> tuple[str, ...]:
        """The names that the numbers of a column stand for, as `datasets` writes them into a file (ClassLabel); () if it does not say. Costs a footer."""
        about = pq.ParquetFile(pa.BufferReader(read_footer(place))).schema_arrow.metadata or {}
        try:
            feature = json.loads(about.get(b"huggingface", b"{}"))["info"]["features"][column]
            return tuple(map(str, feature["names"])) if feature["_type"] == "ClassLabel" else ()
        except (ValueError, KeyError, TypeError):  # no such facts, or of another form
            return ()

    def read(self, place: Place, scan: FileScan, block: int, source: schema.Source, images: Images, limits: SourceLimits) -> pa.Table:
        """One row group through a one-shard streaming dataset; the image column is not read without ``images``. Local: 2 ms beside its bytes, 4 more
        for the first block of a file. Remote: the size, the footer, and one request for each 32 MB of neighbouring columns; the first block of a file
        asks for size and footer twice."""
        names = [name for name in used_columns(source) if images or name != source.columns.image]
        dataset = self._open(place, pa.schema([scan.columns.field(name) for name in names]))
        if dataset.num_shards != len(scan.rows):
            self._forget(place)
            raise UserError(
                f"{place.url} changed while it was in use: it has {dataset.num_shards} row groups, not {len(scan.rows)}; start the run again"
            )
        table = streaming.read_block(dataset, block, scan.rows[block])
        columns = {"image": image_column(table.column(source.columns.image))} if images else {}
        columns["captions"] = captions_column([table.column(name) for name in source.columns.captions], table.num_rows)
        return pa.table(columns | {name: extra_column(table.column(name)) for name in source.columns.extra})

    def _open(self, place: Place, columns: pa.Schema):
        key = (place.url, place.path, place.size, place.stamp, tuple(columns.names))
        with self._lock:
            if key in self._opened:
                self._opened.move_to_end(key)
                return self._opened[key]
        dataset = streaming.open_blocks("parquet", place, columns)
        with self._lock:
            self._opened[key] = dataset
            while len(self._opened) > OPENED:
                self._opened.popitem(last=False)
        return dataset

    def _forget(self, place: Place) -> None:
        with self._lock:
            for key in [key for key in self._opened if key[:2] == (place.url, place.path)]:
                del self._opened[key]


def used_columns(source: schema.Source) -> tuple[str, ...]:
    return (source.columns.image, *source.columns.captions, *source.columns.extra)


def read_footer(place: Place) -> bytes:
    """The bytes of a parquet footer, its length and magic number included. UserError if the file ends otherwise, or the server ignores ranges."""
    size = place.filesystem.size(place.path) if place.size is None else place.size
    if size is None:
        raise UserError(f"{place.url}: the server does not tell the file's size; parquet needs one that answers range requests")
    tail = _end_of(place, size, min(size, TAIL))
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if tail[-4:] != b"PAR1" or length > size:
        raise UserError(f"{place.url} is no parquet file, or is cut off or corrupt: it does not end with a footer")
    return tail[-length:] if length <= len(tail) else _end_of(place, size, length)


def _end_of(place: Place, size: int, length: int) -> bytes:
    data = place.filesystem.cat_file(place.path, start=size - length, end=size)
    if len(data) > length:
        raise UserError(f"{place.url}: the server ignores range requests, which parquet needs; use another server, or download the file")
    if len(data) < length:
        raise OSError(f"{len(data)} of {length} bytes came")
    return data


register("parquet", Parquet())
