"""Pruned k-means is Lloyd's to the bit, on real features with copies; and its options: starts, splits, stops, forms, precisions."""

import faiss
import numpy as np
import pytest
import torch

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes import assign_torch, kmeans, sweeps
from protoclip_scale.prototypes.assign import Targets, assign, engine_module, propose
from protoclip_scale.prototypes.fixed_point import extent_of
from protoclip_scale.prototypes.splitting import split_clusters
from protoclip_scale.prototypes.starts import draw_starts
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.prototypes.workers import Workers
from protoclip_scale.recipe.schema import Prototypes
from tests.support import RECIPES

SEARCHES = [("faiss", "fp32"), ("torch", "fp32"), ("torch", "bf16")]


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """float32 [4000, 64]: the demo corpus's captions, 40% copies, a fifth of the copies off by rounding."""
    store = FeatureStore.open(RECIPES / "demo_corpus_teacher")
    rng = np.random.default_rng(0)
    real = np.unique(store.rows("teacher", 0, np.arange(store.num_rows)), axis=0)
    real = real[rng.permutation(len(real))[:2400]]
    copies = real[rng.integers(len(real), size=1600)]
    copies[::5] += rng.normal(scale=1e-5, size=copies[::5].shape).astype(np.float32)
    return np.concatenate([real, copies])[rng.permutation(4000)]


def settings(**changes) -> Prototypes:
    return Prototypes(**({"clusters": 300, "iterations": 12, "restarts": 1} | changes))


def split(rows: np.ndarray, cuts: tuple[int, ...] = (1000, 2000, 3000)) -> tuple[list[np.ndarray], list[np.ndarray]]:
    return np.split(rows, cuts), np.split(np.arange(len(rows)), cuts)


def slow_labels(rows: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """The nearest centroid by directly taken float32 distances, of equal ones the first: the definition."""
    best, labels = np.full(len(rows), np.inf, dtype=np.float32), np.zeros(len(rows), dtype=np.int64)
    for index, centroid in enumerate(centroids):
        squared = (torch.from_numpy(rows) - torch.from_numpy(centroid)).square().sum(dim=1).numpy()
        labels[squared < best] = index
        best = np.minimum(best, squared)
    return labels


@pytest.fixture(scope="module")
def slow(rows) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """(starts; labels and centroids after 12 iterations) of Lloyd's, with every distance taken."""
    starts = centroids = draw_starts(*split(rows), settings(), [5, 0], extent_of([rows]))
    for _ in range(12):
        labels = slow_labels(rows, centroids)
        centroids = np.stack([rows[labels == cluster].mean(axis=0, dtype=np.float64) for cluster in range(300)]).astype(np.float32)
    return starts, slow_labels(rows, centroids), centroids


@pytest.mark.parametrize(("engine", "distances"), SEARCHES)
def test_pruned_searches_find_every_label_of_full_ones(rows, slow, engine, distances, monkeypatch):
    starts, labels, centroids = slow
    compared = []
    search = sweeps.Sweeps._block
    monkeypatch.setattr(sweeps.Sweeps, "_block", lambda self, own, *rest: compared.append(len(own) * rest[-2]) or search(self, own, *rest))
    monkeypatch.setattr(sweeps, "TILE_ROWS", 700)
    result = kmeans.fit(*split(rows), settings(engine=engine, distances=distances), [5], start=starts)
    assert np.array_equal(np.concatenate(result.labels), labels)
    np.testing.assert_allclose(result.centroids, centroids, atol=1e-7)
    assert sum(compared) < 0.7 * len(rows) * 300 * len(result.history), "many pairs are left out"


def test_a_bound_that_is_too_large_does_not_pass(rows, slow, monkeypatch):
    starts, labels, _ = slow
    search = sweeps.Sweeps._block

    def too_sure(self, *arguments):
        label, squared, bound = search(self, *arguments)
        return label, squared, bound + 0.5

    monkeypatch.setattr(sweeps.Sweeps, "_block", too_sure)
    assert not np.array_equal(np.concatenate(kmeans.fit(*split(rows), settings(), [5], start=starts).labels), labels)


@pytest.mark.parametrize(("engine", "distances"), SEARCHES)
def test_sums_made_from_moved_rows_are_those_of_all_rows(rows, engine, distances):
    module = engine_module(engine)
    found = sweeps.Sweeps(split(rows)[0], 50, module, distances, extent_of([rows]), Workers(module))
    rng = np.random.default_rng(1)
    before = np.full((50, 64), np.nan)
    for step in range(4):
        centroids = rows[rng.permutation(4000)[:50]]
        movement = np.full(50, np.inf) if step == 0 else np.linalg.norm(centroids - before.astype(np.float64), axis=1)
        sweep = found.sweep(torch.from_numpy(centroids), torch.from_numpy(movement))
        labels = slow_labels(rows, centroids)
        whole = np.stack([rows[labels == cluster].sum(axis=0, dtype=np.float64) for cluster in range(50)])
        assert np.array_equal(torch.cat(found.labels).numpy(), labels) and np.array_equal(found.counts.numpy(), np.bincount(labels, minlength=50))
        np.testing.assert_allclose(np.ldexp(found.sums.double().numpy(), -extent_of([rows]).exponent), whole, atol=1e-9)
        assert sweep.objective == pytest.approx(((rows - centroids[labels]) ** 2.0).sum(), rel=1e-5)
        np.testing.assert_allclose(found.spreads(), np.bincount(labels, ((rows - centroids[labels]) ** 2.0).sum(axis=1), 50), atol=1e-5)
        before = centroids


@pytest.mark.parametrize(("engine", "distances"), SEARCHES)
def test_labels_depend_on_the_row_and_the_centroids_alone(rows, engine, distances):
    centroids = np.concatenate([rows[:200], rows[:100], rows[:50] + np.float32(1e-7)])
    labels = slow_labels(rows, centroids)
    found, squared = assign(rows, centroids, engine, distances)
    assert np.array_equal(found, labels) and labels.max() < 350
    some = np.random.default_rng(0).permutation(4000)[:77]
    alone, squared_alone = assign(rows[some], centroids, engine, distances)
    assert np.array_equal(alone, labels[some]) and np.array_equal(squared_alone, squared[some])


def test_the_nearest_of_a_batch_needs_no_other_precision(rows):
    centroids = torch.from_numpy(rows[:300])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = assign_torch.nearest_rows(torch.from_numpy(rows[:128]).requires_grad_(), centroids)
    assert found.dtype == torch.int64 and np.array_equal(found.numpy(), slow_labels(rows[:128], rows[:300]))
    assert torch.equal(found, assign_torch.nearest_rows(torch.from_numpy(rows[:128]), centroids, "bf16"))


def test_tf32_without_a_gpu_is_refused(rows):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="prototypes.distances tf32 needs a GPU.*set prototypes.distances to fp32"):
        kmeans.fit(*split(rows), settings(engine="torch", distances="tf32"), [0])


def test_rows_may_be_missing_and_lanes_empty(rows):
    """Any distinct numbers name the rows; which lane holds one, and with whom, changes nothing."""
    chosen = np.random.default_rng(3).choice(10**8, size=len(rows), replace=False)
    whole = kmeans.fit([rows], [chosen], settings(), [1])
    cuts = (0, 17, 17, 2500)
    other = kmeans.fit(np.split(rows, cuts), np.split(chosen, cuts), settings(), [1])
    assert np.array_equal(np.concatenate(other.labels), whole.labels[0]) and np.array_equal(other.centroids, whole.centroids)
    assert [len(lane) for lane in other.labels] == [0, 17, 0, 2483, 1500]
    assert other.history == whole.history


def test_a_warm_start_goes_on_from_its_centroids(rows):
    first = kmeans.fit(*split(rows), settings(iterations=6), [2])
    further = kmeans.fit(*split(rows), settings(iterations=4, restarts=2), [2], start=first.centroids)
    at_once = kmeans.fit(*split(rows), settings(iterations=10), [2])
    assert further.objectives[0] == at_once.objective and further.history[0].objective == first.objective
    assert further.objectives[1] != at_once.objective, "the second restart draws its own"
    some = kmeans.fit(*split(rows), settings(iterations=1), [2], start=first.centroids[:250])
    starts = draw_starts(*split(rows), settings(), [2, 0], extent_of([rows]), first.centroids[:250])
    assert np.array_equal(starts[:250], first.centroids[:250]) and len(starts) == 300 and some.empties == 0
    assert assign(starts[250:], first.centroids[:250], "faiss")[1].min() > 0, "new ones lie beside no old one"


def test_centroids_far_outside_the_rows_overflow_nothing(rows):
    small = rows[:500] * np.float32(1e-4)
    far = kmeans.fit(*split(small, (200,)), settings(clusters=4, iterations=1), [0], start=np.full((4, 64), 50, dtype=np.float32))
    assert far.history[0].objective == pytest.approx(500 * 64 * 50**2, rel=1e-3) and far.objective < 500 * 64
    spherical = kmeans.fit(*split(small, (200,)), settings(clusters=4, spherical=True), [0])
    assert spherical.objective == pytest.approx(((small - spherical.centroids[np.concatenate(spherical.labels)]) ** 2.0).sum(), rel=1e-5)


def test_k_means_plus_plus_starts_far_apart_and_alike_for_any_lanes(rows):
    uneven = np.concatenate([rows[:1] + np.float32(0.02) * rows[400:], rows[:400]])
    extent, far, even = extent_of([uneven]), settings(start="kmeans++"), settings()
    for seed in range(3):
        starts = draw_starts(*split(uneven), far, [seed, 0], extent)
        assert np.array_equal(starts, draw_starts(*split(uneven, (10, 3500)), far, [seed, 0], extent))
        assert starts.shape == (300, 64) and len(np.unique(starts, axis=0)) == 300
        assert assign(starts, uneven, "faiss")[1].max() == 0, "they are rows"
        alike = draw_starts(*split(uneven), even, [seed, 0], extent)
        assert assign(uneven, starts, "faiss")[1].sum() < 0.4 * assign(uneven, alike, "faiss")[1].sum(), "most rows lie close together"
    with pytest.raises(UserError, match="prototypes.clusters is 3000, but the 4000 rows to cluster hold only 2[0-9]* distinct"):
        draw_starts(*split(rows), settings(start="kmeans++", clusters=3000), [0, 0], extent_of([rows]))


def test_a_spherical_clustering_maximises_cosines(rows):
    result = kmeans.fit(*split(rows), settings(spherical=True, iterations=30), [0])
    np.testing.assert_allclose(np.linalg.norm(result.centroids, axis=1), 1, atol=1e-6)
    labels = np.concatenate(result.labels)
    sums = np.stack([rows[labels == cluster].sum(axis=0, dtype=np.float64) for cluster in range(300)])
    if result.history[-1].moved == 0:
        np.testing.assert_allclose(result.centroids, sums / np.linalg.norm(sums, axis=1, keepdims=True), atol=1e-6)
    assert np.array_equal(labels, slow_labels(rows, result.centroids))
    assert np.mean(labels == (rows @ result.centroids.T).argmax(axis=1)) > 0.999
    nothing = kmeans.fit([np.zeros((20, 4), np.float32)], [np.arange(20)], settings(spherical=True, clusters=1), [0])
    assert np.array_equal(nothing.centroids, np.zeros((1, 4))), "zero stays zero"


def test_a_settled_clustering_stops_early(rows):
    whole = kmeans.fit(*split(rows), settings(iterations=40), [0])
    soon = kmeans.fit(*split(rows), settings(iterations=40, settled=0.01), [0])
    assert soon.iterations < whole.iterations and soon.history == whole.history[: len(soon.history)]
    assert soon.history[-1].moved <= 40 < soon.history[-2].moved
    assert soon.objective == soon.history[-1].objective == pytest.approx(whole.objective, rel=0.01)


@pytest.mark.parametrize("outliers", [10, 100])
def test_empty_clusters_are_split_as_faiss_does(rows, outliers):
    """Without copies the first iteration is faiss's to the bit; later ones part at ties, and stay as good."""
    distinct = np.unique(rows.round(3), axis=0)
    far = (3 * distinct[:1] * np.linspace(1, 1.3, outliers)[:, None]).astype(np.float32)
    starts = np.concatenate([distinct[50 : 350 - outliers], far]).astype(np.float32)
    for iterations, tolerance in ((1, 1e-5), (10, 5e-3)):
        peer = faiss.Kmeans(64, 300, niter=iterations, max_points_per_centroid=10**6, min_points_per_centroid=1)
        peer.train(distinct, init_centroids=starts)
        result = kmeans.fit(*split(distinct), settings(iterations=iterations), [0], start=starts)
        assert result.history[0].empty == peer.iteration_stats[0]["nsplit"] >= outliers - 2
        assert result.objective == pytest.approx(peer.index.search(distinct, 1)[0].sum(dtype=np.float64), rel=tolerance)
    assert result.empties == 0


def test_only_clusters_that_can_be_told_apart_are_split():
    centroids = np.arange(10, dtype=np.float32).reshape(5, 2) + 1
    counts = np.array([500, 0, 3, 0, 1])
    made = split_clusters(centroids, counts, np.array([True, False, False, False, False]))
    assert np.array_equal(made[[0, 4]], centroids[[0, 4]]), "copies of one vector and single rows give nothing"
    np.testing.assert_allclose(made[[1, 2, 3]], np.tile(centroids[2], (3, 1)), rtol=3e-3)
    assert len(np.unique(made[[1, 2, 3]], axis=0)) == 3
    assert np.array_equal(split_clusters(centroids, counts, np.ones(5, dtype=bool)), centroids), "no donor, no change"


@pytest.mark.parametrize("dim", [2, 4, 8, 128])
@pytest.mark.parametrize("distances", ["fp32", "bf16"])
def test_what_an_engine_proposes_is_off_by_no_more_than_it_says(dim, distances):
    """Numbers that bf16 rounds most, all downwards, around a mean of 0."""
    rng = np.random.default_rng(dim)
    signs = rng.choice([-1, 1], size=(20, dim))
    centroids = torch.from_numpy((np.concatenate([signs, -signs]) * (1 + 2.0**-8 - 1e-4)).astype(np.float32))
    rows = centroids[rng.integers(40, size=500)] + torch.from_numpy(rng.normal(scale=1e-5, size=(500, dim)).astype(np.float32))
    targets = Targets(centroids)
    labels, first, _, error = propose(rows, targets, engine_module("torch"), distances)
    true = (rows[:, None].double() - centroids.double()).square().sum(dim=2)
    assert ((first - true.gather(1, labels[:, None])[:, 0]).abs() <= error).all()
    found = assign(rows.numpy(), centroids.numpy(), "torch", distances)[0]
    assert np.array_equal(found, slow_labels(rows.numpy(), centroids.numpy()))
