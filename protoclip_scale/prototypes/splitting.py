"""What k-means does with empty clusters: each becomes a near copy of a large one's centroid, which the next iteration tells apart.

The rule of faiss (``split_clusters`` in its Clustering.cpp), with its generator, seed and order: a donor is taken with probability
proportional to its rows but one. It needs nothing but the counts, so it is the same on every rank. It differs in one thing: clusters whose
rows are all copies of one vector give nothing, for their copies would stay together and the new cluster empty.
"""

import numpy as np

SEED = 1234  # faiss's
SHIFT = np.float32(1 / 1024)


def split_clusters(centroids: np.ndarray, counts: np.ndarray, indivisible: np.ndarray) -> np.ndarray:
    """float32 [K, d]: ``centroids`` with those of empty clusters, and of the clusters they were split from, made anew.

    ``counts`` [K]: rows of each cluster; ``indivisible`` bool [K]: those whose rows are all alike. If there are too few others, some stay
    as they are. Costs about K steps for every empty cluster.
    """
    centroids, sizes = centroids.copy(), np.where(indivisible, np.minimum(counts, 1), counts).astype(np.float64)
    up = np.where(np.arange(centroids.shape[1]) % 2 == 0, 1 + SHIFT, 1 - SHIFT).astype(np.float32)
    down = (2 - up).astype(np.float32)
    num_splits = sizes.sum() - np.count_nonzero(sizes)  # of which the probabilities below are shares
    draws = _Draws(len(counts))
    for empty in np.flatnonzero(counts == 0):
        if not (sizes > 1).any():
            break
        donor = draws.first_below((sizes - 1) / num_splits)
        centroids[empty], centroids[donor] = centroids[donor] * up, centroids[donor] * down
        sizes[empty] = sizes[donor] / 2
        sizes[donor] -= sizes[empty]
    return centroids


class _Draws:
    """faiss's uniform numbers, one for each cluster asked in turn."""

    def __init__(self, num_clusters: int):
        self.random = np.random.RandomState(SEED)  # the same Mersenne twister as C++'s mt19937
        self.ready = np.empty(0, dtype=np.float32)
        self.num_clusters = num_clusters

    def first_below(self, probabilities: np.ndarray) -> int:
        """Asks the clusters from the first, round and round, until a draw is below one's probability."""
        while True:
            if len(self.ready) < self.num_clusters:
                bits = self.random.randint(0, 1 << 32, size=8 * self.num_clusters, dtype=np.uint32)
                self.ready = np.concatenate([self.ready, bits.astype(np.float32) / np.float32(2**32 - 1)])
            hits = np.flatnonzero(self.ready[: self.num_clusters] < probabilities)
            used = hits[0] + 1 if len(hits) else self.num_clusters
            self.ready = self.ready[used:]
            if len(hits):
                return int(hits[0])
