"""Labels in training belong to the right rows: from captions through the teacher's store, the episode and k-means to the rows of the trace.

The teacher's features say which row they are of: exactly, in the episode's store, and by one of four far corners, which k-means with many more
clusters never mixes. A shift by one row anywhere on the way gives most rows the label of another corner.
"""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from protoclip_scale.engine import checkpoint
from protoclip_scale.engine.trace import read_trace
from protoclip_scale.prototypes.store import FeatureStore
from tests.support import CORPUS, TINY_PROTOTYPES, output, pretrain
from tests.teachers import NumberEncoder, corner, data_of, extracted, number_of_features, own_captions

FILES = ("a-*.parquet", "b-*.parquet")
LANES, BATCH, EPISODE = 4, 64, 256
BAD = (5, 70, 71, 333, 600)  # rows without a usable image
SILENT = (6, 250)  # rows without a caption


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two sources of files with unequal row groups; the caption of a row is its number in them."""
    folder = tmp_path_factory.mktemp("numbered")
    table = pq.read_table([CORPUS / "train-00000-of-00010.parquet", CORPUS / "train-00001-of-00010.parquet"]).select(["image", "caption"]).slice(0, 700)
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        row["caption"] = [""] if number in SILENT else [str(number)]
        if number in BAD:
            row["image"]["bytes"] = row["image"]["bytes"][:50]
    numbered = pa.Table.from_pylist(rows, table.schema)
    first = 0
    for name, count, group_rows in (("a-0", 130, 50), ("a-1", 7, 7), ("a-2", 263, 64), ("b-0", 300, 37)):
        pq.write_table(numbered.slice(first, count), folder / f"{name}.parquet", row_group_size=group_rows)
        first += count
    return folder


def numbers(shards) -> dict[int, int]:
    """{row id: the row's number}, by pyarrow; rows without a caption have none."""
    return {row_id: int(caption) for row_id, caption in own_captions(data_of(shards, *FILES)).items() if caption}


def teacher(shards, folder, shift: int = 0) -> None:
    """The store, all rows of each source moved by ``shift``."""
    store = extracted(data_of(shards, *FILES), folder, NumberEncoder(), dim=0)
    for part in range(store.num_parts) if shift else ():
        features = np.load(folder / f"teacher.{part:05d}.npy", mmap_mode="r+")
        features[:] = np.roll(features, shift, axis=0)
        features.flush()


def train(run, shards, features, ranks: int, **env: str) -> list[int]:
    values = (
        *TINY_PROTOTYPES,
        f"data.root={shards}",
        "data.sources=[{files: a-*.parquet}, {files: b-*.parquet}]",
        f"data.plan={{seed: 0, episode_size: {EPISODE}, lanes: {LANES}, global_batch: {BATCH}}}",
        f"objectives.teacher.features={features}",
        "prototypes.clusters=64",
        "schedule.total=2 episodes",
    )
    return pretrain(run, "demo.yaml", values, ranks=ranks, env=env)


def labels_of_last_episode(run) -> np.ndarray:
    """The teacher's label of each position, from what clustering added to the checkpoint before."""
    (folder,) = (run / "checkpoints").glob("step-*.prototypes")
    manifest = checkpoint.read_manifest(folder)
    assert checkpoint.cursor_of(manifest).episode == 1
    return checkpoint.read_tensors(folder, manifest)["prototypes/labels/teacher"].numpy()


def rows_of_last_episode(run, ranks: int) -> np.ndarray:
    """The row that trained at each position, from the trace: a global batch is lane after lane, and so are ranks."""
    steps: dict[int, dict[int, list[int]]] = {}
    for path in sorted((run / "trace").glob("rows-*.arrows")):
        table = read_trace(path)
        for step, row_id in zip(table["step"].to_pylist(), table["row_id"].to_pylist(), strict=True):
            steps.setdefault(step, {}).setdefault(int(path.stem[-4:]), []).append(row_id)
    batches = [np.array(sum((steps[step][rank] for rank in range(ranks)), [])).reshape(LANES, -1) for step in sorted(steps)[-EPISODE // BATCH :]]
    return np.concatenate(batches, axis=1).ravel()


def purity(labels: np.ndarray, row_ids: np.ndarray, of_row: dict[int, int]) -> float:
    """Share of positions whose cluster holds rows of one corner only: 1 where every label is its own row's."""
    corners = np.array([corner(of_row[int(row_id)]) for row_id in row_ids])
    return float(np.mean([len(set(corners[labels == label])) == 1 for label in labels]))


def test_every_position_has_the_label_of_the_row_that_trains_there(tmp_path, shards):
    of_row = numbers(shards)
    teacher(shards, tmp_path / "teacher")
    run = tmp_path / "run"
    codes = train(run, shards, tmp_path / "teacher", 2, PROTOCLIP_KILL_AT="cluster.labels:1")
    assert codes[0] == -9, output(run)
    # The thread clustered the planned rows beside the extraction; since some could not be decoded, those that really stand there were clustered again.
    clustered = []
    for rank in range(2):
        (folder,) = (run / "scratch").rglob(f"teacher-000001-rank-{rank:05d}")
        store = FeatureStore.open(folder / "real")
        clustered += [number_of_features(row) for part in range(LANES // 2) for row in store.rows("teacher", part, np.arange(EPISODE // LANES))]
    assert train(run, shards, tmp_path / "teacher", 2) == [0, 0], output(run)
    rows, labels = rows_of_last_episode(run, 2), labels_of_last_episode(run)
    assert clustered == [of_row[int(row_id)] for row_id in rows], "the features that were clustered are those of the rows that trained"
    assert purity(labels, rows, of_row) == 1 and len(set(labels.tolist())) > 32
    quarantined = [json.loads(line) for path in (run / "quarantine").glob("*.jsonl") for line in path.read_text().splitlines()]
    assert quarantined and not {entry["row_id"] for entry in quarantined} & set(rows.tolist()), "substitutes stand for them, with their own features"


def test_a_store_shifted_by_one_row_fails(tmp_path, shards):
    teacher(shards, tmp_path / "teacher", shift=1)
    assert train(tmp_path / "run", shards, tmp_path / "teacher", 1) == [0], output(tmp_path / "run")
    assert purity(labels_of_last_episode(tmp_path / "run"), rows_of_last_episode(tmp_path / "run", 1), numbers(shards)) < 0.5
