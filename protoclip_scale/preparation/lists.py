"""Lists of URLs with captions: the layouts that are known, and how their lines become rows.

conceptual_captions: ``Train_GCC-training.tsv``, caption TAB url without a header.
yfcc15m_declip: DeCLIP's ``yfcc15m_clean_open_data.json`` (15,388,848 lines), one JSON object a line with caption, filename and url.
yfcc15m_openai: ``yfcc100m_subset_data.tsv`` (14,829,396 lines: line number, photo id, photo hash), joined by photo id with the metadata
of the YFCC100M dataset, which hold titles, descriptions and URLs. The two YFCC lists share only 6,642,077 photos.
csv, tsv: any table whose columns the user names.
"""

import bz2
import contextlib
import csv
import gzip
import html
import json
import lzma
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import unquote_plus

import numpy as np

from protoclip_scale.data.captions import clean_caption
from protoclip_scale.data.randomness import raw_keys
from protoclip_scale.errors import UserError

OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
NO_TEXT = "no text"
BAD_LINE = "line does not fit the layout"
LINES_AT_ONCE = 10_000

# Columns of the YFCC100M metadata, counted from their end, which is the same with and without (line number, ..., hash) in front.
MARKER, LICENSE, DOWNLOAD_URL, PAGE, DESCRIPTION, TITLE = -1, -7, -9, -10, -16, -17
PHOTO_ID_DIGITS = 18  # fewer than int64 has
PHOTO_ID = {25: 1, 23: 0}  # number of columns -> where the photo id stands
PHOTO = "0"  # marker of photos; videos have 1

_TAG = re.compile(r"<!--.*?-->|</?[a-zA-Z][^<>]*>", re.DOTALL)
_ADDRESS = re.compile(r"http\S+|www\S+")


class Row(NamedTuple):
    """One line of a list. ``extra``: values of the columns that ride along."""

    url: str
    captions: tuple[str, ...]
    extra: tuple[str, ...] = ()


@dataclass(frozen=True)
class ListOptions:
    """How a list is read; what a layout does not use must be left alone.

    text: which of a photo's two texts become captions: title, description, both (in this order) or random (one of those that are not
    empty, fixed by the photo's id). metadata: the YFCC100M files. remove_addresses: cut http... and www... out of the texts, as SLIP did.
    The rest: columns of tables.
    """

    text: str = "both"
    metadata: tuple[str, ...] = ()
    remove_addresses: bool = False
    url_column: str = "url"
    caption_columns: tuple[str, ...] = ("caption",)
    keep_columns: tuple[str, ...] = ()
    header: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """``rows(path, options, dropped)`` yields the rows and counts the lines it leaves out by reason. ``options``: the ListOptions in use.
    ``extra``: columns beside url and captions, before those the user names."""

    rows: Callable[[Path, ListOptions, Counter], Iterator[Row]]
    options: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    def extra_columns(self, options: ListOptions) -> tuple[str, ...]:
        return (*self.extra, *options.keep_columns)


def read_rows(path: Path, layout: str, options: ListOptions, dropped: Counter) -> Iterator[Row]:
    """Rows of a list in its order, those without a caption left out and counted in ``dropped``. UserError: no file, an unused option."""
    reader, default = LAYOUTS[layout], ListOptions()
    for option in fields(ListOptions):
        if getattr(options, option.name) != getattr(default, option.name) and option.name not in reader.options:
            raise UserError(f"--{option.name.replace('_', '-')} has no effect with --list {layout}; leave it out")
    for file in (path, *map(Path, options.metadata)):
        if not file.is_file():
            raise UserError(f"{file} is not a file; give the list's path, and with yfcc15m_openai the metadata's")
    for row in reader.rows(path, options, dropped):
        captions = tuple(dict.fromkeys(caption for caption in row.captions if caption))
        if not all(map(_is_utf8, (row.url, *row.extra))):  # JSON may name half a character; captions are cleaned of such
            dropped[BAD_LINE] += 1
        elif captions:
            yield row._replace(captions=captions)
        else:
            dropped[NO_TEXT] += 1


def describe_options(layout: str, options: ListOptions) -> dict[str, object]:
    """The options a layout uses as plain values; files by their names."""
    return {name: _plain(value) for name, value in asdict(options).items() if name in LAYOUTS[layout].options}


@contextlib.contextmanager
def open_list(path: Path, mode: str = "rt") -> Iterator[IO]:
    """A list's content, decompressed if it ends in .gz, .bz2 or .xz. Text is UTF-8 with or without its mark, undecodable bytes replaced, lines end at \\n alone.

    UserError, also while it is read: a file that is cut short, damaged, or may not be read.
    """
    text = {"encoding": "utf-8-sig", "errors": "replace", "newline": "\n"} if "t" in mode else {}
    try:
        with OPENERS.get(path.suffix, open)(path, mode, **text) as file:
            yield file
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}); it may be cut short or damaged: fetch it again") from None


def clean_web_text(text: str, remove_addresses: bool = False) -> str:
    """A title or description of YFCC100M as text: '+' and %xx decoded, HTML tags removed, entities decoded, white space made single."""
    text = html.unescape(_TAG.sub(" ", unquote_plus(text)))
    return clean_caption(_ADDRESS.sub(" ", text) if remove_addresses else text)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: object) -> object:
    return [Path(part).name for part in value] if isinstance(value, tuple) else value


def _conceptual_captions(path: Path, options: ListOptions, dropped: Counter) -> Iterator[Row]:
    with open_list(path) as lines:
        for line in lines:
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) == 2:
                yield Row(cells[1].strip(), (clean_caption(cells[0]),))
            else:
                dropped[BAD_LINE] += 1


def _declip(path: Path, options: ListOptions, dropped: Counter) -> Iterator[Row]:
    with open_list(path) as lines:
        for line in lines:
            try:
                found = json.loads(line)
                caption, url, name = found["caption"], found["url"], found.get("filename", "")
                captions = [caption] if isinstance(caption, str) else caption
                yield Row(url.strip(), tuple(map(clean_caption, captions)), (str(name),))
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                dropped[BAD_LINE] += 1


def _openai(path: Path, options: ListOptions, dropped: Counter) -> Iterator[Row]:
    """One pass over the metadata, in their order; memory is 8 bytes a line of the list."""
    if not options.metadata:
        raise UserError(
            "--list yfcc15m_openai holds only numbers: give the files of the YFCC100M metadata (yfcc100m_dataset) with --metadata"
        )
    choose = TEXTS.get(options.text)
    if choose is None:
        raise UserError(f"--text {options.text} is unknown; choose one of {', '.join(TEXTS)}")
    wanted = _photo_ids(path, dropped)
    found = 0
    for ids, lines in _metadata_lines(options.metadata, dropped):
        places = np.minimum(np.searchsorted(wanted, ids), len(wanted) - 1)
        for number in np.flatnonzero(wanted[places] == ids):
            cells = lines[number].rstrip("\r\n").split("\t")
            found += 1
            if len(cells) not in PHOTO_ID:
                dropped[BAD_LINE] += 1
            elif cells[MARKER] != PHOTO:
                dropped["not a photo"] += 1
            else:
                texts = [clean_web_text(cells[column], options.remove_addresses) for column in (TITLE, DESCRIPTION)]
                yield Row(cells[DOWNLOAD_URL], choose(*texts, int(ids[number])), (str(ids[number]), cells[PAGE], cells[LICENSE]))
    dropped["photo is not in the metadata"] += len(wanted) - found


def _photo_ids(path: Path, dropped: Counter) -> np.ndarray:
    """int64, sorted, each once."""
    ids = []
    with open_list(path) as lines:
        while batch := list(islice(lines, LINES_AT_ONCE)):
            cells = [line.split("\t") for line in batch]
            numbers = [int(row[1]) for row in cells if len(row) == 3 and _is_photo_id(row[1])]
            dropped[BAD_LINE] += len(batch) - len(numbers)
            ids.append(np.array(numbers, dtype=np.int64))
    every = np.concatenate([*ids, np.empty(0, np.int64)])
    unique = np.unique(every)
    dropped["photo stands twice in the list"] += len(every) - len(unique)
    if not len(unique):
        raise UserError(f"{path}: no line reads as line number, photo id, photo hash; --list yfcc15m_openai wants yfcc100m_subset_data.tsv")
    return unique


def _is_photo_id(cell: str) -> bool:
    return cell.isdecimal() and len(cell) <= PHOTO_ID_DIGITS


def _metadata_lines(files: Iterable[str], dropped: Counter) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Batches of lines with their photo ids."""
    for file in files:
        with open_list(Path(file)) as lines:
            column = None
            while batch := list(islice(lines, LINES_AT_ONCE)):
                if column is None:
                    columns = batch[0].count("\t") + 1
                    if columns not in PHOTO_ID:
                        raise UserError(
                            f"--metadata {file}: {columns} columns where the YFCC100M dataset has 25 (or 23); give yfcc100m_dataset"
                        )
                    column = PHOTO_ID[columns]
                cells = [line.split("\t", column + 1)[: column + 1][-1] for line in batch]
                yield np.array([int(cell) if _is_photo_id(cell) else -1 for cell in cells], dtype=np.int64), batch


def _random_text(title: str, description: str, photo_id: int) -> tuple[str, ...]:
    texts = [text for text in (title, description) if text]
    return (texts[int(raw_keys(1, 0, "title or description", photo_id)[0] % np.uint64(len(texts)))],) if texts else ()


TEXTS: dict[str, Callable[[str, str, int], tuple[str, ...]]] = {
    "title": lambda title, description, photo_id: (title,),
    "description": lambda title, description, photo_id: (description,),
    "both": lambda title, description, photo_id: (title, description),
    "random": _random_text,
}


def _table(delimiter: str, quoting: int) -> Callable[[Path, ListOptions, Counter], Iterator[Row]]:
    def rows(path: Path, options: ListOptions, dropped: Counter) -> Iterator[Row]:
        with open_list(path) as lines:
            table = csv.reader(lines, delimiter=delimiter, quoting=quoting)
            header = list(options.header) or next(table, [])
            names = (options.url_column, *options.caption_columns, *options.keep_columns)
            for name in names:
                if name not in header:
                    raise UserError(
                        f"{path} has no column {name}; it has {', '.join(header) or 'none'}. Name them, or give --header if no line names them"
                    )
            url, *others = map(header.index, names)
            captions, extra = others[: len(options.caption_columns)], others[len(options.caption_columns) :]
            for cells in _without_errors(table, dropped):
                if len(cells) == len(header):
                    yield Row(
                        cells[url].strip(),
                        tuple(clean_caption(cells[column]) for column in captions),
                        tuple(cells[column] for column in extra),
                    )
                else:
                    dropped[BAD_LINE] += 1

    return rows


def _without_errors(table: Iterator[list[str]], dropped: Counter) -> Iterator[list[str]]:
    while True:
        try:
            yield next(table)
        except StopIteration:
            return
        except csv.Error:
            dropped[BAD_LINE] += 1


_TABLE_OPTIONS = ("url_column", "caption_columns", "keep_columns", "header")
LAYOUTS = {
    "conceptual_captions": Layout(_conceptual_captions),
    "yfcc15m_declip": Layout(_declip, extra=("filename",)),
    "yfcc15m_openai": Layout(_openai, ("text", "metadata", "remove_addresses"), extra=("photo_id", "page", "license")),
    "csv": Layout(_table(",", csv.QUOTE_MINIMAL), _TABLE_OPTIONS),
    "tsv": Layout(_table("\t", csv.QUOTE_NONE), _TABLE_OPTIONS),
}
