"""Row-aligned .npy files: out of a store and back into one, row for row; what is no such file is refused."""

import numpy as np
import psutil
import pytest

from protoclip_scale.data.index import build_index, open_readers
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.prototypes.teacher import open_teacher
from protoclip_scale.prototypes.teacher_npy import export_npy, import_npy
from tests.support import CORPUS
from tests.teachers import HashEncoder, data_of, extracted, own_captions

FILES = ("train-00003-of-00010.parquet", "val-*.parquet")


@pytest.fixture(scope="module")
def data():
    return data_of(CORPUS, *FILES)


@pytest.fixture(scope="module")
def readers(data):
    return open_readers(data)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_row_of_the_file_is_the_row_of_the_sources_and_comes_back(tmp_path, data, readers, dtype):
    captions = own_captions(data)
    store = extracted(data, tmp_path / "made", dim=0, dtype=dtype)
    export_npy(store, tmp_path / "features.npy")
    array = np.load(tmp_path / "features.npy", allow_pickle=False)
    assert array.dtype == dtype and array.shape == (len(captions), 8)
    assert np.array_equal(array, HashEncoder().captions(list(captions.values())).astype(dtype)), "sources, blocks and rows in order"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features.npy", "made"]
    teacher = open_teacher(import_npy(tmp_path / "features.npy", readers, tmp_path / "back").folder, build_index(data))
    row_ids = np.random.default_rng(0).permutation(np.array(list(captions)))
    expected = HashEncoder().captions([captions[row] for row in row_ids]).astype(dtype)
    assert np.array_equal(teacher.rows(row_ids), expected) and not np.array_equal(teacher.rows(row_ids), np.roll(expected, 1, axis=0))
    assert teacher.info["model"] == "features.npy" and FeatureStore.open(tmp_path / "back").dtype == dtype


def test_an_import_is_kept_and_another_refused(tmp_path, readers):
    rows = sum(int(reader.block_rows.sum()) for reader in readers)
    np.save(tmp_path / "one.npy", np.ones((rows, 3)))
    first = import_npy(tmp_path / "one.npy", readers, tmp_path / "store")
    assert first.dtype == np.float32 and import_npy(tmp_path / "one.npy", readers, tmp_path / "store").info == first.info
    np.save(tmp_path / "two.npy", np.zeros((rows, 3)))
    with pytest.raises(UserError, match="holds other features"):
        import_npy(tmp_path / "two.npy", readers, tmp_path / "store")


def refused(path, content, readers, out) -> str:
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(UserError) as error:
        import_npy(path, readers, out)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_not_row_aligned_features_are_refused_in_one_line(tmp_path, readers):
    counts = [int(reader.block_rows.sum()) for reader in readers]
    rows = sum(counts)
    path, out = tmp_path / "features.npy", tmp_path / "store"
    assert "cannot be read" in refused(path, None, readers, out)
    assert "cannot be read" in refused(path, b"not an array", readers, out)
    assert "without pickled objects" in refused(path, np.array([{"a": 1}] * rows, dtype=object), readers, out)
    assert "it must be one array of floats" in refused(path, np.ones(rows), readers, out)
    assert "int64" in refused(path, np.ones((rows, 2), dtype=np.int64), readers, out)
    message = refused(path, np.ones((rows - 1, 2)), readers, out)
    assert f"has {rows - 1} rows" in message and f"val-*.parquet: {counts[1]}" in message
    holed = np.ones((rows, 2), dtype=np.float16)
    holed[counts[0] + 5, 1] = np.nan
    assert f"row {counts[0] + 5} is not finite" in refused(path, holed, readers, out)
    np.savez(tmp_path / "features.npz", holed)
    assert "an archive" in refused(tmp_path / "features.npz", None, readers, out)


def test_an_interrupted_import_goes_on(tmp_path, readers):
    rows = sum(int(reader.block_rows.sum()) for reader in readers)
    values = np.random.default_rng(0).normal(size=(rows, 3)).astype(np.float32)
    np.save(tmp_path / "features.npy", values)

    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        import_npy(tmp_path / "features.npy", readers, tmp_path / "store", interrupt)
    with pytest.raises(UserError, match="never finished"):
        FeatureStore.open(tmp_path / "store")
    steps = []
    store = import_npy(tmp_path / "features.npy", readers, tmp_path / "store", steps.append)
    assert len(steps) == 1, "the first source was on disk, the second was not"
    assert np.array_equal(np.concatenate([block for part in range(2) for _, block in store.blocks("teacher", part)]), values)


class _ManyRows:
    """A reader of more rows than memory should hold."""

    name, fingerprint = "many", "many"
    block_rows = np.full(400, 1000)


def test_memory_stays_bounded(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "features.npy", mode="w+", dtype=np.float32, shape=(400_000, 64))  # 102 MB
    array[:] = 1
    array.flush()
    del array
    process = psutil.Process()
    before, peak = process.memory_info().rss, []
    store = import_npy(tmp_path / "features.npy", [_ManyRows()], tmp_path / "store", lambda name: peak.append(process.memory_info().rss - before))
    export_npy(store, tmp_path / "back.npy")
    peak.append(process.memory_info().rss - before)
    assert len(peak) > 20 and max(peak) < 40 << 20
