"""k-means over the features of all ranks, each searching its own lanes; the result does not depend on their number (law 6).

Lloyd's iterations: Euclidean, plain means that are never normalised (unless spherical), no sub-sampling (methods 6.2, step 3). As in
faiss.contrib.clustering (DatasetAssign, and its distributed demo), ranks assign rows and share sums and counts, and centroids are made
from those on every rank. Those sums are floats, which depend on the order of their terms; ours are integers, and single rows cross ranks in
a keyed order, so that 1 or 64 ranks do the same arithmetic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from protoclip_scale.prototypes.back_translation import unit_rows
from protoclip_scale.prototypes.diagnostics import imbalance
from protoclip_scale.prototypes.fixed_point import Extent, extent_of, means
from protoclip_scale.prototypes.splitting import split_clusters
from protoclip_scale.prototypes.starts import SAME_ROW, draw_starts
from protoclip_scale.prototypes.sweeps import Sweeps
from protoclip_scale.recipe.schema import Prototypes


@dataclass(frozen=True)
class Iteration:
    """One iteration, before its centroids are updated: ``objective`` the sum of squared distances to the nearest centroids, ``moved``
    rows whose label changed, ``empty`` clusters without a row, ``imbalance`` K sum(n_k^2) / N^2."""

    restart: int
    iteration: int
    objective: float
    moved: int
    empty: int
    imbalance: float


OnIteration = Callable[[Iteration], None]


@dataclass(frozen=True)
class KMeansResult:
    """The best restart. ``labels``: int32 [n_l] of each own lane, the nearest centroid of each row; all else is the same on all ranks.

    ``objective``: sum of squared distances to the nearest centroid; ``objectives``: of every restart; ``empties``: clusters without
    a row; ``imbalance``: K sum(n_k^2) / N^2, 1 if all clusters are of one size; ``iterations``: updates of the centroids made;
    ``history``: the iterations of all restarts, each before its update.
    """

    centroids: np.ndarray
    labels: list[np.ndarray]
    counts: np.ndarray
    objective: float
    objectives: tuple[float, ...]
    empties: int
    imbalance: float
    iterations: int
    history: tuple[Iteration, ...]


def fit(
    parts: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    settings: Prototypes,
    seed: Sequence[int],
    on_iteration: OnIteration | None = None,
    start: np.ndarray | None = None,
) -> KMeansResult:
    """Clusters the rows of all ranks' ``parts`` into ``settings.clusters``; a collective.

    ``parts``: the own lanes' features [n_l, d], float16 or float32, memory-mapped or not; n_l may be 0. ``positions``: int64 [n_l] of each, a
    number of every row that no other row of any rank has, such as its place in the episode. ``seed``: integers that with the restart and
    a row's position alone fix the draws. ``start``: float32 [m <= K, d], where the first restart begins; missing ones are drawn. ``on_iteration``
    is called in each iteration, on all ranks alike; it may raise to stop.

    Raises UserError if there are fewer distinct rows than clusters, or for non-finite features. Costs at most restarts x (iterations + 1)
    searches of 2 n K d operations, on real features two or three searches a restart (see sweeps); memory besides the mapped features is one
    tile, K x d sums, and twelve bytes a row.
    """
    extent = extent_of(parts)
    best: _Restart | None = None
    objectives, history = [], []
    for restart in range(settings.restarts):
        own_seed = [*seed, restart]
        centroids = draw_starts(parts, positions, settings, own_seed, extent, start if restart == 0 else None)
        found = _lloyd(parts, positions, centroids, settings, own_seed, extent, history, on_iteration)
        objectives.append(found.objective)
        if best is None or found.objective < best.objective:
            best = found
    assert best is not None
    counts = best.sweeps.counts
    labels = [lane.cpu().numpy() for lane in best.sweeps.labels]
    empties = int((counts == 0).sum())
    return KMeansResult(
        best.centroids, labels, counts, best.objective, tuple(objectives), empties, imbalance(counts), best.iterations, tuple(history)
    )


@dataclass(frozen=True)
class _Restart:
    sweeps: Sweeps
    centroids: np.ndarray
    objective: float
    iterations: int


def _lloyd(
    parts: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    centroids: np.ndarray,
    settings: Prototypes,
    seed: Sequence[int],
    extent: Extent,
    history: list[Iteration],
    on_iteration: OnIteration | None,
) -> _Restart:
    """One restart, its number last in ``seed``; adds its iterations to ``history``."""
    form = unit_rows if settings.spherical else np.asarray
    centroids = form(centroids)
    sweeps = Sweeps(parts, settings.clusters, settings.engine, settings.distances, extent)
    movement = np.full(settings.clusters, np.inf)
    for iteration in range(settings.iterations + 1):
        found = sweeps.sweep(centroids, movement)
        empty = np.flatnonzero(sweeps.counts == 0)
        if iteration == settings.iterations:
            break
        history.append(Iteration(seed[-1], iteration, found.objective, found.moved, len(empty), imbalance(sweeps.counts)))
        if on_iteration is not None:
            on_iteration(history[-1])
        if found.moved == 0 or (found.moved <= settings.settled * extent.num_rows and not len(empty)):
            break
        updated = means(sweeps.sums, sweeps.counts, extent.exponent)
        if len(empty):
            updated[empty] = centroids[empty]
            updated = split_clusters(updated, sweeps.counts, sweeps.spreads() <= sweeps.counts * (SAME_ROW * extent.largest) ** 2)
        updated = form(updated)
        movement = np.linalg.norm(updated.astype(np.float64) - centroids, axis=1)
        centroids = updated
    return _Restart(sweeps, centroids, found.objective, iteration)
