"""Nearest centroids by faiss: on the rank's own GPU where faiss has a GPU build, else on the CPU."""

from functools import cache

import faiss
import numpy as np

from protoclip_scale import collectives


@cache
def _gpu_resources():
    return faiss.StandardGpuResources()


def nearest(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """int64 [n]; exact search, ties to the lowest index."""
    index = faiss.IndexFlatL2(centroids.shape[1])
    if faiss.get_num_gpus() > 0:
        index = faiss.index_cpu_to_gpu(_gpu_resources(), collectives.local_rank(), index)
    index.add(centroids)
    return index.search(features, 1)[1][:, 0]
