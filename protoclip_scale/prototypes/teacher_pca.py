"""The reduction of a teacher's features: PCA as faiss finds it, centred and not whitened (methods 6.6)."""

import os
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
import safetensors
import safetensors.numpy

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Projection:
    """``components`` [dim, width] and ``mean`` [width], float32; ``explained``: share of the sample's variance that is kept."""

    components: np.ndarray
    mean: np.ndarray
    explained: float

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, dim] of rows [n, width]; a row of zeros, which stands for none, stays one. Computed in float64, so that the result does not
        depend on how many rows, or threads, a product is made with."""
        projected = (rows.astype(np.float64) - self.mean) @ self.components.T.astype(np.float64)
        projected[~rows.any(axis=1)] = 0
        return projected.astype(np.float32)

    def save(self, path: Path) -> None:
        """As one safetensors file, whole or not at all."""
        temporary = path.with_name(f".{path.name}")
        arrays = {"components": self.components, "mean": self.mean}
        temporary.write_bytes(safetensors.numpy.save(arrays, {"explained_variance": repr(self.explained)}))
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path) -> "Projection":
        with safetensors.safe_open(path, "numpy") as file:
            return cls(file.get_tensor("components"), file.get_tensor("mean"), float(file.metadata()["explained_variance"]))


def fit_pca(sample: FeatureStore, column: str, dim: int, max_rows: int) -> Projection:
    """The first ``dim`` principal components of the first ``max_rows`` rows of a sealed store that are not all zeros, the largest entry of each
    component made positive. On one thread, because faiss's result depends on their number. Memory: rows x width x 4 bytes.
    """
    width = sample.columns[column]
    rows = np.empty((min(max_rows, sample.num_rows), width), dtype=np.float32)
    filled = 0
    for part in range(sample.num_parts):
        for _, block in sample.blocks(column, part, ROWS_AT_ONCE):
            block = block[block.any(axis=1)][: len(rows) - filled]
            rows[filled : filled + len(block)] = block
            filled += len(block)
    rows = rows[:filled]
    if filled <= dim:
        raise UserError(f"--dim {dim} needs more than {dim} rows that can be encoded; {filled} of {sample.num_rows} can")
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        pca = faiss.PCAMatrix(width, dim)
        pca.max_points_per_d = -(-filled // width)  # faiss would take a smaller sample of its own
        pca.train(rows)
    finally:
        faiss.omp_set_num_threads(threads)
    mean = faiss.vector_to_array(pca.mean)
    components = faiss.vector_to_array(pca.PCAMat).reshape(-1, width)[:dim]
    largest = np.abs(components).argmax(axis=1)
    components = np.ascontiguousarray(components * np.sign(components[np.arange(dim), largest])[:, None], dtype=np.float32)
    return Projection(components, mean, _explained(rows, components, mean))


def _explained(rows: np.ndarray, components: np.ndarray, mean: np.ndarray) -> float:
    kept = total = 0.0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        centred = rows[start : start + ROWS_AT_ONCE].astype(np.float64) - mean
        total += float((centred**2).sum())
        kept += float(((centred @ components.T.astype(np.float64)) ** 2).sum())
    return kept / total if total else 1.0
