"""What every source layout must do, whichever it is: the same rows, written in each layout, come back the same. A new layout is one function and one line in CASES."""

import io
import json
import pickle
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip_scale.data.sources import FORMATS, BlockReader
from protoclip_scale.data.sources.fingerprint import describe, difference
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from tests.support import CORPUS

TEXTS = pa.list_(pa.string())
IMAGES = [image["bytes"] for image in pq.read_table(next(CORPUS.glob("train-00000*.parquet")), columns=["image"]).column(0).slice(0, 30).to_pylist()]


@dataclass(frozen=True)
class Row:
    image: bytes
    title: str | None
    more: str | None
    number: int
    tags: list[str]
    second: bytes

    @property
    def captions(self) -> list[str]:
        return [text for text in (self.title, self.more) if text is not None]


ROWS = [
    Row(image, None if number % 5 == 3 else f"title {number}, ü", f"more {number}" if number % 2 else None, 100 - number, [f"tag {number}", "all"], IMAGES[-number])
    for number, image in enumerate(IMAGES)
]


def parquet(folder: Path, rows: list[Row]) -> dict[str, Any]:
    columns = [{"image": {"bytes": row.image, "path": None}, "title": row.title, "more": [row.more, None], "number": row.number, "tags": row.tags} for row in rows]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.Table.from_pylist(columns).set_column(0, "image", pa.array([row["image"] for row in columns], image))
    table = table.append_column("second", pa.array([{"bytes": row.second} for row in rows], image)).append_column("unused", pa.nulls(len(rows)))
    for number, part in enumerate((table.slice(0, 17), table.slice(17))):
        pq.write_table(part, folder / f"part-{number}.parquet", row_group_size=7)
    return {"files": "part-{0..1}.parquet", "columns": {"image": "image", "caption": ["title", "more"], "extra": ["number", "tags", "second"]}}


def tar(folder: Path, rows: list[Row]) -> dict[str, Any]:
    for shard in range(2):
        with tarfile.open(folder / f"shard-{shard}.tar", "w") as file:
            for number, row in list(enumerate(rows))[17 * shard : 17 + 100 * shard]:
                facts = {"more": row.more, "number": row.number, "tags": row.tags}
                members = {"webp": row.image, "json": json.dumps(facts).encode(), "second": row.second} | ({"txt": row.title.encode()} if row.title else {})
                for suffix, data in members.items():
                    about = tarfile.TarInfo(f"{number:06d}.{suffix}")
                    about.size = len(data)
                    file.addfile(about, io.BytesIO(data))
    return {"files": "*.tar", "columns": {"caption": ["txt", "json.more"], "extra": ["json.number", "json.tags", "second"]}}


def image_paths(folder: Path, rows: list[Row]) -> list[str]:
    names = [f"pictures/{number % 3}/{number:03d}.webp" for number in range(len(rows))]
    for name, row in zip(names, rows, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(row.image)
    return names


def text_table(suffix: str, separator: str):
    def build(folder: Path, rows: list[Row]) -> dict[str, Any]:
        table = pd.DataFrame({"filepath": image_paths(folder, rows), "title": [row.title for row in rows], "more": [row.more for row in rows], "number": [row.number for row in rows]})
        for part in range(2):
            table[17 * part : 17 + 100 * part].to_csv(folder / f"list-{part}{suffix}", sep=separator, index=False)
        return {"files": f"*{suffix}", "columns": {"caption": ["title", "more"], "extra": ["number"]}}

    return build


def objects(folder: Path, rows: list[Row], path_key: str) -> list[dict[str, Any]]:
    names = image_paths(folder, rows)
    return [{path_key: name, "title": row.title, "more": [row.more], "number": row.number, "tags": row.tags} for name, row in zip(names, rows, strict=True)]


def jsonl(folder: Path, rows: list[Row]) -> dict[str, Any]:
    lines = [json.dumps(line) + "\n" for line in objects(folder, rows, "image")]
    for part in range(2):
        (folder / f"list-{part}.jsonl").write_text("".join(lines[17 * part : 17 + 100 * part]), encoding="utf-8")
    return {"files": "list-*.jsonl", "columns": {"caption": ["title", "more"], "extra": ["number", "tags"]}}


def json_array(folder: Path, rows: list[Row]) -> dict[str, Any]:
    (folder / "list.json").write_text(json.dumps(objects(folder, rows, "image"), indent=1), encoding="utf-8")
    return {"files": "list.json", "columns": {"caption": ["title", "more"], "extra": ["number", "tags"]}}


def folder_with_metadata(folder: Path, rows: list[Row]) -> dict[str, Any]:
    (folder / "images").mkdir()
    lines = [json.dumps(line) + "\n" for line in objects(folder / "images", rows, "file_name")]
    (folder / "images" / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    return {"files": "images", "format": "folder", "columns": {"caption": ["title", "more"], "extra": ["number", "tags"]}}


CASES: dict[str, Callable[[Path, list[Row]], dict[str, Any]]] = {
    "parquet": parquet,
    "tar": tar,
    "csv": text_table(".csv", ","),
    "tsv": text_table(".tsv", "\t"),
    "jsonl": jsonl,
    "json": json_array,
    "folder": folder_with_metadata,
}


@pytest.fixture(params=CASES)
def built(request, tmp_path):
    """(folder, source) of ROWS in one layout."""
    folder = tmp_path / "one"
    folder.mkdir()
    return folder, schema.Source(**CASES[request.param](folder, ROWS))


def all_rows(reader: BlockReader, images: bool = True) -> pa.Table:
    return pa.concat_tables([reader.read(block, images) for block in range(len(reader.block_rows))])


def test_every_layout_of_a_recipe_is_here():
    assert set(CASES) == set(FORMATS)


def test_rows_columns_and_their_order(built):
    folder, source = built
    reader = BlockReader(source, str(folder))
    table = all_rows(reader)
    assert table.schema == pa.schema([("image", pa.large_binary()), ("captions", pa.list_(pa.string())), *reader.extra_types.items()])
    assert table.column("image").to_pylist() == [row.image for row in ROWS]
    assert table.column("captions").to_pylist() == [row.captions for row in ROWS]
    for name in source.columns.extra:
        assert table.column(name).to_pylist() == [getattr(row, name.removeprefix("json.")) for row in ROWS]
    kinds = {name.removeprefix("json."): kind for name, kind in reader.extra_types.items()}
    assert kinds["number"] == pa.int64() and kinds.get("tags", TEXTS) == TEXTS and kinds.get("second", pa.large_binary()) == pa.large_binary()


def test_blocks_are_what_the_reader_says(built):
    folder, source = built
    reader = BlockReader(source, str(folder))
    assert reader.block_rows.sum() == len(ROWS) and len(reader.block_rows) == len(reader.block_bytes)
    assert 0.5 < reader.block_bytes.sum() / sum(len(row.image) + len(row.second) * ("second" in source.columns.extra) for row in ROWS) < 3  # a tar pads its members
    places = [reader.file_of_block(block) for block in range(len(reader.block_rows))]
    assert sorted(set(places)) == places and list(dict.fromkeys(file for file, _ in places)) == reader.files
    for block in reversed(range(len(reader.block_rows))):  # in any order
        assert reader.read(block).num_rows == reader.block_rows[block]


def test_without_images_the_rest_is_the_same(built):
    folder, source = built
    reader = BlockReader(source, str(folder))
    assert all_rows(reader, images=False).equals(all_rows(reader).drop_columns("image"))


def test_a_reader_travels_to_a_process_without_the_cache(built, monkeypatch, tmp_path):
    folder, source = built
    reader = BlockReader(source, str(folder))
    sent = pickle.dumps(reader)
    monkeypatch.setenv("PROTOCLIP_CACHE", str(tmp_path / "nothing"))
    monkeypatch.setattr("protoclip_scale.data.sources.reader.list_places", None)
    received = pickle.loads(sent)
    assert len(sent) < 8000 + len(str(folder)) * 4
    assert (received.fingerprint, received.files, describe(received)) == (reader.fingerprint, reader.files, describe(reader))
    assert all_rows(received).equals(all_rows(reader))


def test_fingerprint_follows_the_rows_and_not_the_place(built, tmp_path, request):
    folder, source = built
    before = describe(BlockReader(source, str(folder)))
    assert json.loads(json.dumps(before)) == before and before["rows"] == len(ROWS)
    shutil.copytree(folder, tmp_path / "moved" / "two")
    assert describe(BlockReader(source, str(tmp_path / "moved" / "two"))) == before
    (tmp_path / "changed").mkdir()
    CASES[request.node.callspec.params["built"]](tmp_path / "changed", [replace(ROWS[0], title="zitle 0, ü"), *ROWS[1:]])
    changed = describe(BlockReader(source, str(tmp_path / "changed")))
    assert changed["fingerprint"] != before["fingerprint"]
    assert "1 file with other content: " in difference(before, changed) and difference(before, before) == ""


def test_a_missing_column_is_named_with_those_that_are_there(built):
    folder, source = built
    wrong = source.model_copy(update={"columns": source.columns.model_copy(update={"caption": "legend"})})
    with pytest.raises(UserError, match="'legend'") as caught:
        BlockReader(wrong, str(folder))
    assert "\n" not in str(caught.value) and ("title" in str(caught.value) or "txt" in str(caught.value))
