"""Figures of a clustering and of the features it is made of, on a fixed sample of rows: once per episode, at a small part of k-means' cost."""

from collections.abc import Sequence

import numpy as np
import torch

from protoclip_scale import collectives
from protoclip_scale.data.randomness import raw_keys
from protoclip_scale.prototypes.diagnostics import TILE_ELEMENTS, class_counts
from protoclip_scale.prototypes.fixed_point import gather_array, reduce_array
from protoclip_scale.recipe.schema import Prototypes

STUDENTS = ("image", "text")
NO_KEY = np.iinfo(np.int64).max


def clustering_quality(
    features: dict[str, list[np.ndarray]],
    positions: list[np.ndarray],
    labels: dict[str, list[np.ndarray]],
    centroids: dict[str, np.ndarray],
    settings: Prototypes,
    seed: Sequence[int],
) -> dict[str, float]:
    """Figures of a clustering; a collective, equal on all ranks and for any number of them. Nothing if ``settings.quality_rows`` is 0.

    ``features``: [n_l, d] by modality (``image``, ``text``; others are left alone) and own lane; ``positions``: int64 [n_l], distinct; ``labels``: [n_l] by
    labeling, -1 where none is known; ``centroids``: [K, d] named as in ``EpisodePrototypes``; ``seed``: integers that draw the sample.

    ``quality/<prototypes>/silhouette`` for ``image``, ``text`` and each translated set (``image_from_text``: the text clusters, in the space of images): see
    ``silhouette``. ``quality/<modality>/effective_rank``: see ``effective_rank``. ``quality/<modality>/self_similarity``: mean cosine of two different rows,
    1 for a collapsed tower. ``quality/modality_gap``: norm of the difference of both modalities' means (Liang et al. 2022), 0 to 2; the two prototype
    spaces are tied by their heads' common start and the prototype loss alone, so it says less here than between embeddings.

    Cost: one search of the sample among the centroids per set of prototypes; a few rows of each lane are read.
    """
    if not settings.quality_rows:
        return {}
    sample = _Sample(positions, settings.quality_rows, seed)
    rows = {name: sample.take(features[name]) for name in STUDENTS if name in features}
    sets = {name.removesuffix("_centroids"): centroids_KD for name, centroids_KD in centroids.items()}
    clustered: dict[str, tuple[np.ndarray, ...]] = {}
    for name, centroids_KD in sets.items():
        modality, _, labeling = name.partition("_from_")
        labeling = labeling or modality
        if modality in rows and labeling in labels:
            own_M = sample.take([part.astype(np.int64, copy=False) for part in labels[labeling]])
            clustered[name] = rows[modality], own_M, centroids_KD, class_counts(labels[labeling], len(centroids_KD))
    return collectives.from_rank_zero(
        lambda: {f"quality/{name}/silhouette": silhouette(*arrays) for name, arrays in clustered.items()} | {f"quality/{name}": value for name, value in feature_figures(rows).items()}
    )


class _Sample:
    """Rows with the smallest keys f(seed, position) over all ranks, by position."""

    def __init__(self, positions: Sequence[np.ndarray], num_rows: int, seed: Sequence[int]):
        own = np.concatenate([*positions, np.empty(0, dtype=np.int64)])
        every_key = raw_keys(int(own.max()) + 1 if len(own) else 0, seed[0], "quality sample", *seed[1:])
        keys = (every_key[own] >> np.uint64(1)).astype(np.int64)
        first = np.lexsort((own, keys))[:num_rows]
        offer = np.full((num_rows, 2), NO_KEY, dtype=np.int64)
        offer[: len(first)] = np.stack([keys[first], own[first]], axis=1)
        offers = gather_array(offer)
        offers = offers[offers[:, 0] != NO_KEY]
        self._chosen = np.sort(offers[np.lexsort((offers[:, 1], offers[:, 0]))][:num_rows, 1])
        self._positions = positions

    def take(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """[m, ...] of the sample from [n_l, ...] of each own lane; on all ranks. Each row has one owner, so the sum over ranks is exact."""
        first = parts[0]
        taken = np.zeros((len(self._chosen), *first.shape[1:]), dtype=np.float32 if first.dtype.kind == "f" else np.int64)
        for part, positions in zip(parts, self._positions, strict=True):
            mine = np.flatnonzero(np.isin(positions, self._chosen))
            taken[np.searchsorted(self._chosen, positions[mine])] = part[mine]
        return reduce_array(taken)


def silhouette(rows_MD: np.ndarray, labels_M: np.ndarray, centroids_KD: np.ndarray, sizes_K: np.ndarray) -> float:
    """Silhouette by centroids, each row left out of its own: mean over rows of (b - a) / max(a, b), from -1 to 1.

    b is the distance to the nearest other centroid, a that to the own one as it would be without the row: n / (n - 1) times as far. A row that is alone
    in its cluster counts 0, as in Rousseeuw's definition, and so does a row between two clusters; rows labelled -1 are left out. ``sizes_K``: rows of
    each cluster, those outside the sample too; nobody's centroid is nobody's neighbour.

    Rousseeuw's own figure needs all pairs of rows. The simplified one (Hruschka et al. 2004) leaves the row in, and with ten rows a cluster that flatters:
    256 clusters of 2,560 rows of noise get 0.09 from it, -0.01 here, -0.01 from all pairs; real features 0.31, 0.24, 0.13; 1,024 clusters 0.39, 0.17, 0.13.
    """
    known = (labels_M >= 0).nonzero()[0]
    if not len(known) or np.count_nonzero(sizes_K) < 2:
        return 0.0
    centroids, sizes = torch.from_numpy(np.asarray(centroids_KD, dtype=np.float32)), torch.from_numpy(sizes_K)
    total = 0.0
    for some in np.array_split(known, -(-len(known) * len(centroids) // TILE_ELEMENTS)):
        rows, own = torch.from_numpy(rows_MD[some]), torch.from_numpy(labels_M[some])
        others = torch.cdist(rows, centroids).masked_fill_(sizes == 0, torch.inf).scatter_(1, own[:, None], torch.inf)
        between, size = others.amin(dim=1), sizes[own]
        within = (rows - centroids[own]).norm(dim=1) * size / (size - 1).clamp(min=1)
        scores = (between - within) / torch.maximum(within, between).clamp(min=torch.finfo(torch.float32).tiny)
        total += float(scores.masked_fill(size <= 1, 0).double().sum())
    return total / len(known)


def effective_rank(rows_MD: np.ndarray) -> float:
    """exp of the entropy of the singular values over their sum (Roy and Vetterli 2007): 1 if all rows lie on a line, d if they fill the space evenly.

    Rows are not centred: features in a narrow cone, which an offset hides from centred ones, count as few dimensions.
    """
    values = torch.linalg.svdvals(torch.from_numpy(rows_MD).double())
    shares = values / values.sum().clamp(min=torch.finfo(torch.float64).tiny)
    return float(torch.special.entr(shares).sum().exp())


def feature_figures(rows: dict[str, np.ndarray]) -> dict[str, float]:
    """``<modality>/effective_rank``, ``<modality>/self_similarity`` and ``modality_gap`` of unit rows [M, d] of the same places; none without two rows."""
    rows = {name: rows_MD for name, rows_MD in rows.items() if len(rows_MD) > 1}
    means = {name: rows_MD.mean(axis=0, dtype=np.float64) for name, rows_MD in rows.items()}
    figures = {f"{name}/effective_rank": effective_rank(rows_MD) for name, rows_MD in rows.items()}
    for name, rows_MD in rows.items():
        itself = float(np.square(rows_MD, dtype=np.float64).sum())  # every row with itself
        figures[f"{name}/self_similarity"] = (float(np.square(means[name] * len(rows_MD)).sum()) - itself) / (len(rows_MD) * (len(rows_MD) - 1))
    if set(STUDENTS) <= means.keys():
        figures["modality_gap"] = float(np.linalg.norm(means["image"] - means["text"]))
    return figures
