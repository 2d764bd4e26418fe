"""The cache of scans: taken while a file is the same, and never believed otherwise; and what is said about changed data."""

import os
import shutil

import pyarrow as pa
import pytest

from protoclip_scale.data.sources import FORMATS, BlockReader, FileScan, Place, SourceLimits, scans
from protoclip_scale.data.sources.fingerprint import describe, difference
from protoclip_scale.data.sources.parquet import Parquet
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from tests.test_data_sources import write


@pytest.fixture
def scanned(monkeypatch, tmp_path):
    """Paths that were scanned, not taken from the cache."""
    paths = []

    class Counting(Parquet):
        def scan(self, place: Place, source: schema.Source, limits: SourceLimits) -> FileScan:
            paths.append(place.relative)
            return super().scan(place, source, limits)

    monkeypatch.setitem(FORMATS, "parquet", Counting())
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))
    return paths


def old(path, seconds=100.0):
    """As if written a while ago."""
    now = path.stat().st_mtime
    os.utime(path, (now - seconds, now - seconds))


def opened(root, **settings) -> BlockReader:
    return BlockReader(schema.Source(**({"files": "*.parquet"} | settings)), str(root))


def test_a_file_is_scanned_again_only_if_it_or_what_is_read_of_it_changed(tmp_path, scanned):
    for name in "ab":
        write(tmp_path / f"{name}.parquet", 20, label=[0] * 20)
        old(tmp_path / f"{name}.parquet")
    first = opened(tmp_path)
    assert sorted(scanned) == ["a.parquet", "b.parquet"]
    again = opened(tmp_path)
    assert len(scanned) == 2 and again.fingerprint == first.fingerprint and again.scans == first.scans and again.read(3).equals(first.read(3))
    write(tmp_path / "b.parquet", 20, first=100, label=[0] * 20)
    old(tmp_path / "b.parquet", 50.0)
    assert opened(tmp_path).fingerprint != first.fingerprint and scanned[2:] == ["b.parquet"]
    opened(tmp_path, columns={"extra": ["label"]})
    assert sorted(scanned[3:]) == ["a.parquet", "b.parquet"]


def test_a_file_written_a_moment_ago_is_not_cached(tmp_path, scanned):
    write(tmp_path / "a.parquet", 20)
    opened(tmp_path)
    opened(tmp_path)
    assert scanned == ["a.parquet"] * 2


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-9] + b"x" + data[-8:], lambda data: b"", lambda data: b"x" * 40])
def test_a_damaged_cache_is_not_believed(tmp_path, scanned, damage):
    write(tmp_path / "a.parquet", 20)
    old(tmp_path / "a.parquet")
    opened(tmp_path)
    (cache,) = (tmp_path / "cache" / "scans").iterdir()
    cache.write_bytes(damage(cache.read_bytes()))
    assert opened(tmp_path).block_rows.tolist() == [7, 7, 6] and len(scanned) == 2
    opened(tmp_path)
    assert len(scanned) == 2  # and it has been mended


def test_scans_made_before_a_failure_are_kept(tmp_path, scanned):
    for name in "abc":
        write(tmp_path / f"{name}.parquet", 20)
    (tmp_path / "b.parquet").write_bytes(b"this is not parquet, but long enough to look for a footer")
    for name in "abc":
        old(tmp_path / f"{name}.parquet")
    with pytest.raises(UserError, match=r"b\.parquet"):
        opened(tmp_path)
    before = set(scanned)  # c only if it was begun before b failed
    assert "a.parquet" in before
    scanned.clear()
    write(tmp_path / "b.parquet", 20)
    assert len(opened(tmp_path).block_rows) == 9
    assert sorted(scanned) == sorted({"b.parquet", "c.parquet"} - (before - {"b.parquet"}))


def test_scans_are_kept_while_others_are_made(tmp_path, scanned, monkeypatch):
    saved = []
    monkeypatch.setattr("protoclip_scale.data.sources.reader.SAVE_SECONDS", -1.0)
    monkeypatch.setattr(scans.ScanCache, "save", lambda self, done: saved.append(len(done)))
    for name in "abc":
        write(tmp_path / f"{name}.parquet", 20)
    opened(tmp_path)
    assert len(saved) == 4 and saved[-1] == 3  # after each file, and at the end


def test_a_revision_is_no_part_of_the_caches_name(tmp_path):
    one, two, other = (
        scans.ScanCache(schema.Source(hub="org/name", **settings), ".", SourceLimits()).path
        for settings in ({"revision": "main"}, {"revision": "v1"}, {"split": "test"})
    )
    assert one == two != other


def test_types_that_are_read_alike_are_the_same(tmp_path):
    kinds = {"a": (pa.string(), pa.binary()), "b": (pa.large_string(), pa.large_binary()), "c": (pa.dictionary(pa.int32(), pa.string()), pa.binary())}
    for name, (text, data) in kinds.items():
        columns = {"image": pa.array([b"i"] * 3, data), "caption": pa.array(["t"] * 3).cast(text), "tag": pa.array(["x"] * 3).cast(text)}
        write(tmp_path / f"{name}.parquet", 3, **columns)
    reader = opened(tmp_path, columns={"extra": ["tag"]})
    assert [reader.read(block).schema for block in range(3)] == [reader.schema] * 3
    assert opened(tmp_path, files="a.parquet").column_types == {"image": pa.binary(), "caption": pa.string()}  # as it is: fingerprints hold


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, scanned, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "file"))
    write(tmp_path / "a.parquet", 20)
    old(tmp_path / "a.parquet")
    assert len(opened(tmp_path).block_rows) == 3


def test_packed_scans_come_back_with_equal_schemas_as_one_object():
    columns = [pa.schema([("image", pa.binary())]), pa.schema([("image", pa.binary()), ("tags", pa.list_(pa.string()))])]
    made = [
        FileScan((3, 4), (30, 2**40), columns[0], "one"),
        FileScan((), (), columns[1], "two", (0, 7, 9)),
        FileScan((1,), (0,), columns[0], "three", (), pa.array(["a b", "ü"])),
    ]
    back = scans.unpack(scans.from_bytes(scans.to_bytes(scans.pack(made))))
    assert [(scan.rows, scan.bytes, scan.columns, scan.digest, scan.offsets) for scan in back] == [
        (scan.rows, scan.bytes, scan.columns, scan.digest, scan.offsets) for scan in made
    ]
    assert back[0].columns is back[2].columns
    assert [scan.names and scan.names.to_pylist() for scan in back] == [None, None, ["a b", "ü"]]


def test_a_difference_names_what_changed(tmp_path):
    for name in "abcdef":
        write(tmp_path / "one" / f"{name}.parquet", 20)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    before = describe(opened(tmp_path / "one"))
    assert difference(before, describe(opened(tmp_path / "two"))) == ""
    write(tmp_path / "two" / "a.parquet", 21)
    write(tmp_path / "two" / "b.parquet", 20, first=900)
    for name in "cdef":
        (tmp_path / "two" / f"{name}.parquet").rename(tmp_path / "two" / f"new {name}.parquet")
    line = difference(before, describe(opened(tmp_path / "two")))
    assert line == (
        "4 files missing: c.parquet, d.parquet, e.parquet and 1 more; 4 files new: new c.parquet, new d.parquet, new e.parquet and 1 more; "
        "1 file with another number of rows: a.parquet (20 -> 21); 1 file with other content: b.parquet"
    )
    for name in "abcdef":
        write(tmp_path / "one" / f"{name}.parquet", 20, text=["other"] * 20)
    assert "columns image binary, caption string -> image binary, text string" in difference(before, describe(opened(tmp_path / "one", columns={"caption": "text"})))


def test_content_of_equal_size_and_rows_is_seen(tmp_path):
    write(tmp_path / "a.parquet", 20)
    before, size = opened(tmp_path).fingerprint, (tmp_path / "a.parquet").stat().st_size
    write(tmp_path / "a.parquet", 20, caption=[f"TEXT {number}" for number in range(20)])
    assert (tmp_path / "a.parquet").stat().st_size == size and opened(tmp_path).fingerprint != before


def test_a_file_of_another_type_is_named(tmp_path):
    write(tmp_path / "a.parquet", 3, tag=["x"] * 3)
    write(tmp_path / "b.parquet", 3, tag=[1] * 3)
    with pytest.raises(UserError, match=r"'tag' is int64 in .*b\.parquet but string in .*a\.parquet; list them as two sources"):
        opened(tmp_path, columns={"extra": ["tag"]})
    assert opened(tmp_path).block_rows.tolist() == [3, 3]
