"""Image folders: with metadata they are the metadata's rows, without it the images in order, each with the text beside it."""

import os

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protoclip_scale.data.sources import folder, json_tables, tables
from tests.source_cases import read_all, refused, scan_of

ROWS = [("a.jpg", "one", 1), ("sub/b.png", "two", None), ("missing.jpg", "three", 3), ("../outside.jpg", "four", 4), ("sub/b.png", "", 5)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in (folder, tables, json_tables):
        monkeypatch.setattr(module, "BLOCK_LINES", 2)


@pytest.fixture
def images(tmp_path):
    (tmp_path / "outside.jpg").write_bytes(b"outside")
    root = tmp_path / "set"
    (root / "sub").mkdir(parents=True)
    (root / "a.jpg").write_bytes(b"image a")
    (root / "sub" / "b.png").write_bytes(b"image b")
    return root


def write_csv(root):
    (root / "metadata.csv").write_text(
        "file_name,text,id\n" + "".join(f"{name},{text},{'' if number is None else number}\n" for name, text, number in ROWS)
    )


def write_jsonl(root):
    import json

    (root / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": name, "text": text or None, "id": number}) + "\n" for name, text, number in ROWS)
    )


def write_parquet(root):
    names, texts, numbers = zip(*ROWS, strict=True)
    pq.write_table(
        pa.table({"file_name": names, "text": [text or None for text in texts], "id": numbers}), root / "metadata.parquet", row_group_size=3
    )


@pytest.mark.parametrize("write", [write_csv, write_jsonl, write_parquet])
def test_metadata_of_all_kinds_gives_the_same_rows(images, write):
    write(images)
    table = read_all(images, "folder", {"extra": ("id",)})
    assert table.column("image").to_pylist() == [b"image a", b"image b", None, None, b"image b"]
    assert table.column("captions").to_pylist() == [["one"], ["two"], ["three"], ["four"], []]
    assert table.column("id").to_pylist() == [1, None, 3, 4, 5] and table.schema.field("id").type == pa.int64()
    scan = scan_of(images, "folder")
    assert max(scan.rows) <= 2 and sum(scan.bytes) > 0
    assert "'label'" in refused(images, "folder", {"extra": ("label",)})
    (images / "sub" / "b.png").write_bytes(b"another image")
    assert scan_of(images, "folder").digest == scan.digest  # the metadata are what is hashed
    (images / f"metadata{'.csv' if write is not write_csv else '.jsonl'}").write_text("")
    assert "keep one" in refused(images, "folder")


names = st.sampled_from(["a", "b", "a b", "é", ".hidden", "sub/a", "sub/deep/é", ".git/a", "a.b"])
files = st.dictionaries(
    st.tuples(names, st.sampled_from([".jpg", ".PNG", ".webp", ".txt", ".txt", ".json"])), st.binary(max_size=20), max_size=14
)


@settings(max_examples=1500, deadline=None)
@given(files)
def test_any_folder_equals_its_twin(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("folder")
    for (name, suffix), content in ({("first", ".jpg"): b"i", ("first", ".txt"): b"t"} | files).items():
        path = root / (name + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and "/." not in f"/{path.relative_to(root)}")
    expected = []
    for name in found:
        stem, suffix = os.path.splitext(name)
        if suffix in (".jpg", ".PNG", ".webp"):
            text = root / f"{stem}.txt"
            expected.append(((root / name).read_bytes(), [text.read_bytes().decode("utf-8-sig", "replace")] if text.exists() else []))
    for url in (root, f"memory:/{root}"):
        if url is not root:
            fsspec.filesystem("memory").put(str(root), str(root), recursive=True)
        table = read_all(url, "folder")
        assert list(zip(table.column("image").to_pylist(), table.column("captions").to_pylist(), strict=True)) == expected
    assert scan_of(root, "folder").bytes == scan_of(f"memory:/{root}", "folder").bytes


def test_links_are_followed_inside_only(tmp_path, images):
    (images / "a.txt").write_text("text a")
    (images / "link.jpg").symlink_to("a.jpg")
    (images / "up.jpg").symlink_to("../outside.jpg")
    (images / "broken.jpg").symlink_to("nowhere.jpg")
    (images / "loop").symlink_to(".")
    (tmp_path / "elsewhere").symlink_to(images)
    for root in (images, tmp_path / "elsewhere"):
        assert scan_of(root, "folder").names.to_pylist() == ["a.jpg", "link.jpg", "sub/b.png"]
        assert read_all(root, "folder").column("captions").to_pylist() == [["text a"], [], []]
    (images / "metadata.csv").write_text("file_name,text\nlink.jpg,inside\nup.jpg,outside\n/etc/hostname,absolute\n")
    assert read_all(images, "folder").column("image").to_pylist() == [b"image a", None, None]


def test_the_digest_follows_names_and_sizes(images):
    (images / "a.txt").write_text("text a")
    seen = {scan_of(images, "folder").digest}
    for change in (
        lambda: (images / "a.txt").write_text("text"),
        lambda: (images / "sub" / "b.txt").write_text(""),
        lambda: (images / "a.jpg").rename(images / "c.jpg"),
    ):
        change()
        seen.add(scan_of(images, "folder").digest)
    assert len(seen) == 4


def test_folders_without_captions_or_images_are_one_clear_line(tmp_path, images):
    message = refused(images, "folder")
    assert "2 images but no captions" in message and "metadata.csv" in message and ".txt" in message
    (images / "a.txt").write_text("text a")
    assert "'label'" in refused(images, "folder", {"extra": ("label",)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "up.jpg").symlink_to("../outside.jpg")
    assert "no images" in refused(tmp_path / "empty", "folder")
    os.mkdir(os.fsencode(tmp_path) + b"/odd")
    for name in (b"\xff.jpg", b"\xff.txt"):
        with open(os.fsencode(tmp_path) + b"/odd/" + name, "wb"):
            pass
    assert "not UTF-8" in refused(tmp_path / "odd", "folder")
    (images / "metadata.parquet").write_bytes(b"no parquet at all")
    assert "metadata.parquet" in refused(images, "folder")
