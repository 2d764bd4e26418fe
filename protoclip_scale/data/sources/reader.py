"""BlockReader: source, block -> table. One per source; it lists the files, knows the rows of every block, and reads any block by its number."""

import functools
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from protoclip_scale import standing
from protoclip_scale.data.sources import fingerprint, hub, scans
from protoclip_scale.data.sources.cells import merged_text_type, merged_type
from protoclip_scale.data.sources.columns import extra_type
from protoclip_scale.data.sources.filesystems import full_url, is_remote, join, open_filesystem, shown, shown_pattern
from protoclip_scale.data.sources.formats import (
    BYTES_AT_ONCE,
    CAPTIONS,
    FORMATS,
    IMAGE,
    ROWS_AT_ONCE,
    FileScan,
    Images,
    Place,
    SourceLimits,
)
from protoclip_scale.data.sources.listing import in_threads, list_places
from protoclip_scale.data.sources.retry import retry
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

SAVE_SECONDS = 60.0  # between two writings of the cache while files are scanned


class BlockReader:
    """The blocks of one source.

    files: URLs of the files with rows, sorted by their path under the root. block_rows, block_bytes: int64 [blocks], rows and about how many
    decompressed bytes of the used columns. extra_types: types of the extra columns as ``read`` returns them. fingerprint: changes with the content of the
    files, the order and the size of their blocks, and the columns of image and captions; not with the place. layout: the format of the files; commit: of a
    Hub dataset, else None.

    Opening lists the files and scans those that no earlier run has scanned (see ``scans``). Raises UserError: no files, a missing or unusable column, a
    file that is not readable, or remote reads that fail for ``retry_seconds``.
    """

    cancelled: threading.Event  # while it is set, reads raise ``retry.Cancelled`` instead of waiting for a server

    def __init__(self, source: schema.Source, root: str, retry_seconds: float = 0.0, limits: SourceLimits = SourceLimits()):  # noqa: B008 (frozen)
        self.image_root = source.image_root  # as the recipe says it, whatever the root
        if source.image_root is not None:
            source = source.model_copy(update={"image_root": join(root, source.image_root)})
        self.source = source
        self.root = root
        self.retry_seconds = retry_seconds
        self.limits = limits
        self.cancelled = threading.Event()
        self.name = source.name or source.hub or ", ".join(shown_pattern(pattern, root) for pattern in source.patterns)
        patterns, self.layout, self.commit = source.patterns, source.format, None
        if source.hub is not None:
            patterns, root, self.layout, self.commit = hub.resolve(source, self._retry)
        layout = FORMATS[self.layout]
        places = list_places(patterns, root, layout.suffixes, self._retry)
        scanned = self._scan(places)
        used = [(place, scan) for place, scan in zip(places, scanned, strict=True) if sum(scan.rows)]  # a file without rows may lack types too
        if not used:
            raise UserError(f"the {len(places)} files of {self.name!r} under {shown(root)!r} hold no rows; remove the source or prepare its data")
        self.places, self.scans = [place for place, _ in used], [scan for _, scan in used]
        self.column_types = self._check_columns()
        if layout.text_cells:
            self._widen_scans()
        self._count()
        columns = {name: str(kind) for name, kind in self.column_types.items() if name not in source.columns.extra}
        self.fingerprint = fingerprint.fingerprint(source, self.image_root, self.layout, self.places, self.scans, columns)

    def __getstate__(self) -> dict[str, Any]:
        """Small enough to be broadcast: 1,540 files of 10 blocks are 150 kB."""
        places = [(full_url(place), place.relative, place.size, place.stamp) for place in self.places]
        made_again = ("places", "scans", "block_rows", "block_bytes", "_first_block", "cancelled")
        state = {name: value for name, value in self.__dict__.items() if name not in made_again}
        return state | {"places": places, "scans": scans.to_bytes(scans.pack(self.scans))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.cancelled = threading.Event()
        self.places = [_place_again(*facts) for facts in state["places"]]
        self.scans = scans.unpack(scans.from_bytes(state["scans"]))
        self._count()

    def cancel(self) -> None:
        """From any thread: reads that wait to try again raise ``retry.Cancelled`` at once, and so do later ones, until ``resume``. A request under way
        goes on until it is answered or times out."""
        self.cancelled.set()

    def resume(self) -> None:
        """Reads work again after ``cancel``."""
        self.cancelled.clear()

    @property
    def files(self) -> list[str]:
        return [place.url for place in self.places]

    @property
    def extra_types(self) -> dict[str, pa.DataType]:
        return {name: extra_type(self.column_types[name]) for name in self.source.columns.extra}

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Of the tables that ``read`` returns."""
        return pa.schema([("image", IMAGE), ("captions", CAPTIONS), *self.extra_types.items()])

    def file_of_block(self, block: int) -> tuple[str, int]:
        """(file, number of the block in it)."""
        file, number = self._find(block)
        return self.places[file].url, number

    def rows_at_once(self, block: int) -> int | None:
        """How many rows of a block to ask for at once, so that no more than some 64 MB of images are held; None where images lie in the block itself,
        which is then read as a whole."""
        if not FORMATS[self.layout].images_apart:
            return None
        size = int(self.block_bytes[block]) // max(1, int(self.block_rows[block]))
        return max(8, min(ROWS_AT_ONCE, BYTES_AT_ONCE // max(1, size)))

    def read(self, block: int, images: Images = True) -> pa.Table:
        """One block: ``image`` large_binary (missing without ``images``, and then not read either; null in rows that ``images`` does not name, if they are
        files of their own), ``captions`` list<string>, and the extra columns, in the file's row order. Costs what the format's ``read`` says. Raises
        ``retry.Cancelled`` after ``cancel``."""
        file, number = self._find(block)
        place, layout = self.places[file], FORMATS[self.layout]
        table = self._retry(
            lambda: layout.read(place, self.scans[file], number, self.source, images, self.limits),
            f"reading {layout.block_noun} {number}",
            place.url,
        )
        if table.num_rows != self.block_rows[block]:
            raise UserError(
                f"{place.url} changed while it was in use: {layout.block_noun} {number} has {table.num_rows} rows, not {self.block_rows[block]}; start the run again"
            )
        expected = self.schema if images else self.schema.remove(0)
        if self.source.columns.extra:
            table = table.cast(expected)  # a file may have a column that is empty in it, or whole numbers where others have fractions
        assert table.schema.equals(expected), f"format {self.layout} returned {table.schema}, not {expected}"
        return table

    def class_names(self, column: str) -> tuple[str, ...]:
        """The names that the numbers of a column stand for, where the files say so and all say the same; else (). UserError if they contradict each other."""
        layout = FORMATS[self.layout]
        if not pa.types.is_integer(self.column_types.get(column, pa.null())) or not hasattr(layout, "class_names"):
            return ()
        told = {place.url: self._retry(lambda place=place: layout.class_names(place, column), "reading the class names", place.url) for place in self.places}
        different = {names: url for url, names in told.items()}
        if len(different) > 1:
            raise UserError(f"column {column!r}: {' and '.join(list(different.values())[:2])} give its numbers different names; list them as two sets")
        return next(iter(different))

    def _find(self, block: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._first_block, block, side="right")) - 1
        return file, block - int(self._first_block[file])

    def _count(self) -> None:
        per_file = [len(scan.rows) for scan in self.scans]
        self._first_block = np.concatenate([[0], np.cumsum(per_file)]).astype(np.int64)
        self.block_rows = np.array([rows for scan in self.scans for rows in scan.rows], dtype=np.int64)
        self.block_bytes = np.array([size for scan in self.scans for size in scan.bytes], dtype=np.int64)

    def _scan(self, places: list[Place]) -> list[FileScan]:
        """A scan of each file, from the cache or made now; what is made is kept even if another file fails or the process is stopped."""
        layout = FORMATS[self.layout]
        cache = scans.ScanCache(self.source, self.root, self.limits)
        known = cache.load() if layout.cacheable else {}
        made: dict[str, FileScan] = {}
        saving, saved = threading.Lock(), time.monotonic()

        def done() -> list[tuple[Place, FileScan]]:
            now = dict(made)  # other threads add to it
            found = ((place, now.get(place.path) or known.get(scans.key_of(place))) for place in places)
            return [(place, scan) for place, scan in found if scan is not None]

        def scan(place: Place) -> None:
            nonlocal saved
            made[place.path] = self._retry(lambda: layout.scan(place, self.source, self.limits), "looking through the file", place.url)
            standing.got_on()
            with saving:
                if layout.cacheable and time.monotonic() - saved > SAVE_SECONDS:
                    cache.save(done())
                    saved = time.monotonic()

        try:
            in_threads(scan, [place for place in places if scans.key_of(place) not in known])
        finally:
            if made and layout.cacheable:
                cache.save(done())
        return [scan for _, scan in done()]

    def _check_columns(self) -> dict[str, pa.DataType]:
        """Types of the used columns, which are the same in all files; a column that is empty in a whole file has the type that it has in the others.
        Types that are read as the same one (string and large_string) are the same; cells of text have the type that holds those of all files."""
        merge = merged_text_type if FORMATS[self.layout].text_cells else _merged_as_read
        names = (self.source.columns.image, *self.source.columns.captions, *self.source.columns.extra)
        told_by: dict[str, str] = {}
        checked: dict[pa.Schema, None] = {}
        types: dict[str, pa.DataType] = {}
        for place, scan in zip(self.places, self.scans, strict=True):
            if scan.columns in checked:
                continue
            checked[scan.columns] = None
            FORMATS[self.layout].check(scan, place, self.source)
            for name in names:
                if name not in scan.columns.names:
                    continue
                kind = scan.columns.field(name).type
                merged = merge(types.get(name, pa.null()), kind)
                if merged is None:
                    raise UserError(f"column {name!r} is {kind} in {place.url} but {types[name]} in {told_by[name]}; list them as two sources")
                if types.get(name) != merged:
                    types[name], told_by[name] = merged, place.url
        return {name: pa.string() if pa.types.is_null(kind) else kind for name, kind in types.items()}

    def _widen_scans(self) -> None:
        """Gives the files' extra columns the types of the source, so that ``read`` casts their text to these, and not to a file's own first."""
        widened: dict[pa.Schema, pa.Schema] = {}
        for columns in {scan.columns: None for scan in self.scans}:
            fields = [(name, self.column_types[name] if name in self.source.columns.extra else columns.field(name).type) for name in columns.names]
            widened[columns] = pa.schema(fields)
        self.scans = [replace(scan, columns=widened[scan.columns]) for scan in self.scans]

    def _retry(self, action: Callable[[], Any], doing: str, place: str) -> Any:
        return retry(action, self.retry_seconds, doing, place, is_remote(place) or is_remote(self.source.image_root or ""), self.cancelled)


def _merged_as_read(one: pa.DataType, other: pa.DataType) -> pa.DataType | None:
    """The type of both; if they differ, that of what is read from them."""
    merged = merged_type(one, other)
    return merged_type(extra_type(one), extra_type(other)) if merged is None else merged


def _place_again(url: str, relative: str, size: int | None, stamp: str) -> Place:
    filesystem, path = open_filesystem(url)
    return Place(shown(url), filesystem, path, relative, size, stamp)
