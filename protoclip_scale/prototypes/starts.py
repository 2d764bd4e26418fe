"""Where k-means begins: distinct rows in a keyed order, the same for any number of ranks."""

from collections.abc import Sequence

import numpy as np
import torch

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.assign import Targets, engine_module, nearest
from protoclip_scale.prototypes.distinct import draw_distinct, position_keys, weighted_keys
from protoclip_scale.prototypes.fixed_point import Extent
from protoclip_scale.prototypes.mapped import let_pages_go
from protoclip_scale.prototypes.store import BLOCK_ROWS
from protoclip_scale.recipe.schema import Prototypes

SAME_ROW = 1e-3  # rows closer than this, in units of the largest value, count as one: equal captions differ by rounding
FIRST_ROUND = 16  # k-means++ draws a sixteenth of the rows evenly, then twice as many altogether in every round


def draw_starts(
    parts: Sequence[np.ndarray],
    positions: Sequence[np.ndarray],
    settings: Prototypes,
    seed: Sequence[int],
    extent: Extent,
    given: np.ndarray | None = None,
) -> np.ndarray:
    """float32 [K, d]: ``given`` [m <= K, d], then K - m rows that are distinct from it and from each other; a collective.

    ``settings.start`` random: rows in the order f(seed, position), each alike. kmeans++: a sixteenth of them so, then in rounds that
    double their number with probability proportional to the squared distance from those drawn before (Bahmani et al., "Scalable
    k-means++", 2012, without its final reclustering). UserError if there are fewer distinct rows than K - m.
    """
    given = np.empty((0, parts[0].shape[1]), dtype=np.float32) if given is None else given
    assert given.shape[1] == parts[0].shape[1] and len(given) <= settings.clusters, given.shape
    drawn = DRAWS[settings.start](parts, positions, settings, seed, SAME_ROW * extent.largest, given)
    if len(drawn) < settings.clusters:
        beside = f" beside the {len(given)} that k-means starts from" if len(given) else ""
        raise UserError(
            f"prototypes.clusters is {settings.clusters}, but the {extent.num_rows} rows to cluster hold only {len(drawn) - len(given)} distinct "
            f"features{beside}; set prototypes.clusters to at most {len(drawn)}, or cluster more rows (data.plan.episode_size)"
        )
    return drawn


def _evenly(
    parts: Sequence[np.ndarray], positions: Sequence[np.ndarray], settings: Prototypes, seed: Sequence[int], tolerance: float, taken: np.ndarray, number: int | None = None
) -> np.ndarray:
    """``taken`` and the first rows by key beside it, up to ``number`` (default K) in all."""
    keys = [position_keys(seed, "k-means start", own) for own in positions]
    wanted = (settings.clusters if number is None else number) - len(taken)
    return np.concatenate([taken, draw_distinct(parts, positions, keys, wanted, tolerance, taken, settings.engine)])


def _far_apart(
    parts: Sequence[np.ndarray], positions: Sequence[np.ndarray], settings: Prototypes, seed: Sequence[int], tolerance: float, taken: np.ndarray
) -> np.ndarray:
    """``taken`` and rows far from those before, up to K in all. Costs up to half a search of all rows among K centroids."""
    if not len(taken):
        taken = _evenly(parts, positions, settings, seed, tolerance, taken, max(1, settings.clusters // FIRST_ROUND))
    squared = [np.full(len(part), np.inf, dtype=np.float32) for part in parts]
    searched = 0
    while len(taken) < settings.clusters:
        squared = [np.minimum(*both) for both in zip(squared, squared_distances(parts, taken[searched:], settings), strict=True)]
        searched = len(taken)
        keys = [weighted_keys([*seed, searched], "k-means++", *lane) for lane in zip(positions, squared, strict=True)]
        wanted = min(searched, settings.clusters - searched)
        drawn = draw_distinct(parts, positions, keys, wanted, tolerance, taken, settings.engine)
        if not len(drawn):
            break
        taken = np.concatenate([taken, drawn])
    return taken


DRAWS = {"random": _evenly, "kmeans++": _far_apart}


def squared_distances(parts: Sequence[np.ndarray], centroids: np.ndarray, settings: Prototypes) -> list[np.ndarray]:
    """float32 [n_l] of each own lane: squared distances to the nearest of some centroids; one search."""
    module = engine_module(settings.engine)
    targets = Targets(torch.from_numpy(centroids).to(module.device()))
    found = []
    for part in parts:
        found.append(np.empty(len(part), dtype=np.float32))
        for start in range(0, len(part), BLOCK_ROWS):
            rows = torch.from_numpy(np.array(part[start : start + BLOCK_ROWS], dtype=np.float32)).to(module.device())
            found[-1][start : start + BLOCK_ROWS] = nearest(rows, targets, module, settings.distances)[1].cpu().numpy()
            let_pages_go(part)
    return found
