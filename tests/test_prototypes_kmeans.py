"""k-means in one process: against a slow twin, its starts, its refills, and what it does with bad features."""

import importlib
import sys

import numpy as np
import pytest

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes import kmeans
from protoclip_scale.prototypes.assign import assign
from protoclip_scale.prototypes.distinct import draw_distinct, position_keys, weighted_keys
from protoclip_scale.prototypes.fixed_point import extent_of
from protoclip_scale.prototypes.starts import draw_starts
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.recipe.schema import Prototypes
from tests.support import spawn

ENGINES = ("faiss", "torch")


def blobs(rows: int = 1200, dim: int = 16, centres: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(centres, dim))[rng.integers(centres, size=rows)] + 0.5 * rng.normal(size=(rows, dim))
    return (mixed / np.linalg.norm(mixed, axis=1, keepdims=True)).astype(np.float32)


def split(rows: np.ndarray, num_lanes: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(parts, positions)"""
    return np.array_split(rows, num_lanes), np.array_split(np.arange(len(rows)), num_lanes)


def settings(**changes) -> Prototypes:
    return Prototypes(**({"clusters": 30, "iterations": 15, "restarts": 1} | changes))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("num_rows", [1, 19, 20, 333])
@pytest.mark.parametrize("num_clusters", [1, 7, 64, 65, 257])
def test_assignment_is_the_nearest_centroid_and_of_equal_ones_the_first(engine, num_rows, num_clusters):
    rng = np.random.default_rng(num_clusters)
    rows = rng.normal(size=(num_rows, 24)).astype(np.float32)
    centroids = rng.normal(size=(num_clusters, 24)).astype(np.float32)
    centroids[num_clusters // 2 : 2 * (num_clusters // 2)] = centroids[: num_clusters // 2]
    centroids[0] = 0.0
    if num_clusters > 1:
        centroids[-1] = -0.0
    distances = ((rows[:, None].astype(np.float64) - centroids) ** 2).sum(axis=2)
    labels, squared = assign(rows, centroids, engine)
    assert np.array_equal(labels, distances.argmin(axis=1)) and labels.dtype == np.int64
    np.testing.assert_allclose(squared, distances.min(axis=1), rtol=1e-5)


def test_distances_stay_exact_far_from_the_origin():
    """|x|^2 - 2xc + |c|^2 around the origin would lose them: all points of one cluster (faiss issues 1196 and 3818)."""
    rows = (blobs(200) * 1e-3 + 5).astype(np.float32)
    distances = ((rows[:, None].astype(np.float64) - rows[:50]) ** 2).sum(axis=2)
    for engine in ENGINES:
        labels, _ = assign(rows, rows[:50], engine)
        assert (labels == distances.argmin(axis=1)).mean() > 0.98


def without_faiss(rank: int, world: int) -> tuple[int, str]:
    """In a process of its own, everything imported anew: (clusters that the torch engine finds, what the other engine says)."""
    for name in [name for name in sys.modules if name.startswith(("protoclip_scale.", "faiss"))]:
        del sys.modules[name]
    sys.modules["faiss"] = None
    anew = importlib.import_module("protoclip_scale.prototypes.kmeans")
    user_error = importlib.import_module("protoclip_scale.errors").UserError
    found = anew.fit(*split(blobs(300), 2), settings(engine="torch"), [0])
    with pytest.raises(user_error) as error:
        anew.fit(*split(blobs(300), 2), settings(engine="faiss"), [0])
    return len(found.counts), str(error.value)


def test_the_torch_engine_does_not_need_faiss():
    clusters, said = spawn(without_faiss, 1)[0]
    assert clusters == 30
    assert said.startswith("prototypes.engine faiss: ") and said.endswith("set prototypes.engine to torch")


def slow_lloyd(rows: np.ndarray, centroids: np.ndarray, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    for _ in range(iterations):
        labels = ((rows[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)
        centroids = np.stack([rows[labels == k].mean(axis=0) for k in range(len(centroids))])
    return centroids, ((rows[:, None] - centroids) ** 2).sum(axis=2).argmin(axis=1)


def test_the_result_is_that_of_a_slow_twin():
    rows = blobs()
    chosen = settings(iterations=4)
    starts = draw_starts(*split(rows, 3), chosen, [1, 0], extent_of([rows]))
    centroids, labels = slow_lloyd(rows.astype(np.float64), starts.astype(np.float64), 4)
    result = kmeans.fit(*split(rows, 3), chosen, [1])
    assert np.array_equal(np.concatenate(result.labels), labels)
    np.testing.assert_allclose(result.centroids, centroids, atol=1e-6)
    assert result.objective == pytest.approx(((rows - centroids[labels]) ** 2).sum(), rel=1e-5)
    assert np.array_equal(result.counts, np.bincount(labels, minlength=30))
    sizes = np.bincount(labels, minlength=30)
    assert result.imbalance == pytest.approx((30 * (sizes**2.0).sum()) / 1200**2) and result.empties == 0
    assert np.linalg.norm(result.centroids, axis=1).max() < 1, "plain means of unit rows are shorter than 1"


def test_the_seed_fixes_everything_and_the_order_and_number_of_lanes_nothing():
    rows = blobs()
    first = kmeans.fit(*split(rows, 4), settings(restarts=2), [5, 1])
    again = kmeans.fit(*split(rows, 4), settings(restarts=2), [5, 1])
    parts, positions = split(rows, 4)
    order = [2, 0, 3, 1]
    reordered = kmeans.fit([parts[i] for i in order], [positions[i] for i in order], settings(restarts=2), [5, 1])
    halved = kmeans.fit(*split(rows, 2), settings(restarts=2), [5, 1])
    for other in (again, reordered, halved):
        assert np.array_equal(other.centroids, first.centroids) and other.objectives == first.objectives
    assert all(np.array_equal(reordered.labels[place], first.labels[lane]) for place, lane in enumerate(order))
    assert kmeans.fit(*split(rows, 4), settings(restarts=2), [5, 2]).objectives != first.objectives


def test_the_best_restart_is_kept_and_iterations_are_told():
    told = []
    result = kmeans.fit(*split(blobs(), 2), settings(restarts=4), [0], told.append)
    assert len(set(result.objectives)) == 4 and result.objective == min(result.objectives)
    assert result.history == tuple(told)
    for restart in range(4):
        own = [line for line in told if line.restart == restart]
        assert [line.iteration for line in own] == list(range(len(own))) and len(own) <= 15
        objectives = [line.objective for line in own]
        assert objectives == sorted(objectives, reverse=True), "no empty clusters here, so each iteration lowers the objective"
        assert own[0].moved == 1200 and all(line.empty == 0 and line.imbalance > 1 for line in own)
        assert own[-1].moved == 0 or len(own) == 15, "ends early only when no label moves"


def test_a_callback_may_stop_the_clustering():
    class Stop(Exception):
        pass

    def stop(line):
        if line.iteration == 2:
            raise Stop

    with pytest.raises(Stop):
        kmeans.fit(*split(blobs(), 2), settings(), [0], stop)


def test_starts_are_a_keyed_choice_of_distinct_rows():
    rows = np.repeat(blobs(300), 4, axis=0)[np.random.default_rng(1).permutation(1200)]
    parts, positions = split(rows, 4)
    starts = draw_starts(parts, positions, settings(clusters=250), [3, 1], extent_of(parts))
    keys = position_keys([3, 1], "k-means start", np.arange(1200))
    expected, seen = [], set()
    for row in rows[np.argsort(keys)]:
        if row.tobytes() not in seen:
            seen.add(row.tobytes())
            expected.append(row)
    assert np.array_equal(starts, np.stack(expected)[:250])
    assert np.array_equal(np.concatenate([position_keys([3, 1], "k-means start", own) for own in positions]), keys)
    assert len(np.unique(keys)) == 1200 and not np.array_equal(keys, position_keys([3, 2], "k-means start", np.arange(1200)))


def test_weighted_keys_draw_in_proportion():
    weights = np.array([0, 1, 2, 5, 0], dtype=np.float32)
    places = np.arange(7, 12)
    drawn = np.bincount([weighted_keys([0, seed], "test", places, weights).argmin() for seed in range(2000)], minlength=5)
    assert drawn[0] == drawn[4] == 0
    np.testing.assert_allclose(drawn[1:4] / 2000, [1 / 8, 2 / 8, 5 / 8], atol=0.035)
    assert np.array_equal(weighted_keys([0, 1], "test", places[1:], weights[1:]), weighted_keys([0, 1], "test", places, weights)[1:])


def test_rows_are_drawn_in_the_order_of_their_keys_and_not_beside_others():
    rows = np.repeat(np.array([[0.0, 0], [0.01, 0], [5, 0], [6, 0], [0, 9]], dtype=np.float32), [40, 40, 5, 5, 5], axis=0)
    parts, positions = split(rows, 5)
    distances = [-np.linalg.norm(part, axis=1).view(np.int32).astype(np.int64) for part in parts]
    farthest = draw_distinct(parts, positions, distances, 3, 1e-3, np.array([[6.0, 0]], np.float32), "faiss")
    assert farthest.tolist() == [[0, 9], [5, 0], [np.float32(0.01), 0]]
    everything = draw_distinct(parts, positions, distances, 99, 1e-3, np.empty((0, 2), np.float32), "torch")
    assert len(everything) == 5


@pytest.mark.parametrize("engine", ENGINES)
def test_a_clustering_that_empties_clusters_ends_without_empty_ones(engine):
    rows = blobs(600, centres=60)
    outliers = np.tile(rows[:1] * 3, (25, 1)) + np.linspace(0, 1, 25, dtype=np.float32)[:, None] * 0.1
    usual = kmeans.fit(*split(rows, 2), settings(engine=engine), [0])
    result = kmeans.fit(*split(rows, 2), settings(engine=engine), [0], start=np.concatenate([rows[:5], outliers]))
    assert result.history[0].empty > 15 and result.empties == 0
    assert result.objective < 1.1 * usual.objective


def test_features_that_are_not_finite_are_refused():
    rows = blobs()
    rows[700, 3] = np.nan
    with pytest.raises(UserError, match="not all finite"):
        kmeans.fit(*split(rows, 2), settings(), [0])


def test_sums_hold_the_largest_values_of_many_rows():
    rows = np.full((4096, 2), [3e4, -2e-5], dtype=np.float32)
    exponent = extent_of([rows]).exponent
    assert 4096 * 3e4 * 2.0**exponent < 2**62 <= 4096 * 3e4 * 2.0 ** (exponent + 2)
    result = kmeans.fit([rows], [np.arange(4096)], settings(clusters=1), [0])
    np.testing.assert_allclose(result.centroids[0], [3e4, -2e-5], rtol=1e-5)


def test_memory_mapped_float16_features_give_the_clusters_of_their_float32_copies(tmp_path):
    parts, positions = split(blobs(), 2)
    store = FeatureStore.create(tmp_path, {"image": 16}, 2, 600, "float16")
    for lane, part in enumerate(parts):
        with store.writer(lane) as writer:
            writer.write(slice(0, 600), {"image": part})
    store = store.seal()
    mapped = kmeans.fit([store.read("image", lane) for lane in range(2)], positions, settings(), [0])
    copied = kmeans.fit([part.astype(np.float16).astype(np.float32) for part in parts], positions, settings(), [0])
    assert np.array_equal(mapped.centroids, copied.centroids) and mapped.objective == copied.objective
