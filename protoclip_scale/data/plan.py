"""Which row stands in which place of which batch: a pure function of the index and ``data.plan``. FROZEN.

The stream is perm(0) ++ perm(1) ++ ... (``data/streams.py``); sources with weights have a stream each. Episode k is places [kS, (k+1)S) of the
stream. It is cut into L lanes, and each lane is permuted, so that a batch mixes L distant parts of the stream. Two runs with equal ``data.plan`` and
sources see the same batches whatever else differs. tests/test_data_plan.py holds golden hashes: a change of any order needs a new PLAN_VERSION.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from protoclip_scale.data.index import Index
from protoclip_scale.data.randomness import generator, permutation
from protoclip_scale.data.repeats import separate_repeats
from protoclip_scale.data.streams import Mixture, Stream, Subset
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
    epochs: np.ndarray  # int64 [L, lane_rows], the epoch each place belongs to (with weights: the pass over its source)
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

    def other_places(self) -> np.ndarray:
        """Where else in the episode the row of each place stands, as lane x lane_rows + slot; -1 if nowhere, as ever unless an epoch ends in the episode.
        int64 [L, lane_rows]."""
        rows = self.row_ids.reshape(-1)
        order = np.argsort(rows, kind="stable")
        twice = np.flatnonzero(rows[order[1:]] == rows[order[:-1]])
        other = np.full(rows.size, -1, dtype=np.int64)
        other[order[twice]], other[order[twice + 1]] = order[twice + 1], order[twice]
        return other.reshape(self.row_ids.shape)


class Plan:
    """The order of rows of a whole run. ``episode(k)`` takes memory and time in proportion to the episode, not to the sources."""

    def __init__(self, index: Index, settings: schema.Plan):
        self.index = index
        self.settings = settings
        subset = self._subset()
        available = int(subset.block_rows.sum())
        self.num_rows = settings.epoch_rows or available  # of an epoch
        self._check_sizes()
        self.per_lane = settings.global_batch // settings.lanes
        self.steps_per_episode = settings.episode_size // settings.global_batch
        self.lane_rows = self.steps_per_episode * self.per_lane
        self.episode_size = self.lane_rows * settings.lanes
        if self.steps_per_episode == 1 and (index.weights or self.num_rows % self.episode_size):
            raise UserError(
                f"data.plan.episode_size {settings.episode_size} is a single global batch, "
                + ("and sources with weights begin anew inside it: " if index.weights else f"and {self.num_rows} rows are not a multiple of it: ")
                + f"a batch across an epoch's end could hold a row twice; raise episode_size to at least {2 * settings.global_batch}"
            )
        self._rows_of = subset.row_ids
        if index.weights:
            self._pieces = Mixture(subset, index, settings.seed, self.episode_size).pieces
        else:
            stream = Stream(subset, np.arange(len(index.block_rows)), settings.seed)
            self._pieces = lambda episode: stream.pieces(episode * self.episode_size, (episode + 1) * self.episode_size)

    def _subset(self) -> Subset:
        """The rows that count: of each source ``rows`` of them, or of all together ``epoch_rows`` when no source has a weight."""
        index, wanted = self.index, self.settings.epoch_rows
        subset = Subset(index, self.settings.seed)
        for source, (name, limit) in enumerate(zip(index.source_names, index.row_limits or [None] * len(index.source_names), strict=True)):
            if limit is not None:
                if limit > index.source_rows(source):
                    raise UserError(f"data.sources {name}: rows {limit} is more than the {index.source_rows(source)} it has; lower it or leave it out")
                subset.draw([source], limit)
        if wanted is not None and not index.weights:
            if wanted > index.num_rows:
                raise UserError(f"data.plan.epoch_rows {wanted} is more than the {index.num_rows} rows of the sources; lower it or set it to null")
            subset.draw(list(range(len(index.source_names))), wanted)
        return subset

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
        mixture = "".join(f"|{name}={value}" for name, value in (("weights", self.index.weights), ("rows", self.index.row_limits)) if any(value))
        return hashlib.sha256(f"plan {PLAN_VERSION}|{settings}|{self.index.fingerprint}{mixture}".encode()).hexdigest()

    def episode(self, number: int) -> EpisodePlan:
        """The plan of episode ``number`` >= 0; 200,000 rows take some tens of milliseconds."""
        lanes, seed = self.settings.lanes, self.settings.seed
        row_ids = np.empty(self.episode_size, dtype=np.int64)
        epochs, pieces = np.empty_like(row_ids), np.empty_like(row_ids)
        place = 0
        for piece_number, piece in enumerate(self._pieces(number)):
            here = slice(place, place + piece.last - piece.first)
            row_ids[here], epochs[here], pieces[here] = self._rows_of(piece), piece.pass_number, piece_number
            place = here.stop
        assert place == self.episode_size
        row_ids, epochs, pieces = (array.reshape(lanes, self.lane_rows) for array in (row_ids, epochs, pieces))
        slot_to_read = np.empty_like(row_ids)
        for lane in range(lanes):
            reading = np.lexsort((row_ids[lane], pieces[lane]))
            slot_to_read[lane] = permutation(self.lane_rows, seed, "slots", number, lane)
            shuffled = reading[slot_to_read[lane]]
            row_ids[lane], epochs[lane] = row_ids[lane][shuffled], epochs[lane][shuffled]
        if epochs.min() != epochs.max():
            separate_repeats(row_ids, (epochs, slot_to_read), self.per_lane, generator(seed, "repeats", number).bit_generator)
        return EpisodePlan(number, self.fingerprint, row_ids, epochs, slot_to_read, self.per_lane)
