"""CSV and TSV: a table of image paths and captions, as open_clip and ProtoCLIP read it. A block is 1,000 rows.

Records are what pandas.read_csv takes for them (tests/test_data_sources_tables.py compares them): quotes count at the start of a field, and
stand for themselves inside one; a quoted field may hold line ends; lines end with LF, CRLF or CR; blank lines are skipped; short records
are filled up. But a cell is the text that stands there: NA, null and 007 stay strings, an empty cell is null, and a record with more cells
than the header is an error instead of an index. One pass over the file finds the byte offsets of the blocks; reading one asks for its bytes
alone, and for its images in parallel.
"""

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from itertools import islice

import pyarrow as pa

from protoclip_scale.data.sources.cells import assemble, check_names, text_cells, text_type
from protoclip_scale.data.sources.formats import BLOCK_LINES, FileScan, Images, Place, SourceLimits, register
from protoclip_scale.data.sources.image_files import ImageRoot, image_root, refuse_urls
from protoclip_scale.data.sources.lines import UTF8_MARK, hashed_lines, not_utf8
from protoclip_scale.data.sources.ranges import open_forward, read_range
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

END = "\0"  # fed after the last line: it stands alone unless a quote was never closed. check_text lets no other in
PIECES = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")


class Feed:
    """Lines as text for csv.reader, which takes one only when it needs it: ``position`` is the number of bytes of all lines taken."""

    def __init__(self, lines: Iterable[bytes], place: Place, position: int = 0):
        self._lines = lines
        self._place = place
        self.position = position
        self.number = 0  # of the last line
        self.ended = False

    def __iter__(self) -> Iterator[str]:
        for line in self._lines:
            self.number += 1
            if self.position == 0 and line.startswith(UTF8_MARK):
                self.position, line = len(UTF8_MARK), line[len(UTF8_MARK) :]
            simple = b"\r" not in line or (line.endswith(b"\r\n") and line.find(b"\r") == len(line) - 2)
            try:
                for piece in (line,) if simple else PIECES.findall(line):
                    self.position += len(piece)
                    text = piece.decode()
                    yield text if text[-1] in "\r\n" else text + "\n"  # or a quote that is the last byte of the file would look closed
            except UnicodeDecodeError:
                raise not_utf8(self._place, f"line {self.number}") from None
        self.ended = True
        yield END


class Records:
    """The records of lines: lists of ``width`` strings."""

    def __init__(self, lines: Iterable[bytes], separator: str, place: Place, position: int = 0):
        self.feed = Feed(lines, place, position)
        self._reader = csv.reader(self.feed, delimiter=separator)
        self._place = place

    def first(self) -> list[str]:
        """The next record that is not blank, whatever its width; [] at the end."""
        row = next((row for row in self._rows() if not is_blank(row)), [])
        self._check_end(row)
        return [] if row == [END] else row

    def of_width(self, width: int) -> Iterator[list[str]]:
        """The rest. UserError for a record with more cells, and for a quote that is never closed."""
        row = [END]
        for row in self._rows():
            if len(row) != width:
                if is_blank(row) or row == [END]:
                    continue
                if any(row[width:]):
                    raise UserError(
                        f"{self._place.url}: the record that ends on line {self.feed.number} has {len(row)} cells, not {width}; "
                        "quote cells that hold the separator, or name a last column in the header"
                    )
                row = row[:width] + [""] * (width - len(row))
            yield row
        self._check_end(row)

    def _rows(self) -> Iterator[list[str]]:
        try:
            yield from self._reader
        except csv.Error as error:
            raise UserError(
                f"{self._place.url}: the record on line {self.feed.number} cannot be read ({error}); is a quote never closed?"
            ) from None

    def _check_end(self, row: list[str]) -> None:
        if self.feed.ended and row != [END]:
            raise UserError(
                f"{self._place.url}: a quote is opened and never closed; write a quote at the start of a cell twice, inside quotes"
            )


def is_blank(row: list[str]) -> bool:
    """Whether a record is a line of nothing but spaces and tabs."""
    return not row or (len(row) == 1 and not row[0].strip(" \t"))


def unique(names: list[str]) -> list[str]:
    """Column names as pandas makes them: a second a is a.1, an empty one is Unnamed."""
    result: list[str] = []
    for number, name in enumerate(names):
        name = plain = name or f"Unnamed: {number}"
        copy = 0
        while name in result:
            copy += 1
            name = f"{plain}.{copy}"
        result.append(name)
    return result


class Table:
    """See ``formats.Format``. Column types of a file: string for image and captions; for extra columns int64 or double if every cell is
    such a number, null if all are empty, else string. Columns that are not used have the type null."""

    block_noun = "block of lines"
    images_apart = True
    cacheable = True
    text_cells = True

    def __init__(self, suffix: str, separator: str):
        self.suffixes = (suffix,)
        self._separator = separator

    def scan(self, place: Place, source: schema.Source, limits: SourceLimits) -> FileScan:
        """One pass over the file; the digest is the hash of its bytes. A million lines take about 2 s."""
        digest = hashlib.sha256()
        with open_forward(place) as file:
            records = Records(hashed_lines(file, digest, place), source.separator or self._separator, place)
            names = unique(list(source.header) if source.header is not None else records.first())
            if not names:
                raise UserError(f"{place.url} is empty; it must hold a line with the columns' names, and one line a row")
            self._check(names, place, source)
            return self._scan(records, names, digest, place, source)

    def _scan(self, records: Records, names: list[str], digest, place: Place, source: schema.Source) -> FileScan:
        image, extras = names.index(source.columns.image), {name: names.index(name) for name in source.columns.extra}
        types = dict.fromkeys(extras, pa.null())
        rows, offsets, some_images = [], [records.feed.position], []
        stream = records.of_width(len(names))
        while block := list(islice(stream, BLOCK_LINES)):
            rows.append(len(block))
            offsets.append(records.feed.position)
            images = [row[image] for row in block]
            refuse_urls(images, place, source)
            some_images.append(images[0])
            for name, number in extras.items():
                types[name] = text_type([row[number] for row in block], types[name])
        mean = image_root(place, source).mean_size(some_images)
        sizes = [end - start + count * mean for start, end, count in zip(offsets[:-1], offsets[1:], rows, strict=True)]
        used = dict.fromkeys((source.columns.image, *source.columns.captions), pa.string()) | types
        columns = pa.schema([(name, used.get(name, pa.null())) for name in names])
        return FileScan(tuple(rows), tuple(sizes), columns, digest.hexdigest()[:32], tuple(offsets) if rows else ())

    def check(self, scan: FileScan, place: Place, source: schema.Source) -> None:
        """All used columns are there."""
        self._check(scan.columns.names, place, source)

    def _check(self, names: list[str], place: Place, source: schema.Source) -> None:
        separator = source.separator or self._separator
        other = next((other for other in "\t,;|" if other != separator and other in names[0]), None) if len(names) == 1 else None
        check_names(names, place, source, f"; set separator: {other!r}" if other else "")

    def read(self, place: Place, scan: FileScan, block: int, source: schema.Source, images: Images, limits: SourceLimits) -> pa.Table:
        """One request for the lines, and one for each image."""
        return self.read_rows(place, scan, block, source, images, limits, image_root(place, source))

    def read_rows(
        self, place: Place, scan: FileScan, block: int, source: schema.Source, images: Images, limits: SourceLimits, root: ImageRoot
    ) -> pa.Table:
        """``read`` with images from another place."""
        start, end = scan.offsets[block : block + 2]
        lines = io.BytesIO(read_range(place, start, end))
        names = scan.columns.names
        rows = list(Records(lines, source.separator or self._separator, place, position=start).of_width(len(names)))
        captions = [names.index(name) for name in source.columns.captions]
        extras = {}
        for name in source.columns.extra:
            number = names.index(name)
            kind = scan.columns.field(name).type
            cells = text_cells([row[number] for row in rows])
            extras[name] = pa.nulls(len(rows)) if pa.types.is_null(kind) else cells.cast(kind)
        image = names.index(source.columns.image)
        return assemble(
            source,
            [row[image] or None for row in rows],
            [[row[number] for number in captions if row[number]] for row in rows],
            extras,
            root,
            images,
            limits,
        )


register("csv", Table(".csv", ","))
register("tsv", Table(".tsv", "\t"))
