"""A store of YFCC15M's size: what writing, sealing, opening and reading it takes of memory, in a process of its own, above what its imports hold."""

import resource
import shutil
import time

import numpy as np
import pytest

from protoclip_scale.prototypes.store import FeatureStore, let_pages_go
from tests.support import spawn

DIM = 128
ALLOWED = 1 << 30


def _peak() -> int:
    """Most resident bytes this process ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def features_of(first: int, last: int) -> np.ndarray:
    """float16 [last - first, DIM], a cheap function of the rows' numbers: a wrong row or a wrong half of one is seen."""
    numbers = np.arange(first, last, dtype=np.uint32)[:, None]
    return ((numbers * np.uint32(2654435761) + np.arange(DIM, dtype=np.uint32) * np.uint32(40503)) >> np.uint32(22)).astype(np.float16)


def _write_and_read(rank: int, world: int, folder: str, rows: int, piece: int, named: bool) -> dict[str, float]:
    """Peaks above imports after each stage, and the CPU seconds of all."""
    before, started, peaks = _peak(), time.process_time(), {}
    half = rows // 2  # two parts, so that one is far longer than any block
    store = FeatureStore.create(folder, {"image": DIM}, 2, [half, rows - half], "float16", row_ids=named)
    for part, first_row in enumerate((0, half)):
        with store.writer(part) as writer:
            for start in range(0, store.part_rows[part], piece):
                stop = min(start + piece, store.part_rows[part])
                ids = {"row_ids": np.arange(first_row + start, first_row + stop)} if named else {}
                writer.write(slice(start, stop), {"image": features_of(first_row + start, first_row + stop)}, **ids)
    peaks["written"] = _peak() - before
    assert not store.unfinished()
    store.seal(allow_missing=named)
    peaks["sealed"] = _peak() - before
    opened = FeatureStore.open(folder)
    for part, first_row in enumerate((0, half)):
        for start, block in opened.blocks("image", part):
            assert np.array_equal(block, features_of(first_row + start, first_row + start + len(block)))
    peaks["read in blocks"] = _peak() - before
    anywhere = np.random.default_rng(0).integers(0, rows - half, 20_000)
    taken = opened.rows("image", 1, anywhere)
    assert np.array_equal(taken[::500], np.concatenate([features_of(half + row, half + row + 1) for row in anywhere[::500]]))
    if named:
        ids = opened.row_ids(1)
        assert np.array_equal(ids[anywhere], half + anywhere)
        let_pages_go(ids)
    peaks["read row by row"] = _peak() - before
    return {**peaks, "imports": before, "seconds": time.process_time() - started}


def _report(rows: int, found: dict[str, float]) -> None:
    stages = ", ".join(f"{name} {found[name] / 2**20:.0f}" for name in ("written", "sealed", "read in blocks", "read row by row"))
    print(f"{rows:,} rows x {DIM} float16: peak resident MiB above imports ({found['imports'] / 2**20:.0f}): {stages}; {found['seconds']:.0f} s CPU")


def test_memory_does_not_grow_with_a_store_of_150_megabytes(tmp_path):
    rows = 600_000
    [found] = spawn(_write_and_read, 1, str(tmp_path), rows, 4096, True)
    _report(rows, found)
    assert found["read in blocks"] < 48 << 20
    assert found["read row by row"] < 112 << 20 < sum(path.stat().st_size for path in tmp_path.glob("image.*"))


@pytest.mark.slow
def test_fifteen_million_rows_take_less_than_a_gigabyte(tmp_path):
    rows = 15_400_000
    needed = FeatureStore.bytes_needed({"image": DIM}, rows, "float16")
    if shutil.disk_usage(tmp_path).free < 1.1 * needed:
        pytest.skip(f"the disk has no room for a store of {needed / 1e9:.1f} GB")
    try:
        [found] = spawn(_write_and_read, 1, str(tmp_path / "store"), rows, 16384, False)
    finally:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
    _report(rows, found)
    assert max(found[name] for name in found if name != "seconds") < ALLOWED, "of the whole process, imports included"
    assert found["read row by row"] < 128 << 20
