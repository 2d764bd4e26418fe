"""Exact searches of Lloyd's iterations that look only where something can have changed.

Per row the label, the squared distance to its own centroid, and a lower bound of the distance to every other one are kept (Hamerly,
"Making k-means even faster", 2010). A centroid that moved by m has come nearer by m at most; so with centroids in the order of how far
they moved, a row must be compared with those at the front alone, and with none if its own one stayed near enough. Rows that changed their
label are all that changes the sums, which are integers: taking a row away and adding it elsewhere is exact.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch

from protoclip_scale import standing
from protoclip_scale.prototypes.assign import UNIT, Targets, decide, direct, propose
from protoclip_scale.prototypes.fixed_point import Extent, add_rows, reduce_tensor, unit_exponent
from protoclip_scale.prototypes.mapped import let_pages_go
from protoclip_scale.prototypes.workers import Workers

TILE_ROWS, LEAST_TILE_ROWS = 65536, 2048
BLOCK_ROWS = {"cpu": 2048, "cuda": 4096}  # searched at once: those of one block share the front of the centroids


@dataclass(frozen=True)
class Found:
    """Of one search, over all ranks: labels that changed, and the sum of squared distances to the nearest centroids."""

    moved: int
    objective: float


class Sweeps:
    """The searches of one restart over the own lanes, and the sums and counts of all ranks' rows by label.

    ``labels``: int32 [n_l] of each lane; ``squared``: float32 [n_l], the squared distances to their centroids. Tiles of rows, each in one lane, are
    searched by ``workers`` in any order: what they find does not depend on it, nor on their size. ``farthest``: the largest absolute value of a centroid that is not a mean of rows. Memory: 12 bytes a row, one tile of rows for
    each worker, 2 K d int64.
    """

    def __init__(self, parts: Sequence[np.ndarray], num_clusters: int, module: ModuleType, distances: str, extent: Extent, workers: Workers, farthest: float = 0.0):
        self.module, self.device = module, module.device()
        self.parts, self.distances, self.extent = parts, distances, extent
        self.workers, self.adding = workers, threading.Lock()
        num_rows = sum(map(len, parts))
        tile_rows = TILE_ROWS if workers.number == 1 else max(LEAST_TILE_ROWS, min(TILE_ROWS, -(-num_rows // (4 * workers.number))))
        self.tiles = [
            (lane, slice(start, min(start + tile_rows, len(part)))) for lane, part in enumerate(parts) for start in range(0, len(part), tile_rows)
        ]
        self.dim = parts[0].shape[1]
        self.slightly = (self.dim + 16) * UNIT  # a float32 distance is off by less than this share, and bounds are rounded outwards by it
        self.objective_exponent = unit_exponent(4 * extent.num_rows * self.dim * max(extent.largest, farthest, 1e-30) ** 2)
        self.labels = [torch.full((len(part),), -1, dtype=torch.int32, device=self.device) for part in parts]
        self.squared = [torch.full((len(part),), torch.inf, device=self.device) for part in parts]
        self.bounds = [torch.full((len(part),), -torch.inf, device=self.device) for part in parts]
        self.sums = torch.zeros((num_clusters, self.dim), dtype=torch.int64, device=self.device)
        self.counts = torch.zeros(num_clusters, dtype=torch.int64, device=self.device)

    def sweep(self, centroids_KD: torch.Tensor, movement_K: torch.Tensor) -> Found:
        """Labels, distances, sums and counts for float32 centroids, each of which is ``movement_K`` (float64) away from where it was in the search
        before, infinitely in the first; a collective. Costs 2 d operations for each pair that is compared."""
        movement_K = (movement_K * (1 + self.slightly)).float()
        order = movement_K.argsort(descending=True, stable=True)
        front = _Front(Targets(centroids_KD, order), movement_K, movement_K[order])
        sums, counts = torch.zeros_like(self.sums), torch.zeros_like(self.counts)
        moved = sum(self.workers.map(lambda tile: self._tile(*tile, front, sums, counts), self.tiles))
        objective = sum(int(self._fixed(squared).sum()) for squared in self.squared)
        changes = reduce_tensor(torch.cat([sums.flatten(), counts, torch.tensor([moved, objective], device=self.device)]))
        self.sums += changes[: self.sums.numel()].view_as(self.sums)
        self.counts += changes[self.sums.numel() : -2]
        moved, objective = changes[-2:].tolist()
        return Found(moved, math.ldexp(objective, -self.objective_exponent))

    def spreads(self) -> np.ndarray:
        """float64 [K]: the sum of squared distances inside each cluster, by the last search; a collective."""
        totals = torch.zeros_like(self.counts)
        for labels, squared in zip(self.labels, self.squared, strict=True):
            totals.index_add_(0, labels.long(), self._fixed(squared))
        return np.ldexp(reduce_tensor(totals).cpu().numpy().astype(np.float64), -self.objective_exponent)

    def _fixed(self, squared: torch.Tensor) -> torch.Tensor:
        return (squared.double() * 2.0**self.objective_exponent).to(torch.int64)

    def _tile(self, lane: int, tile: slice, front: "_Front", sums: torch.Tensor, counts: torch.Tensor) -> int:
        """Searches one tile of a lane; the number of its labels that changed."""
        standing.got_on()
        labels, squared, bounds = self.labels[lane][tile], self.squared[lane][tile], self.bounds[lane][tile]
        farthest = front.descending[0]
        own_moved = (labels < 0) | (front.movement[labels.clamp_min(0)] > 0)
        chosen = (own_moved | (bounds - self._outwards(squared) <= farthest)).nonzero()[:, 0]
        rows = _load(self.parts[lane], tile, chosen, self.device)
        before, bound = labels[chosen].long(), bounds[chosen]
        own = direct(rows, front.targets.centroids, before.clamp_min(0)).masked_fill_(before < 0, torch.inf)
        bounds.copy_(_lowered(bounds, farthest))
        label, bound_now = before.clone(), _lowered(bound, farthest)
        needed = torch.searchsorted(-front.descending, self._outwards(own) - bound, right=True)  # how many moved at least as far as the slack
        needed[needed > len(front.descending) // 2] = len(front.descending)  # so that these rows' bounds are close again
        for block, number in _blocks(needed, BLOCK_ROWS[self.device.type]):
            label[block], own[block], bound_now[block] = self._block(rows.index_select(0, block), before[block], own[block], bound[block], number, front)
        labels[chosen], squared[chosen], bounds[chosen] = label.to(torch.int32), own, bound_now
        gone = (label != before).nonzero()[:, 0]
        known = gone[before[gone] >= 0]
        with self.adding:
            add_rows(sums, counts, rows.index_select(0, gone), label[gone], self.extent.exponent)
            add_rows(sums, counts, rows.index_select(0, known), before[known], self.extent.exponent, sign=-1)
        return len(gone)

    def _block(
        self, rows: torch.Tensor, before: torch.Tensor, own: torch.Tensor, bound: torch.Tensor, number: int, front: "_Front"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(labels, squared distances, bounds) after rows were compared with the ``number`` centroids that moved farthest."""
        targets = front.targets.front(number)
        candidate, first, second, error = propose(rows, targets, self.module, self.distances)
        other = candidate != before
        nearer = other & (first < own)
        label, squared = torch.where(nearer, candidate, before), own.clone()
        squared[nearer] = direct(rows[nearer], targets.centroids, candidate[nearer])
        unclear = ((second - first <= 2 * error) & (first - 2 * error <= own)) | (other & ((first - own).abs() <= 2 * error))
        if len(rest := unclear.nonzero()[:, 0]):
            decided, distance = decide(rows[rest], targets)
            stays = (own[rest] < distance) | ((own[rest] == distance) & (before[rest] <= decided))
            label[rest], squared[rest] = torch.where(stays, before[rest], decided), torch.where(stays, own[rest], distance)
        others = torch.where(label == candidate, second, first) - error
        others = torch.where(label == before, others, torch.minimum(others, own))
        compared = others.clamp_min(0).sqrt() * (1 - self.slightly)
        return label, squared, compared if number == len(front.descending) else torch.minimum(compared, _lowered(bound, front.descending[number]))

    def _outwards(self, squared: torch.Tensor) -> torch.Tensor:
        """Distances, not below the true ones, from squared ones."""
        return squared.sqrt() * (1 + self.slightly)


def _lowered(bounds: torch.Tensor, movement: torch.Tensor) -> torch.Tensor:
    """``bounds - movement``, rounded downwards: over many iterations rounding to the nearest would add up."""
    lowered = bounds - movement
    return lowered - 2 * UNIT * lowered.abs()


@dataclass(frozen=True)
class _Front:
    """Centroids in the order of how far they moved: that order, and the movement [K] by index and in descending order."""

    targets: Targets
    movement: torch.Tensor
    descending: torch.Tensor


def _blocks(needed: torch.Tensor, largest: int) -> Iterator[tuple[torch.Tensor, int]]:
    """(indexes, the largest number needed by one) of rows that need any: up to ``largest`` rows whose numbers are within a factor of
    two, or an eighth as many whatever theirs."""
    descending, order = needed.sort(descending=True, stable=True)
    ascending = -descending.cpu().numpy()
    start, end = 0, int(np.searchsorted(ascending, 0))
    while start < end:
        most = -int(ascending[start])
        similar = int(np.searchsorted(ascending, -(most // 2), side="right"))
        stop = min(end, max(start + largest // 8, min(similar, start + largest)))
        yield order[start:stop], most
        start = stop


def _load(part: np.ndarray, tile: slice, chosen: torch.Tensor, device: torch.device) -> torch.Tensor:
    """float32 [len(chosen), d] copies of a tile's rows."""
    rows = part[tile]
    copied = np.array(rows) if len(chosen) == len(rows) else rows[chosen.cpu().numpy()]
    let_pages_go(part)
    return torch.from_numpy(copied).to(device).float()
