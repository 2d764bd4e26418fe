"""Nearest centroids by Euclidean distance, with exchangeable search engines."""

import importlib

import numpy as np

from protoclip_scale.errors import UserError


def assign(features: np.ndarray, centroids: np.ndarray, engine: str) -> tuple[np.ndarray, np.ndarray]:
    """(labels int64 [n], squared distances float32 [n]) of float32 rows [n, d] to centroids [K, d]; ties go to the lowest index.

    ``engine``: faiss or torch, a module ``assign_<engine>`` with ``nearest(features, centroids) -> labels``. The search runs around the
    centroids' mean, where |x|^2 - 2xc + |c|^2 cancels least; the distances are then taken directly, so they do not depend on the engine.
    Costs 2 n K d operations; memory is a copy of the rows and the engine's tiles.
    """
    try:
        module = importlib.import_module(f"protoclip_scale.prototypes.assign_{engine}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"prototypes.engine {engine}: {error}; install faiss-cpu (or faiss-gpu), or set prototypes.engine to torch"
        ) from None
    centre = centroids.mean(axis=0, dtype=np.float64).astype(np.float32)
    labels = _lowest_of_equal(centroids)[module.nearest(np.ascontiguousarray(features - centre), np.ascontiguousarray(centroids - centre))]
    differences = features - centroids[labels]
    return labels, np.einsum("nd,nd->n", differences, differences)


def _lowest_of_equal(centroids: np.ndarray) -> np.ndarray:
    """int64 [K]: the lowest index of an equal centroid. Matrix products round equal columns differently near a tile's edge."""
    itself = np.arange(len(centroids))
    words = np.ascontiguousarray(centroids + np.float32(0)).view(np.int32).astype(np.int64)  # + 0 turns -0 into 0
    factors = np.random.default_rng(0).integers(1 << 62, size=centroids.shape[1]) | 1
    _, first, group = np.unique((words * factors).sum(axis=1), return_index=True, return_inverse=True)
    if len(first) == len(centroids):
        return itself
    lowest = first[group]
    return np.where((centroids == centroids[lowest]).all(axis=1), lowest, itself)
