"""Filling an unfinished store from units of work: each process its own groups, blocks read ahead, units that are on disk left out."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa

from protoclip_scale import collectives
from protoclip_scale.data.sources import BlockReader
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.prototypes.teacher_work import Work
from protoclip_scale.report.plain import count, duration

REPORT_SECONDS = 10.0
Report = Callable[[str], None]
Features = Callable[[int, Callable[[], pa.Table]], np.ndarray]


class BlocksAhead:
    """Blocks in a known order: the one asked for last is kept, the next one is read in the background."""

    def __init__(self, readers: Sequence[BlockReader], order: list[tuple[int, int]], images: bool):
        self._readers, self._images = readers, images
        distinct = list(dict.fromkeys(order))
        self._next = dict(zip(distinct, distinct[1:], strict=False))
        self._blocks: dict[tuple[int, int], Future] = {}
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> "BlocksAhead":
        return self

    def __exit__(self, *_) -> None:
        self._pool.shutdown(cancel_futures=True)

    def read(self, source: int, block: int) -> pa.Table:
        """As ``BlockReader.read``, with what it raises."""
        wanted = (source, block)
        kept = {wanted, self._next.get(wanted, wanted)}
        self._blocks = {key: read for key, read in self._blocks.items() if key in kept}
        for key in (wanted, self._next.get(wanted, wanted)):
            if key not in self._blocks:
                self._blocks[key] = self._pool.submit(self._readers[key[0]].read, key[1], images=self._images)
        return self._blocks[wanted].result()


class Progress:
    """A line every some seconds: rows done of this process's, rows per second, time left."""

    def __init__(self, what: str, total: int, report: Report):
        world = collectives.world_size()
        self._what, self._total, self._report = what + (f" (process 1 of {world})" if world > 1 else ""), total, report
        self._begun = self._told = time.monotonic()
        self._done = self._found = 0

    def skip(self, rows: int) -> None:
        """Rows that an earlier attempt has done."""
        self._found += rows
        self._done += rows

    def advance(self, rows: int) -> None:
        self._done += rows
        now = time.monotonic()
        if now - self._told >= REPORT_SECONDS:
            self._told = now
            speed = (self._done - self._found) / (now - self._begun)
            left = duration((self._total - self._done) / speed)
            self._report(f"{self._what}: {count(self._done)} of {count(self._total)} rows, {speed:,.1f} rows/s, {left} left")


def write_groups(
    store: FeatureStore, work: Work, features: Features, readers: Sequence[BlockReader], images: bool, what: str, report: Report, event: Callable[[str], None]
) -> FeatureStore:
    """The store, sealed, with a part for each group of ``work``; a collective.

    ``features(unit, block)`` gives the rows of a unit and calls ``block`` for the table it lies in only if it needs that. Features are put on disk
    unit by unit. A process that fails leaves the others to the launcher, which ends them: all that is on disk is kept.
    """
    (column,) = store.columns
    if not collectives.from_rank_zero((store.folder / "manifest.json").exists):
        # Rank 0 looks for all: another process may already be writing when a slow one gets here.
        groups = work.share(collectives.from_rank_zero(store.unfinished), collectives.rank(), collectives.world_size())
        units = [unit for group in groups for unit in work.units_of(group)]
        progress = Progress(what, int(work.rows[units].sum()), report)
        with BlocksAhead(readers, [(int(work.source[unit]), int(work.block[unit])) for unit in units], images) as blocks:
            for group in groups:
                with store.writer(group) as writer:
                    written = writer.written
                    for unit in work.units_of(group):
                        rows = work.rows_in_group(unit)
                        if written[rows].all():
                            progress.skip(rows.stop - rows.start)
                            continue
                        block = (int(work.source[unit]), int(work.block[unit]))
                        writer.write(rows, {column: features(unit, lambda block=block: blocks.read(*block))})
                        writer.flush()
                        event("teacher.unit")
                        progress.advance(rows.stop - rows.start)
        collectives.barrier()
        collectives.from_rank_zero(lambda: bool(store.seal()))
    return FeatureStore.open(store.folder)
