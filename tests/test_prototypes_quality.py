"""Silhouette, effective rank, gap and agreement with labels: against scikit-learn, slow twins, and any number of ranks."""

import functools

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, silhouette_score

from protoclip_scale.prototypes.agreement import adjusted_mutual_information, adjusted_rand, label_agreement
from protoclip_scale.prototypes.assign import assign
from protoclip_scale.prototypes.diagnostics import collapse_warnings
from protoclip_scale.prototypes.episode import EpisodePrototypes
from protoclip_scale.prototypes.quality import clustering_quality, effective_rank, feature_figures, silhouette
from protoclip_scale.recipe.schema import Prototypes
from tests.support import CORPUS, spawn

SETTINGS = Prototypes(quality_rows=200)


def lloyd(rows: np.ndarray, num_clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels, their means) after some iterations from the first rows that differ."""
    centroids = np.unique(rows, axis=0)[:: max(1, len(np.unique(rows, axis=0)) // num_clusters)][:num_clusters]
    for _ in range(5):
        labels = assign(rows, centroids, "torch")[0]
        used = np.unique(labels)
        centroids = np.stack([rows[labels == cluster].mean(axis=0) for cluster in used])
    return np.searchsorted(used, labels), centroids


@functools.cache
def real_features() -> np.ndarray:
    """2,000 MiniLM features of the corpus's captions, unit rows; captions repeat."""
    rows = np.load(next((CORPUS.parent / "demo_corpus_teacher").glob("teacher.*.npy")))[:2000].astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@functools.cache
def corpus_labels() -> tuple[np.ndarray, np.ndarray]:
    """(class names, clusters) of 2,000 rows."""
    tables = [pq.read_table(path, columns=["coarse"]) for path in sorted(CORPUS.glob("train-*"))]
    return np.concatenate([table.column("coarse").to_numpy() for table in tables])[:2000].astype(str), lloyd(real_features(), 100)[0]


def noise() -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(1500, 32)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("num_clusters", [8, 150, 600])
@pytest.mark.parametrize("made", [real_features, noise])
def test_silhouette_is_near_that_of_all_pairs_where_the_simplified_one_flatters(made, num_clusters):
    rows = made()
    labels, centroids = lloyd(rows, num_clusters)
    every_pair = silhouette_score(rows, labels)
    ours = silhouette(rows, labels, centroids, np.bincount(labels))
    simplified = silhouette(rows, labels, centroids, np.full(len(centroids), 10**9))  # n / (n - 1) = 1
    assert simplified > max(ours, every_pair)
    assert abs(ours - every_pair) < 0.16 and (num_clusters == 8 or abs(ours - every_pair) < 0.6 * (simplified - every_pair))


def test_silhouette_is_that_of_a_slow_twin(monkeypatch):
    rows = real_features()[:300]
    labels, centroids = lloyd(rows, 40)
    centroids, sizes = np.concatenate([centroids, rows[:1] + 1e-3]), np.append(np.bincount(labels), 0)
    labels = np.where(np.arange(300) % 7, labels, -1)  # the sizes stay those of all rows
    twin = []
    for row, label in zip(rows[labels >= 0], labels[labels >= 0], strict=True):
        if sizes[label] == 1:
            twin.append(0.0)
            continue
        own = np.linalg.norm(row - centroids[label]) * sizes[label] / (sizes[label] - 1)
        other = min(np.linalg.norm(row - centroid) for number, centroid in enumerate(centroids) if number != label and sizes[number])
        twin.append((other - own) / max(own, other))
    assert silhouette(rows, labels, centroids, sizes) == pytest.approx(np.mean(twin), abs=1e-5)
    monkeypatch.setattr("protoclip_scale.prototypes.quality.TILE_ELEMENTS", 500)
    assert silhouette(rows, labels, centroids, sizes) == pytest.approx(np.mean(twin), abs=1e-5), "tiles change nothing"


def test_silhouette_goes_from_wrong_labels_to_perfect_ones():
    rows, labels = np.repeat(np.eye(5, dtype=np.float32), 4, axis=0), np.repeat(np.arange(5), 4)
    assert silhouette(rows, labels, np.eye(5), np.full(5, 4)) == 1
    assert silhouette(rows, (labels + 1) % 5, np.eye(5), np.full(5, 4)) == -1
    assert silhouette(rows, np.zeros_like(labels), np.eye(5), np.array([20, 0, 0, 0, 0])) == 0, "one cluster has no neighbour"


def test_effective_rank_counts_dimensions():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0].astype(np.float32)
    for dim in (1, 3, 64):
        assert effective_rank(np.concatenate([basis[:dim], -basis[:dim]])) == pytest.approx(dim, rel=1e-5)
    values = np.linalg.svd(real_features(), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(real_features()) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert effective_rank(np.zeros((5, 3), dtype=np.float32)) == 1


def test_feature_figures_are_those_of_all_pairs():
    image, text = real_features()[:400], real_features()[400:800] + 0.2
    figures = feature_figures({"image": image, "text": text})
    cosines = image.astype(np.float64) @ image.T
    assert figures["image/self_similarity"] == pytest.approx(cosines[~np.eye(400, dtype=bool)].mean(), abs=1e-6)
    assert figures["modality_gap"] == pytest.approx(np.linalg.norm(image.mean(0) - text.mean(0)), abs=1e-6)
    assert feature_figures({"image": image[:1]}) == {} and "modality_gap" not in feature_figures({"text": text})


def _figures_of(rank: int, world: int, folder: str) -> list[dict[str, float]]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/join", rank=rank, world_size=world)
    return [_quality(slice(rank * 4 // world, (rank + 1) * 4 // world), cuts) for cuts in ([500, 1000, 1500], [0, 700, 1999])]


def _quality(lanes: slice, cuts: list[int]) -> dict[str, float]:
    """Of four lanes, of which those in ``lanes`` are a process's own; every third text label is not known."""
    image, text = real_features(), real_features()[::-1].copy()
    labels, centroids = lloyd(image, 50)
    known = np.where(np.arange(2000) % 3, labels, -1).astype(np.int32)
    positions = 3 * np.arange(2000, dtype=np.int64)  # two of three rows are missing
    arrays = [np.split(array, cuts)[lanes] for array in (image, text, positions, labels.astype(np.int32), known)]
    from_text = {"image_centroids": centroids, "image_from_text": centroids[::-1].copy(), "text_from_image": centroids}
    return clustering_quality({"image": arrays[0], "text": arrays[1], "teacher": []}, arrays[2], {"image": arrays[3], "text": arrays[4]}, from_text, SETTINGS, (7, 2))


def test_quality_is_the_same_for_1_and_2_ranks_and_any_lanes(tmp_path):
    alone = _quality(slice(0, 4), [500, 1000, 1500])
    assert sorted(alone) == sorted([f"quality/{name}/silhouette" for name in ("image", "image_from_text", "text_from_image")]
                                   + [f"quality/{name}/{what}" for name in ("image", "text") for what in ("effective_rank", "self_similarity")] + ["quality/modality_gap"])  # fmt: skip
    assert _quality(slice(0, 4), [0, 1, 1999]) == alone
    for of_rank in spawn(_figures_of, 2, str(tmp_path)):
        assert of_rank == [alone, alone]
    whole = silhouette(real_features(), *lloyd(real_features(), 50), np.bincount(lloyd(real_features(), 50)[0]))
    assert alone["quality/image/silhouette"] == pytest.approx(whole, abs=0.05), "200 of 2,000 rows"
    assert clustering_quality({}, [], {}, {}, Prototypes(quality_rows=0), (0, 0)) == {}


@pytest.mark.parametrize("change", [lambda clusters, rng: clusters, lambda clusters, rng: rng.permutation(clusters), lambda clusters, rng: clusters % 3, lambda clusters, rng: np.arange(2000), lambda clusters, rng: clusters * 0])
def test_agreement_is_scikit_learns(change):
    names, clusters = corpus_labels()
    clusters = change(clusters, np.random.default_rng(0))
    assert adjusted_rand(names, clusters) == pytest.approx(adjusted_rand_score(names, clusters), abs=1e-12)
    assert adjusted_mutual_information(names, clusters) == pytest.approx(adjusted_mutual_info_score(names, clusters), abs=1e-9)


@pytest.mark.parametrize("figure", [adjusted_rand, adjusted_mutual_information])
def test_agreement_of_extremes(figure):
    names, clusters = corpus_labels()
    assert figure(names, names) == pytest.approx(1) and figure(names, clusters) == pytest.approx(figure(clusters, names))
    for same in (np.zeros(5, dtype=int), np.arange(5), np.zeros(1, dtype=int)):
        assert figure(same, same) == 1
    assert figure(np.zeros(5, dtype=int), np.arange(5)) == 0
    shuffled = [figure(names, np.random.default_rng(seed).permutation(clusters)) for seed in range(20)]
    assert abs(np.mean(shuffled)) < 0.003


def test_rows_go_to_their_nearest_prototype_and_rows_without_a_class_are_left_out():
    centroids = torch.eye(4) * torch.tensor([[1.0], [1.0], [0.5], [0.0]])  # the last cluster is empty: a zero row
    rows = torch.tensor([[0.9, 0.1, 0, 0], [0.1, 0.9, 0, 0], [0, 0.9, 0.1, 0], [0, 0, 0.4, 0.1], [0, 0, 0.0, 0.1]])
    prototypes = EpisodePrototypes(0, {"image_centroids": centroids, "image_from_text": centroids, "text_from_teacher": centroids}, {})
    figures = label_agreement(prototypes, {"image": rows, "text": rows}, {"kind": ["a", "b", "b", "c", ""], "none": [""] * 5})
    assert figures == {f"kind/{name}/{what}": 1.0 for name in ("image", "text_from_teacher") for what in ("ari", "ami")}
    figures = label_agreement(prototypes, {"image": rows}, {"kind": ["a", "b", "b", "c", "d"]})
    assert figures["kind/image/ari"] == adjusted_rand_score([0, 1, 1, 2, 3], [0, 1, 1, 2, 2]), "the zero row is nobody's prototype"


def test_collapse_is_told_once_for_each_labeling_and_health_is_not():
    healthy = {"kmeans/image/imbalance": 1.2, "target_entropy/image": 0.4, "kmeans/image/objective": 1e6, "quality/image/effective_rank": 1.0}
    assert collapse_warnings(healthy, 256) == [] and collapse_warnings({"kmeans/image/imbalance": 2.0}, 2) == []
    told = collapse_warnings({"target_entropy/text": 0.97, "kmeans/image/imbalance": 200.0, "kmeans/teacher/imbalance": 100.0}, 256)
    assert len(told) == 2 and "text prototypes are nearly uniform" in told[0] and "image features lie in one cluster" in told[1]
