"""Figures that tell a healthy clustering from a collapsed one."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from protoclip_scale.prototypes.fixed_point import reduce_array

TILE_ELEMENTS = 1 << 23
COLLAPSED_ENTROPY = 0.95
SMALL_IMBALANCE = 4.0  # uneven at most: with so few clusters K / 2 says nothing


def imbalance(counts: np.ndarray) -> float:
    """K sum(n_k^2) / N^2 of the cluster sizes [K]: 1 if all are equal, K if one cluster holds every row."""
    sizes = counts.astype(np.float64)
    return float(len(sizes) * (sizes**2).sum() / max(sizes.sum(), 1) ** 2)


def class_counts(labels: Sequence[np.ndarray], num_clusters: int) -> np.ndarray:
    """int64 [K]: rows of each cluster over all ranks, from the labels of the own lanes, -1 for rows of none; a collective."""
    counts = np.zeros(num_clusters, dtype=np.int64)
    for part in labels:
        counts += np.bincount(part[part >= 0], minlength=num_clusters)
    return reduce_array(counts)


@torch.no_grad()
def target_entropy(centroids: np.ndarray | torch.Tensor, labels: Sequence[np.ndarray], temperature: float) -> float:
    """Mean entropy of the soft targets softmax(C_y C^T / temperature) over all rows, divided by ln K: 0 is one-hot, 1 is uniform.

    ``centroids`` [K, d] of the teacher; ``labels`` of the own lanes (a collective). Above 0.95 the targets tell nothing apart and the
    prototype loss stays at ln K. A target depends on the label only, so this costs 2 K K d operations, in tiles, on the centroids' device.
    """
    centroids_KD = torch.as_tensor(centroids, dtype=torch.float32)
    num_clusters = len(centroids_KD)
    counts = class_counts(labels, num_clusters)
    if num_clusters == 1:
        return 0.0
    used = torch.from_numpy(np.flatnonzero(counts)).to(centroids_KD.device)
    weights = torch.from_numpy(counts[counts > 0]).to(centroids_KD.device, torch.float64)
    tile_rows = max(1, TILE_ELEMENTS // num_clusters)
    total = torch.zeros((), dtype=torch.float64, device=centroids_KD.device)
    for start in range(0, len(used), tile_rows):
        log_targets = torch.log_softmax(centroids_KD[used[start : start + tile_rows]] @ centroids_KD.T / temperature, dim=1)
        entropy = -(log_targets.exp() * log_targets).sum(dim=1)
        total += (entropy.double() * weights[start : start + tile_rows]).sum()
    return float(total / weights.sum() / math.log(num_clusters))


def collapse_warnings(figures: Mapping[str, float], num_clusters: int) -> list[str]:
    """One line for each way in which a clustering's ``figures`` say that it teaches nothing, with what to do.

    ``target_entropy/<labeling>`` above 0.95; ``kmeans/<labeling>/imbalance`` above K / 2: fewer than two clusters would be as uneven, so nearly all rows lie in one.
    """
    lines = []
    for name, value in figures.items():
        kind, _, rest = name.partition("/")
        labeling = rest.split("/")[0]
        if kind == "target_entropy" and value > COLLAPSED_ENTROPY:
            lines.append(
                f"soft targets of {labeling} prototypes are nearly uniform (entropy {value:.3f} ln K): they teach nothing; "
                "lower objectives.prototype.temperature, or use hard targets"
            )
        if kind == "kmeans" and name.endswith("/imbalance") and value > max(num_clusters / 2, SMALL_IMBALANCE):
            lines.append(
                f"nearly all {labeling} features lie in one cluster (imbalance {value:.1f} of at most {num_clusters}): they have collapsed; "
                "compare quality/*/effective_rank of the episodes before, and lower optim.lr or the objectives' weights"
            )
    return lines
