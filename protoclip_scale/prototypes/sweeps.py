"""Exact searches of Lloyd's iterations that look only where something can have changed.

Per row the label, the squared distance to its own centroid, and a lower bound of the distance to every other one are kept (Hamerly,
"Making k-means even faster", 2010). A centroid that moved by m has come nearer by m at most; so with centroids in the order of how far
they moved, a row must be compared with those at the front alone, and with none if its own one stayed near enough. Rows that changed their
label are all that changes the sums, which are integers: taking a row away and adding it elsewhere is exact.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from protoclip_scale.prototypes.assign import UNIT, Targets, decide, direct, engine_module, propose
from protoclip_scale.prototypes.fixed_point import Extent, add_rows, reduce_array, unit_exponent
from protoclip_scale.prototypes.mapped import let_pages_go

TILE_ROWS = 65536
BLOCK_ROWS = {"cpu": 2048, "cuda": 4096}  # searched at once: those of one block share the front of the centroids


@dataclass(frozen=True)
class Found:
    """Of one search, over all ranks: labels that changed, and the sum of squared distances to the nearest centroids."""

    moved: int
    objective: float


class Sweeps:
    """The searches of one restart over the own lanes, and the sums and counts of all ranks' rows by label.

    ``labels``: int32 [n_l] of each lane; ``squared``: float32 [n_l], the squared distances to their centroids. Tiles begin anew in every
    lane, so that each product has the same shape whichever rank computes it. Memory: 12 bytes a row, one tile of rows, 2 K d int64.
    """

    def __init__(self, parts: Sequence[np.ndarray], num_clusters: int, engine: str, distances: str, extent: Extent):
        self.module = engine_module(engine)
        self.device = self.module.device()
        self.parts, self.distances, self.extent = parts, distances, extent
        self.dim = parts[0].shape[1]
        self.slightly = (self.dim + 16) * UNIT  # a float32 distance is off by less than this share, and bounds are rounded outwards by it
        self.objective_exponent = unit_exponent(4 * extent.num_rows * self.dim * max(extent.largest, 1e-30) ** 2)
        self.labels = [torch.full((len(part),), -1, dtype=torch.int32, device=self.device) for part in parts]
        self.squared = [torch.full((len(part),), torch.inf, device=self.device) for part in parts]
        self.bounds = [torch.full((len(part),), -torch.inf, device=self.device) for part in parts]
        self.sums = np.zeros((num_clusters, self.dim), dtype=np.int64)
        self.counts = np.zeros(num_clusters, dtype=np.int64)
        self.pairs = 0

    def sweep(self, centroids: np.ndarray, movement: np.ndarray) -> Found:
        """Labels, distances, sums and counts for ``centroids`` float32 [K, d], of which each is ``movement`` [K] away from where it was in
        the search before (infinitely in the first); a collective. Costs 2 d operations for each pair compared, counted in ``pairs``."""
        num_clusters = len(centroids)
        movement_K = torch.from_numpy((movement * (1 + self.slightly)).astype(np.float32)).to(self.device)
        order = movement_K.argsort(descending=True, stable=True)
        front = _Front(Targets(torch.from_numpy(centroids).to(self.device), order), movement_K, movement_K[order])
        sums = torch.zeros((num_clusters, self.dim), dtype=torch.int64, device=self.device)
        counts = torch.zeros(num_clusters, dtype=torch.int64, device=self.device)
        moved, objective = 0, 0
        for lane, part in enumerate(self.parts):
            for start in range(0, len(part), TILE_ROWS):
                moved += self._tile(lane, slice(start, min(start + TILE_ROWS, len(part))), front, sums, counts)
            objective += int(self._fixed(self.squared[lane]).sum())
        changes = torch.cat([sums.flatten(), counts, torch.tensor([moved, objective], device=self.device)]).cpu().numpy()
        changes = reduce_array(changes)
        self.sums += changes[: self.sums.size].reshape(self.sums.shape)
        self.counts += changes[self.sums.size : -2]
        return Found(int(changes[-2]), float(np.ldexp(float(changes[-1]), -self.objective_exponent)))

    def spreads(self) -> np.ndarray:
        """float64 [K]: the sum of squared distances inside each cluster, by the last search; a collective."""
        totals = torch.zeros(len(self.counts), dtype=torch.int64, device=self.device)
        for labels, squared in zip(self.labels, self.squared, strict=True):
            totals.index_add_(0, labels.long(), self._fixed(squared))
        return np.ldexp(reduce_array(totals.cpu().numpy()).astype(np.float64), -self.objective_exponent)

    def _fixed(self, squared: torch.Tensor) -> torch.Tensor:
        return (squared.double() * 2.0**self.objective_exponent).to(torch.int64)

    def _tile(self, lane: int, tile: slice, front: "_Front", sums: torch.Tensor, counts: torch.Tensor) -> int:
        """Searches one tile of a lane; the number of its labels that changed."""
        labels, squared, bounds = self.labels[lane][tile], self.squared[lane][tile], self.bounds[lane][tile]
        farthest = front.descending[0]
        own_moved = (labels < 0) | (front.movement[labels.clamp_min(0)] > 0)
        chosen = (own_moved | (bounds - self._outwards(squared) <= farthest)).nonzero()[:, 0]
        rows = _load(self.parts[lane], tile, chosen, self.device)
        before, bound = labels[chosen].long(), bounds[chosen]
        own = direct(rows, front.targets.centroids, before.clamp_min(0)).masked_fill_(before < 0, torch.inf)
        bounds -= farthest
        label, bound_now = before.clone(), bound - farthest
        needed = torch.searchsorted(-front.descending, self._outwards(own) - bound, right=True)  # how many moved at least as far as the slack
        needed[needed > len(front.descending) // 2] = len(front.descending)  # so that these rows' bounds are close again
        for block, number in _blocks(needed, BLOCK_ROWS[self.device.type]):
            label[block], own[block], bound_now[block] = self._block(rows.index_select(0, block), before[block], own[block], bound[block], number, front)
        labels[chosen], squared[chosen], bounds[chosen] = label.to(torch.int32), own, bound_now
        gone = (label != before).nonzero()[:, 0]
        add_rows(sums, counts, rows.index_select(0, gone), label[gone], self.extent.exponent)
        known = gone[before[gone] >= 0]
        add_rows(sums, counts, rows.index_select(0, known), before[known], self.extent.exponent, sign=-1)
        return len(gone)

    def _block(
        self, rows: torch.Tensor, before: torch.Tensor, own: torch.Tensor, bound: torch.Tensor, number: int, front: "_Front"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(labels, squared distances, bounds) after rows were compared with the ``number`` centroids that moved farthest."""
        self.pairs += len(rows) * number
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
        return label, squared, compared if number == len(front.descending) else torch.minimum(compared, bound - front.descending[number])

    def _outwards(self, squared: torch.Tensor) -> torch.Tensor:
        """Distances, not below the true ones, from squared ones."""
        return squared.sqrt() * (1 + self.slightly)


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
