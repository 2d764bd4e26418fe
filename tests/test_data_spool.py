"""The spool: the right rows, written once, resumed where it was, never half a file under a final name."""

import errno
import os
import sys
from collections import namedtuple

import numpy as np
import pyarrow.parquet as pq
import pytest

from protoclip_scale.data import spool as spool_module
from protoclip_scale.data.index import index_of, open_readers
from protoclip_scale.data.plan import Plan
from protoclip_scale.data.rows import unpack_row_ids
from protoclip_scale.data.spool import Spool, lane_bytes
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema
from tests.support import CORPUS, spawn

LANES = range(4)


@pytest.fixture(scope="module")
def corpus():
    """(plan, readers) on the demo corpus."""
    data = schema.Data(
        root=str(CORPUS), sources=[{"files": "train-*.parquet"}], plan={"episode_size": 1024, "lanes": 4, "global_batch": 64}
    )
    readers = open_readers(data)
    return Plan(index_of(readers), data.plan), readers


class CountingReaders(list):
    """Readers that note which blocks were read."""

    def __init__(self, readers):
        self.blocks = []
        super().__init__(self._Counting(reader, self.blocks) for reader in readers)

    class _Counting:
        def __init__(self, reader, blocks):
            self.reader, self.blocks = reader, blocks

        def __getattr__(self, name):
            return getattr(self.reader, name)

        def read(self, block):
            self.blocks.append(block)
            return self.reader.read(block)


def test_a_spooled_slot_holds_the_row_that_the_plan_names(corpus, tmp_path):
    plan, readers = corpus
    episode = plan.episode(4)  # across the end of the first epoch
    assert episode.epochs.min() < episode.epochs.max()
    spool = Spool(tmp_path, "run")
    progress = []
    spool.fill(episode, 4, LANES, readers, lambda done, total: progress.append((done, total)))
    assert progress == [(number + 1, len(progress)) for number in range(len(progress))]
    rng = np.random.default_rng(0)
    for lane in LANES:
        spooled = spool.open(4, lane)
        assert len(spooled) == plan.lane_rows
        assert np.array_equal(spooled.row_ids, episode.read_order(lane))
        for slot in rng.integers(plan.lane_rows, size=10):
            _, block, row = (int(part) for part in unpack_row_ids(episode.row_ids[lane, slot]))
            file, group = readers[0].file_of_block(block)
            expected = pq.ParquetFile(file).read_row_group(group).slice(row, 1).to_pylist()[0]
            assert spooled.row(int(episode.spool_rows(lane)[slot])) == (expected["image"]["bytes"], expected["caption"])
        assert lane_bytes(episode, lane, readers) == pytest.approx(spooled.path.stat().st_size, rel=0.25)


def test_complete_lanes_are_kept_and_a_shared_block_is_read_once(corpus, tmp_path):
    plan, readers = corpus
    episode, counting = plan.episode(0), CountingReaders(readers)
    spool = Spool(tmp_path, "run")
    spool.fill(episode, 0, LANES, counting)
    assert len(counting.blocks) == len(set(counting.blocks))
    times = [spool.open(0, lane).path.stat().st_mtime_ns for lane in LANES]
    spool.open(0, 2).path.unlink()
    counting.blocks.clear()
    spool.fill(episode, 0, LANES, counting)
    assert set(counting.blocks) == set(unpack_row_ids(episode.row_ids[2])[1].tolist())
    assert [spool.open(0, lane).path.stat().st_mtime_ns == times[lane] for lane in LANES] == [True, True, False, True]


@pytest.mark.parametrize("break_at", [1, 5, 9])
def test_a_fill_that_dies_leaves_only_whole_lanes_and_goes_on(corpus, tmp_path, break_at):
    plan, readers = corpus
    episode = plan.episode(1)

    def die(done, total):
        if done == break_at:
            raise KeyboardInterrupt

    spool = Spool(tmp_path / "broken", "run")
    with pytest.raises(KeyboardInterrupt):
        spool.fill(episode, 1, LANES, readers, die)
    files = list((tmp_path / "broken").rglob("*.*"))
    assert all(file.name in {f"lane-{lane:05d}.arrow" for lane in LANES} for file in files)
    assert all(spool.is_complete(episode, lane) == any(file.name == f"lane-{lane:05d}.arrow" for file in files) for lane in LANES)
    spool.fill(episode, 1, LANES, readers)
    whole = Spool(tmp_path / "whole", "run")
    whole.fill(episode, 1, LANES, readers)
    for lane in LANES:
        assert spool.open(1, lane).path.read_bytes() == whole.open(1, lane).path.read_bytes()


def test_files_of_another_run_plan_or_half_written_are_not_used(corpus, tmp_path):
    plan, readers = corpus
    Spool(tmp_path, "run").fill(plan.episode(0), 0, [0, 1], readers)
    assert Spool(tmp_path, "run").is_complete(plan.episode(0), 0)
    assert not Spool(tmp_path, "another run").is_complete(plan.episode(0), 0)
    other = Plan(plan.index, plan.settings.model_copy(update={"seed": 1}))
    assert not Spool(tmp_path, "run").is_complete(other.episode(0), 0)
    path = Spool(tmp_path, "run").open(0, 1).path
    path.write_bytes(path.read_bytes()[:-100])
    assert not Spool(tmp_path, "run").is_complete(plan.episode(0), 1)
    path.write_bytes(b"")
    assert not Spool(tmp_path, "run").is_complete(plan.episode(0), 1)
    Spool(tmp_path, "another run").fill(plan.episode(0), 0, [0, 1], readers)
    assert Spool(tmp_path, "another run").is_complete(plan.episode(0), 1)


def test_at_most_two_episodes_lie_on_disk(corpus, tmp_path):
    plan, readers = corpus
    spool = Spool(tmp_path, "run")
    for number in (0, 1, 2, 3):
        spool.fill(plan.episode(number), number, [0], readers)
        assert sorted(path.name for path in tmp_path.iterdir()) == [f"episode-{kept:06d}" for kept in range(max(0, number - 1), number + 1)]
    spool.drop(3)
    spool.drop(3)
    assert [path.name for path in tmp_path.iterdir()] == ["episode-000002"]


def test_a_full_disk_is_told_before_and_while_writing(corpus, tmp_path, monkeypatch):
    plan, readers = corpus
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(spool_module.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 1000))
        with pytest.raises(UserError, match=r"disk full: the spool needs \d+ MB, has 0 MB at .*run.scratch_dir"):
            Spool(tmp_path, "run").fill(plan.episode(0), 0, LANES, readers)
    assert not list(tmp_path.rglob("lane*"))

    def no_space(done, total):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="disk full"):
        Spool(tmp_path, "run").fill(plan.episode(0), 0, LANES, readers, no_space)
    assert not list(tmp_path.rglob("lane*"))


def environment_after_a_fill(rank: int, world: int, folder: str) -> list[bool]:
    """Whether what the first block needs was imported while it was read, and whether that left the environment as it was."""
    data = schema.Data(root=str(CORPUS), sources=[{"files": "train-*.parquet"}], plan={"episode_size": 128, "lanes": 4, "global_batch": 64})
    readers = open_readers(data)
    before, imported = dict(os.environ), "scipy.io" in sys.modules
    Spool(folder, "run").fill(Plan(index_of(readers), data.plan).episode(0), 0, LANES, readers)
    return [not imported and "scipy.io" in sys.modules, dict(os.environ) == before]


def test_the_first_block_leaves_the_environment_alone(tmp_path):
    """It is read in a thread beside training, where C code may look the environment up at any time."""
    assert spawn(environment_after_a_fill, 1, str(tmp_path)) == [[True, True]]
