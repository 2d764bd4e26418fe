"""The spool: the rows of an episode on local disk, one memory-mapped Arrow file per lane, read by extraction and by training.

A lane's file appears under its name only when it is complete (written under another name, then renamed), so a killed fill goes on where it was.
"""

import bisect
import errno
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from protoclip_scale.data.plan import EpisodePlan
from protoclip_scale.data.rows import unpack_row_ids
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.errors import UserError

SCHEMA = "1"  # of a lane's file; those of others are written anew
ROWS_PER_BATCH = 256  # bounds the memory of a write; offsets stay far below 2 GB
LANE_FIELDS = (pa.field("image", pa.large_binary()), pa.field("captions", pa.list_(pa.string())), pa.field("row_id", pa.int64()))


def lane_schema(readers: list[BlockReader]) -> pa.Schema:
    """Columns of a lane's file: image, captions, row_id and every extra column that a source has (null in rows of the others).

    Raises UserError if two sources store an extra column of one name as different types.
    """
    fields = [*LANE_FIELDS]
    owner: dict[str, BlockReader] = {}
    for reader in readers:
        for name, kind in reader.extra_types.items():
            if name not in owner:
                owner[name] = reader
                fields.append(pa.field(name, kind))
            elif owner[name].extra_types[name] != kind:
                raise UserError(
                    f"data.sources {reader.name}: columns.extra {name!r} is {kind}, but {owner[name].extra_types[name]} in {owner[name].name}; "
                    "store it as one type, or give it another name"
                )
    return pa.schema(fields)


def lane_bytes(episode_plan: EpisodePlan, lane: int, readers: list[BlockReader]) -> int:
    """Estimated bytes of a lane's file, from the footers of its blocks."""
    source, block, _ = unpack_row_ids(episode_plan.read_order(lane))
    total = 0.0
    for number, reader in enumerate(readers):
        blocks, rows = np.unique(block[source == number], return_counts=True)
        total += float((reader.block_bytes[blocks] / np.maximum(reader.block_rows[blocks], 1) * rows).sum())
    return int(total * 1.05) + 64 * episode_plan.lane_rows


class SpooledLane:
    """A complete lane, memory-mapped: rows are in read order."""

    def __init__(self, path: Path):
        self.path = path
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            self.metadata = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        self._starts = np.concatenate([[0], np.cumsum([batch.num_rows for batch in batches])]).tolist()
        self._columns = {name: [batch.column(name) for batch in batches] for name in reader.schema.names}
        self.extra_names = tuple(reader.schema.names[len(LANE_FIELDS) :])

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def row_ids(self) -> np.ndarray:
        """int64 [rows]."""
        return np.concatenate([column.to_numpy() for column in self._columns["row_id"]])

    def row(self, number: int) -> tuple[bytes | None, list[str]]:
        """(encoded image, or None for none, captions) of one row. Some microseconds."""
        return self._cell("image", number), [caption for caption in self._cell("captions", number) or [] if caption is not None]

    def extra(self, number: int) -> dict[str, Any]:
        """The extra columns of one row, as plain values."""
        return {name: self._cell(name, number) for name in self.extra_names}

    def _cell(self, name: str, number: int) -> Any:
        batch = bisect.bisect_right(self._starts, number) - 1
        return self._columns[name][batch][number - self._starts[batch]].as_py()


class Spool:
    """Folder of at most two episodes. ``run_id`` keeps files of another run from being taken for this one's."""

    def __init__(self, folder: str | os.PathLike, run_id: str):
        self.folder = Path(folder)
        self.run_id = run_id

    def _path(self, episode: int, lane: int) -> Path:
        return self.folder / f"episode-{episode:06d}" / f"lane-{lane:05d}.arrow"

    def _metadata(self, episode_plan: EpisodePlan, lane: int) -> dict[str, str]:
        return {"schema": SCHEMA, "plan": episode_plan.fingerprint, "run_id": self.run_id, "episode": str(episode_plan.number), "lane": str(lane)}

    def is_complete(self, episode_plan: EpisodePlan, lane: int) -> bool:
        """Whether the lane lies there, whole and of this run and plan."""
        path = self._path(episode_plan.number, lane)
        if not path.exists():
            return False
        try:
            spooled = SpooledLane(path)
        except pa.ArrowInvalid:
            return False
        return spooled.metadata == self._metadata(episode_plan, lane) and len(spooled) == episode_plan.lane_rows

    def fill(
        self,
        episode_plan: EpisodePlan,
        episode: int,
        lanes: Iterable[int],
        readers: list[BlockReader],
        on_block: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Writes the lanes that are not yet complete; ``on_block(blocks read, blocks in all)`` after each block.

        Removes episodes other than this one and the one before it. UserError if the disk is or gets full, and whatever the readers raise.
        """
        assert episode == episode_plan.number
        for other in self._episodes():
            if other not in (episode - 1, episode):
                self.drop(other)
        missing = [lane for lane in lanes if not self.is_complete(episode_plan, lane)]
        if not missing:
            return
        self._path(episode, 0).parent.mkdir(parents=True, exist_ok=True)
        for lane in missing:
            for left in self._path(episode, lane).parent.glob(f"{self._path(episode, lane).stem}.*.unfinished"):  # by a killed process
                left.unlink()
        self._check_space(sum(lane_bytes(episode_plan, lane, readers) for lane in missing))
        columns = lane_schema(readers)
        pieces = {lane: _pieces(episode_plan.read_order(lane)) for lane in missing}
        total, done = sum(len(parts) for parts in pieces.values()), 0
        held: tuple[tuple[int, int], pa.Table] | None = None  # neighbouring lanes share a block
        for lane in missing:
            path = self._path(episode, lane)
            unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
            try:
                with (
                    pa.OSFile(str(unfinished), "wb") as file,
                    pa.ipc.new_file(file, columns.with_metadata(self._metadata(episode_plan, lane))) as writer,
                ):
                    for source, block, rows, row_ids in pieces[lane]:
                        reader, at_once = readers[source], readers[source].rows_at_once(block)
                        if at_once is None and (held is None or held[0] != (source, block)):
                            held = (source, block), reader.read(block)
                        for first in range(0, len(rows), at_once or ROWS_PER_BATCH):
                            some = slice(first, first + (at_once or ROWS_PER_BATCH))
                            table = held[1] if at_once is None else reader.read(block, images=frozenset(rows[some].tolist()))
                            taken = table.take(pa.array(rows[some])).append_column("row_id", pa.array(row_ids[some]))
                            writer.write_table(_in_order(taken.combine_chunks(), columns), max_chunksize=ROWS_PER_BATCH)
                        done += 1
                        on_block(done, total)
                os.replace(unfinished, path)
            except OSError as error:
                if error.errno == errno.ENOSPC:
                    raise UserError(
                        f"disk full while writing the spool at {self.folder}; free space there or set run.scratch_dir to another disk, then resume"
                    ) from error
                raise
            finally:
                unfinished.unlink(missing_ok=True)

    def open(self, episode: int, lane: int) -> SpooledLane:
        """A lane that ``fill`` completed."""
        return SpooledLane(self._path(episode, lane))

    def drop(self, episode: int) -> None:
        """Removes an episode's files; none is no error."""
        shutil.rmtree(self._path(episode, 0).parent, ignore_errors=True)

    def _episodes(self) -> list[int]:
        return [int(path.name.removeprefix("episode-")) for path in self.folder.glob("episode-[0-9]*")]

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"disk full: the spool needs {needed / 1e6:.0f} MB, has {free / 1e6:.0f} MB at {self.folder}; free space or set run.scratch_dir to another disk"
            )


def _pieces(row_ids: np.ndarray) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """Runs of one block in a read order: (source, block, rows in the block, row ids)."""
    source, block, row = unpack_row_ids(row_ids)
    starts = np.flatnonzero(np.diff(source * (1 << 32) + block, prepend=-1))
    ends = np.append(starts[1:], len(row_ids))
    return [(int(source[first]), int(block[first]), row[first:last], row_ids[first:last]) for first, last in zip(starts, ends, strict=True)]


def _in_order(table: pa.Table, columns: pa.Schema) -> pa.Table:
    """The columns of a lane; those that the row's source lacks are null."""
    there = set(table.column_names)
    return pa.table(
        [table.column(field.name) if field.name in there else pa.nulls(len(table), field.type) for field in columns], schema=columns
    )
