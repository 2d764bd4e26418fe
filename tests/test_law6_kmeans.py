"""Law 6: k-means gives the same clusters on any number of ranks, with duplicate rows too, and is as good as faiss's own."""

import faiss
import numpy as np
import pytest
import torch
import torch.distributed as dist

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes import kmeans
from protoclip_scale.prototypes.back_translation import class_means
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.recipe.schema import Prototypes
from tests.support import RECIPES, spawn

LANES, LANE_ROWS, DISTINCT = 4, 1000, 2400
SEED = (7, 3)
ENGINES = ("faiss", "torch")
BREAKS = ("each rank's own sums", "a dropped lane")


def settings(engine: str = "faiss", clusters: int = 200, restarts: int = 2) -> Prototypes:
    return Prototypes(clusters=clusters, iterations=20, restarts=restarts, engine=engine)


def different_rows(rows: np.ndarray, tolerance: float) -> np.ndarray:
    """The slow twin of the choice of distinct rows: a row goes if it lies on an earlier one."""
    rows = rows.astype(np.float64)
    squares = (rows**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * rows @ rows.T
    return rows[~np.tril(distances <= tolerance**2, -1).any(axis=1)].astype(np.float32)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """float32 [4000, 64]: features of real captions, 40% of them copies, a fifth of the copies off by rounding."""
    store = FeatureStore.open(RECIPES / "demo_corpus_teacher")
    real = different_rows(store.rows("teacher", 0, np.arange(store.num_rows)), 0.01)
    rng = np.random.default_rng(0)
    real = real[rng.permutation(len(real))[:DISTINCT]]
    copies = real[rng.integers(DISTINCT, size=LANES * LANE_ROWS - DISTINCT)]
    copies[::5] += rng.normal(scale=1e-5, size=copies[::5].shape).astype(np.float32)
    mixed = np.concatenate([real, copies])
    return mixed[rng.permutation(len(mixed))]


def lanes(rows: np.ndarray, of: range = range(LANES)) -> tuple[list[np.ndarray], list[int]]:
    return [rows[lane * LANE_ROWS : (lane + 1) * LANE_ROWS] for lane in of], [lane * LANE_ROWS for lane in of]


def results(rank: int, world: int, rows: torch.Tensor) -> dict:
    """On one rank of a real group: clusterings with both engines, broken ones, and a refused one."""
    dist.init_process_group("gloo")
    parts, first_positions = lanes(rows.numpy(), range(rank * LANES // world, (rank + 1) * LANES // world))
    found = {}
    reduce_array, add_by_class = kmeans.reduce_array, kmeans.add_by_class
    calls = []

    def drop_a_lane(*arguments):
        calls.append(arguments)
        if rank == 0 or len(calls) % len(parts):
            add_by_class(*arguments)

    broken = {
        "each rank's own sums": {"reduce_array": lambda array, op="sum": array if array.ndim == 2 else reduce_array(array, op)},
        "a dropped lane": {"add_by_class": drop_a_lane},
    }
    for case in (*ENGINES, *BREAKS):
        vars(kmeans).update({"reduce_array": reduce_array, "add_by_class": add_by_class} | broken.get(case, {}))
        found[case] = summary(kmeans.fit(parts, first_positions, settings(case if case in ENGINES else "faiss"), SEED), parts)
    vars(kmeans).update(reduce_array=reduce_array, add_by_class=add_by_class)
    found["refills"] = refilled(parts, first_positions)
    try:
        kmeans.fit(parts, first_positions, settings(clusters=DISTINCT + 1), SEED)
    except UserError as error:
        found["refused"] = str(error)
    dist.destroy_process_group()
    return found


def refilled(parts: list[np.ndarray], first_positions: list[int]) -> dict:
    """A clustering whose starts are far from all rows but one, so that nearly every cluster is empty at first."""
    draw_starts = kmeans.draw_starts
    kmeans.draw_starts = lambda parts, *_: np.linspace(1, 2, 100 * parts[0].shape[1], dtype=np.float32).reshape(100, -1)
    empties = []
    try:
        result = kmeans.fit(parts, first_positions, settings(clusters=100, restarts=1), SEED, lambda *figures: empties.append(figures[4]))
    finally:
        kmeans.draw_starts = draw_starts
    return summary(result, parts) | {"empties": empties}


def summary(result: kmeans.KMeansResult, parts: list[np.ndarray]) -> dict:
    translated = class_means([part[:, ::-1] for part in parts], result.labels, len(result.centroids))
    return {
        "labels": torch.from_numpy(np.concatenate(result.labels)),
        "centroids": torch.from_numpy(result.centroids),
        "translated": torch.from_numpy(translated),
        "objectives": list(result.objectives),
        "objective": result.objective,
        "counts": torch.from_numpy(result.counts),
    }


@pytest.fixture(scope="module")
def on_two_ranks(rows) -> list[dict]:
    return spawn(results, 2, torch.from_numpy(rows))


@pytest.fixture(scope="module")
def on_one_rank(rows) -> dict[str, dict]:
    parts, first_positions = lanes(rows)
    return {engine: summary(kmeans.fit(parts, first_positions, settings(engine), SEED), parts) for engine in ENGINES}


def obeys_the_law(ranks: list[dict], single: dict) -> bool:
    labels = torch.cat([rank["labels"] for rank in ranks])
    same = (labels == single["labels"]).double().mean().item() >= 0.9999
    return same and all(rank["objective"] == pytest.approx(single["objective"], rel=1e-6) for rank in ranks)


@pytest.mark.parametrize("engine", ENGINES)
def test_two_ranks_find_the_clusters_of_one(on_two_ranks, on_one_rank, engine):
    ranks, single = [rank[engine] for rank in on_two_ranks], on_one_rank[engine]
    assert obeys_the_law(ranks, single)
    for rank in ranks:
        assert rank["objectives"] == pytest.approx(single["objectives"], rel=1e-6) and len(set(rank["objectives"])) == 2
        for name in ("centroids", "translated", "counts"):
            assert torch.equal(rank[name], ranks[0][name]), "ranks hold different results"
            torch.testing.assert_close(rank[name], single[name], rtol=0, atol=1e-6)


def test_empty_clusters_are_refilled_alike(on_two_ranks, rows):
    single, ranks = refilled(*lanes(rows)), [rank["refills"] for rank in on_two_ranks]
    assert obeys_the_law(ranks, single)
    assert single["empties"][0] > 90 and single["counts"].min() > 0 and all(rank["empties"] == single["empties"] for rank in ranks)


@pytest.mark.parametrize("broken", BREAKS)
def test_a_seeded_break_does_not_pass_for_the_law(on_two_ranks, on_one_rank, broken):
    assert not obeys_the_law([rank[broken] for rank in on_two_ranks], on_one_rank["faiss"])


def test_both_engines_find_the_same_clusters(on_one_rank):
    first, second = (on_one_rank[engine] for engine in ENGINES)
    assert (first["labels"] == second["labels"]).double().mean() >= 0.9999
    assert first["objective"] == pytest.approx(second["objective"], rel=1e-6)


def test_more_clusters_than_distinct_rows_are_refused_with_both_numbers(on_two_ranks, rows):
    assert len(different_rows(rows, kmeans.SAME_ROW * float(np.abs(rows).max()))) == DISTINCT
    with pytest.raises(UserError, match=f"clusters is {DISTINCT + 1}, but the 4000 rows to cluster hold only {DISTINCT} distinct") as error:
        kmeans.fit(*lanes(rows), settings(clusters=DISTINCT + 1), SEED)
    assert [rank["refused"] for rank in on_two_ranks] == [str(error.value)] * 2
    assert kmeans.fit(*lanes(rows), settings(clusters=DISTINCT, restarts=1), SEED).empties == 0


@pytest.mark.parametrize(("clusters", "seed"), [(50, 0), (200, 1), (400, 2)])
def test_the_objective_is_that_of_faiss_from_the_same_start(rows, clusters, seed):
    chosen = settings(clusters=clusters, restarts=1)
    starts = kmeans.draw_starts(*lanes(rows), chosen, [seed], 0)
    peer = faiss.Kmeans(rows.shape[1], clusters, niter=20, max_points_per_centroid=10**6, min_points_per_centroid=1)
    peer.train(rows, init_centroids=starts)
    expected = peer.index.search(rows, 1)[0].sum(dtype=np.float64)
    result = kmeans.fit(*lanes(rows), chosen, [seed])
    assert result.objective == pytest.approx(expected, rel=1e-3)
    assert result.objective < 0.9 * ((rows[:, None] - starts) ** 2).sum(axis=2).min(axis=1).sum(), "the start itself is no better"
