"""CSV and TSV: records are those of pandas.read_csv, cell by cell, whatever the quotes; images come from beside the table or from image_root."""

import errno
import io
import os
import pickle
import re

import aiohttp
import fsspec
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from protoclip_scale.data.sources import FORMATS, BlockReader, SourceLimits, image_files, ranges, tables
from protoclip_scale.data.sources.tables import Records
from protoclip_scale.errors import UserError
from tests.source_cases import place_of, read_all, refused, scan_of, source_of
from tests.test_data_sources_listing import answer as error_of

HEADER = b"filepath,title,note\n"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_LINES", 3)


def write(folder, content: bytes, name="table.csv"):
    (folder / name).write_bytes(content)
    return folder / name


def cells_of(path, separator=",", **settings) -> list[list[str]]:
    """All cells, block by block, each from its own range of bytes."""
    scan = scan_of(path, "csv", separator=separator, **settings)
    content, rows = path.read_bytes(), []
    for start, end, count in zip(scan.offsets[:-1], scan.offsets[1:], scan.rows, strict=True):
        block = list(Records(io.BytesIO(content[start:end]), separator, place_of(path), position=start).of_width(len(scan.columns.names)))
        assert len(block) == count
        rows += block
    return rows


def by_pandas(content: bytes, separator=",") -> list[list[str]] | str:
    """The cells as pandas reads them, the error if it does not, or 'index' if it makes an index of the first column."""
    try:
        frame = pd.read_csv(io.BytesIO(content), sep=separator, dtype=str, keep_default_na=False)
    except pd.errors.ParserError as error:
        return str(error)
    return frame.values.tolist() if isinstance(frame.index, pd.RangeIndex) else "index"


def compare(path, content: bytes, separator: str) -> None:
    path.write_bytes(content)
    expected = by_pandas(content, separator)
    try:
        cells = cells_of(path, separator)
    except UserError as error:
        assert isinstance(expected, str) and re.search("never closed|cells, not 3", str(error)), (error, expected)
        return
    if isinstance(expected, str):  # empty cells after the last column are not worth an error
        assert "EOF inside string" not in expected
        return
    blank = [row for row in expected if not "".join(row).strip(" \t")]  # pandas keeps a line of quoted spaces and skips one of plain ones
    assert [row for row in cells if "".join(row).strip(" \t")] == [row for row in expected if row not in blank]


@settings(max_examples=100, deadline=None)
@given(st.text('aé ,\t"\n\r', max_size=60), st.sampled_from([HEADER, b"\xef\xbb\xbf" + HEADER, b' \n\r\n"filepath","ti"tle,note\r\n']))
@example('a,b,c\n"', HEADER)
@example('a,"b\r\nc",d\r\n\r\n  \na,"b""c",\r\ra,b"c"d,e', HEADER)
@example('"a"b,"c" ,d\n"a,b\n', HEADER)
@example(" ,\n,\n\t\n,,,\n", HEADER)
def test_any_text_is_read_as_pandas_reads_it(tmp_path_factory, body, header):
    assume(not re.search(r"(^|[\r\n])[ \t]*\r(?!\n)", body))  # after a blank line that ends in CR alone, pandas 3.1 loses a separator
    compare(tmp_path_factory.mktemp("csv") / "table.csv", header + body.encode(), ",")
    compare(tmp_path_factory.mktemp("tsv") / "table.csv", header.replace(b",", b"\t") + body.encode(), "\t")


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=9), st.text(max_size=20), st.text("xé\"'\n\r,", max_size=9)), max_size=10),
    st.sampled_from(["\n", "\r\n"]),
)
def test_what_pandas_writes_comes_back(tmp_path_factory, rows, line_end):
    rows = [tuple(cell.replace("\0", "").encode("utf-8", "ignore").decode().replace("://", "") for cell in row) for row in rows]
    rows = [row for row in rows if "".join(row).strip(" \t")]
    path = tmp_path_factory.mktemp("csv") / "table.csv"
    pd.DataFrame(rows, columns=["filepath", "title", "note"]).to_csv(path, index=False, lineterminator=line_end, quoting=1)
    assert cells_of(path) == [list(row) for row in rows]
    table = read_all(path, "csv", {"extra": ("note",)}, images=False)
    assert table.num_rows == len(rows)
    if rows:
        assert table.column("captions").to_pylist() == [[title] if title else [] for _, title, _ in rows]
        assert [value or "" for value in table.column("note").cast(pa.string()).to_pylist()] == [note for *_, note in rows]


def test_layouts_of_the_file(tmp_path):
    expected = [["a.jpg", "x"], ["b.jpg", "ü"], ["c.jpg", ""]]
    for content, reading in (
        (b"filepath,title\na.jpg,x\nb.jpg,\xc3\xbc\nc.jpg", {}),
        (b"\xef\xbb\xbffilepath,title\r\na.jpg,x\r\n\r\nb.jpg,\xc3\xbc\r\nc.jpg,\r\n", {}),
        (b"\xef\xbb\xbfa.jpg,x\nb.jpg,\xc3\xbc\nc.jpg,\n", {"header": ("filepath", "title")}),
        (b"a.jpg;x\nb.jpg;\xc3\xbc\nc.jpg;;;\n", {"header": ("filepath", "title"), "separator": ";"}),
    ):
        assert cells_of(write(tmp_path, content), **({"separator": ","} | reading)) == expected
    path = write(tmp_path, b"filepath\ttitle\na, b.jpg\tx, y\n", "table.tsv")
    assert read_all(path, "tsv").column("captions").to_pylist() == [["x, y"]]
    assert scan_of(write(tmp_path, HEADER), "csv").rows == ()


def test_offsets_are_those_of_the_blocks_and_the_digest_that_of_the_bytes(tmp_path):
    content = HEADER + b"".join(b'%d.jpg,"a\nb",\n' % number for number in range(7))
    scan = scan_of(write(tmp_path, content), "csv")
    assert scan.rows == (3, 3, 1) and scan.offsets[0] == len(HEADER) and scan.offsets[-1] == len(content)
    assert content[scan.offsets[1] :].startswith(b"3.jpg") and content[scan.offsets[2] :].startswith(b"6.jpg")
    assert scan_of(write(tmp_path, content), "csv") == scan
    assert scan_of(write(tmp_path, content.replace(b"b", b"c")), "csv").digest != scan.digest


def test_types_of_extra_columns_hold_for_all_blocks(tmp_path):
    columns = {
        "whole": ["1", "", "-30", "", "", "", "5"],
        "number": ["1", "2", "3", "0.5", "-1e3", "", "7"],
        "mixed": ["1", "2", "3", "4", "5", "6", "x"],
        "zeros": ["007", "8", "9", "1", "1", "1", "1"],
        "long": ["12345678901234567890", "1", "1", "1", "1", "1", "1"],
        "words": ["NA", "null", "nan", "None", "true", "inf", "-"],
        "empty": [""] * 7,
    }
    lines = [",".join(["filepath", "title", *columns])] + [
        ",".join([f"{row}.jpg", "t", *(values[row] for values in columns.values())]) for row in range(7)
    ]
    path = write(tmp_path, "\n".join(lines).encode())
    scan = scan_of(path, "csv", {"extra": tuple(columns)})
    kinds = {name: str(scan.columns.field(name).type) for name in columns}
    assert kinds == {
        "whole": "int64",
        "number": "double",
        "mixed": "string",
        "zeros": "string",
        "long": "string",
        "words": "string",
        "empty": "null",
    }
    assert str(scan_of(path, "csv").columns.field("whole").type) == "null"
    table = read_all(path, "csv", {"extra": tuple(columns)}, images=False)
    assert table.column("whole").to_pylist() == [1, None, -30, None, None, None, 5]
    assert table.column("number").to_pylist() == [1, 2, 3, 0.5, -1000, None, 7]
    for name in ("mixed", "zeros", "long", "words"):
        assert table.column(name).to_pylist() == columns[name]


def test_images_are_read_from_the_folder_of_the_table_or_image_root(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "images" / "sub é #1").mkdir(parents=True)
    (tmp_path / "images" / "a.jpg").write_bytes(b"image a")
    (tmp_path / "images" / "sub é #1" / "b c.jpg").write_bytes(b"")
    (tmp_path / "images" / "long.jpg").write_bytes(b"x" * 101)
    os.mkfifo(tmp_path / "images" / "pipe.jpg")
    absolute = tmp_path / "images" / "a.jpg"
    names = ["a.jpg", "sub é #1/b c.jpg", "missing.jpg", str(absolute), "sub é #1", "long.jpg", "pipe.jpg", "a.jpg/b.jpg", "", "x" * 300]
    path = write(tmp_path / "lists", "\n".join(["filepath,title", *(f"{name},t" for name in names)]).encode())
    expected = [b"image a", b"", None, b"image a", None, None, None, None, None, None]
    limits = SourceLimits(max_bytes=100)
    assert read_all(path, "csv", limits=limits, image_root=str(tmp_path / "images")).column("image").to_pylist() == expected
    (tmp_path / "images" / "table.csv").write_bytes(path.read_bytes())
    assert read_all(tmp_path / "images" / "table.csv", "csv", limits=limits).column("image").to_pylist() == expected
    assert "image" not in read_all(path, "csv", images=False).column_names
    memory = fsspec.filesystem("memory")
    memory.pipe(
        {
            f"/set/{name.relative_to(tmp_path / 'images')}": name.read_bytes()
            for name in (tmp_path / "images").rglob("*[gv]")
            if name.is_file()
        }
    )
    remote = read_all("memory://set/table.csv", "csv", limits=limits)
    assert remote.column("image").to_pylist() == [*expected[:3], None, *expected[4:]]  # others wrote it: it names no file of this machine
    assert read_all("memory://set/table.csv", "csv", limits=limits, image_root="memory://set").equals(remote)
    assert read_all(path, "csv", limits=limits, image_root="memory://set").column("image").to_pylist() == expected
    here = read_all("memory://set/table.csv", "csv", limits=limits, image_root=str(tmp_path / "images"))
    assert here.column("image").to_pylist() == expected
    assert sum(scan_of(path, "csv", image_root=str(tmp_path / "images")).bytes) > len(names) * 7


def test_many_images_keep_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK_LINES", 1000)
    for number in range(1100):
        (tmp_path / f"{number}.jpg").write_bytes(b"%d" % number)
    path = write(tmp_path, b"filepath,title\n" + b"".join(b"%d.jpg,t\n" % number for number in range(1100)))
    assert read_all(path, "csv").column("image").to_pylist() == [b"%d" % number for number in range(1100)]


def test_errors_of_a_disk_are_raised_not_taken_for_missing_files(tmp_path, monkeypatch):
    path = write(tmp_path, b"filepath,title\na.jpg,t\n")

    def broken(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(image_files.os, "open", broken)
    with pytest.raises(OSError, match="Input/output"):
        read_all(path, "csv")


class Busy:
    """A remote filesystem's cat_file that fails before each success, and for one file always."""

    def __init__(self, action, down=()):
        self.action, self.down, self.calls = action, down, {}

    def __call__(self, path, start=None, end=None, **settings):
        self.calls[path, start] = self.calls.get((path, start), 0) + 1
        if path in self.down or self.calls[path, start] % 3:
            raise ConnectionResetError("503 Service Unavailable")
        return self.action(path, start=start, end=end, **settings)


def test_remote_failures_are_tried_again_and_then_raised(tmp_path, monkeypatch):
    monkeypatch.setattr(ranges.time, "sleep", lambda seconds: None)
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/busy/{number}.jpg": b"%d" % number for number in range(10)})
    memory.pipe("/busy/table.csv", b"filepath,title\n" + b"".join(b"%d.jpg,t\n" % number for number in range(10)))
    busy = Busy(memory.cat_file)
    monkeypatch.setattr(type(memory), "cat_file", lambda self, *arguments, **settings: busy(*arguments, **settings))
    assert read_all("memory://busy/table.csv", "csv").column("image").to_pylist() == [b"%d" % number for number in range(10)]
    busy.down = ("/busy/7.jpg",)
    with pytest.raises(ConnectionResetError):
        read_all("memory://busy/table.csv", "csv")


def test_refused_images_are_bad_rows_unless_all_are(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/shut/{number}.jpg": b"%d" % number for number in range(6)})
    statuses = {}

    def answer(self, path, **settings):
        status = statuses.get(path, 200)
        if status != 200:
            raise error_of(status)
        return memory.store[path].getvalue()

    monkeypatch.setattr(type(memory), "cat_file", answer)
    monkeypatch.setattr(type(memory), "info", answer)
    names = [f"{number}.jpg" for number in range(6)]
    root = image_files.ImageRoot(memory, "/shut")
    statuses |= dict(zip((f"/shut/{name}" for name in names), (403, 400, 414, 451, 200, 200), strict=True))
    assert root.read([*names, None], 100) == [None] * 4 + [b"4", b"5", None]
    statuses["/shut/4.jpg"] = 401  # nobody is logged in: never a matter of one image
    with pytest.raises(aiohttp.ClientResponseError, match="401"):
        root.read(names, 100)
    expired = type("ClientError", (Exception,), {"response": {"Error": {"Code": "ExpiredToken"}, "ResponseMetadata": {"HTTPStatusCode": 400}}})()
    assert not image_files.is_refused(expired)
    with pytest.raises(aiohttp.ClientResponseError, match="403"):
        root.read([names[0], names[1], None], 100)
    monkeypatch.setattr(ranges.time, "sleep", lambda seconds: None)
    statuses |= dict.fromkeys((f"/shut/{name}" for name in names), 503)
    assert root.mean_size(names) == 0


def test_an_image_name_that_no_url_can_hold_is_a_bad_row():
    for url in ("http://127.0.0.1:9", "memory://nowhere"):
        assert image_files.ImageRoot(*fsspec.core.url_to_fs(url)).read(["half \ud800.jpg"], 100) == [None]


def test_extra_columns_have_one_type_in_all_files(tmp_path):
    for name, values in {"a": ("1", "", "0.50"), "b": ("x1", "2"), "c": ("", "")}.items():
        write(tmp_path, b"filepath,title,id\n" + b"".join(b"a.jpg,t,%s\n" % value.encode() for value in values), f"{name}.csv")
    reader = BlockReader(source_of("*.csv", "csv", {"extra": ("id",)}), str(tmp_path))
    for one in (reader, pickle.loads(pickle.dumps(reader))):
        ids = [value for block in range(len(one.block_rows)) for value in one.read(block, images=False).column("id").to_pylist()]
        assert ids == ["1", None, "0.50", "x1", "2", None, None]  # as they stand there


def test_after_an_error_no_file_is_begun():
    begun = []

    def read(number):
        begun.append(number)
        raise ConnectionResetError("503")

    with pytest.raises(ConnectionResetError):
        image_files.in_parallel(read, range(1000), 8)
    assert len(begun) <= 8
    assert image_files.in_parallel(lambda number: number, range(1000), 7) == list(range(1000))


def test_a_server_without_ranges_and_a_table_that_shrinks_are_named(tmp_path, monkeypatch):
    memory = fsspec.filesystem("memory")
    memory.pipe("/whole/table.csv", b"filepath,title\na.jpg,t\nb.jpg,t\n")
    scan_of("memory://whole/table.csv", "csv")
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, **settings: memory.store[path].getvalue())
    assert "ignores range requests" in refused("memory://whole/table.csv", "csv")
    path = write(tmp_path, b"filepath,title\na.jpg,t\n")
    scan = scan_of(path, "csv")
    path.write_bytes(b"filepath,title\n")
    with pytest.raises(UserError, match=r"table\.csv changed"):
        FORMATS["csv"].read(place_of(path), scan, 0, source_of(path, "csv"), False, SourceLimits())


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"path,title\n", "'filepath'"),
        (b"filepath\ttitle\na\tb\n", r"set separator: '\t'"),
        (HEADER + b"a,b,c\na,b,c,d\n", "line 3 has 4 cells, not 3"),
        (HEADER + b'a,"b\n', "never closed"),
        (HEADER + b'a,"b\n' + b"x" * 140_000, "never closed"),
        (HEADER + b"a,b,c\na,\xff,c\n", "line 3 is not UTF-8"),
        ((HEADER + b"a,b,c\n").decode().encode("utf-16"), "UTF-16"),
        (HEADER + b"a,b\0,c\n", "zero bytes"),
        (b"\x1f\x8b" + bytes(100), "compressed with gzip"),
        (HEADER + b"a.jpg,b,c\nhttps://example.org/b.jpg,b,c\n", "tools/gather_images.py"),
    ],
)
def test_bad_tables_are_one_clear_line(tmp_path, content, expected):
    message = refused(write(tmp_path, content), "csv", {"extra": ("note",)} if b"note" in content else None)
    assert expected in message and "table.csv" in message
