"""Two nearest centroids by faiss: on the rank's own GPU where faiss has a GPU build, else on the CPU."""

from functools import cache

import faiss
import torch

from protoclip_scale import collectives

faiss.cvar.distance_compute_blas_threshold = 2048  # values of the rows; faiss's 128,000 leaves blocks of 1,000 rows to code two to three times as slow as products


@cache
def _gpu_resources():
    return faiss.StandardGpuResources()


def device() -> torch.device:
    """Where rows should be: faiss takes them from the host, its GPU build too."""
    return torch.device("cpu")


def use_one_thread() -> None:
    """In the calling thread, of faiss's and torch's own."""
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)


def two_nearest(rows_ND: torch.Tensor, centroids_KD: torch.Tensor, distances: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(labels int64 [N], smallest and second smallest squared distance [N]) by brute force in float32."""
    assert distances == "fp32"
    rows, centroids = rows_ND.numpy(), centroids_KD.numpy()
    wanted = min(2, len(centroids))
    if faiss.get_num_gpus() > 0:
        squared, labels = faiss.knn_gpu(_gpu_resources(), rows, centroids, wanted, device=collectives.local_rank())
    else:
        squared, labels = faiss.knn(rows, centroids, wanted)
    squared, labels = torch.from_numpy(squared), torch.from_numpy(labels)
    second = squared[:, 1] if wanted == 2 else torch.full((len(rows),), torch.inf)
    return labels[:, 0], squared[:, 0], second
