"""Two nearest centroids by tiled matrix products in torch: for machines where faiss has no GPU build. Never imports faiss."""

import torch

from protoclip_scale import collectives
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.assign import Targets, engine_module, nearest, precise_products

CPU_TILE_ELEMENTS = 1 << 22  # 16 MB of float32 distances at once
GPU_TILE_ELEMENTS = 1 << 26
GROUPS = 16


def device() -> torch.device:
    """The rank's own GPU, else the CPU."""
    return torch.device("cuda", collectives.local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def use_one_thread() -> None:
    """In the calling thread, of torch's own."""
    torch.set_num_threads(1)


@torch.no_grad()
def nearest_rows(rows_ND: torch.Tensor, centroids_KD: torch.Tensor, distances: str = "fp32") -> torch.Tensor:
    """int64 [N], on the tensors' device: each row's nearest centroid, of equal ones the first. For float tensors of any kind, under
    autocast too. Costs 2 N K d operations; memory is a float32 copy of both and one tile of distances, never N x K."""
    return nearest(rows_ND.float(), Targets(centroids_KD.float()), engine_module("torch"), distances)[0]


@torch.no_grad()
def two_nearest(rows_ND: torch.Tensor, centroids_KD: torch.Tensor, distances: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(labels int64 [N], smallest and second smallest squared distance [N]) in tiles of rows; products as ``distances`` says.

    A centroid's place among K = GROUPS x width is (group, column): the minima over groups are taken side by side, and only those
    ``width`` columns, and the groups of the winning one, are looked at again. UserError for tf32 without a GPU.
    """
    if distances == "tf32" and rows_ND.device.type != "cuda":
        raise UserError("prototypes.distances tf32 needs a GPU, and k-means runs on the CPU here; set prototypes.distances to fp32 or bf16")
    num_rows, width = len(rows_ND), -(-len(centroids_KD) // GROUPS)
    padded_KD = centroids_KD.new_zeros(GROUPS * width, centroids_KD.shape[1])
    padded_KD[: len(centroids_KD)] = centroids_KD
    half_norms_K = centroids_KD.new_full((GROUPS * width,), torch.inf)
    half_norms_K[: len(centroids_KD)] = 0.5 * centroids_KD.square().sum(dim=1)
    labels = torch.empty(num_rows, dtype=torch.int64, device=rows_ND.device)
    first, second = rows_ND.new_empty(num_rows), rows_ND.new_empty(num_rows)
    tile_rows = max(1, (GPU_TILE_ELEMENTS if rows_ND.is_cuda else CPU_TILE_ELEMENTS) // (GROUPS * width))
    minus_products = _in_bf16 if distances == "bf16" else _in_float32
    with precise_products(rows_ND.device, "high" if distances == "tf32" else "highest"):
        for start in range(0, num_rows, tile_rows):
            tile = slice(start, start + tile_rows)
            scores = minus_products(half_norms_K, rows_ND[tile], padded_KD).view(-1, GROUPS, width)
            columns = scores[:, 0].clone()
            for group in range(1, GROUPS):
                torch.minimum(columns, scores[:, group], out=columns)
            first[tile], column = columns.min(dim=1)
            groups = scores.gather(2, column[:, None, None].expand(-1, GROUPS, 1))[:, :, 0]
            group = groups.argmin(dim=1)
            labels[tile] = group * width + column
            columns.scatter_(1, column[:, None], torch.inf)
            groups.scatter_(1, group[:, None], torch.inf)
            second[tile] = torch.minimum(columns.amin(dim=1), groups.amin(dim=1))
    norms_N = rows_ND.square().sum(dim=1)
    return labels, 2 * first + norms_N, 2 * second + norms_N


def _in_float32(half_norms_K: torch.Tensor, rows_ND: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    """Half norms [K] - rows [N, d] centroids^T."""
    return torch.addmm(half_norms_K, rows_ND, centroids_KD.T, alpha=-1)


def _in_bf16(half_norms_K: torch.Tensor, rows_ND: torch.Tensor, centroids_KD: torch.Tensor) -> torch.Tensor:
    rows_ND, columns_DK = rows_ND.bfloat16(), centroids_KD.bfloat16().T
    products = torch.mm(rows_ND, columns_DK, out_dtype=torch.float32) if rows_ND.is_cuda else (rows_ND @ columns_DK).float()
    return half_norms_K - products
