"""The shard writer: whole or not at all, columns that readers know, reports before shards."""

import errno

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip_scale.data.sources.reader import BlockReader
from protoclip_scale.errors import UserError
from protoclip_scale.preparation import shards
from protoclip_scale.preparation.shards import Pair, ShardWriter, remove_unfinished
from protoclip_scale.recipe import schema
from tests.support import CORPUS

EXTRA = pa.schema([("label", pa.string()), ("concepts", pa.list_(pa.string())), ("second", pa.large_binary()), ("number", pa.int64())])


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    rows = pq.read_table(CORPUS / "train-00000-of-00010.parquet").slice(0, 50).to_pylist()
    return [
        Pair(row["image"]["bytes"], row["caption"], {"label": row["label"], "concepts": [row["concept"]], "second": row["image"]["bytes"], "number": number}, f"rows#{number}")
        for number, row in enumerate(rows)
    ]


def test_block_readers_read_what_it_writes(tmp_path, pairs):
    writer = ShardWriter(tmp_path, rows_per_shard=30, row_group_rows=8, extra=EXTRA, metadata={"made by": "a test"})
    assert writer.num_shards(len(pairs)) == 2 and [len(writer.rows_of(shard, len(pairs))) for shard in (0, 1)] == [30, 20]
    for shard in (0, 1):
        assert not writer.is_complete(shard)
        with writer.shard(shard) as file:
            for number in writer.rows_of(shard, len(pairs)):
                if number % 10:
                    file.add(pairs[number])
                else:
                    file.drop(pairs[number].key, "download failed", "404", url="a")
            file.facts["tried"] = 7
            file.arrays["hash"] = np.arange(file.kept)
        assert writer.is_complete(shard)
    kept = [pair for number, pair in enumerate(pairs) if number % 10]
    reader = BlockReader(schema.Source(files="*.parquet", columns={"extra": EXTRA.names}), str(tmp_path))
    assert reader.block_rows.tolist() == [8, 8, 8, 3, 8, 8, 2]
    table = pa.concat_tables([reader.read(block) for block in range(7)])
    assert table.column("image").to_pylist() == [pair.image for pair in kept]
    assert table.column("captions").to_pylist() == [pair.captions for pair in kept]
    for name in EXTRA.names:
        assert table.column(name).to_pylist() == [pair.extra[name] for pair in kept]
    parquet = pq.ParquetFile(writer.path(1))
    assert parquet.schema_arrow.metadata[b"made by"] == b"a test"
    assert parquet.read().column("image").to_pylist()[-1]["path"] == "rows#49"
    report = writer.report(1)
    assert report["kept"] == 18 and report["tried"] == 7 and report["image_bytes"] == sum(len(pair.image) for pair in pairs[31:40] + pairs[41:])
    assert report["dropped"] == [{"key": f"rows#{number}", "kind": "download failed", "reason": "404", "url": "a"} for number in (30, 40)]
    assert writer.arrays(0)["hash"].tolist() == list(range(27))


def test_the_same_rows_give_the_same_bytes(tmp_path, pairs):
    for folder in ("a", "b"):
        with ShardWriter(tmp_path / folder, extra=EXTRA).shard(0) as file:
            for pair in pairs:
                file.add(pair)
    assert (tmp_path / "a/shard-00000.parquet").read_bytes() == (tmp_path / "b/shard-00000.parquet").read_bytes()


def test_a_shard_that_fails_leaves_nothing(tmp_path, pairs):
    writer = ShardWriter(tmp_path, row_group_rows=5)
    with pytest.raises(RuntimeError, match="the input broke"), writer.shard(0) as file:
        for pair in pairs:
            file.add(pair)
        raise RuntimeError("the input broke")
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.writing"))
    (tmp_path / ".shard-00000.parquet.17.writing").write_bytes(b"of a killed process")
    remove_unfinished(tmp_path)
    assert not list(tmp_path.rglob("*.writing"))


def test_large_images_end_a_row_group_early(tmp_path, pairs, monkeypatch):
    monkeypatch.setattr(shards, "MAX_GROUP_BYTES", 3 * max(len(pair.image) for pair in pairs))
    with ShardWriter(tmp_path).shard(0) as file:
        for pair in pairs:
            file.add(pair)
    metadata = pq.ParquetFile(tmp_path / "shard-00000.parquet").metadata
    assert metadata.num_rows == 50 and 5 < metadata.num_row_groups < 50


def test_a_shard_without_rows_is_a_shard(tmp_path):
    writer = ShardWriter(tmp_path)
    with writer.shard(0) as file:
        file.drop("rows#0", "undecodable")
    assert writer.is_complete(0) and pq.ParquetFile(writer.path(0)).metadata.num_rows == 0


def test_other_errors_of_the_system_are_not_called_a_full_disk(tmp_path, pairs, monkeypatch):
    def fail(number: int):
        def replace(*paths):
            raise OSError(number, "from the system")

        return replace

    writer = ShardWriter(tmp_path)
    for number, kind, message in ((errno.ENOSPC, UserError, "disk full"), (errno.EDQUOT, UserError, "disk full"), (errno.EIO, OSError, "from the system")):
        monkeypatch.setattr(shards.os, "replace", fail(number))
        with pytest.raises(kind, match=message), writer.shard(0) as file:
            file.add(pairs[0])
        assert not list(tmp_path.rglob("*.writing"))
