"""k-means over the features of all ranks, each searching its own lanes; the result does not depend on their number (law 6).

Lloyd's iterations: Euclidean, plain means that are never normalised, no sub-sampling (methods 6.2, step 3). What crosses ranks is
integer sums and counts, and single rows in a keyed order, so that 1 or 64 ranks do the same arithmetic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.assign import assign
from protoclip_scale.prototypes.diagnostics import imbalance
from protoclip_scale.prototypes.distinct import draw_distinct, position_keys
from protoclip_scale.prototypes.fixed_point import Extent, add_by_class, extent_of, means, reduce_array, unit_exponent
from protoclip_scale.prototypes.store import let_pages_go
from protoclip_scale.recipe.schema import Prototypes

TILE_ROWS = 65536
SAME_ROW = 1e-3  # rows closer than this, in units of the largest value, count as one: equal captions differ by rounding
OnIteration = Callable[[int, int, float, int, int], None]


@dataclass(frozen=True)
class KMeansResult:
    """The best restart. ``labels``: int32 [n_l] of each own lane, the nearest centroid of each row; all else is the same on all ranks.

    ``objective``: sum of squared distances to the nearest centroid; ``objectives``: of every restart; ``empties``: clusters without
    a row; ``imbalance``: K sum(n_k^2) / N^2, 1 if all clusters are of one size; ``iterations``: updates of the centroids made.
    """

    centroids: np.ndarray
    labels: list[np.ndarray]
    counts: np.ndarray
    objective: float
    objectives: tuple[float, ...]
    empties: int
    imbalance: float
    iterations: int


@dataclass
class _Sweep:
    labels: list[np.ndarray]
    distances: list[np.ndarray]
    sums: np.ndarray
    counts: np.ndarray
    objective: float
    moved: int


def fit(
    parts: Sequence[np.ndarray],
    first_positions: Sequence[int],
    settings: Prototypes,
    seed: Sequence[int],
    on_iteration: OnIteration | None = None,
) -> KMeansResult:
    """Clusters the rows of all ranks' ``parts`` into ``settings.clusters``; a collective.

    ``parts``: the own lanes' features [n_l, d], float16 or float32, memory-mapped or not; ``first_positions``: the episode position of
    each one's first row; ``seed``: integers that with the restart and a row's position alone fix the starts. ``on_iteration(restart,
    iteration, objective, moved labels, empty clusters)`` is called in each iteration, on all ranks alike; it may raise to stop.
    Raises UserError if there are fewer distinct rows than clusters, or for non-finite features. Costs restarts x (iterations + 1) searches
    of 2 n K d operations; memory besides the mapped features is one tile, K x d sums, and a label and a distance per row.
    """
    extent = extent_of(parts)
    best: tuple[_Sweep, np.ndarray, int] | None = None
    objectives = []
    for restart in range(settings.restarts):
        starts = draw_starts(parts, first_positions, settings, seed, restart, extent)
        sweep, centroids, iterations = _lloyd(parts, first_positions, starts, settings, [*seed, restart], extent, on_iteration)
        objectives.append(sweep.objective)
        if best is None or sweep.objective < best[0].objective:
            best = (sweep, centroids, iterations)
    assert best is not None
    sweep, centroids, iterations = best
    empties = int((sweep.counts == 0).sum())
    return KMeansResult(
        centroids, sweep.labels, sweep.counts, sweep.objective, tuple(objectives), empties, imbalance(sweep.counts), iterations
    )


def draw_starts(
    parts: Sequence[np.ndarray],
    first_positions: Sequence[int],
    settings: Prototypes,
    seed: Sequence[int],
    restart: int,
    extent: Extent | None = None,
) -> np.ndarray:
    """float32 [K, d]: the first K distinct rows in the order f(seed, restart, position); a collective. UserError if there are fewer."""
    extent = extent or extent_of(parts)
    keys = [position_keys([*seed, restart], "k-means start", first, len(part)) for first, part in zip(first_positions, parts, strict=True)]
    none = np.empty((0, parts[0].shape[1]), dtype=np.float32)
    starts = draw_distinct(parts, first_positions, keys, settings.clusters, SAME_ROW * extent.largest, none, settings.engine)
    if len(starts) < settings.clusters:
        raise UserError(
            f"prototypes.clusters is {settings.clusters}, but the {extent.num_rows} rows to cluster hold only {len(starts)} distinct "
            f"features; set prototypes.clusters to at most {len(starts)}, or raise data.plan.episode_size"
        )
    return starts


def _lloyd(
    parts: Sequence[np.ndarray],
    first_positions: Sequence[int],
    centroids: np.ndarray,
    settings: Prototypes,
    seed: Sequence[int],
    extent: Extent,
    on_iteration: OnIteration | None,
) -> tuple[_Sweep, np.ndarray, int]:
    """One restart, its number last in ``seed``: (the last search, the centroids it searched, updates made)."""
    labels = [np.full(len(part), -1, dtype=np.int32) for part in parts]
    for iteration in range(settings.iterations + 1):
        sweep = _search(parts, centroids, labels, settings.engine, extent)
        empty = np.flatnonzero(sweep.counts == 0)
        if iteration == settings.iterations:
            break
        if on_iteration is not None:
            on_iteration(seed[-1], iteration, sweep.objective, sweep.moved, len(empty))
        if sweep.moved == 0:
            break
        labels = sweep.labels
        updated = means(sweep.sums, sweep.counts, extent.exponent)
        if len(empty):
            updated[empty] = centroids[empty]
            filled = sweep.counts > 0
            keys = [refill_keys([*seed, iteration], *lane) for lane in zip(first_positions, sweep.distances, strict=True)]
            refills = draw_distinct(parts, first_positions, keys, len(empty), SAME_ROW * extent.largest, updated[filled], settings.engine)
            updated[empty[: len(refills)]] = refills
        centroids = updated
    return sweep, centroids, iteration


def refill_keys(seed: Sequence[int], first_position: int, distances: np.ndarray) -> np.ndarray:
    """int64 [n_l] keys whose ascending order draws rows without replacement, with probability proportional to their squared ``distances``
    from their centroids, as k-means++ does; f(seed, position, distance). The farthest rows alone would be outliers of one corner."""
    uniform = (position_keys(seed, "k-means refill", first_position, len(distances)) + 1.0) / 2.0**63
    waiting = -np.log(uniform) / np.maximum(distances, np.finfo(np.float32).tiny)
    return waiting.view(np.int64)  # the bits of positive floats are ordered like their values


def _search(parts: Sequence[np.ndarray], centroids: np.ndarray, previous: list[np.ndarray], engine: str, extent: Extent) -> _Sweep:
    """Nearest centroids of the own lanes, tile by tile; sums, counts, moved labels and objective over all ranks. Tiles start anew in
    every lane, so that each product has the same shape whichever rank computes it."""
    num_clusters, dim = centroids.shape
    sums = np.zeros((num_clusters, dim), dtype=np.int64)
    counts = np.zeros(num_clusters, dtype=np.int64)
    objective_exponent = unit_exponent(4 * extent.num_rows * dim * max(extent.largest, 1e-30) ** 2)
    objective, moved, labels, distances = 0, 0, [], []
    for part, part_previous in zip(parts, previous, strict=True):
        labels.append(np.empty(len(part), dtype=np.int32))
        distances.append(np.empty(len(part), dtype=np.float32))
        for start in range(0, len(part), TILE_ROWS):
            tile = slice(start, start + TILE_ROWS)
            features = np.asarray(part[tile], dtype=np.float32)
            nearest, squared = assign(features, centroids, engine)
            add_by_class(sums, counts, features, nearest, extent.exponent)
            let_pages_go(part)
            labels[-1][tile], distances[-1][tile] = nearest, squared
            objective += int(np.ldexp(squared.astype(np.float64), objective_exponent).astype(np.int64).sum())
        moved += int((labels[-1] != part_previous).sum())
    sums = reduce_array(sums)
    counts_moved_objective = reduce_array(np.concatenate([counts, [moved, objective]]).astype(np.int64))
    total = float(np.ldexp(float(counts_moved_objective[-1]), -objective_exponent))
    return _Sweep(labels, distances, sums, counts_moved_objective[:-2], total, int(counts_moved_objective[-2]))
