"""Layouts whose images are files of their own, and shards, through a BlockReader: types over several files, images elsewhere, servers that fail now and then."""

import json
import shutil

import pyarrow as pa
import pytest

from protoclip_scale.data.sources import BlockReader
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from tests.servers import Server
from tests.test_data_sources_conformance import CASES, ROWS, all_rows

LAYOUTS = [layout for layout in CASES if layout != "parquet"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "cache"))


def build(layout, folder) -> schema.Source:
    folder.mkdir(parents=True)
    return schema.Source(**CASES[layout](folder, ROWS))


def test_every_layout_over_http_with_failures(tmp_path):
    sources = {layout: build(layout, tmp_path / "data" / layout) for layout in LAYOUTS}
    with Server("http_server", "--root", tmp_path / "data") as server:
        server.faults(unavailable_every=6, half_every=11)
        for layout, source in sources.items():
            local = BlockReader(source, str(tmp_path / "data" / layout))
            remote = BlockReader(source, f"{server.url}/{layout}", retry_seconds=60)
            assert all_rows(remote).equals(all_rows(local)), layout
            assert remote.block_rows.tolist() == local.block_rows.tolist()
        tar = BlockReader(sources["tar"], f"{server.url}/tar", retry_seconds=0.2)
        server.kill()
        with pytest.raises(UserError, match=r"shard-0\.tar: reading shard 0 failed.*data\.retry_seconds"):
            tar.read(0)


def test_a_server_that_stays_down_while_images_are_read_is_named(tmp_path):
    source = build("csv", tmp_path / "data")
    with Server("http_server", "--root", tmp_path / "data") as server:
        mixed = source.model_copy(update={"image_root": server.url})
        reader = BlockReader(mixed, str(tmp_path / "data"), retry_seconds=0.2)
        assert all_rows(reader).equals(all_rows(BlockReader(source, str(tmp_path / "data"))))
        server.kill()
        with pytest.raises(UserError, match=r"list-0\.csv.*data\.retry_seconds"):
            reader.read(0)


def test_image_root_starts_from_the_root(tmp_path):
    source = build("csv", tmp_path / "data")
    shutil.move(tmp_path / "data" / "pictures", tmp_path / "data" / "elsewhere" / "pictures")
    reader = BlockReader(source.model_copy(update={"image_root": "elsewhere"}), str(tmp_path / "data"))
    assert all_rows(reader).column("image").to_pylist() == [row.image for row in ROWS]


@pytest.mark.parametrize("layout", ["csv", "tar", "json"])
def test_data_changed_in_use_is_named(tmp_path, layout):
    source = build(layout, tmp_path / "data")
    reader = BlockReader(source, str(tmp_path / "data"))
    CASES[layout](tmp_path / "data", ROWS[:20] if layout == "tar" else ROWS[:3])
    with pytest.raises(UserError, match="changed while it was in use"):
        all_rows(reader)
    assert BlockReader(source, str(tmp_path / "data")).fingerprint != reader.fingerprint


def write_lines(folder, name, values):
    (folder / name).write_text("".join(json.dumps({"image": "a.jpg", "caption": "b", "id": value}) + "\n" for value in values))


def test_types_of_extra_columns_agree_over_files(tmp_path):
    source = schema.Source(files="*.jsonl", columns={"extra": ["id"]})
    write_lines(tmp_path, "a.jsonl", [None, None])
    reader = BlockReader(source, str(tmp_path))
    assert reader.extra_types == {"id": pa.string()} and reader.read(0).column("id").to_pylist() == [None, None]
    write_lines(tmp_path, "b.jsonl", [1, None])
    reader = BlockReader(source, str(tmp_path))
    assert reader.extra_types == {"id": pa.int64()} and all_rows(reader).column("id").to_pylist() == [None, None, 1, None]
    write_lines(tmp_path, "c.jsonl", [0.5])
    assert all_rows(BlockReader(source, str(tmp_path))).column("id").to_pylist() == [None, None, 1.0, None, 0.5]
    write_lines(tmp_path, "d.jsonl", ["x"])
    with pytest.raises(UserError, match=r"'id' is string in .*d\.jsonl but double in .*c\.jsonl"):
        BlockReader(source, str(tmp_path))


def test_a_folder_is_looked_through_every_time(tmp_path):
    (tmp_path / "set" / "sub").mkdir(parents=True)
    for name in ("a.jpg", "a.txt", "sub/b.jpg"):
        (tmp_path / "set" / name).write_bytes(b"x")
    source = schema.Source(files="set", format="folder")
    before = BlockReader(source, str(tmp_path))
    (tmp_path / "set" / "sub" / "b.txt").write_bytes(b"text b")  # the time of set stays what it was
    after = BlockReader(source, str(tmp_path))
    assert all_rows(before).column("captions").to_pylist() == all_rows(after).column("captions").to_pylist() == [["x"], ["text b"]]
    assert before.fingerprint != after.fingerprint
    inside = BlockReader(source.model_copy(update={"files": "."}), str(tmp_path / "set"))
    shutil.copytree(tmp_path / "set", tmp_path / "copy")
    assert inside.fingerprint == BlockReader(inside.source, str(tmp_path / "copy")).fingerprint
