"""The two passes over shards: read, decode, hash and encode; then leave out the rows that turned out to repeat others."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protoclip_scale.data.captions import clean_caption
from protoclip_scale.data.decode import BadImage
from protoclip_scale.engine.faults import event
from protoclip_scale.preparation.hashes import caption_hash, perceptual_hash, pixel_hash
from protoclip_scale.preparation.images import prepare_image
from protoclip_scale.preparation.inputs import InputRow, InputRows
from protoclip_scale.preparation.pool import Advance
from protoclip_scale.preparation.settings import Settings
from protoclip_scale.preparation.shards import MAX_GROUP_BYTES, Pair, ShardFile, ShardWriter, publishing

UNDECODABLE, EMPTY_CAPTION = "undecodable", "empty caption"
NO_IMAGE = "no image: its file is missing, unreadable or over the limit of bytes"
UNDECODABLE_EVALUATION = "evaluation.json"  # of each evaluation file: how many of its images cannot be decoded
DECISIONS = "dropped.npz"  # rows that repeat others: numbers, reasons, and what each repeats


class Hashes(NamedTuple):
    """Of one kept row; arrays of these names lie beside each shard's report."""

    row: int
    pixels: int
    perceptual: int
    captions: int


HASH_TYPES = Hashes(np.int64, np.uint64, np.uint64, np.uint64)


@dataclass(frozen=True)
class Job:
    """What every worker knows. Without rows dropped afterwards the first pass writes into ``out`` itself."""

    rows: InputRows
    settings: Settings
    out: Path

    @property
    def reports(self) -> Path:
        return self.out / "preparation"

    @property
    def first(self) -> ShardWriter:
        """The writer of the first pass."""
        return self._writer(self.reports / "shards" if self.settings.drops_afterwards else self.out)

    @property
    def final(self) -> ShardWriter:
        """Where shards lie in the end."""
        return self._writer(self.out)

    def _writer(self, folder: Path) -> ShardWriter:
        settings = self.settings
        return ShardWriter(folder, rows_per_shard=settings.rows_per_shard, row_group_rows=settings.row_group_rows, extra=self.rows.extra, reports=self.reports)


def encode_shards(job: Job, shards: list[int], advance: Advance) -> list[int]:
    """First pass over neighbouring shards. Memory: one block of the input and one row group."""
    for shard in shards:
        encode_shard(job, shard, advance)
    return shards


def encode_shard(job: Job, shard: int, advance: Advance) -> None:
    """Reads the input rows of one shard and publishes what is good of them."""
    hashes: list[Hashes] = []
    writer, numbers = job.first, job.first.rows_of(shard, job.rows.num_rows)
    input_bytes = 0
    with writer.shard(shard) as file:
        for row in job.rows.rows(numbers):
            input_bytes += len(row.image or b"")
            _encode_row(job, row, file, hashes)
            advance(1)
        file.facts = {"read": len(numbers), "input_bytes": input_bytes}
        if job.settings.drops_afterwards:
            file.arrays = {name: np.array([getattr(one, name) for one in hashes], dtype=getattr(HASH_TYPES, name)) for name in Hashes._fields}


def _encode_row(job: Job, row: InputRow, file: ShardFile, hashes: list[Hashes]) -> None:
    settings = job.settings
    if settings.empty_caption == "drop" and not any(map(clean_caption, filter(None, row.captions))):
        return _drop(job, row, file, EMPTY_CAPTION)
    if row.image is None:
        return _drop(job, row, file, UNDECODABLE, NO_IMAGE)
    try:
        image = prepare_image(row.image, settings.images, settings.limits)
    except BadImage as problem:
        return _drop(job, row, file, UNDECODABLE, str(problem))
    file.add(Pair(image.encoded, row.captions, row.extra, row.key))
    if settings.drops_afterwards:
        perceptual = perceptual_hash(image.pixels) if settings.needs_perceptual_hash else 0
        hashes.append(Hashes(row.number, pixel_hash(image.pixels), perceptual, caption_hash(row.captions)))
    return None


def _drop(job: Job, row: InputRow, file: ShardFile, kind: str, reason: str = "") -> None:
    name = job.rows.image_name(row.number)
    file.drop(row.key, kind, reason, **({} if name is None else {"image": name}))


def finish_shards(job: Job, shards: list[int], advance: Advance) -> list[int]:
    """Second pass: publishes each shard without the rows that the decisions name, and removes the first pass's."""
    with np.load(job.reports / DECISIONS, allow_pickle=False) as decisions:
        dropped = decisions["row"]
    for shard in shards:
        before, after = job.first.path(shard), job.final.path(shard)
        rows = job.first.arrays(shard)["row"]
        keep = ~np.isin(rows, dropped)
        if keep.all():
            os.replace(before, after)
        else:
            _copy_rows(before, after, keep, job.settings.row_group_rows)
            before.unlink()
        event("prepare.finished")
        advance(len(rows))
    return shards


def _copy_rows(before: Path, after: Path, keep: np.ndarray, row_group_rows: int) -> None:
    """The kept rows of a file in row groups of the same size as before."""
    with pq.ParquetFile(before) as file, publishing(after, file.schema_arrow) as (writer, _):
        held: list[pa.Table] = []
        at = 0
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            held.append(table.filter(pa.array(keep[at : at + table.num_rows])))
            at += table.num_rows
            table = pa.concat_tables(held)
            while table.num_rows >= row_group_rows or table.nbytes >= MAX_GROUP_BYTES:
                writer.write_table(table.slice(0, row_group_rows), row_group_size=row_group_rows)
                table = table.slice(row_group_rows)
            held = [table]
        if held and held[0].num_rows:
            writer.write_table(held[0])
