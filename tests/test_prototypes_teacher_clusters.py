"""A teacher's clusters of a whole corpus: every row gets its own label, for any number of ranks, and nothing half made or made from other data is taken."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from protoclip_scale.data.index import build_index
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.teacher import open_teacher
from protoclip_scale.prototypes.teacher_clusters import TeacherClusters, cluster_teacher, open_teacher_clusters
from protoclip_scale.recipe import schema
from tests.support import CORPUS, spawn
from tests.teachers import HashEncoder, data_of, extracted, own_captions

FILES = ("train-00000-of-00010.parquet", "val-*.parquet", "train-00001-of-00010.parquet")
SETTINGS = schema.Prototypes(clusters=40, iterations=6, restarts=2)
SEED = (5, 2)
LANES = 4


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """A store of three sources, of the captions' hashes."""
    return extracted(data_of(CORPUS, *FILES), tmp_path_factory.mktemp("teacher") / "features", dim=0).folder


def opened(features, files=FILES):
    index = build_index(data_of(CORPUS, *files))
    return open_teacher(features, index), index


def made(folder, features, settings=SETTINGS, files=FILES, seed=SEED, lanes=range(LANES), **hooks) -> TeacherClusters:
    return cluster_teacher(folder, *opened(features, files), settings, seed, lanes, LANES, **hooks)


def found(folder, features, settings=SETTINGS, files=FILES, seed=SEED) -> TeacherClusters | None:
    return open_teacher_clusters(folder, *opened(features, files), settings, seed)


@functools.cache
def captions(files=FILES) -> dict[int, str]:
    return own_captions(data_of(CORPUS, *files))


def test_every_row_has_the_cluster_nearest_to_its_own_features(tmp_path, features):
    order = FILES[::-1]  # other than the store's parts
    clusters = made(tmp_path / "clusters", features, files=order)
    row_ids = np.random.default_rng(0).permutation(np.array(list(captions(order))))
    rows = HashEncoder().captions([captions(order)[row_id] for row_id in row_ids])
    distances = np.square(rows[:, None] - clusters.centroids[None]).sum(axis=2)
    labels = clusters.labels(row_ids)
    own = distances[np.arange(len(labels)), labels]
    assert labels.dtype == np.int32 and np.allclose(own, distances.min(axis=1), atol=1e-5)
    assert (np.roll(own, 1) < np.roll(distances, 1, axis=0).min(axis=1) + 1e-5).all() and (distances[np.arange(len(labels)), np.roll(labels, 1)] > own + 1e-3).mean() > 0.9, "a neighbour's label would be seen"
    assert np.array_equal(np.bincount(labels, minlength=40), clusters.counts)
    assert np.isclose(own.sum(), clusters.figures["objective"], rtol=1e-4) and clusters.figures["imbalance"] >= 1
    assert {line["restart"] for line in clusters.history} == {0, 1} and clusters.history[0]["objective"] > clusters.figures["objective"]
    with pytest.raises(AssertionError, match="names a row that its block does not have"):
        clusters.labels(np.array([63 + 1]))


def _clustered(folder: Path, features, lanes: range) -> dict[str, torch.Tensor]:
    clusters = made(folder, features, lanes=lanes)
    return {"labels": torch.from_numpy(clusters.labels(np.array(sorted(captions())))), "centroids": torch.from_numpy(clusters.centroids)}


def _of_one_rank(rank: int, world: int, folder: str, features: str) -> dict[str, torch.Tensor]:
    from protoclip_scale.engine import strategy

    strategy.start(10)
    return _clustered(Path(folder), features, range(LANES * rank // world, LANES * (rank + 1) // world))


def test_the_number_of_ranks_does_not_matter(tmp_path, features):
    one = _clustered(tmp_path / "1", features, range(LANES))
    two, other = spawn(_of_one_rank, 2, str(tmp_path / "2"), str(features))
    assert torch.equal(one["labels"], two["labels"]) and torch.equal(two["labels"], other["labels"]) and len(one["labels"].unique()) == 40
    assert torch.equal(one["centroids"], two["centroids"]) and torch.equal(two["centroids"], other["centroids"])
    files = [{path.name: path.read_bytes() for path in (tmp_path / run).iterdir()} for run in "12"]
    assert files[0]["labels.npy"] == files[1]["labels.npy"] and sorted(files[0]) == ["centroids.safetensors", "labels.npy", "manifest.json"]


@pytest.mark.parametrize("moment", ["iteration", "teacher.labels", "teacher.clusters.written"])
def test_clusters_that_were_interrupted_are_made_again(tmp_path, features, moment):
    class Killed(Exception):
        pass

    def on_iteration(line) -> None:
        if moment == "iteration" and line.restart == 1:
            raise Killed

    def event(name: str) -> None:
        if name == moment:
            raise Killed

    with pytest.raises(Killed):
        made(tmp_path / "clusters", features, on_iteration=on_iteration, event=event)
    assert found(tmp_path / "clusters", features) is None
    again, never_interrupted = made(tmp_path / "clusters", features), made(tmp_path / "other", features)
    row_ids = np.array(list(captions()))
    assert np.array_equal(again.labels(row_ids), never_interrupted.labels(row_ids))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clusters", "other"], "nothing is left of the interrupted ones"


def test_clusters_are_found_again_and_others_made_anew(tmp_path, features):
    folder = tmp_path / "clusters"
    assert found(folder, features) is None
    first = made(folder, features)
    again = found(folder, features)
    row_ids = np.array(list(captions()))
    assert np.array_equal(again.labels(row_ids), first.labels(row_ids)) and np.array_equal(again.centroids, first.centroids) and again.figures == first.figures
    same = SETTINGS.model_copy(update={"pictures": 3, "normalize_centroids": True})
    assert found(folder, features, same) is not None, "settings that k-means does not look at"
    for other in ({"clusters": 41}, {"iterations": 7}, {"restarts": 1}, {"start": "kmeans++"}, {"settled": 0.01}, {"spherical": True}):
        assert found(folder, features, SETTINGS.model_copy(update=other)) is None, other
    assert found(folder, features, seed=(6, 2)) is None
    assert found(folder, features, files=FILES[:2]) is None and found(folder, features, files=FILES[::-1]) is None
    fewer = made(folder, features, SETTINGS.model_copy(update={"clusters": 8}))
    assert len(fewer.counts) == 8 and found(folder, features) is None, "they replace those that were there"


def test_features_made_anew_are_noticed(tmp_path, features):
    made(tmp_path / "clusters", features)
    other = extracted(data_of(CORPUS, *FILES), tmp_path / "features", HashEncoder(weights="others"), dim=0).folder
    assert found(tmp_path / "clusters", other) is None


def test_damaged_clusters_are_refused_in_one_line(tmp_path, features):
    folder = tmp_path / "clusters"
    made(folder, features)
    labels = np.load(folder / "labels.npy", mmap_mode="r+")
    labels[17] += 1
    labels.flush()
    with pytest.raises(UserError, match=r"teacher clusters .*clusters: labels\.npy is missing or damaged; remove that folder"):
        found(folder, features)
    labels[17] -= 1
    labels.flush()
    assert found(folder, features) is not None
    (folder / "centroids.safetensors").unlink()
    with pytest.raises(UserError, match=r"centroids\.safetensors is missing"):
        found(folder, features)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest)[:-9])
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        found(folder, features)


def test_more_lanes_than_rows_leave_some_empty(tmp_path, features):
    files = ("val-*.parquet",)
    few = SETTINGS.model_copy(update={"clusters": 5})
    clusters = cluster_teacher(tmp_path / "clusters", *opened(features, files), few, SEED, range(150), 150)
    assert clusters.counts.sum() == 119 and np.array_equal(np.bincount(clusters.labels(np.array(list(captions(files))))), clusters.counts)
