"""k-means over the features of all ranks, each searching its own lanes; the result does not depend on their number (law 6).

Lloyd's iterations: Euclidean, plain means that are never normalised (unless spherical), no sub-sampling (methods 6.2, step 3). As in
faiss.contrib.clustering (DatasetAssign, and its distributed demo), ranks assign rows and share sums and counts, and centroids are made
from those on every rank. Those sums are floats, which depend on the order of their terms; ours are integers, and single rows cross ranks in
a keyed order, so that 1 or 64 ranks do the same arithmetic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from protoclip_scale.prototypes.assign import engine_module
from protoclip_scale.prototypes.diagnostics import imbalance
from protoclip_scale.prototypes.fixed_point import Extent, extent_of, mean_rows
from protoclip_scale.prototypes.splitting import split_clusters
from protoclip_scale.prototypes.starts import SAME_ROW, draw_starts
from protoclip_scale.prototypes.sweeps import Sweeps
from protoclip_scale.prototypes.workers import Workers
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
    ``history``: the iterations of all restarts, each before its update; ``extent``: of the rows.
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
    extent: Extent


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
    tile for each processor thread, K x d sums, and twelve bytes a row.
    """
    assert start is None or np.isfinite(start).all()
    extent = extent_of(parts)
    best: _Restart | None = None
    objectives, history = [], []
    module = engine_module(settings.engine)
    with Workers(module) as workers:
        for restart in range(settings.restarts):
            drawn = draw_starts(parts, positions, settings, [*seed, restart], extent, start if restart == 0 else None)
            farthest = max(float(np.abs(drawn).max()), float(settings.spherical))
            sweeps = Sweeps(parts, settings.clusters, module, settings.distances, extent, workers, farthest)
            found = _lloyd(sweeps, drawn, settings, restart, history, on_iteration)
            objectives.append(found.objective)
            if best is None or found.objective < best.objective:
                best = found
    assert best is not None
    counts = best.sweeps.counts.cpu().numpy()
    return KMeansResult(
        centroids=best.centroids.cpu().numpy(),
        labels=[lane.cpu().numpy() for lane in best.sweeps.labels],
        counts=counts,
        objective=best.objective,
        objectives=tuple(objectives),
        empties=int((counts == 0).sum()),
        imbalance=imbalance(counts),
        iterations=best.iterations,
        history=tuple(history),
        extent=extent,
    )


@dataclass(frozen=True)
class _Restart:
    sweeps: Sweeps
    centroids: torch.Tensor
    objective: float
    iterations: int


def _lloyd(
    sweeps: Sweeps,
    start: np.ndarray,
    settings: Prototypes,
    restart: int,
    history: list[Iteration],
    on_iteration: OnIteration | None,
) -> _Restart:
    """One restart; adds its iterations to ``history``."""
    extent = sweeps.extent
    centroids_KD = _form(torch.from_numpy(start).to(sweeps.device), settings)
    movement_K = torch.full((settings.clusters,), torch.inf, dtype=torch.float64, device=sweeps.device)
    for iteration in range(settings.iterations + 1):
        found = sweeps.sweep(centroids_KD, movement_K)
        if iteration == settings.iterations:
            break
        counts = sweeps.counts.cpu().numpy()
        num_empty = int((counts == 0).sum())
        history.append(Iteration(restart, iteration, found.objective, found.moved, num_empty, imbalance(counts)))
        if on_iteration is not None:
            on_iteration(history[-1])
        if found.moved == 0 or (found.moved <= settings.settled * extent.num_rows and not num_empty):
            break
        updated_KD = mean_rows(sweeps.sums, sweeps.counts, extent.exponent)
        if num_empty:
            indivisible = sweeps.spreads() <= counts * (SAME_ROW * extent.largest) ** 2
            updated_KD = torch.where(sweeps.counts[:, None] > 0, updated_KD, centroids_KD)
            updated_KD = torch.from_numpy(split_clusters(updated_KD.cpu().numpy(), counts, indivisible)).to(sweeps.device)
        updated_KD = _form(updated_KD, settings)
        movement_K = torch.linalg.vector_norm(updated_KD - centroids_KD, dim=1, dtype=torch.float64)
        centroids_KD = updated_KD
    return _Restart(sweeps, centroids_KD, found.objective, iteration)


def _form(centroids_KD: torch.Tensor, settings: Prototypes) -> torch.Tensor:
    """Scaled to unit length if they are to be; zero stays zero."""
    return torch.nn.functional.normalize(centroids_KD, dim=1) if settings.spherical else centroids_KD
