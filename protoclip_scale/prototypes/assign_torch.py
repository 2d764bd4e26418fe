"""Nearest centroids by tiled matrix products in torch: for machines where faiss has no GPU build. Never imports faiss."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from protoclip_scale import collectives

TILE_ELEMENTS = 1 << 23  # 32 MB of float32 distances at once


@contextmanager
def _full_float32() -> Iterator[None]:
    """TF32 or bf16 products would change labels, whatever the training uses."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def nearest(features: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """int64 [n]; exact search, ties to the lowest index; tiles of rows so that n x K never exists whole."""
    device = torch.device("cuda", collectives.local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    rows_ND, centroids_KD = torch.from_numpy(features).to(device), torch.from_numpy(centroids).to(device)
    tile_rows = max(64, TILE_ELEMENTS // len(centroids))
    half_norms_K = 0.5 * centroids_KD.square().sum(dim=1)
    labels = torch.empty(len(features), dtype=torch.int64, device=device)
    with _full_float32():
        for start in range(0, len(features), tile_rows):
            tile = rows_ND[start : start + tile_rows]
            labels[start : start + tile_rows] = torch.addmm(half_norms_K, tile, centroids_KD.T, alpha=-1).argmin(dim=1)
    return labels.cpu().numpy()
