"""Block readers: what they list and read equals what pyarrow says; bad input is one clear line. Other layouts: test_data_sources_conformance.py; remote places: test_data_sources_remote.py."""

import pickle
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip_scale.data.index import build_index, index_of, open_readers
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.data.sources.fingerprint import describe, difference
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from tests.support import CORPUS, ROOT


def write(path, num_rows, row_group_size=7, first=0, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = range(first, first + num_rows)
    columns = {"image": [f"image {number}".encode() for number in numbers], "caption": [f"text {number}" for number in numbers], **columns}
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)


def reader_of(root, files="*.parquet", retry_seconds=0.0, **columns):
    return BlockReader(schema.Source(files=files, columns=columns), str(root), retry_seconds)


def refused(*arguments, **settings) -> str:
    with pytest.raises(UserError) as caught:
        reader_of(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_demo_corpus_blocks_equal_its_row_groups():
    reader = reader_of(CORPUS, "train-*.parquet")
    assert reader.files == sorted(str(path) for path in CORPUS.glob("train-*.parquet"))
    groups = [(file, group) for file in reader.files for group in range(pq.ParquetFile(file).num_row_groups)]
    assert len(reader.block_rows) == len(groups) > 20
    for block in (0, 1, 17, len(groups) - 1):
        file, group = reader.file_of_block(block)
        assert (file, group) == groups[block]
        expected = pq.ParquetFile(file).read_row_group(group, columns=["image", "caption"])
        table = reader.read(block)
        assert table.num_rows == reader.block_rows[block]
        assert table.schema == pa.schema([("image", pa.large_binary()), ("captions", pa.list_(pa.string()))])
        assert table.column("image").to_pylist() == [image["bytes"] for image in expected.column("image").to_pylist()]
        assert table.column("captions").to_pylist() == expected.column("caption").to_pylist()
    assert reader.read(3, images=False).equals(reader.read(3).drop_columns("image"))


def test_files_with_odd_names_empty_files_and_unequal_groups(tmp_path):
    write(tmp_path / "a[1] ?.parquet", 20)
    write(tmp_path / "b.parquet", 0)
    write(tmp_path / "c.parquet", 5, first=20)
    reader = reader_of(tmp_path)
    assert [rows for rows in reader.block_rows.tolist() if rows] == [7, 7, 6, 5]
    texts = [text for block in np.flatnonzero(reader.block_rows) for text in reader.read(block).column("captions").to_pylist()]
    assert texts == [[f"text {number}"] for number in range(25)]


def test_a_folder_a_list_of_patterns_and_a_url_name_the_same_files(tmp_path):
    write(tmp_path / "set" / "a.parquet", 3)
    write(tmp_path / "set" / "b.parquet", 4)
    by_folder = reader_of(tmp_path, "set")
    for files in (("set/b.parquet", "set/a*.parquet", "set/*.parquet"), str(tmp_path / "set"), f"file://{tmp_path}/set/*.parquet"):
        assert reader_of(tmp_path, files).block_rows.tolist() == by_folder.block_rows.tolist() == [3, 4]


def test_fingerprint_follows_the_content_not_the_place(tmp_path):
    write(tmp_path / "one" / "a.parquet", 20)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    fingerprint = reader_of(tmp_path / "one").fingerprint
    assert reader_of(tmp_path / "two").fingerprint == fingerprint
    write(tmp_path / "two" / "a.parquet", 20, row_group_size=10)
    assert reader_of(tmp_path / "two").fingerprint != fingerprint
    write(tmp_path / "one" / "b.parquet", 1)
    assert reader_of(tmp_path / "one").fingerprint != fingerprint


def test_index_counts_blocks_of_all_sources_and_readers_pickle_small(tmp_path):
    write(tmp_path / "x" / "a.parquet", 20)
    write(tmp_path / "y" / "a.parquet", 5)
    data = schema.Data(root=str(tmp_path), sources=[{"files": "x", "name": "first"}, {"files": "y"}], plan={"global_batch": 8})
    index = build_index(data)
    assert index.source_names == ("first", "y")
    assert (index.num_rows, index.source_rows(0), index.source_rows(1)) == (25, 20, 5)
    assert index.block_source.tolist() == [0, 0, 0, 1]
    assert index.block_number.tolist() == [0, 1, 2, 0]
    readers = open_readers(data)
    readers[0].read(0)  # a reader that has been used pickles too
    again = pickle.loads(pickle.dumps(readers))
    assert len(pickle.dumps(readers)) < 8000
    assert index_of(again).fingerprint == index.fingerprint
    assert again[0].read(2).equals(readers[0].read(2))


def test_no_files(tmp_path):
    message = refused(tmp_path, "cc3m/*.parquet")
    assert "cc3m/*.parquet" in message and str(tmp_path) in message and "prepare" in message
    assert "no files match" in refused(tmp_path, "missing.parquet")
    (tmp_path / "empty").mkdir()
    assert "no files match" in refused(tmp_path, "empty")


def test_missing_and_unusable_columns_are_named(tmp_path):
    write(tmp_path / "a.parquet", 3, label=[1, 2, 3])
    message = refused(tmp_path, caption="text")
    assert "'text'" in message and "columns.caption" in message
    assert "columns.extra" in refused(tmp_path, extra=("id",))
    assert "'text'" in message and "a.parquet" in message and "image, caption, label" in message
    assert "'label'" in refused(tmp_path, image="label") and "'label'" in refused(tmp_path, caption="label")
    write(tmp_path / "b.parquet", 3, caption=[["a list"]] * 3)
    assert "b.parquet" in refused(tmp_path) and "list<element: string>" in refused(tmp_path)


def test_extra_columns_that_cannot_be_returned_are_named(tmp_path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    kinds = {pa.map_(pa.string(), pa.int64()): [("a", 1)], pa.list_(image): [{"bytes": b"x", "path": None}]}
    for kind, value in kinds.items():
        write(tmp_path / "a.parquet", 3, more=pa.array([value] * 3, kind))
        message = refused(tmp_path, extra=("more",))
        assert "column 'more'" in message and "a.parquet" in message and "neither maps nor lists of images" in message
    write(tmp_path / "a.parquet", 3, more=pa.array([{"a": [1]}] * 3))
    assert reader_of(tmp_path, extra=("more",)).read(0).column("more").to_pylist() == [{"a": [1]}] * 3


def test_no_rows_and_not_parquet(tmp_path):
    write(tmp_path / "empty.parquet", 0)
    assert "no rows" in refused(tmp_path)
    (tmp_path / "empty.parquet").write_bytes(b"this is not parquet, but long enough to look for a footer")
    message = refused(tmp_path, retry_seconds=60.0)  # waiting would not help, so it does not wait
    assert "empty.parquet" in message and "corrupt" in message


def test_corrupt_pages_and_files_changed_in_use_are_named(tmp_path):
    write(tmp_path / "a.parquet", 50, image=[np.random.default_rng(row).bytes(2000) for row in range(50)])
    reader = reader_of(tmp_path, retry_seconds=60.0)
    size = (tmp_path / "a.parquet").stat().st_size
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4 : size // 2] = b"\xff" * (size // 2 - 4)
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet.*row group 0"):
        reader.read(0)
    write(tmp_path / "a.parquet", 50, row_group_size=25)
    with pytest.raises(UserError, match="changed while"):
        reader_after_change = pickle.loads(pickle.dumps(reader))
        reader_after_change.read(0)


def test_reading_local_files_touches_no_network(tmp_path):
    write(tmp_path / "a.parquet", 20)
    script = f"""
import socket
def refuse(*arguments, **settings):
    raise SystemExit("a connection was tried")
socket.socket.connect = socket.getaddrinfo = refuse
from protoclip_scale.data.sources import BlockReader

from protoclip_scale.recipe import schema
print(BlockReader(schema.Source(files="*.parquet"), {str(tmp_path)!r}).read(2).num_rows)
"""
    finished = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (finished.returncode, finished.stdout.strip(), finished.stderr) == (0, "6", "")


def test_the_fingerprint_knows_where_images_lie_and_what_each_column_is(tmp_path):
    """Two tables of one text with other images, and captions in another order, are other data; the same data elsewhere are not."""
    for place in ("here", "there"):
        for folder in ("a", "b"):
            (tmp_path / place / folder).mkdir(parents=True)
            (tmp_path / place / folder / "x.png").write_bytes(folder.encode())
        (tmp_path / place / "pairs.csv").write_text("filepath,title,other\nx.png,one,two\n")

    def reader(place="here", **changes):
        return BlockReader(schema.Source(**{"files": "pairs.csv", "image_root": "a"} | changes), str(tmp_path / place))

    same = reader().fingerprint
    assert reader("there").fingerprint == same
    others = [reader(image_root="b"), reader(columns={"caption": ["title", "other"]}), reader(columns={"caption": ["other", "title"]})]
    assert len({same, *(other.fingerprint for other in others)}) == 4
    assert "image_root a -> b" in difference(describe(reader()), describe(others[0]))
    assert "caption columns title, other -> other, title" in difference(describe(others[1]), describe(others[2]))
