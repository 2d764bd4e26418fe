"""JSON and JSON lines: objects with an image path, captions (a string or a list of strings) and more. A block is 1,000 objects.

jsonl: one object a line. json: an array of objects, as ALBEF and ViCHA write their lists, or an object that has such an array under
``annotations`` or ``data``; further keys of that object are skipped. One pass finds the byte offsets of the blocks, without the file ever
being in memory; reading a block asks for its bytes alone, and for its images in parallel.
"""

import codecs
import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from typing import Any, BinaryIO

import pyarrow as pa

from protoclip_scale.data.sources.cells import assemble, check_names, is_plain, name_of, typed, value_type
from protoclip_scale.data.sources.formats import BLOCK_LINES, CAPTIONS, FileScan, Images, Place, SourceLimits, register
from protoclip_scale.data.sources.image_files import ImageRoot, image_root, refuse_urls
from protoclip_scale.data.sources.lines import CHUNK_BYTES, UTF8_MARK, check_text, hashed_lines, not_utf8
from protoclip_scale.data.sources.ranges import open_forward, read_range
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

ARRAY_KEYS = ("annotations", "data")
MAX_VALUE_BYTES = 64 << 20  # of one object of the array, and of a value that is skipped
NEAR_THE_END = 64  # an error so close to the end of what has been read may only say that the rest is missing
WHITE = " \t\r\n"

Located = tuple[dict[str, Any], int, int]  # an object, its first byte in the file, and the byte after it


class JsonLines:
    """One object a line; blank lines are skipped."""

    def locate(self, file: BinaryIO, digest, place: Place) -> Iterator[Located]:
        """The objects of a file."""
        end = 0
        for number, line in enumerate(hashed_lines(file, digest, place), 1):
            start, end = end, end + len(line)
            if start == 0 and line.startswith(UTF8_MARK):
                start, line = len(UTF8_MARK), line[len(UTF8_MARK) :]
            if line.isspace() or not line:
                continue
            try:
                value = json.loads(line.decode())
            except UnicodeDecodeError:
                raise not_utf8(place, f"line {number}") from None
            except (ValueError, RecursionError) as error:
                if number == 1 and line.lstrip().startswith(b"[") or line.strip() in (b"{", b"["):
                    raise UserError(f"{place.url} is not JSON lines: its first line is {line[:40]!r}; set format: json") from None
                raise UserError(f"{place.url}: line {number} is not valid JSON: {error}") from None
            if isinstance(value, list) and number == 1:
                raise UserError(f"{place.url} is not JSON lines but an array; set format: json")
            yield _an_object(value, f"line {number}", place), start, end

    def parse(self, data: bytes) -> list[dict[str, Any]]:
        """The objects of a block."""
        return [json.loads(line) for line in data.decode().split("\n") if line.strip()]


class JsonArray:
    """An array of objects, or an object with one."""

    def locate(self, file: BinaryIO, digest, place: Place) -> Iterator[Located]:
        """The objects of a file."""
        text = _Text(file, digest, place)
        if text.peek() == "{":
            _enter_object(text, place)
        if text.peek() != "[":
            raise UserError(f"{place.url} must hold an array of objects, or an object that has one under {' or '.join(ARRAY_KEYS)}")
        text.take("[")
        if text.peek() != "]":
            while True:
                text.peek()
                start = text.position
                value = text.value()
                yield _an_object(value, f"the value at byte {start}", place), start, text.position
                if text.peek() == "]":
                    break
                text.take(",")
        text.take("]")
        text.drain()

    def parse(self, data: bytes) -> list[dict[str, Any]]:
        """The objects of a block, which ends with a comma unless it is the last one."""
        return json.loads(f"[{data.decode().rstrip(WHITE).removesuffix(',')}]")


class _Text:
    """JSON values of a file one after the other. The text is decoded as Latin-1, so that characters are bytes and positions are the file's;
    JSON's own characters are ASCII, and values with others are decoded once more."""

    def __init__(self, file: BinaryIO, digest, place: Place):
        self._file = file
        self._digest = digest
        self._place = place
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decode = json.JSONDecoder().raw_decode
        self._text, self._at, self._base = "", 0, 0
        if self._more() and self._text.startswith(UTF8_MARK.decode("latin-1")):
            self._at = len(UTF8_MARK)

    @property
    def position(self) -> int:
        """The byte that comes next."""
        return self._base + self._at

    def peek(self) -> str:
        """The next character that is not white space; '' at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in WHITE:
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Steps over a character that must come next."""
        found = self.peek()
        if found != character:
            what = f"{found!r} stands" if found else "the file ends"
            raise UserError(f"{self._place.url} is not valid JSON: at byte {self.position} {what} where {character!r} is expected")
        self._at += 1

    def value(self) -> Any:
        """The next value."""
        self.peek()
        while True:
            try:
                value, end = self._decode(self._text, self._at)
                if end < len(self._text) or not self._more():  # a number may go on
                    written, self._at = self._text[self._at : end], end
                    return value if written.isascii() else json.loads(written.encode("latin-1"))
                continue
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._text) - NEAR_THE_END
                if not cut or not self._more():
                    raise UserError(f"{self._place.url} is not valid JSON at byte {self._base + error.pos}: {error.msg}") from None
            except RecursionError:
                raise UserError(f"{self._place.url}: the value at byte {self.position} is nested too deeply") from None
            if len(self._text) - self._at > MAX_VALUE_BYTES:
                raise UserError(
                    f"{self._place.url}: the value at byte {self.position} is longer than {MAX_VALUE_BYTES >> 20} MB; put the array of rows first, or write JSON lines"
                )

    def drain(self) -> None:
        """Reads the rest of the file, for the hash."""
        self._at = len(self._text)
        while self._more():
            self._at = len(self._text)

    def _more(self) -> bool:
        chunk = self._file.read(
            max(CHUNK_BYTES, len(self._text) - self._at)
        )  # twice as much each time, or long values would be read n times
        check_text(chunk, self._base == 0 and not self._text, self._place)
        self._digest.update(chunk)
        try:
            self._utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            raise not_utf8(self._place, f"the text after byte {self._base + len(self._text)}") from None
        self._base += self._at
        self._text, self._at = self._text[self._at :] + chunk.decode("latin-1"), 0
        return bool(chunk)


def _enter_object(text: _Text, place: Place) -> None:
    """Steps to the array under one of ARRAY_KEYS."""
    keys = []
    text.take("{")
    while text.peek() == '"':
        keys.append(text.value())
        text.take(":")
        if keys[-1] in ARRAY_KEYS and text.peek() == "[":
            return
        text.value()
        if text.peek() == ",":
            text.take(",")
    text.take("}")
    if text.peek() == "{":
        raise UserError(f"{place.url} holds one object after the other, not an array; set format: jsonl")
    raise UserError(f"{place.url} is an object without an array under {' or '.join(ARRAY_KEYS)}; its keys are {', '.join(keys[:50])}")


def _an_object(value: Any, what: str, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place.url}: {what} is {name_of(value)}; every row must be an object with the columns as keys")
    return value


class JsonTable:
    """See ``formats.Format``. Column types of a file: string for the image, list<string> for captions; for extra columns what their values
    are, null if all are. Columns that are not used have the type null."""

    block_noun = "block of objects"
    images_apart = True
    cacheable = True
    text_cells = False

    def __init__(self, suffix: str, layout: JsonLines | JsonArray):
        self.suffixes = (suffix,)
        self._layout = layout

    def scan(self, place: Place, source: schema.Source, limits: SourceLimits) -> FileScan:
        """One pass over the file; the digest is the hash of its bytes. A million objects take about 5 s."""
        digest, rows, offsets, some_images = hashlib.sha256(), [], [], []
        present: dict[str, None] = {}
        types = dict.fromkeys(source.columns.extra, pa.null())
        with open_forward(place) as file:
            located = self._layout.locate(file, digest, place)
            while block := list(islice(located, BLOCK_LINES)):
                offsets.append(block[0][1])
                values = [value for value, _, _ in block]
                for value in values:
                    if not value.keys() <= present.keys():
                        present |= dict.fromkeys(value)
                images = [_image(value, source, place) for value in values]
                refuse_urls(images, place, source)
                some_images.append(images[0])
                for value in values:
                    _captions(value, source, place)
                for name in types:
                    types[name] = _merged([value.get(name) for value in values], types[name], name, place)
                rows.append(len(block))
                end = block[-1][2]
        if rows:
            offsets.append(end)
            check_names(list(present), place, source)
        mean = image_root(place, source).mean_size(some_images)
        sizes = [last - first + count * mean for first, last, count in zip(offsets[:-1], offsets[1:], rows, strict=True)]
        used = {source.columns.image: pa.string()} | dict.fromkeys(source.columns.captions, CAPTIONS) | types
        columns = pa.schema([(name, used.get(name, pa.null())) for name in present])
        return FileScan(tuple(rows), tuple(sizes), columns, digest.hexdigest()[:32], tuple(offsets))

    def check(self, scan: FileScan, place: Place, source: schema.Source) -> None:
        """All used columns are there, at least in one row."""
        check_names(scan.columns.names, place, source)

    def read(self, place: Place, scan: FileScan, block: int, source: schema.Source, images: Images, limits: SourceLimits) -> pa.Table:
        """One request for the text, and one for each image."""
        return self.read_rows(place, scan, block, source, images, limits, image_root(place, source))

    def read_rows(
        self, place: Place, scan: FileScan, block: int, source: schema.Source, images: Images, limits: SourceLimits, root: ImageRoot
    ) -> pa.Table:
        """``read`` with images from another place."""
        start, end = scan.offsets[block : block + 2]
        try:
            values = self._layout.parse(read_range(place, start, end))
            names = [_image(value, source, place) for value in values]
            captions = [_captions(value, source, place) for value in values]
            extras = {name: typed([value.get(name) for value in values], scan.columns.field(name).type) for name in source.columns.extra}
        except (ValueError, AttributeError, pa.ArrowException) as error:  # what the scan has let pass
            if isinstance(error, UserError):
                raise
            raise UserError(f"{place.url} changed while it was in use: {' '.join(str(error).split())}; start the run again") from error
        return assemble(source, names, captions, extras, root, images, limits)


def _image(row: dict[str, Any], source: schema.Source, place: Place) -> str | None:
    name = row.get(source.columns.image)
    if name is not None and not isinstance(name, str):
        raise UserError(f"{place.url}: column {source.columns.image!r} holds {name_of(name)}; it must hold the path of an image file")
    return name or None


def _captions(row: dict[str, Any], source: schema.Source, place: Place) -> list[str]:
    captions: list[str] = []
    for name in source.columns.captions:
        value = row.get(name)
        values = value if isinstance(value, list) else [value]
        for caption in values:
            if isinstance(caption, str):
                captions.append(caption)
            elif caption is not None:
                raise UserError(f"{place.url}: column {name!r} holds {name_of(caption)}; it must hold a string or a list of strings")
    return captions


def _merged(values: list[Any], known: pa.DataType, name: str, place: Place) -> pa.DataType:
    kind = value_type(values, known)
    if kind is None:
        kinds = sorted({name_of(value) for value in values if value is not None})
        raise UserError(
            f"{place.url}: the values of column {name!r} have no common type: {known} so far, then {', '.join(kinds)}; write them alike, or leave it out of columns.extra"
        )
    if not is_plain(kind):
        raise UserError(
            f"{place.url}: column {name!r} holds objects or nested lists; columns.extra takes strings, numbers, truth values and lists of them"
        )
    return kind


register("json", JsonTable(".json", JsonArray()))
register("jsonl", JsonTable(".jsonl", JsonLines()))
