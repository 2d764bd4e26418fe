"""Law 6: k-means gives the same clusters on any number of ranks, with duplicate rows too, and is as good as faiss's own."""

import faiss
import numpy as np
import pytest
import torch
import torch.distributed as dist

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes import kmeans, sweeps
from protoclip_scale.prototypes.back_translation import class_means
from protoclip_scale.prototypes.fixed_point import extent_of
from protoclip_scale.prototypes.starts import SAME_ROW, draw_starts
from protoclip_scale.prototypes.store import FeatureStore
from protoclip_scale.recipe.schema import Prototypes
from tests.support import RECIPES, spawn

LANES, LANE_ROWS, DISTINCT = 4, 1000, 2400
SEED = (7, 3)
ENGINES = ("faiss", "torch")
GROUPS = {(2, 1): (*ENGINES, "kmeans++", "empty at first"), (4, 1): ("faiss", "empty at first"), (1, 2): ENGINES}  # (ranks, threads): what they cluster
BREAKS = ("each rank's own sums", "a dropped lane")


def settings(engine: str = "faiss", clusters: int = 200, restarts: int = 2, start: str = "random") -> Prototypes:
    return Prototypes(clusters=clusters, iterations=20, restarts=restarts, engine=engine, start=start)


def different_rows(rows: np.ndarray, tolerance: float) -> np.ndarray:
    """The slow twin of the choice of distinct rows: a row goes if it lies on an earlier one."""
    rows = rows.astype(np.float64)
    squares = (rows**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * rows @ rows.T
    return rows[~np.tril(distances <= tolerance**2, -1).any(axis=1)].astype(np.float32)


def real_rows() -> np.ndarray:
    """float32 [4000, 64]: features of real captions, 40% of them copies, a fifth of the copies off by rounding."""
    store = FeatureStore.open(RECIPES / "demo_corpus_teacher")
    real = different_rows(store.rows("teacher", 0, np.arange(store.num_rows)), 0.01)
    rng = np.random.default_rng(0)
    real = real[rng.permutation(len(real))[:DISTINCT]]
    copies = real[rng.integers(DISTINCT, size=LANES * LANE_ROWS - DISTINCT)]
    copies[::5] += rng.normal(scale=1e-5, size=copies[::5].shape).astype(np.float32)
    mixed = np.concatenate([real, copies])
    return mixed[rng.permutation(len(mixed))]


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return real_rows()


def lanes(rows: np.ndarray, of: range = range(LANES)) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(parts, positions) of some lanes."""
    return tuple([np.split(array, LANES)[lane] for lane in of] for array in (rows, np.arange(len(rows))))


def results(rank: int, world: int, rows: torch.Tensor, threads: int) -> dict:
    """On one rank of a real group: its clusterings, broken ones, and a refused one."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    parts, positions = lanes(rows.numpy(), range(rank * LANES // world, (rank + 1) * LANES // world))
    if world == 1:
        found = {case: clustering(case, parts, positions) for case in GROUPS[world, threads]}
        assert torch.get_num_threads() == faiss.omp_get_max_threads() == threads, "searching in threads leaves the settings alone"
        return found
    dist.init_process_group("gloo")
    found = {case: clustering(case, parts, positions) for case in GROUPS[world, threads]}
    if world == 2:
        found |= {name: summary(broken(name, rank, parts, positions), parts) for name in BREAKS}
    with pytest.raises(UserError) as error:
        kmeans.fit(parts, positions, settings(clusters=DISTINCT + 1), SEED)
    dist.destroy_process_group()
    return found | {"refused": str(error.value)}


def clustering(case: str, parts: list[np.ndarray], positions: list[np.ndarray]) -> dict:
    """``empty at first`` starts far from all rows with half of its centroids; ``kmeans++`` once so; the others are engines, with two restarts."""
    chosen, start = settings(case) if case in ENGINES else settings(start="kmeans++", restarts=1), None
    if case == "empty at first":
        chosen = settings(clusters=100, restarts=1)
        start = draw_starts(parts, positions, chosen, SEED, extent_of(parts))
        start[50:] = np.linspace(1, 2, 50 * start.shape[1], dtype=np.float32).reshape(50, -1)
    return summary(kmeans.fit(parts, positions, chosen, SEED, start=start), parts)


def broken(name: str, rank: int, parts: list[np.ndarray], positions: list[np.ndarray]) -> kmeans.KMeansResult:
    """A clustering with a fault in it."""
    reduce_tensor, add_rows, calls = sweeps.reduce_tensor, sweeps.add_rows, []

    def drop_a_lane(*arguments, **sign):
        calls.append(arguments)
        if rank == 0 or len(calls) % 3:
            add_rows(*arguments, **sign)

    def own_sums(changes):
        return torch.cat([changes[:-2], reduce_tensor(changes[-2:])])

    faults = {"each rank's own sums": {"reduce_tensor": own_sums}, "a dropped lane": {"add_rows": drop_a_lane}}
    with pytest.MonkeyPatch.context() as patch:
        for attribute, fault in faults[name].items():
            patch.setattr(sweeps, attribute, fault)
        return kmeans.fit(parts, positions, settings(), SEED)


def summary(result: kmeans.KMeansResult, parts: list[np.ndarray]) -> dict:
    translated = class_means([part[:, ::-1] for part in parts], result.labels, len(result.centroids))
    return {
        "labels": torch.from_numpy(np.concatenate(result.labels)),
        "centroids": torch.from_numpy(result.centroids),
        "translated": torch.from_numpy(translated),
        "objectives": list(result.objectives),
        "objective": result.objective,
        "counts": torch.from_numpy(result.counts),
        "history": [list(vars(line).values()) for line in result.history],
    }


@pytest.fixture(scope="module")
def groups(rows) -> dict[tuple[int, int], list[dict]]:
    """By ranks and threads: what each rank found."""
    return {(ranks, threads): spawn(results, ranks, torch.from_numpy(rows), threads) for ranks, threads in GROUPS}


@pytest.fixture(scope="module")
def alone(rows) -> dict[str, dict]:
    return {case: clustering(case, *lanes(rows)) for case in GROUPS[2, 1]}


def obeys_the_law(ranks: list[dict], single: dict) -> bool:
    labels = torch.cat([rank["labels"] for rank in ranks])
    same = (labels == single["labels"]).double().mean().item() >= 0.9999
    return same and all(rank["objective"] == pytest.approx(single["objective"], rel=1e-6) for rank in ranks)


@pytest.mark.parametrize(("group", "case"), [(group, case) for group, cases in GROUPS.items() for case in cases])
def test_any_ranks_and_threads_find_the_clusters_of_one(groups, alone, group, case):
    ranks, single = [rank[case] for rank in groups[group]], alone[case]
    assert obeys_the_law(ranks, single)
    assert torch.equal(torch.cat([rank["labels"] for rank in ranks]), single["labels"]), "more than the law asks: equal to the bit"
    for rank in ranks:
        for name in ("centroids", "translated", "counts"):
            assert torch.equal(rank[name], single[name]), name
        assert rank["objectives"] == single["objectives"] and rank["history"] == single["history"]
    if case == "empty at first":
        assert single["history"][0][4] >= 40 and single["counts"].min() > 0, "half of them were empty"


@pytest.mark.parametrize("broken", BREAKS)
def test_a_seeded_break_does_not_pass_for_the_law(groups, alone, broken):
    assert not obeys_the_law([rank[broken] for rank in groups[2, 1]], alone["faiss"])


def test_both_engines_find_the_same_clusters(alone):
    first, second = (alone[engine] for engine in ENGINES)
    assert torch.equal(first["labels"], second["labels"]) and first["history"] == second["history"]
    assert len(set(first["objectives"])) == 2


def test_more_clusters_than_distinct_rows_are_refused_with_both_numbers(groups, rows):
    assert len(different_rows(rows, SAME_ROW * float(np.abs(rows).max()))) == DISTINCT
    with pytest.raises(UserError, match=f"clusters is {DISTINCT + 1}, but the 4000 rows to cluster hold only {DISTINCT} distinct") as error:
        kmeans.fit(*lanes(rows), settings(clusters=DISTINCT + 1), SEED)
    assert [rank["refused"] for group in ((2, 1), (4, 1)) for rank in groups[group]] == [str(error.value)] * 6
    assert kmeans.fit(*lanes(rows), settings(clusters=DISTINCT, restarts=1), SEED).empties == 0


@pytest.mark.parametrize(("clusters", "seed"), [(50, 0), (200, 1), (400, 2)])
def test_the_objective_is_that_of_faiss_from_the_same_start(rows, clusters, seed):
    chosen = settings(clusters=clusters, restarts=1)
    starts = draw_starts(*lanes(rows), chosen, [seed, 0], extent_of([rows]))
    peer = faiss.Kmeans(rows.shape[1], clusters, niter=20, max_points_per_centroid=10**6, min_points_per_centroid=1)
    peer.train(rows, init_centroids=starts)
    expected = peer.index.search(rows, 1)[0].sum(dtype=np.float64)
    result = kmeans.fit(*lanes(rows), chosen, [seed])
    assert result.objective == pytest.approx(expected, rel=1e-3)
    assert result.objective < 0.9 * ((rows[:, None] - starts) ** 2).sum(axis=2).min(axis=1).sum(), "the start itself is no better"
