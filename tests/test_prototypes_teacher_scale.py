"""Millions of rows: memory stays bounded, in a process of its own, above what it holds after its imports."""

import resource
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from protoclip_scale.data.rows import pack_row_ids
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.prototypes.teacher import TeacherFeatures
from protoclip_scale.prototypes.teacher_extraction import extract_teacher
from protoclip_scale.recipe import schema
from tests.support import spawn
from tests.teachers import HashEncoder


class NumberedReader:
    """A source of captions that are numbers, made when a block is read."""

    def __init__(self, name: str, blocks: int, rows: int = 1000):
        self.name = self.fingerprint = name
        self.block_rows = np.full(blocks, rows)
        self.source = schema.Source(files=f"{name}.parquet")

    def read(self, block: int, images: bool = True) -> pa.Table:
        first = int(self.block_rows[:block].sum())
        captions = pa.array(np.arange(first, first + self.block_rows[block])).cast(pa.string())
        return pa.table({"captions": pa.ListArray.from_arrays(pa.array(np.arange(len(captions) + 1), pa.int32()), captions)})


class WideEncoder(HashEncoder):
    """A cheap function of a number, 64 wide."""

    width = 64

    def encode(self, rows: pa.Table) -> np.ndarray:
        return wide_features(pa.compute.list_flatten(rows.column("captions").combine_chunks()).cast(pa.int64()).to_numpy())


def wide_features(numbers: np.ndarray) -> np.ndarray:
    bits = (numbers[:, None].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)) >> np.arange(64, dtype=np.uint64)
    return ((bits & np.uint64(1)) - np.float32(0.5)).astype(np.float32) * np.linspace(2, 0.1, 64, dtype=np.float32)


def _extract(rank: int, world: int, folder: str, blocks: int) -> dict[str, int]:
    from protoclip_scale.engine import strategy

    strategy.start(10)
    readers = [NumberedReader("first", blocks), NumberedReader("second", blocks // 2)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    extract_teacher(readers, WideEncoder(), folder, dim=32, pca_rows=65_536, report=lambda line: None)
    return {"peak": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10}


def _memory(folder: Path, blocks: int, world: int) -> int:
    return max(result["peak"] for result in spawn(_extract, world, str(folder), blocks))


@pytest.mark.slow
def test_memory_does_not_grow_from_150_thousand_to_two_million_rows(tmp_path):
    small = _memory(tmp_path / "small", 100, 2)
    large = _memory(tmp_path / "large", 1400, 2)
    print(f"peak above imports: {small / 2**20:.0f} MiB for 150,000 rows, {large / 2**20:.0f} MiB for 2,100,000")
    assert large < 160 << 20 and large < small + (48 << 20)
    store = FeatureStore.open(tmp_path / "large")
    assert store.part_rows == [1_400_000, 700_000]
    teacher = TeacherFeatures(store, np.array([0, 1]), [np.arange(1401) * 1000, np.arange(701) * 1000])
    blocks = np.random.default_rng(0).integers(0, 700, 500)
    rows = np.random.default_rng(1).integers(0, 1000, 500)
    sources = np.arange(500) % 2
    expected = wide_features(blocks * 1000 + rows)
    found = teacher.rows(pack_row_ids(sources, blocks, rows))
    from protoclip_scale.prototypes.teacher_pca import Projection

    np.testing.assert_allclose(found, Projection.load(tmp_path / "large" / "pca.safetensors")(expected), atol=2e-3)


def test_a_disk_that_is_too_small_is_told_before_anything_is_encoded(tmp_path, monkeypatch):
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free._replace(free=100_000))
    with pytest.raises(UserError, match=r"disk full: the features need \d+ MB"):
        extract_teacher([NumberedReader("a", 20)], WideEncoder(), tmp_path / "teacher", dim=32, report=lambda line: None)
    assert not (tmp_path / "teacher.partial").exists()


def test_a_source_without_captions_is_refused_by_name(tmp_path):
    class Silent(NumberedReader):
        def read(self, block: int, images: bool = True) -> pa.Table:
            return pa.table({"captions": pa.array([[""], [], None, [" "]], pa.list_(pa.string()))})

    with pytest.raises(UserError, match=r"source 'mute' has no caption in any row of caption; correct data\.sources columns\.caption"):
        extract_teacher([NumberedReader("a", 2), Silent("mute", 3, 4)], WideEncoder(), tmp_path / "teacher", dim=2, report=lambda line: None)


def test_progress_says_how_far_and_how_long(tmp_path, monkeypatch):
    from protoclip_scale.prototypes import teacher_writing

    monkeypatch.setattr(teacher_writing, "REPORT_SECONDS", 0)
    lines = []
    extract_teacher([NumberedReader("a", 3)], WideEncoder(), tmp_path / "teacher", dim=2, report=lines.append)
    assert lines[0].startswith("encoding for the PCA: 1,000 of 3,000 rows, ") and lines[0].endswith(" left")
    assert any(line.startswith("PCA 64 -> 2 keeps ") for line in lines) and lines[-1].startswith("encoding: 3,000 of 3,000 rows")
