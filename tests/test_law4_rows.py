"""Law 4 (with law 3): every decodable row exactly once per epoch, apart from listed substitutes, for any world size, any worker count, and after any kill.

A property of plan, spool and batches over hundreds of random sources and lives of a run, all in this process, with readers that hold their rows in memory. The same with real
processes and files: tests/test_law4_runs.py.
"""

import functools
import hashlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from protoclip_scale.data.batches import Batch, EpisodeBatches, make_loader
from protoclip_scale.data.index import Index, index_of
from protoclip_scale.data.plan import EpisodePlan, Plan, lanes_of
from protoclip_scale.data.quarantine import Quarantine, read_quarantine
from protoclip_scale.data.rows import pack_row_ids, unpack_row_ids
from protoclip_scale.data.spool import Spool
from protoclip_scale.engine.context import BadRows
from protoclip_scale.recipe import schema
from tests.runs import check_rows, rows_of_stream
from tests.test_data_batches import Letters, text_of

SIZE = 8
NUM_SEEDS = 200
WORLDS = (1, 2, 4)


# Sources: numbers of rows of the blocks.
def fewer_blocks_than_ranks(rng: np.random.Generator) -> list[int]:
    return rng.integers(25, 45, rng.integers(2, 4)).tolist() if rng.random() < 0.5 else [int(rng.integers(45, 80))]


def one_huge(rng: np.random.Generator) -> list[int]:
    return rng.permutation([int(rng.integers(45, 70)), *rng.integers(1, 5, 6).tolist()]).tolist()


def many_tiny(rng: np.random.Generator) -> list[int]:
    return [3] * 10 + rng.integers(0, 4, 30).tolist()  # some are empty


def uneven(rng: np.random.Generator) -> list[int]:
    return [0, *rng.integers(0, 16, 6).tolist(), 0, 42]


SHAPES = (fewer_blocks_than_ranks, one_huge, many_tiny, uneven)


@functools.cache
def picture(number: int) -> bytes:
    """A picture of one colour that knows its number below 512: three digits to the base 8, far enough apart for JPEG."""
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), tuple(16 + 32 * (number >> shift & 7) for shift in (0, 3, 6))).save(buffer, "JPEG")
    return buffer.getvalue()


def numbers_of(images: torch.Tensor) -> list[int]:
    """The numbers of decoded pictures uint8 [B, 3, SIZE, SIZE]."""
    digits = images[:, :, SIZE // 2, SIZE // 2].long() // 32
    return (digits * torch.tensor([1, 8, 64])).sum(dim=1).tolist()


def broken(number: int) -> bytes | None:
    return (b"", None, b"not an image", picture(number)[:40])[number % 4]


class RowsInMemory:
    """What ``data.sources.BlockReader`` promises to the spool; row ``first + n`` is the n-th of the source."""

    extra_types: dict[str, pa.DataType] = {}

    def __init__(self, source: schema.Source, block_rows: list[int], first: int, bad: set[int]):
        self.source = source
        self.name = self.fingerprint = source.name
        self.block_rows = np.array(block_rows, dtype=np.int64)
        self.block_bytes = self.block_rows * 100
        self.starts = first + np.concatenate([[0], np.cumsum(self.block_rows)])
        self.bad = bad

    def file_of_block(self, block: int) -> tuple[str, int]:
        return self.name, block

    def rows_at_once(self, block: int) -> int | None:
        return None if block % 3 else 7  # a few at a time, as images that are files are read

    def read(self, block: int, images: bool | frozenset[int] = True) -> pa.Table:
        numbers = range(self.starts[block], self.starts[block + 1])
        wanted = numbers if images is True else {numbers[row] for row in images}
        encoded = [None if number not in wanted else broken(number) if number in self.bad else picture(number) for number in numbers]
        captions = pa.array([[f"row {number}"] for number in numbers], pa.list_(pa.string()))
        return pa.table({"image": pa.array(encoded, pa.large_binary()), "captions": captions})


@dataclass
class Case:
    """Sources, their bad rows and a plan."""

    readers: list[RowsInMemory]
    data: schema.Data
    plan: Plan
    bad: set[int]  # numbers of rows

    @property
    def num_episodes(self) -> int:
        """Enough for two epochs; with weights for one pass and a half over every source."""
        if not self.plan.index.weights:
            return -(-2 * self.plan.num_rows // self.plan.episode_size)
        shares = np.array(self.plan.index.weights) / sum(self.plan.index.weights)
        passes = shares * self.plan.episode_size / [rows_of_stream(self.plan, source) for source in range(len(shares))]
        return int(np.ceil(1.5 / passes.min()))

    def numbers(self, row_ids) -> np.ndarray:
        """The rows' numbers: their place among all rows of all sources."""
        source, block, row = unpack_row_ids(row_ids)
        return np.array([self.readers[s].starts[b] for s, b in zip(source.tolist(), block.tolist(), strict=True)]) + row


def random_case(seed: int) -> Case:
    """One source or two, with weights, limits or neither; up to a tenth of the rows bad; at least 10 rows in a lane of an episode, so that each bad
    one finds a substitute."""
    rng = np.random.default_rng(seed)
    blocks = [SHAPES[seed % len(SHAPES)](rng), *([many_tiny(rng)] if rng.random() < 0.4 else [])]
    sizes = [sum(rows) for rows in blocks]
    bad = {int(number) for number in np.flatnonzero(rng.random(sum(sizes)) < 0.1 * (seed % 3 > 0))}
    limits = [int(rng.integers(max(40, size * 2 // 3), size)) if rng.random() < 0.3 else None for size in sizes]
    counted = [limit or size for limit, size in zip(limits, sizes, strict=True)]
    weights = rng.integers(1, 4, len(sizes)).tolist() if rng.random() < 0.5 else [None] * len(sizes)
    longest = sum(counted)  # an episode; with weights no source may give more than it has
    if weights[0]:
        longest = min(int((rows - 3) * sum(weights) / weight) for rows, weight in zip(counted, weights, strict=True))
    if longest < 40:
        weights, longest = [None] * len(sizes), sum(counted)
    epoch_rows = int(rng.integers(max(40, longest * 3 // 4), longest + 1)) if limits == weights == [None] * len(sizes) and rng.random() < 0.5 else None
    batch = 4 * int(rng.integers(1, 1 + min(3, (epoch_rows or longest) // 40)))
    steps = int(rng.integers(-(-40 // batch), (epoch_rows or longest) // batch + 1))
    plan = {"seed": seed, "epoch_rows": epoch_rows, "episode_size": steps * batch, "lanes": 4, "global_batch": batch}
    sources = [{"name": f"source {number}", "files": "unused.parquet", "weight": weights[number], "rows": limits[number]} for number in range(len(sizes))]
    data = schema.Data(sources=sources, plan=plan, augmentation="none")
    readers = [RowsInMemory(data.sources[number], blocks[number], sum(sizes[:number]), bad) for number in range(len(sizes))]
    return Case(readers, data, Plan(index_of(readers), data.plan), bad)


class Killed(BaseException):
    """SIGKILL, in one process."""


class Run:
    """What the engine does with plan, spool and batches, without a model: ranks in lock step, a cursor saved every few steps and after each episode.

    ``history``: of every step of the weights that live, the batches of the ranks.
    """

    def __init__(self, case: Case, folder: Path, save_every: int, loader: Callable = make_loader, lanes: Callable = lanes_of):
        self.case, self.folder, self.save_every, self.loader, self.lanes = case, folder, save_every, loader, lanes
        self.num_steps = case.num_episodes * case.plan.steps_per_episode
        self.saved = 0
        self.history: list[list[Batch]] = []

    def attempt(self, world: int, machines: int, disk: str, die_after_steps: int | None = None, die_after_blocks: int | None = None) -> None:
        """From the last save until a death or the end. ``disk``: machines of other names have empty spools."""
        del self.history[self.saved :]
        lists = [BadRows(Quarantine(self.folder / "quarantine" / f"rank-{rank:05d}.jsonl"), self.case.readers, 1.0) for rank in range(world)]
        blocks_read = steps_taken = 0

        def read_one(done: int, total: int) -> None:
            nonlocal blocks_read
            blocks_read += 1
            if blocks_read == die_after_blocks:
                raise Killed

        while len(self.history) < self.num_steps:
            episode, first_step = divmod(len(self.history), self.case.plan.steps_per_episode)
            plan = self.case.plan.episode(episode)
            spools = [Spool(self.folder / f"{disk}-{machine}", "run") for machine in range(machines)]
            of_machine = [lanes_of(machine, machines, plan.num_lanes) for machine in range(machines)]
            for spool, lanes in zip(spools, of_machine, strict=True):
                spool.fill(plan, episode, lanes, self.case.readers, on_block=read_one)
            for parts in zip(*(self._batches(plan, spools[rank * machines // world], rank, world, first_step) for rank in range(world)), strict=True):
                self.history.append(list(parts))
                for bad_rows, batch in zip(lists, parts, strict=True):
                    bad_rows.add(batch)
                steps_taken += 1
                if steps_taken == die_after_steps:
                    raise Killed
                if len(self.history) % self.save_every == 0 or len(self.history) % plan.num_steps == 0:
                    self.saved = len(self.history)
                if len(self.history) == self.num_steps:
                    return

    def _batches(self, plan: EpisodePlan, spool: Spool, rank: int, world: int, first_step: int) -> Iterator[Batch]:
        lanes = self.lanes(rank, world, plan.num_lanes)
        return self.loader(EpisodeBatches(self.case.data, SIZE, Letters(), plan, spool, lanes, "train", self.case.data.plan.seed), first_step)


def live(run: Run, rng: np.random.Generator, worlds: list[int]) -> None:
    """One attempt for each world size; all but the last die somewhere."""
    for number, world in enumerate(worlds):
        machines = int(rng.choice([count for count in WORLDS if world % count == 0]))
        death = {"die_after_steps": int(rng.integers(1, 2 + run.num_steps // 2))} if rng.random() < 0.7 else {"die_after_blocks": int(rng.integers(1, 30))}
        try:
            run.attempt(world, machines, f"disk-{rng.integers(2)}", **(death if number < len(worlds) - 1 else {}))
            return  # to the end, or before the death could come
        except Killed:
            pass
    raise AssertionError("the last attempt died")


def check(run: Run) -> None:
    """Law 4 of a finished run; each picture and caption is that of its row."""
    history = []
    for parts in run.history:
        for batch in parts:
            numbers = run.case.numbers(batch.row_ids.numpy()).tolist()
            assert numbers_of(batch.images) == numbers
            assert [text_of(batch, place) for place in range(len(numbers))] == [f"row {number}" for number in numbers]
        history.append(tuple(torch.cat([getattr(batch, name) for batch in parts]).numpy() for name in ("positions", "row_ids")))
    listed = read_quarantine(run.folder / "quarantine")
    for file in (run.folder / "quarantine").glob("*.jsonl"):
        assert len(file.read_text().splitlines()) == len(set(file.read_text().splitlines()))
    bad_ids = {row_id for row_id in _all_row_ids(run.case) if int(run.case.numbers([row_id])[0]) in run.case.bad}
    check_rows(run.case.plan, history, bad_ids, set(listed))


def _all_row_ids(case: Case) -> list[int]:
    index: Index = case.plan.index
    return [
        int(row_id)
        for source, block, rows in zip(index.block_source, index.block_number, index.block_rows, strict=True)
        for row_id in pack_row_ids(source, block, np.arange(rows))
    ]


def digest(parts: list[Batch]) -> str:
    """Of a global batch, however many ranks made it."""
    whole = hashlib.sha256()
    for name in ("images", "token_ids", "token_lengths", "positions", "row_ids", "slots"):
        whole.update(torch.cat([getattr(batch, name) for batch in parts]).numpy().tobytes())
    return whole.hexdigest() + repr([entry for batch in parts for entry in batch.replaced])


def lived(seed: int, folder: Path) -> Run:
    """A run of a random case that was killed a few times and then ended."""
    rng = np.random.default_rng([seed, 1])
    run = Run(random_case(seed), folder, save_every=int(rng.integers(1, 9)))
    live(run, rng, rng.choice(WORLDS, rng.integers(2, 6)).tolist())
    return run


@pytest.mark.parametrize("seeds", [range(32), range(32, 64), *(pytest.param(range(at, at + 84), marks=pytest.mark.slow) for at in (64, 148, 232, 316))], ids=str)
def test_every_decodable_row_once_per_epoch_whatever_happens(tmp_path, seeds):
    """Kills while fetching and training, spools that survive or not, ranks and machines that change, bad rows: as if nothing had happened."""
    for seed in seeds:
        killed = lived(seed, tmp_path / f"{seed}")
        check(killed)
        if seed % 4 == 1:
            calm = Run(killed.case, tmp_path / f"{seed}-calm", save_every=1)
            calm.attempt(1, 1, "disk")
            assert [digest(parts) for parts in killed.history] == [digest(parts) for parts in calm.history], seed


def test_rows_with_two_places_in_an_episode_stand_in_when_no_other_can(tmp_path):
    """A block that ends an epoch and begins the next one may fill two whole lanes of an episode; a fifth of its rows are bad."""
    num_lent = 0
    for seed in range(16):
        bad = {int(number) for number in np.flatnonzero(np.random.default_rng(seed).random(80) < 0.2)}
        data = schema.Data(sources=[{"files": "unused.parquet"}], plan={"seed": seed, "episode_size": 64, "lanes": 4, "global_batch": 8}, augmentation="none")
        readers = [RowsInMemory(data.sources[0], [16] * 5, 0, bad)]
        run = Run(Case(readers, data, Plan(index_of(readers), data.plan), bad), tmp_path / f"{seed}", save_every=1)
        run.attempt(1, 1, "disk")
        check(run)
        for step, parts in enumerate(run.history):
            episode = run.case.plan.episode(step // 8)
            twice = set(episode.row_ids[episode.other_places() >= 0].tolist())
            num_lent += len(twice & set(parts[0].row_ids.tolist()) - set(episode.batch_row_ids(step % 8).tolist()))
    assert num_lent > 20


def one_step_off(batches: EpisodeBatches, first_step: int) -> Iterator[Batch]:
    return make_loader(batches, first_step - (first_step > 0))


def one_step_skipped(batches: EpisodeBatches, first_step: int) -> Iterator[Batch]:
    skip = 0 < first_step < len(batches) - 1
    yield from make_loader(batches, first_step + skip)
    yield from make_loader(batches, len(batches) - skip)


def one_lane_skipped(rank: int, world: int, lanes: int) -> list[int]:
    own = list(lanes_of(rank, world, lanes))
    return [*own[:-1], own[0]] if world == 2 and rank == 1 else own


def read_again_one_row_off(reader: RowsInMemory, block: int, images=True, read: Callable = RowsInMemory.read) -> pa.Table:
    table = read(reader, block)
    seen = reader.__dict__.setdefault("seen", set())
    again = block in seen and len(table) > 1
    seen.add(block)
    return pa.concat_tables([table.slice(1), table.slice(0, 1)]) if again else table


def forgets_odd_rows(quarantine: Quarantine, row_id: int, *about: object, record: Callable = Quarantine.record) -> bool:
    return row_id % 2 == 0 and record(quarantine, row_id, *about)


BREAKS: dict[str, dict] = {
    "none": {},
    "resumed one step off": {"loader": one_step_off},
    "resumed one step late": {"loader": one_step_skipped},
    "a lane skipped": {"lanes": one_lane_skipped},
    "a block read again is one row off": {"patch": (RowsInMemory, "read", read_again_one_row_off)},
    "a bad row is not listed": {"patch": (Quarantine, "record", forgets_odd_rows)},
}


@pytest.mark.parametrize("broken_by", BREAKS)
def test_a_break_of_the_law_is_seen(tmp_path, monkeypatch, broken_by):
    """The test above can see the faults it looks for."""
    settings = dict(BREAKS[broken_by])
    if "patch" in settings:
        monkeypatch.setattr(*settings.pop("patch"))
    run = Run(random_case(5), tmp_path, save_every=2, **settings)
    assert run.case.bad and run.case.plan.steps_per_episode > 6
    for world, machines, disk, death in ((2, 1, "a", {"die_after_steps": 5}), (4, 2, "b", {"die_after_blocks": 5}), (2, 2, "c", {"die_after_steps": 4})):
        with pytest.raises(Killed):
            run.attempt(world, machines, disk, **death)
    assert run.saved > 4
    run.attempt(1, 1, "d")
    if broken_by == "none":
        check(run)
        return
    with pytest.raises(AssertionError):
        check(run)
