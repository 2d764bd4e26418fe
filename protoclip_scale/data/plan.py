"""Which row stands in which place of which batch: a pure function of the index and ``data.plan``. FROZEN.

The stream is perm(0) ++ perm(1) ++ ...: every epoch visits all blocks in a random order, the rows of a block one after the other (in a random
order, so that a block cut by the end of an episode is cut at random). Episode k is places [kS, (k+1)S) of the stream. It is cut into L lanes, and
each lane is permuted, so that a batch mixes L distant parts of the stream. Two runs with equal ``data.plan`` and sources see the same batches
whatever else differs. tests/test_data_plan.py holds golden hashes: a change of any order needs a new PLAN_VERSION.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from protoclip_scale.data.index import Index
from protoclip_scale.data.randomness import generator, permutation, raw_keys
from protoclip_scale.data.rows import pack_row_ids
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

PLAN_VERSION = 1


def check_lanes(lanes: int, world: int) -> None:
    """UserError unless ``world`` ranks can share the lanes equally."""
    if lanes % world:
        usable = ", ".join(str(count) for count in range(1, lanes + 1) if lanes % count == 0)
        raise UserError(
            f"world size {world} does not divide data.plan.lanes {lanes}: start one of {usable} ranks, or set data.plan.lanes to a multiple of {world}"
        )


def lanes_of(rank: int, world: int, lanes: int) -> range:
    """The lanes that a rank owns."""
    check_lanes(lanes, world)
    return range(rank * lanes // world, (rank + 1) * lanes // world)


@dataclass(frozen=True)
class EpisodePlan:
    """The places of one episode. Slots [s per_lane, (s+1) per_lane) of every lane, in lane order, are the batch of step s."""

    number: int
    fingerprint: str  # the plan's
    row_ids: np.ndarray  # int64 [L, lane_rows] in slot order
    epochs: np.ndarray  # int64 [L, lane_rows], the epoch each place belongs to
    slot_to_read: np.ndarray  # int64 [L, lane_rows], place in the lane's read order of each slot
    per_lane: int

    @property
    def num_lanes(self) -> int:
        return self.row_ids.shape[0]

    @property
    def lane_rows(self) -> int:
        return self.row_ids.shape[1]

    @property
    def num_steps(self) -> int:
        return self.lane_rows // self.per_lane

    def read_order(self, lane: int) -> np.ndarray:
        """Row ids of a lane in the order to read them: block after block, rows ascending inside a block. int64 [lane_rows]."""
        ordered = np.empty(self.lane_rows, dtype=np.int64)
        ordered[self.slot_to_read[lane]] = self.row_ids[lane]
        return ordered

    def spool_rows(self, lane: int) -> np.ndarray:
        """Index in ``read_order(lane)`` of every slot. int64 [lane_rows]."""
        return self.slot_to_read[lane]

    def slots(self, step: int) -> np.ndarray:
        """The slots that a step uses in every lane. int64 [per_lane]."""
        return np.arange(step * self.per_lane, (step + 1) * self.per_lane, dtype=np.int64)

    def batch_row_ids(self, step: int) -> np.ndarray:
        """Row ids of the global batch of a step, lane after lane. int64 [global_batch]."""
        return self.row_ids[:, step * self.per_lane : (step + 1) * self.per_lane].reshape(-1)

    def occurs_once(self) -> np.ndarray:
        """bool [L, lane_rows]: rows without a second place in this episode (all of them unless it crosses an epoch's end)."""
        _, inverse, counts = np.unique(self.row_ids, return_inverse=True, return_counts=True)
        return (counts[inverse] == 1).reshape(self.row_ids.shape)


class Plan:
    """The order of rows of a whole run. ``episode(k)`` takes memory and time in proportion to the episode, not to the sources."""

    def __init__(self, index: Index, settings: schema.Plan):
        self.index = index
        self.settings = settings
        available = index.num_rows
        wanted = settings.epoch_rows
        if wanted is not None and wanted > available:
            raise UserError(f"data.plan.epoch_rows {wanted} is more than the {available} rows of the sources; lower it or set it to null")
        self.num_rows = wanted or available
        self._check_sizes()
        self.per_lane = settings.global_batch // settings.lanes
        self.steps_per_episode = settings.episode_size // settings.global_batch
        self.lane_rows = self.steps_per_episode * self.per_lane
        self.episode_size = self.lane_rows * settings.lanes
        if self.steps_per_episode == 1 and self.num_rows % self.episode_size:
            raise UserError(
                f"data.plan.episode_size {settings.episode_size} is a single global batch, and {self.num_rows} rows are not a multiple of it: "
                f"a batch across an epoch's end could hold a row twice; raise episode_size to at least {2 * settings.global_batch}"
            )
        self._threshold, self._block_rows = None, index.block_rows
        if self.num_rows < available:
            self._threshold, self._block_rows = self._draw_subset()
        assert int(self._block_rows.sum()) == self.num_rows
        self._shuffled: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _check_sizes(self) -> None:
        settings, rows = self.settings, self.num_rows
        if settings.global_batch > rows:
            raise UserError(f"data.plan.global_batch {settings.global_batch} is more than the {rows} rows of an epoch; lower it")
        rounded = settings.episode_size // settings.global_batch * settings.global_batch
        if rounded > rows:
            largest = rows // settings.global_batch * settings.global_batch
            raise UserError(
                f"data.plan.episode_size {settings.episode_size} ({rounded} in whole global batches of {settings.global_batch}) "
                f"is more than the {rows} rows of an epoch; use at most {largest}"
            )

    @property
    def fingerprint(self) -> str:
        """Changes when any batch of any episode could change."""
        settings = "|".join(f"{name}={value}" for name, value in sorted(self.settings.model_dump().items()))
        return hashlib.sha256(f"plan {PLAN_VERSION}|{settings}|{self.index.fingerprint}".encode()).hexdigest()

    def _subset_keys(self, block: int) -> np.ndarray:
        source, number = int(self.index.block_source[block]), int(self.index.block_number[block])
        return raw_keys(int(self.index.block_rows[block]), self.settings.seed, "subset", source, number)

    def _draw_subset(self) -> tuple[np.uint64, np.ndarray]:
        """A uniform subset: the rows with the ``num_rows`` smallest keys. One pass, in memory of the order of sqrt(rows)."""
        share = 2.0**64 / self.index.num_rows
        margin = 10 * math.sqrt(self.num_rows) + 100  # ten deviations: the threshold lies between low and high
        low = np.uint64(max(0.0, self.num_rows - margin) * share)
        high = np.uint64(min(int((self.num_rows + margin) * share), 2**64 - 1))
        certain = np.zeros(len(self.index.block_rows), dtype=np.int64)
        undecided, undecided_block = [], []
        for block in range(len(certain)):
            keys = self._subset_keys(block)
            certain[block] = np.count_nonzero(keys < low)
            near = keys[(keys >= low) & (keys <= high)]
            undecided.append(near)
            undecided_block.append(np.full(len(near), block))
        near, near_block = np.concatenate(undecided), np.concatenate(undecided_block)
        missing = self.num_rows - int(certain.sum())
        assert 0 < missing <= len(near)
        threshold = np.partition(near, missing - 1)[missing - 1]
        return threshold, certain + np.bincount(near_block[near <= threshold], minlength=len(certain))

    def _blocks_of_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(blocks of the epoch in stream order, number of rows up to the end of each); the last epoch asked for is kept."""
        if epoch not in self._shuffled:
            order = permutation(len(self._block_rows), self.settings.seed, "blocks", epoch)
            self._shuffled = {epoch: (order, np.cumsum(self._block_rows[order]))}
        return self._shuffled[epoch]

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """(epoch, block, first, last) of the parts of blocks that fill stream places [start, stop)."""
        place = start
        while place < stop:
            epoch, offset = divmod(place, self.num_rows)
            order, ends = self._blocks_of_epoch(epoch)
            at = int(np.searchsorted(ends, offset, side="right"))
            block = int(order[at])
            first = offset - (int(ends[at]) - int(self._block_rows[block]))
            last = min(int(self._block_rows[block]), first + stop - place)
            yield epoch, block, first, last
            place += last - first

    def _rows_of_piece(self, epoch: int, block: int, first: int, last: int) -> np.ndarray:
        """Row ids at stream places first..last of a block."""
        source, number = int(self.index.block_source[block]), int(self.index.block_number[block])
        rows = permutation(int(self._block_rows[block]), self.settings.seed, "rows", epoch, source, number)[first:last]
        if self._threshold is not None:
            rows = np.flatnonzero(self._subset_keys(block) <= self._threshold)[rows]
        return pack_row_ids(source, number, rows)

    def episode(self, number: int) -> EpisodePlan:
        """The plan of episode ``number`` >= 0; 200,000 rows take some tens of milliseconds."""
        lanes, seed = self.settings.lanes, self.settings.seed
        row_ids = np.empty(self.episode_size, dtype=np.int64)
        epochs, pieces = np.empty_like(row_ids), np.empty_like(row_ids)
        place = 0
        for piece, (epoch, block, first, last) in enumerate(self._pieces(number * self.episode_size, (number + 1) * self.episode_size)):
            here = slice(place, place + last - first)
            row_ids[here], epochs[here], pieces[here] = self._rows_of_piece(epoch, block, first, last), epoch, piece
            place += last - first
        row_ids, epochs, pieces = (array.reshape(lanes, self.lane_rows) for array in (row_ids, epochs, pieces))
        slot_to_read = np.empty_like(row_ids)
        for lane in range(lanes):
            reading = np.lexsort((row_ids[lane], pieces[lane]))
            slot_to_read[lane] = permutation(self.lane_rows, seed, "slots", number, lane)
            shuffled = reading[slot_to_read[lane]]
            row_ids[lane], epochs[lane] = row_ids[lane][shuffled], epochs[lane][shuffled]
        if epochs.min() != epochs.max():
            _separate_repeats(row_ids, (epochs, slot_to_read), self.per_lane, generator(seed, "repeats", number).bit_generator)
        return EpisodePlan(number, self.fingerprint, row_ids, epochs, slot_to_read, self.per_lane)


def _separate_repeats(row_ids: np.ndarray, companions: tuple[np.ndarray, ...], per_lane: int, bits: np.random.BitGenerator) -> None:
    """Swaps slots inside lanes, in place, until no step holds a row twice. An episode across an epoch's end may hold a row twice.

    A place whose row stands in the same step twice changes places with a random slot of its lane in another step, if possible one that makes no
    new repeat. A solution exists from two steps on: take the two places of a row as an edge between their lanes; every graph can be oriented so
    that in- and out-degree of each vertex differ by at most one.
    """
    lane_rows = row_ids.shape[1]
    flat = [array.reshape(-1) for array in (row_ids, *companions)]
    order = np.argsort(flat[0], kind="stable")
    twice = np.flatnonzero(flat[0][order[1:]] == flat[0][order[:-1]])
    partner = np.full(row_ids.size, -1, dtype=np.int64)
    partner[order[twice]], partner[order[twice + 1]] = order[twice + 1], order[twice]
    every = np.arange(row_ids.size)
    step = every % lane_rows // per_lane

    def swap(one: int, other: int) -> None:
        for array in flat:
            array[one], array[other] = array[other], array[one]
        first, second = int(partner[one]), int(partner[other])
        partner[one], partner[other] = second, first
        if second >= 0:
            partner[second] = one
        if first >= 0:
            partner[first] = other

    def repeated(place: int) -> bool:
        return partner[place] >= 0 and step[place] == step[partner[place]]

    waiting = [int(place) for place in every[(partner > every) & (step == step[partner])]]
    for _ in range(1000 * (len(waiting) + len(twice) + 1)):
        while waiting and not repeated(waiting[-1]):
            waiting.pop()
        if not waiting:
            return
        place = waiting[-1]
        if int(bits.random_raw()) & 1:
            place = int(partner[place])
        lane_start = place // lane_rows * lane_rows
        for guess in bits.random_raw(32):
            other = lane_start + int(guess) % lane_rows
            elsewhere = step[other] != step[place]
            if elsewhere and not (partner[other] >= 0 and step[partner[other]] == step[place]):
                swap(place, other)
                break
        else:
            other = lane_start + int(bits.random_raw()) % lane_rows
            if step[other] != step[place]:
                swap(place, other)
                waiting.append(place)
    raise AssertionError("repeated rows could not be separated")
