"""The feature store: what it refuses, how it goes on after an interruption, and that reading it takes no memory."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore, let_pages_go
from tests.support import mount_small_disk, needs_small_disk, spawn

ROWS = 50


def values(part: int, rows: int = ROWS, dim: int = 3) -> np.ndarray:
    return np.random.default_rng(part).normal(size=(rows, dim)).astype(np.float32)


def written_store(folder, parts=2, dtype="float32", info=None) -> FeatureStore:
    store = FeatureStore.create(folder, {"image": 3, "text": 3}, parts, ROWS, dtype, info)
    for part in range(parts):
        with store.writer(part) as writer:
            order = np.random.default_rng(9).permutation(ROWS)
            for rows in np.array_split(order, 4):
                writer.write(rows, {"image": values(part)[rows], "text": -values(part)[rows]})
    return store


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_come_back_as_they_were_written(tmp_path, dtype):
    info = {"run_id": "a", "episode": 3, "model_step": 120, "plan": "f" * 8}
    written_store(tmp_path / "store", dtype=dtype, info=info).seal()
    store = FeatureStore.open(tmp_path / "store")
    assert store.info == info and store.num_rows == 2 * ROWS and store.columns == {"image": 3, "text": 3}
    for part in range(2):
        expected = values(part).astype(dtype).astype(np.float32)
        blocks = list(store.blocks("image", part, block_rows=7))
        assert np.array_equal(np.concatenate([block for _, block in blocks]), expected)
        assert [start for start, _ in blocks] == list(range(0, ROWS, 7))
        assert np.array_equal(store.rows("text", part, np.array([49, 0, 0, 7])), -expected[[49, 0, 0, 7]])
        assert store.read("image", part).dtype == dtype
        with pytest.raises(ValueError, match="read-only"):
            store.read("image", part)[0] = 0


def test_a_store_without_its_manifest_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match=r"store: no manifest\.json; there is none"):
        FeatureStore.open(tmp_path / "store")
    written_store(tmp_path / "store")
    with pytest.raises(UserError, match="never finished"):
        FeatureStore.open(tmp_path / "store")


def test_unwritten_rows_are_not_sealed(tmp_path):
    store = FeatureStore.create(tmp_path, {"image": 3}, 2, ROWS)
    with store.writer(0) as writer:
        writer.write(slice(0, ROWS), {"image": values(0)})
    with store.writer(1) as writer:
        writer.write(slice(0, 20), {"image": values(1)[:20]})
    with pytest.raises(UserError, match="30 of 50 rows of part 1 were never written, the first is row 20"):
        store.seal()
    assert store.seal(parts=[0]).complete == {0}, "a node seals its own lanes"


def test_marks_removed_later_are_noticed(tmp_path):
    written_store(tmp_path).seal()
    marks = np.load(tmp_path / "written.00001.npy", mmap_mode="r+")
    marks[5] = 0
    marks.flush()
    with pytest.raises(UserError, match="part 1 were never written, the first is row 5"):
        FeatureStore.open(tmp_path)


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (np.inf, "float32"), (1e6, "float16")])
def test_non_finite_rows_are_refused_when_written(tmp_path, value, dtype):
    store = FeatureStore.create(tmp_path, {"image": 3}, 1, ROWS, dtype)
    bad = values(0)
    bad[17, 1] = value
    with store.writer(0) as writer:
        with pytest.raises(UserError, match=f"column image, part 0, row 17 is not finite in {dtype}"):
            writer.write(slice(0, ROWS), {"image": bad})
        assert len(writer.pending()) == ROWS


def test_non_finite_rows_are_refused_when_sealed_and_read(tmp_path):
    store = written_store(tmp_path)
    sealed = store.seal()
    features = np.load(tmp_path / "text.00001.npy", mmap_mode="r+")
    features[31] = np.nan
    features.flush()
    for use in (store.seal, lambda: list(sealed.blocks("text", 1, 8)), lambda: sealed.rows("text", 1, np.array([2, 31]))):
        with pytest.raises(UserError, match="column text, part 1, row 31 is not finite"):
            use()


def test_cut_and_missing_and_exchanged_files_are_refused(tmp_path):
    written_store(tmp_path).seal()
    path = tmp_path / "image.00001.npy"
    whole = path.read_bytes()
    for part, message in ((whole[:-4], "cut short"), (whole[:20], "cut short"), (b"", "cut short"), ((tmp_path / "written.00000.npy").read_bytes(), "holds")):
        path.write_bytes(part)
        with pytest.raises(UserError, match=rf"image\.00001\.npy.*{message}"):
            FeatureStore.open(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=r"image\.00001\.npy is missing"):
        FeatureStore.open(tmp_path)
    path.write_bytes(whole)
    FeatureStore.open(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        FeatureStore.open(tmp_path)


def test_a_store_of_another_layout_is_not_continued(tmp_path):
    FeatureStore.create(tmp_path, {"image": 3}, 2, ROWS, info={"episode": 1})
    FeatureStore.create(tmp_path, {"image": 3}, 2, ROWS, info={"episode": 1})
    with pytest.raises(UserError, match=r"begun with other info .*\"episode\": 1.*\"episode\": 2"):
        FeatureStore.create(tmp_path, {"image": 3}, 2, ROWS, info={"episode": 2})
    with pytest.raises(UserError, match="begun with other columns and dtype"):
        FeatureStore.create(tmp_path, {"image": 4}, 2, ROWS, "float16", info={"episode": 1})


def test_a_part_has_one_writer(tmp_path):
    store = FeatureStore.create(tmp_path, {"image": 3}, 2, ROWS)
    with store.writer(0), store.writer(1), pytest.raises(UserError, match="part 0 is being written by another process"):
        store.writer(0)
    with store.writer(0) as writer:
        assert len(writer.pending()) == ROWS


KILLED = """
import os, signal, sys
import numpy as np
from protoclip_scale.prototypes.store import FeatureStore
store = FeatureStore.create(sys.argv[1], {"image": 3}, 1, 50)
writer = store.writer(0)
writer.write(slice(0, 20), {"image": np.ones((20, 3))})
writer.flush()
writer._features["image"][20:30] = 7  # features on their way to disk, not marked
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_writer_is_continued_and_half_written_rows_are_written_again(tmp_path):
    child = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert child.returncode == -signal.SIGKILL
    store = FeatureStore.create(tmp_path, {"image": 3}, 1, ROWS)
    with store.writer(0) as writer:
        pending = writer.pending()
        assert pending.tolist() == list(range(20, ROWS))
        writer.write(pending, {"image": values(0)[pending]})
    features = store.seal().rows("image", 0, np.arange(ROWS))
    assert np.array_equal(features, np.concatenate([np.ones((20, 3), np.float32), values(0)[20:]]))


def test_resident_memory_does_not_grow_with_the_store(tmp_path):
    rows, dim = 65536, 256  # 64 MB
    store = FeatureStore.create(tmp_path, {"image": dim}, 1, rows)
    block = np.ones((4096, dim), dtype=np.float32)
    process = psutil.Process()

    def growth(work) -> int:
        before, most = process.memory_info().rss, 0
        for _ in work():
            most = max(most, process.memory_info().rss - before)
        return most

    def write():
        with store.writer(0) as writer:
            for start in range(0, rows, len(block)):
                writer.write(slice(start, start + len(block)), {"image": block})
                yield

    def read_and_keep_pages():
        features = sealed.read("image", 0)
        for start in range(0, rows, len(block)):
            yield features[start : start + len(block)].sum()
        let_pages_go(features)
        assert process.memory_info().rss - resident < 32 << 20

    assert growth(write) < 32 << 20
    sealed = store.seal()
    resident = process.memory_info().rss
    assert growth(lambda: sealed.blocks("image", 0, 4096)) < 32 << 20
    assert growth(read_and_keep_pages) > 48 << 20, "the measurement sees pages that are kept"


def test_bytes_needed_is_what_the_files_take(tmp_path):
    written_store(tmp_path, dtype="float16").seal()
    on_disk = sum(path.stat().st_size for path in tmp_path.glob("*.npy"))
    needed = FeatureStore.bytes_needed({"image": 3, "text": 3}, 2 * ROWS, "float16")
    assert needed == 2 * ROWS * (2 * 3 * 2 + 1) and 0 <= on_disk - needed <= 6 * 256


def _fill_small_disk(rank: int, world: int, folder: str) -> list[str]:
    """What a store that does not fit says, the files it leaves, and whether one that fits can be written afterwards."""
    mount_small_disk(Path(folder), 1 << 20)
    store = FeatureStore.create(Path(folder) / "store", {"image": 64}, 2, 3000)  # 0.77 MB a part
    with store.writer(0) as writer:
        writer.write(slice(0, 3000), {"image": np.ones((3000, 64))})
    try:
        store.writer(1)
    except UserError as error:
        return [str(error), *sorted(path.name for path in store.folder.iterdir() if path.name.endswith("1.npy")), *map(str, store.unfinished())]
    return []


@needs_small_disk
def test_a_full_disk_is_one_line_and_no_signal(tmp_path):
    [(message, *left)] = spawn(_fill_small_disk, 1, str(tmp_path / "disk"))
    assert message.startswith("disk full: the feature store") and "0.8 MB for image.00001.npy" in message and left == ["1"]


def test_let_pages_go_leaves_private_memory_alone(tmp_path):
    ordinary = np.arange(10.0)
    np.save(tmp_path / "copy.npy", ordinary)
    private = np.load(tmp_path / "copy.npy", mmap_mode="c")
    private[0] = 99
    for array in (ordinary, private):
        let_pages_go(array)
    assert private[0] == 99 and ordinary[9] == 9
