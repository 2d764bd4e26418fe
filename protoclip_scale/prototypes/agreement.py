"""How well clusters agree with class labels, corrected for chance: ARI and AMI.

scikit-learn has both. It is not asked here, because importing it takes three seconds of each run and brings SciPy along; the tests compare with it.
"""

from collections.abc import Sequence

import numpy as np
import torch

from protoclip_scale.prototypes.assign_torch import nearest_rows
from protoclip_scale.prototypes.episode import EpisodePrototypes

MODALITIES = ("image", "text")


def label_agreement(prototypes: EpisodePrototypes, features: dict[str, torch.Tensor], classes: dict[str, Sequence[str]]) -> dict[str, float]:
    """ARI and AMI of class columns with the nearest prototypes of held-out rows: ``COLUMN/PROTOTYPES/{ari,ami}``, by column.

    ``features``: prototype features [n, P] of the rows by modality, ``image`` or ``text`` or both; ``classes``: a class name of each row by column, ""
    for a row without one, which is left out. PROTOTYPES is ``image`` or ``text`` for the clusters of the modality itself, ``image_from_teacher`` or
    ``text_from_teacher`` for the teacher's, translated. Prototypes at the origin, those of empty clusters, are nobody's.

    The prototypes are older than the features: they were found before the episode's training. Cost: 2 n K P operations for each kind of prototypes.
    """
    figures: dict[str, float] = {}
    for modality, rows_NP in features.items():
        for name, title in ((f"{modality}_centroids", modality), (f"{modality}_from_teacher", f"{modality}_from_teacher")):
            if name not in prototypes.centroids:
                continue
            centroids_KP = prototypes.centroids[name]
            centroids_KP = centroids_KP[centroids_KP.any(dim=1)]
            if not len(centroids_KP) or not rows_NP.shape[-1]:
                continue
            clusters_N = nearest_rows(rows_NP.to(centroids_KP), centroids_KP).cpu().numpy()
            for column, names in classes.items():
                known_N = np.array([bool(name) for name in names], dtype=bool)
                if known_N.any():
                    numbers_N = np.unique(np.array(names)[known_N], return_inverse=True)[1]
                    figures[f"{column}/{title}/ari"] = adjusted_rand(numbers_N, clusters_N[known_N])
                    figures[f"{column}/{title}/ami"] = adjusted_mutual_information(numbers_N, clusters_N[known_N])
    return figures


def _crossed(first_N: np.ndarray, second_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Rows of each pair of groups that occurs, with the sizes of the pair's two groups, float64 [pairs] each; and the sizes of both labelings' groups."""
    first_N, second_N = (np.unique(labels, return_inverse=True)[1] for labels in (first_N, second_N))
    sizes_A, sizes_B = np.bincount(first_N), np.bincount(second_N)
    pairs, counts = np.unique(first_N.astype(np.int64) * len(sizes_B) + second_N, return_counts=True)
    return np.stack([counts, sizes_A[pairs // len(sizes_B)], sizes_B[pairs % len(sizes_B)]]).astype(np.float64), sizes_A, sizes_B


def adjusted_rand(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """Hubert and Arabie's adjusted Rand index of two labelings of n rows: 1 if they are the same partition, 0 on average for independent ones."""
    (counts, _, _), sizes_A, sizes_B = _crossed(first_N, second_N)
    together, in_first, in_second = (float((sizes * (sizes - 1.0)).sum()) / 2 for sizes in (counts, sizes_A, sizes_B))
    expected = in_first * in_second / (len(first_N) * (len(first_N) - 1) / 2) if len(first_N) > 1 else 0.0
    largest = (in_first + in_second) / 2
    return 1.0 if largest == expected else (together - expected) / (largest - expected)


def adjusted_mutual_information(first_N: np.ndarray, second_N: np.ndarray) -> float:
    """Mutual information of two labelings less what independent ones of the same sizes share, over what it could be (Vinh et al. 2010, arithmetic mean).

    1 for the same partition, 0 on average for independent ones, for any number of clusters: unlike ARI it does not sink when classes are few and clusters
    many. Cost: (distinct sizes of one) x (distinct sizes of the other) x (largest common size).
    """
    (counts, of_first, of_second), sizes_A, sizes_B = _crossed(first_N, second_N)
    num_rows = len(first_N)
    if max(len(sizes_A), len(sizes_B)) == 1 or min(len(sizes_A), len(sizes_B)) == num_rows:
        return 1.0  # the same partition, and any partition would have to be it
    shared = float((counts / num_rows * np.log(num_rows * counts / (of_first * of_second))).sum())
    expected = _expected_information(sizes_A, sizes_B)
    entropies = [-float((sizes / num_rows * np.log(sizes / num_rows)).sum()) for sizes in (sizes_A, sizes_B)]
    room = sum(entropies) / 2 - expected
    return (shared - expected) / (room if abs(room) > np.finfo(np.float64).eps else np.copysign(np.finfo(np.float64).eps, room))


def _expected_information(sizes_A: np.ndarray, sizes_B: np.ndarray) -> float:
    """Mean mutual information, in nats, over all labelings with these group sizes: common sizes follow the hypergeometric distribution."""
    num_rows = int(sizes_A.sum())
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, num_rows + 1)))])
    sizes_B, times_B = np.unique(sizes_B, return_counts=True)
    total = 0.0
    for size, times in zip(*np.unique(sizes_A, return_counts=True), strict=True):
        common_BC = np.arange(1, min(size, sizes_B[-1]) + 1)[None, :].repeat(len(sizes_B), axis=0)
        possible_BC = (common_BC <= sizes_B[:, None]) & (common_BC >= size + sizes_B[:, None] - num_rows)
        other = np.broadcast_to(sizes_B[:, None], common_BC.shape)[possible_BC]
        common = common_BC[possible_BC]
        log_probability = (
            log_factorial[size] + log_factorial[other] + log_factorial[num_rows - size] + log_factorial[num_rows - other] - log_factorial[num_rows]
            - log_factorial[common] - log_factorial[size - common] - log_factorial[other - common] - log_factorial[num_rows - size - other + common]
        )  # fmt: skip
        terms = common / num_rows * np.log(num_rows * common / (size * other.astype(np.float64))) * np.exp(log_probability)
        total += float(times * (terms * np.broadcast_to(times_B[:, None], common_BC.shape)[possible_BC]).sum())
    return total
