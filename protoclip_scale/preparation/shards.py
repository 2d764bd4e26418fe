"""Parquet shards that appear whole or not at all, each a pure function of its own input rows.

Shard k is made from the input rows [k R, (k + 1) R) of an order that does not change, whatever was dropped elsewhere. Its small report and its hashes are on
the disk before the shard takes its name, so a killed run goes on with the first shard that is not there and ends with the same bytes.
"""

import contextlib
import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protoclip_scale.engine.faults import event
from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json, sync

IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
COLUMNS = pa.schema([("image", IMAGE_TYPE), ("caption", pa.list_(pa.string()))])
MAX_GROUP_BYTES = 256 << 20  # a row group ends here too: large images must not fill the memory
PARQUET = {"compression": "zstd", "use_dictionary": False, "write_statistics": False}  # images do not repeat, and their minimum means nothing


@dataclass(frozen=True)
class Pair:
    """One row to be written. key: where it comes from (file and row, path, address), written as ``image.path``."""

    image: bytes
    captions: list[str]
    extra: dict[str, Any] = field(default_factory=dict)
    key: str = ""


class ShardFile:
    """One shard being written. Holds one row group in memory. Made by ``ShardWriter.shard``.

    ``arrays``: arrays put here are saved beside the report, for instance hashes. ``facts``: JSON-able values put here are saved in the report.
    """

    def __init__(self, writer: pq.ParquetWriter, schema: pa.Schema, row_group_rows: int):
        self._writer, self._schema, self._row_group_rows = writer, schema, row_group_rows
        self._pairs: list[Pair] = []
        self._held_bytes = 0
        self.kept, self.image_bytes = 0, 0
        self.dropped: list[dict[str, str]] = []  # key, kind, reason and facts of each
        self.arrays: dict[str, np.ndarray] = {}
        self.facts: dict[str, Any] = {}

    def add(self, pair: Pair) -> None:
        """The next row."""
        self._pairs.append(pair)
        self.kept += 1
        self.image_bytes += len(pair.image)
        self._held_bytes += len(pair.image)
        if len(self._pairs) == self._row_group_rows or self._held_bytes >= MAX_GROUP_BYTES:
            self.flush()

    def drop(self, key: str, kind: str, reason: str = "", **facts: str) -> None:
        """An input row that is not written. kind: what it is counted under; reason and facts: details for the list of such rows."""
        self.dropped.append({"key": key, "kind": kind, "reason": reason, **facts})

    def flush(self) -> None:
        """Writes the rows held as one row group."""
        if not self._pairs:
            return
        columns = [
            pa.array([{"bytes": pair.image, "path": pair.key or None} for pair in self._pairs], IMAGE_TYPE),
            pa.array([pair.captions for pair in self._pairs], pa.list_(pa.string())),
            *(pa.array([pair.extra.get(name) for pair in self._pairs], self._schema.field(name).type) for name in self._schema.names[2:]),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=self._row_group_rows)
        self._pairs, self._held_bytes = [], 0
        event("prepare.row_group")


class ShardWriter:
    """Writes FOLDER/shard-00000.parquet, ...: image struct<bytes, path>, caption list<string>, then the extra columns.

    reports: folder of the small reports, by default FOLDER/preparation. metadata: text put into every footer. Disk full raises UserError; what was published stays.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        rows_per_shard: int = 10_000,
        row_group_rows: int = 500,
        extra: pa.Schema | None = None,
        metadata: Mapping[str, str] | None = None,
        reports: str | os.PathLike | None = None,
    ):
        self.folder = Path(folder)
        self.reports = Path(reports) if reports is not None else self.folder / "preparation"
        self.rows_per_shard, self.row_group_rows = rows_per_shard, row_group_rows
        self.schema = pa.schema([*COLUMNS, *(extra or [])], metadata=dict(metadata or {}) or None)

    def path(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.parquet"

    def report_path(self, shard: int) -> Path:
        return self.reports / f"shard-{shard:05d}.json"

    def arrays_path(self, shard: int) -> Path:
        return self.reports / f"shard-{shard:05d}.npz"

    def rows_of(self, shard: int, num_rows: int) -> range:
        """The input rows that a shard is made from."""
        return range(shard * self.rows_per_shard, min(num_rows, (shard + 1) * self.rows_per_shard))

    def num_shards(self, num_rows: int) -> int:
        return -(-num_rows // self.rows_per_shard)

    def is_complete(self, shard: int) -> bool:
        return self.path(shard).exists()

    def report(self, shard: int) -> dict[str, Any]:
        """Of a complete shard: shard, kept, image_bytes, seconds, dropped (key, kind, reason of each row), and the facts that were put in."""
        return json.loads(self.report_path(shard).read_text(encoding="utf-8"))

    def arrays(self, shard: int) -> dict[str, np.ndarray]:
        with np.load(self.arrays_path(shard), allow_pickle=False) as saved:
            return {name: saved[name] for name in saved.files}

    @contextlib.contextmanager
    def shard(self, shard: int) -> Iterator[ShardFile]:
        """``with writer.shard(3) as shard: shard.add(pair) ...`` in input order; published when the block ends, and not if it raises."""
        started = time.monotonic()
        with publishing(self.path(shard), self.schema) as (writer, temporary):
            file = ShardFile(writer, self.schema, self.row_group_rows)
            yield file
            file.flush()
            writer.close()
            self.reports.mkdir(parents=True, exist_ok=True)
            if file.arrays:
                publish_arrays(self.arrays_path(shard), file.arrays)
            figures = {"shard": shard, "kept": file.kept, "image_bytes": file.image_bytes, "seconds": round(time.monotonic() - started, 3)}
            publish_json(self.report_path(shard), {**figures, **file.facts, "dropped": file.dropped})
        event("prepare.shard")


@contextlib.contextmanager
def publishing(path: Path, schema: pa.Schema) -> Iterator[tuple[pq.ParquetWriter, Path]]:
    """A parquet writer whose file takes its name when the block ends; removed if the block raises. A full disk is a UserError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with pq.ParquetWriter(temporary, schema, **PARQUET) as writer:
            yield writer, temporary
        sync(temporary)
        event("prepare.written")
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"disk full while writing {path}; free space there and run the same command again: it goes on where it stopped") from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_unfinished(folder: Path) -> None:
    """Temporary files that a killed run left."""
    for file in folder.glob(".*.writing"):
        file.unlink(missing_ok=True)


def publish_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An .npz file that appears whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with temporary.open("wb") as file:
            np.savez(file, **arrays)
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
