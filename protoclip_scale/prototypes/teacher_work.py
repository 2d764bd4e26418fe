"""What a teacher has to encode, cut into units and groups that depend on the sources alone, never on processes or interruptions.

A unit is encoded in one call: a block, or one of the equal parts of a large one. A group is a run of neighbouring units of one source and has one
writer: a process. So any number of processes, another one after each interruption, writes the same bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from protoclip_scale.data.randomness import permutation

UNIT_ROWS = 1024  # bounds the memory of a call
MIN_GROUP_ROWS = 512
MAX_GROUPS = 512  # files of the unfinished store; twice that when there are many sources


@dataclass(frozen=True)
class Work:
    """Units in the order of their rows; every array is int64 [units]. 15 million rows in 15,400 blocks are 0.9 MB."""

    source: np.ndarray
    block: np.ndarray  # number in its source
    first_in_block: np.ndarray
    first_in_source: np.ndarray
    rows: np.ndarray
    group: np.ndarray  # ascending from 0
    first_in_group: np.ndarray

    @classmethod
    def of_sources(cls, block_rows: Sequence[np.ndarray]) -> "Work":
        """All rows; ``block_rows``: those of each block of each source."""
        columns: list[list[np.ndarray]] = [[], [], [], [], []]
        for source, rows in enumerate(block_rows):
            rows = np.asarray(rows, dtype=np.int64)
            units = -(-rows // UNIT_ROWS)  # of each block; none if it is empty
            block = np.repeat(np.arange(len(rows)), units)
            number = np.arange(len(block)) - np.repeat(np.cumsum(units) - units, units)
            start, stop = (rows[block] * edge // units[block] for edge in (number, number + 1))
            first_in_source = (np.cumsum(rows) - rows)[block] + start
            for column, values in zip(columns, (np.full(len(block), source), block, start, first_in_source, stop - start), strict=True):
                column.append(values)
        return cls._grouped(*(np.concatenate(column) for column in columns))

    @classmethod
    def _grouped(cls, source, block, first_in_block, first_in_source, rows) -> "Work":
        target = max(MIN_GROUP_ROWS, -(-int(rows.sum()) // MAX_GROUPS))
        before = np.cumsum(rows) - rows
        new_source = np.diff(source, prepend=-1) != 0
        before -= np.maximum.accumulate(np.where(new_source, before, 0))  # rows of the source before the unit
        group = np.cumsum(new_source | (np.diff(before // target, prepend=0) != 0)) - 1
        starts = (np.cumsum(rows) - rows)[np.flatnonzero(np.diff(group, prepend=-1))]
        return cls(source, block, first_in_block, first_in_source, rows, group, np.cumsum(rows) - rows - starts[group])

    @property
    def num_rows(self) -> int:
        return int(self.rows.sum())

    @property
    def group_rows(self) -> list[int]:
        return np.bincount(self.group, self.rows).astype(np.int64).tolist()

    def units_of(self, group: int) -> range:
        """The units of a group, in order."""
        first, last = np.searchsorted(self.group, (group, group + 1))
        return range(int(first), int(last))

    def rows_in_group(self, unit: int) -> slice:
        return slice(int(self.first_in_group[unit]), int(self.first_in_group[unit] + self.rows[unit]))

    def sample(self, num_rows: int) -> tuple["Work", np.ndarray]:
        """(a seeded choice of whole units that hold at least ``num_rows`` rows, all if there are no more; their numbers here, ascending)."""
        order = permutation(len(self.rows), 0, "teacher sample")
        before = np.cumsum(self.rows[order]) - self.rows[order]
        chosen = np.sort(order[before < num_rows])
        parts = (self.source, self.block, self.first_in_block, self.first_in_source, self.rows)
        return Work._grouped(*(part[chosen] for part in parts)), chosen

    def share(self, groups: Sequence[int], rank: int, world: int) -> list[int]:
        """The groups, of those given, that a process encodes: neighbours, so that it meets each block once; about the same rows each."""
        rows = np.array(self.group_rows)[list(groups)] if groups else np.zeros(0)
        middle = np.cumsum(rows) - rows / 2
        return [group for group, place in zip(groups, middle, strict=True) if int(place * world / rows.sum()) == rank]
