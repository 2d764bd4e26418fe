"""What training records is found again by row, wherever it was trained on last; labels that nobody knows beforehand are the nearest centroid's."""

import numpy as np
import pytest
import torch

from protoclip_scale.data.batches import Batch
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes import recording
from protoclip_scale.prototypes.episode import EpisodePrototypes

LANES, LANE_ROWS, DIM = 2, 6, 3


def batch(slots, row_ids) -> Batch:
    slots = torch.as_tensor(slots)
    nothing = torch.zeros(len(slots), 1, dtype=torch.int64)
    return Batch(0, nothing, nothing, nothing[:, 0], slots, torch.as_tensor(row_ids), slots)


def opened(folder, episode: int, first_slot: int = 0) -> recording.Recorder:
    return recording.Recorder(recording.create(folder, episode, DIM, LANES, LANE_ROWS, {}), range(LANES), first_slot)


def record(folder, episode: int, lanes_of_ids: np.ndarray, values: np.ndarray, skipped_steps=()) -> None:
    """Two rows of each lane a step; the features of a row tell its episode and row id."""
    recorder = opened(folder, episode)
    for step in range(LANE_ROWS // 2):
        if step in skipped_steps:
            continue
        slots = np.tile(np.arange(2 * step, 2 * step + 2), LANES)
        rows = lanes_of_ids[:, 2 * step : 2 * step + 2].reshape(-1)
        features = torch.from_numpy(values[:, 2 * step : 2 * step + 2].reshape(-1, DIM))
        recorder.write(torch.from_numpy(slots), torch.from_numpy(rows), {"image_prototype": features, "text_prototype": -features})
    recorder.close()
    recorder.store.seal(allow_missing=True)


def test_the_newest_visit_of_each_row_is_found(tmp_path):
    """Against a dictionary; rows of skipped steps count as never visited then."""
    rng = np.random.default_rng(0)
    newest = {}
    for episode in range(4):
        ids = rng.permutation(40)[: LANES * LANE_ROWS].reshape(LANES, LANE_ROWS)
        values = rng.normal(size=(LANES, LANE_ROWS, DIM)).astype(np.float32)
        skipped = (1,) if episode == 2 else ()
        record(tmp_path, episode, ids, values, skipped)
        kept = [slot for slot in range(LANE_ROWS) if slot // 2 not in skipped]
        newest |= {int(ids[lane, slot]): values[lane, slot] for lane in range(LANES) for slot in kept}
    assert recording.recorded_episodes(tmp_path) == [0, 1, 2, 3]
    stores = [recording.open_recorded(tmp_path, episode) for episode in (3, 2, 1, 0)]
    wanted = np.concatenate([rng.permutation(40), [7, 7]])
    found = {}
    for store, part, indices, rows in recording.latest_visits(stores, wanted):
        found |= dict(zip(indices.tolist(), store.rows("image", part, rows), strict=True))
    assert {int(wanted[index]) for index in found} == newest.keys() & set(wanted.tolist()) and len(newest) < 40
    for index, features in found.items():
        np.testing.assert_allclose(features, newest[int(wanted[index])], atol=2e-3)
    assert (40 in found) == (41 in found) == (7 in newest)


def test_of_a_row_that_stands_twice_in_an_episode_the_later_step_counts(tmp_path):
    """Where an epoch ends in the episode; slots are in the order of steps."""
    ids = np.array([[1, 2, 3, 4, 5, 6], [6, 7, 8, 9, 10, 5]])
    record(tmp_path, 0, ids, np.arange(36, dtype=np.float32).reshape(2, 6, 3))
    visits = recording.latest_visits([recording.open_recorded(tmp_path, 0)], np.array([6, 5]))
    assert {(part, *indices.tolist(), *rows.tolist()) for _, part, indices, rows in visits} == {(0, 0, 5), (1, 1, 5)}


def test_what_follows_the_first_slot_is_written_anew(tmp_path):
    ids = np.arange(12).reshape(2, 6)
    record(tmp_path, 0, ids, np.zeros((2, 6, 3), dtype=np.float32))
    opened(tmp_path, 0, first_slot=4).close()
    store = opened(tmp_path, 0, first_slot=6).store.seal(allow_missing=True)
    assert store.missing == {0: 2, 1: 2} and store.written(0).tolist() == [True] * 4 + [False] * 2


def test_records_that_are_gone_or_unfinished_are_told(tmp_path):
    with pytest.raises(UserError, match="episode-000005 is missing"):
        recording.open_recorded(tmp_path, 5)
    opened(tmp_path, 5).close()
    with pytest.raises(UserError, match="never finished"):
        recording.open_recorded(tmp_path, 5)
    recording.forget(tmp_path, [5])
    assert recording.recorded_episodes(tmp_path) == []


def test_rows_without_a_label_get_the_nearest_centroid_and_no_gradient():
    centroids = torch.eye(DIM)
    features = {"image_prototype": torch.tensor([[0.1, 0.9, 0], [0.8, 0, 0.2]], requires_grad=True), "text_prototype": torch.tensor([[0, 0, 1.0], [0.0, 1, 0]])}
    prototypes = EpisodePrototypes(
        3,
        {"image_centroids": centroids, "text_centroids": centroids, "image_from_teacher": centroids},
        {"text": torch.tensor([0, -1, 2], dtype=torch.int32)},
        {"teacher": lambda row_ids: (row_ids % 3).astype(np.int32)},
    )
    labels = prototypes.labels_of(batch([0, 1], [100, 101]), features)
    assert {name: found.tolist() for name, found in labels.items()} == {"image": [1, 0], "text": [0, 1], "teacher": [1, 2]}
    assert all(found.dtype == torch.int64 and not found.requires_grad for found in labels.values())
    again = EpisodePrototypes.from_tensors(3, prototypes.tensors(), torch.device("cpu"), prototypes.row_labels)
    assert all(torch.equal(again.labels_of(batch([0, 1], [100, 101]), features)[name], found) for name, found in labels.items())
