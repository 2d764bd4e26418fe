"""Sums that are the same for every number of ranks: features as int64 fixed point, added exactly, over lanes and ranks.

A float sum depends on the order of its terms; an integer one does not. The unit is a power of two, as small as the
largest value and the number of rows allow (2**-44 for 200,000 unit vectors), so what is cut off stays far below float32's rounding.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from protoclip_scale import collectives
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.mapped import let_pages_go
from protoclip_scale.prototypes.store import BLOCK_ROWS

ADDED_ROWS = 4096  # 4 MB of int64 at d = 128: a processor's cache holds it


def _to_device(array: np.ndarray) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.cuda() if collectives.backend() == "nccl" else tensor


def reduce_array(array: np.ndarray, op: str = "sum") -> np.ndarray:
    """Sum, min or max over ranks, element by element; the same on all ranks."""
    return collectives.all_reduce(_to_device(array), op).cpu().numpy()


def reduce_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, on the tensor's device."""
    if collectives.world_size() == 1:
        return tensor
    reached = tensor if tensor.is_cuda and collectives.backend() == "nccl" else _to_device(tensor.cpu().numpy())
    return collectives.all_reduce(reached).to(tensor.device)


def gather_array(array: np.ndarray) -> np.ndarray:
    """[n, ...] on each rank (the same n) -> [W*n, ...] in rank order on all."""
    return collectives.all_gather(_to_device(array)).cpu().numpy()


def unit_exponent(largest_sum: float) -> int:
    """e such that sums up to ``largest_sum`` in units of 2**-e stay below 2**62."""
    return 62 - math.frexp(largest_sum)[1] if largest_sum > 0 else 0


@dataclass(frozen=True)
class Extent:
    """What all ranks' rows have in common: their number, the largest absolute value, and the unit that their sums are held in."""

    num_rows: int
    largest: float

    @property
    def exponent(self) -> int:
        """Any sum of rows fits int64 in units of 2**-exponent."""
        return unit_exponent(self.num_rows * self.largest)


def extent_of(parts: Sequence[np.ndarray]) -> Extent:
    """A collective, one pass over the own rows. All ranks raise UserError if a value of any of them is not finite."""
    largest, num_rows = 0.0, 0
    for part in parts:
        for start in range(0, len(part), BLOCK_ROWS):
            value = float(np.abs(part[start : start + BLOCK_ROWS]).max())
            largest = max(largest, value if math.isfinite(value) else math.inf)
            let_pages_go(part)
        num_rows += len(part)
    largest = float(reduce_array(np.array([largest]), "max")[0])
    if math.isinf(largest):
        raise UserError(
            "features to cluster or translate are not all finite: the model that made them has diverged, or the feature store is damaged"
        )
    return Extent(int(reduce_array(np.array([num_rows], dtype=np.int64))[0]), largest)


def add_by_class(sums: np.ndarray, counts: np.ndarray, features: np.ndarray, labels: np.ndarray, exponent: int) -> None:
    """``add_rows`` for NumPy arrays."""
    rows = torch.from_numpy(np.array(features, dtype=np.float32))
    add_rows(torch.from_numpy(sums), torch.from_numpy(counts), rows, torch.from_numpy(labels.astype(np.int64)), exponent)


def add_rows(sums_KD: torch.Tensor, counts_K: torch.Tensor, rows_ND: torch.Tensor, labels: torch.Tensor, exponent: int, sign: int = 1) -> None:
    """Adds float32 rows to int64 sums at their labels int64 [N], in units of 2**-exponent, and 1 each to the counts, in place; with
    ``sign`` -1 takes them away again, to the bit.

    Scaling float32 by a power of two is exact; the conversion cuts towards zero.
    """
    scale = sign * math.ldexp(1.0, exponent)
    for start in range(0, len(rows_ND), ADDED_ROWS):
        block = slice(start, start + ADDED_ROWS)
        sums_KD.index_add_(0, labels[block], (rows_ND[block] * scale).to(torch.int64))
    counts_K += sign * torch.bincount(labels, minlength=len(counts_K))


def means(sums: np.ndarray, counts: np.ndarray, exponent: int) -> np.ndarray:
    """``mean_rows`` for NumPy arrays."""
    return mean_rows(torch.from_numpy(sums), torch.from_numpy(counts), exponent).numpy()


def mean_rows(sums_KD: torch.Tensor, counts_K: torch.Tensor, exponent: int) -> torch.Tensor:
    """float32 [K, d] of global sums and counts; zero rows where a count is 0."""
    return (sums_KD.double() * math.ldexp(1.0, -exponent) / counts_K.clamp_min(1)[:, None]).float()
