"""What recorded features need of the store: row ids, rows written again after a resume, and rows that never came."""

import os

import numpy as np
import pytest

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes import store_writer
from protoclip_scale.prototypes.store import FeatureStore

ROWS, DIM = 60, 3
IDS = np.arange(ROWS) * (1 << 40) - 7


def values(seed: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float16)


def named_store(folder) -> FeatureStore:
    return FeatureStore.create(folder, {"image": DIM}, 2, ROWS, "float16", row_ids=True)


def write(store: FeatureStore, part: int, rows: np.ndarray) -> None:
    with store.writer(part) as writer:
        for piece in np.array_split(rows, 5):
            writer.write(piece, {"image": values(part)[piece]}, IDS[piece] + part)


def test_row_ids_come_back_beside_their_rows(tmp_path):
    store = named_store(tmp_path)
    for part in range(2):
        write(store, part, np.random.default_rng(3).permutation(ROWS))
    sealed = store.seal()
    for part in range(2):
        assert np.array_equal(sealed.row_ids(part), IDS + part) and sealed.row_ids(part).dtype == np.int64
        assert np.array_equal(sealed.read("image", part), values(part)) and isinstance(sealed.row_ids(part), np.memmap)
    assert sealed.named_rows and FeatureStore.open(tmp_path).layout == store.layout
    assert sum(path.stat().st_size for path in tmp_path.glob("*.npy")) - FeatureStore.bytes_needed({"image": DIM}, 2 * ROWS, "float16", row_ids=True) <= 6 * 256
    (tmp_path / "row_ids.00001.npy").unlink()
    with pytest.raises(UserError, match=r"row_ids\.00001\.npy is missing"):
        FeatureStore.open(tmp_path)


def test_a_store_with_row_ids_and_one_without_are_not_mixed_up(tmp_path):
    FeatureStore.create(tmp_path / "plain", {"image": DIM}, 2, ROWS, "float16")
    with pytest.raises(UserError, match="begun with other row_ids"):
        named_store(tmp_path / "plain")
    named_store(tmp_path / "named")
    with pytest.raises(UserError, match="begun with other row_ids"):
        FeatureStore.create(tmp_path / "named", {"image": DIM}, 2, ROWS, "float16")
    assert "row_ids" not in (tmp_path / "plain" / "layout.json").read_text(), "stores of older releases look the same"


def test_what_is_trained_again_is_written_again(tmp_path):
    store = named_store(tmp_path)
    write(store, 0, np.arange(40))
    write(store, 1, np.arange(ROWS))
    with named_store(tmp_path).writer(0) as writer:
        assert writer.pending().tolist() == list(range(40, ROWS))
        for start in range(24, ROWS, 12):  # begins in the middle of what is marked
            writer.write(slice(start, start + 12), {"image": values(9)[start : start + 12]}, IDS[start : start + 12])
    found = store.seal().read("image", 0)
    assert np.array_equal(found[:24], values(0)[:24]) and np.array_equal(found[24:], values(9)[24:])


def test_a_row_has_no_mark_while_it_is_written_again(tmp_path):
    store = named_store(tmp_path)
    write(store, 0, np.arange(ROWS))
    child = os.fork()
    if child == 0:  # dies with rows 10 to 19 on their way
        store.writer(0).write(slice(10, 20), {"image": values(9)[10:20]}, IDS[10:20])
        os._exit(0)
    os.waitpid(child, 0)
    assert np.flatnonzero(~store.written(0)).tolist() == list(range(10, 20))
    with store.writer(0) as writer:
        writer.forget(slice(50, ROWS))
        assert writer.pending().tolist() == [*range(10, 20), *range(50, ROWS)]


def test_forgotten_rows_stay_so_though_they_were_just_written(tmp_path):
    store = named_store(tmp_path)
    with store.writer(0) as writer:
        writer.write(np.arange(ROWS), {"image": values(0)}, IDS)
        writer.forget(np.array([3, 5]))
    assert np.flatnonzero(~store.written(0)).tolist() == [3, 5]


def test_a_step_waits_for_the_disk_only_now_and_then(tmp_path, monkeypatch):
    monkeypatch.setattr(store_writer, "FLUSH_ROWS", 20)
    store = named_store(tmp_path)
    with store.writer(0) as writer:
        written = []
        for start in range(0, ROWS, 6):
            writer.write(slice(start, start + 6), {"image": values(0)[start : start + 6]}, IDS[start : start + 6])
            written.append(int(writer.written.sum()))
        assert written == [0, 0, 0, 24, 24, 24, 24, 48, 48, 48]
        writer.flush()
        assert writer.written.all()


def test_rows_that_never_came_are_counted_and_told(tmp_path):
    store = named_store(tmp_path)
    there = np.setdiff1d(np.arange(ROWS), [7, 30, 31])
    write(store, 0, there)
    write(store, 1, np.arange(ROWS))
    with pytest.raises(UserError, match="3 of 60 rows of part 0 were never written, the first is row 7"):
        store.seal()
    np.load(tmp_path / "image.00000.npy", mmap_mode="r+")[30] = np.nan  # what a row without a mark holds does not matter
    sealed = store.seal(allow_missing=True)
    assert sealed.missing == {0: 3, 1: 0} and '"missing": [\n  3,\n  0\n ]' in (tmp_path / "manifest.json").read_text()
    assert np.array_equal(np.flatnonzero(sealed.written(0)), there) and sealed.written(1).all()
    expected = values(0).astype(np.float32)
    expected[[7, 30, 31]] = 0
    assert np.array_equal(np.concatenate([block for _, block in sealed.blocks("image", 0, 16)]), expected)
    assert np.array_equal(sealed.rows("image", 0, there[::-1]), expected[there[::-1]])
    with pytest.raises(AssertionError, match="never written to part 0"):
        sealed.rows("image", 0, np.array([6, 7]))


def test_a_store_with_other_gaps_than_its_manifest_says_is_refused(tmp_path):
    store = named_store(tmp_path)
    write(store, 0, np.arange(50))
    write(store, 1, np.arange(ROWS))
    store.seal(allow_missing=True)
    marks = np.load(tmp_path / "written.00000.npy", mmap_mode="r+")
    for row, mark, message in ((4, 0, "11 of 60 rows of part 0 were never written, of which the manifest allows 10, the first is row 4"), (55, 1, "9 of 60")):
        before, marks[row] = int(marks[row]), mark
        with pytest.raises(UserError, match=message):
            FeatureStore.open(tmp_path)
        marks[row] = before
    assert FeatureStore.open(tmp_path).missing == {0: 10, 1: 0}
