"""Nearest centroids by Euclidean distance, with exchangeable search engines and one answer.

An engine proposes: its matrix products give every row's two smallest distances up to a known rounding error. Where that error leaves
a choice, distances taken directly decide, the lowest index among equal ones. So labels are a function of the row and the centroids
alone: not of the engine, its precision, threads, tiles, nor of the other rows.
"""

import copy
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import torch

from protoclip_scale.errors import UserError

ROUNDING = {"fp32": 0.0, "tf32": 2.0**-10, "bf16": 2.0**-8}  # of a product's factors; tf32's may be cut off, not rounded
UNIT = 2.0**-24  # of a float32 sum
DECIDE_ELEMENTS = 1 << 21


def engine_module(engine: str) -> ModuleType:
    """``assign_<engine>``, with ``device()``, ``use_one_thread()`` and ``two_nearest(rows, centroids, distances)``. UserError if its library is missing."""
    try:
        return importlib.import_module(f"protoclip_scale.prototypes.assign_{engine}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"prototypes.engine {engine}: {error}; install faiss-cpu (or faiss-gpu), or set prototypes.engine to torch"
        ) from None


def assign(features: np.ndarray, centroids: np.ndarray, engine: str, distances: str = "fp32") -> tuple[np.ndarray, np.ndarray]:
    """(labels int64 [n], squared distances float32 [n]) of float32 rows [n, d] to centroids [K, d]; ties go to the lowest index.

    ``engine``: faiss or torch. The search runs around the centroids' mean, where |x|^2 - 2xc + |c|^2 cancels least.
    Costs 2 n K d operations; memory is two copies of the rows and the engine's tiles.
    """
    module = engine_module(engine)
    device = module.device()
    rows_ND, centroids_KD = (torch.from_numpy(np.array(array, dtype=np.float32)).to(device) for array in (features, centroids))
    labels, squared = nearest(rows_ND, Targets(centroids_KD), module, distances)
    return labels.cpu().numpy(), squared.cpu().numpy()


class Targets:
    """Centroids [K, d] ready to be searched: around their mean, in the given ``order`` of their indexes, with the length of the longest."""

    def __init__(self, centroids_KD: torch.Tensor, order: torch.Tensor | None = None):
        self.centroids = centroids_KD
        self.order = torch.arange(len(centroids_KD), device=centroids_KD.device) if order is None else order
        self.centre = centroids_KD.mean(dim=0, dtype=torch.float64).float()
        self.centred = centroids_KD[self.order] - self.centre
        self.longest = self.centred.norm(dim=1).max()

    def front(self, number: int) -> "Targets":
        """The first ``number`` of them, around the same mean."""
        part = copy.copy(self)
        part.order, part.centred = self.order[:number], self.centred[:number]
        return part


@torch.no_grad()
def nearest(rows_ND: torch.Tensor, targets: Targets, module: ModuleType, distances: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels int64 [N], squared distances float32 [N]) of one search over all ``targets``, on the rows' device."""
    labels, first, second, error = propose(rows_ND, targets, module, distances)
    squared = direct(rows_ND, targets.centroids, labels)
    unclear = (second - first <= 2 * error).nonzero()[:, 0]
    labels[unclear], squared[unclear] = decide(rows_ND[unclear], targets)
    return labels, squared


def propose(
    rows_ND: torch.Tensor, targets: Targets, module: ModuleType, distances: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """An engine's (label int64 [N], smallest and second smallest squared distance [N], error [N]) of rows to ``targets``.

    No distance is off by more than ``error``, nor is a directly taken one from the true one: for a product of rounded factors it
    is at most 2|x||c| (3u' + du), for the norms du(|x|^2 + |c|^2), where u = 2^-24 and u' is the rounding of the factors; |x|+|c| bounds
    all of them. The second is infinite if there is but one target.
    """
    centred_ND = rows_ND - targets.centre
    places, first, second = module.two_nearest(centred_ND, targets.centred, distances)
    reach = centred_ND.norm(dim=1) + targets.longest
    return targets.order[places], first, second, error_share(rows_ND.shape[1], distances) * reach.square()


@contextmanager
def precise_products(device: torch.device, precision: str = "highest") -> Iterator[None]:
    """Float32 matrix products of this precision inside, whatever the training uses. The setting is the process's, not the thread's: it is left
    alone where it is right, as it is on CPUs unless somebody has changed it."""
    before = torch.get_float32_matmul_precision()
    with torch.autocast(device.type, enabled=False):
        if before == precision:
            yield
            return
        torch.set_float32_matmul_precision(precision)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


def error_share(dim: int, distances: str) -> float:
    """The error of a squared distance as a share of (|x| + |c|)^2."""
    return 1.5 * ROUNDING[distances] + (3 * dim + 8) * UNIT


def decide(rows_ND: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """(labels, squared distances) by directly taken distances to all targets that float32 products cannot tell from the nearest.

    Costs as much as a search of these rows; they are few, unless centroids lie on each other.
    """
    labels = torch.empty(len(rows_ND), dtype=torch.int64, device=rows_ND.device)
    squared = torch.empty(len(rows_ND), dtype=torch.float32, device=rows_ND.device)
    half_norms_K = 0.5 * targets.centred.square().sum(dim=1)
    tile = max(1, DECIDE_ELEMENTS // len(targets.order))
    for start in range(0, len(rows_ND), tile):
        rows = rows_ND[start : start + tile]
        centred = rows - targets.centre
        with precise_products(rows.device):
            scores_NK = torch.addmm(half_norms_K, centred, targets.centred.T, alpha=-1)
        error = error_share(rows.shape[1], "fp32") * (centred.norm(dim=1) + targets.longest).square()
        row, place = (scores_NK <= scores_NK.amin(dim=1, keepdim=True) + error[:, None]).nonzero(as_tuple=True)
        candidates = targets.order[place]
        distances = direct(rows, targets.centroids, candidates, row)
        smallest = torch.full_like(error, torch.inf).scatter_reduce_(0, row, distances, "amin")
        best = distances == smallest[row]
        lowest = torch.full((len(rows),), len(targets.centroids), device=rows.device)
        labels[start : start + tile] = lowest.scatter_reduce_(0, row[best], candidates[best], "amin")
        squared[start : start + tile] = smallest
    return labels, squared


def direct(rows_ND: torch.Tensor, centroids_KD: torch.Tensor, labels: torch.Tensor, row: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [n]: |x - c|^2 term by term, of the rows (or of those at ``row``) to the centroids at ``labels``, int64 [n].

    Each sum is taken in the same order whatever rows stand beside it. Memory is a tile of both."""
    squared = torch.empty(len(labels), dtype=torch.float32, device=rows_ND.device)
    tile = 2048 if rows_ND.device.type == "cpu" else 1 << 16  # a processor's cache
    for start in range(0, len(labels), tile):
        end = start + tile
        rows = rows_ND[start:end] if row is None else rows_ND.index_select(0, row[start:end])
        centroids = centroids_KD.index_select(0, labels[start:end])
        squared[start:end] = torch.sub(rows, centroids, out=centroids).square_().sum(dim=1)
    return squared
