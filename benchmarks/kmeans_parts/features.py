"""The rows that are clustered: from a file, a feature store, or the captions of a parquet file."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import safetensors.numpy

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import FeatureStore


def read(path: Path, column: str | None) -> np.ndarray:
    """float32 [N, d] of an .npy file, a .safetensors file, or a sealed store's folder; ``column`` names the tensor or column if there are several."""
    if path.is_dir():
        store = FeatureStore.open(path)
        name = _only(path, list(store.columns), column)
        return np.concatenate([np.asarray(store.read(name, part), dtype=np.float32) for part in range(store.num_parts)])
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False).astype(np.float32)
    if path.suffix == ".safetensors":
        tensors = safetensors.numpy.load_file(path)
        return tensors[_only(path, list(tensors), column)].astype(np.float32)
    raise UserError(f"--features {path}: neither an .npy nor a .safetensors file nor a feature store's folder")


def _only(path: Path, names: list[str], chosen: str | None) -> str:
    if chosen in names:
        return chosen
    if chosen is None and len(names) == 1:
        return names[0]
    raise UserError(f"--features {path} holds {', '.join(names)}; choose one with --column")


def embed(captions: Path, dim: int, cache: Path) -> np.ndarray:
    """float32 [N, dim] unit rows: MiniLM's features of a parquet file's captions (rows of its train split, if it has splits), reduced by principal
    components; kept in ``cache``. Equal captions have equal features. Minutes for tens of thousands of captions."""
    if cache.exists():
        return np.load(cache, allow_pickle=False)
    from protoclip_scale.prototypes.teacher_encoders import TextEncoder

    files = sorted(captions.glob("train*.parquet")) if captions.is_dir() else [captions]
    texts: list[str] = []
    for file in files:
        table = pq.read_table(file)
        if "split" in table.column_names:
            table = table.filter([split == "train" for split in table.column("split").to_pylist()])
        texts += [cell[0] if isinstance(cell, list) else cell for cell in table.column("caption").to_pylist()]
    distinct = sorted(set(texts))
    place = {text: row for row, text in enumerate(distinct)}
    rows = TextEncoder("minilm", tokens=32).captions(distinct)[[place[text] for text in texts]]
    rows = rows - rows.mean(axis=0)
    axes = np.linalg.svd(rows[:: max(1, len(rows) // 8000)], full_matrices=False)[2]
    rows = rows @ axes[:dim].T
    rows = np.ascontiguousarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float32)
    cache.parent.mkdir(parents=True, exist_ok=True)
    np.save(cache, rows)
    return rows


def enlarge(rows: np.ndarray, wanted: int) -> np.ndarray:
    """``wanted`` rows: the given ones again and again, each copy moved by a fifth of a typical distance and scaled to unit length, so that all differ."""
    rng = np.random.default_rng(0)
    copies = rows[np.arange(wanted) % len(rows)]
    moved = copies + (0.2 / np.sqrt(rows.shape[1])) * rng.standard_normal(copies.shape, dtype=np.float32)
    moved[: len(rows)] = rows[:wanted]
    return moved / np.linalg.norm(moved, axis=1, keepdims=True)
