"""Teacher features as one row-aligned .npy, [rows, dim] in the order of sources, blocks and rows: the form in which they are published (methods 6.6)."""

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from protoclip_scale.data.sources import BlockReader
from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.store import BLOCK_ROWS, FeatureStore, check_folder, let_pages_go
from protoclip_scale.prototypes.teacher import COLUMN, KIND, describe_source

HASH_BYTES = 1 << 24


def export_npy(store: FeatureStore, path: str | Path) -> None:
    """Writes all parts of a sealed store, one after the other, in its dtype. One process; resident memory stays at some MB."""
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"descr": np.lib.format.dtype_to_descr(store.dtype), "fortran_order": False, "shape": (store.num_rows, store.columns[COLUMN])}
        with open(unfinished, "wb") as file:  # written, not mapped: a full disk is then an error and not a signal
            np.lib.format.write_array_header_1_0(file, facts)
            for part in range(store.num_parts):
                for _, block in store.blocks(COLUMN, part):
                    file.write(block.astype(store.dtype).data)
        os.replace(unfinished, path)
    except OSError as error:
        raise UserError(f"--npy-out {path}: cannot be written ({error}); choose another file") from error
    finally:
        unfinished.unlink(missing_ok=True)


def import_npy(path: str | Path, readers: Sequence[BlockReader], out: str | Path, event: Callable[[str], None] = lambda name: None) -> FeatureStore:
    """The sealed store in ``out`` of a file's rows, which must be those of the readers' sources: source by source, block by block, row by row. A CSV
    of the published code is such a source, its rows in the file's order.

    One process; an interrupted import goes on. float16 stays, anything else becomes float32. Raises UserError for a file that is no array of finite
    numbers, of another number of rows than the sources have, or if ``out`` holds something else. Reads the file twice.
    """
    path, out = Path(path), Path(out)
    check_folder(out)
    source_rows = [int(reader.block_rows.sum()) for reader in readers]
    array = _open(path)
    if len(array) != sum(source_rows):
        each = ", ".join(f"{reader.name}: {rows}" for reader, rows in zip(readers, source_rows, strict=True))
        raise UserError(f"--from-npy {path} has {len(array)} rows, the recipe's sources have {sum(source_rows)} ({each}); they must be the same rows, in order")
    dtype = "float16" if array.dtype == np.float16 else "float32"
    info = {"kind": KIND, "sources": [describe_source(reader, {}) for reader in readers], "model": path.name, "file_sha256": _file_hash(path), "dim": array.shape[1]}
    if (out / "manifest.json").exists():
        store = FeatureStore.open(out)
        if store.info != info or store.dtype != dtype:
            raise UserError(f"--out {out} holds other features; remove that folder or choose another")
        return store
    store = FeatureStore.create(out, {COLUMN: array.shape[1]}, len(readers), source_rows, dtype, info)
    first_row = 0
    for part, rows in enumerate(source_rows):
        with store.writer(part) as writer:
            written = writer.written
            for start in range(0, rows, BLOCK_ROWS):
                stop = min(start + BLOCK_ROWS, rows)
                if not written[start:stop].all():
                    writer.write(slice(start, stop), {COLUMN: _finite(array, first_row + start, first_row + stop, dtype, path)})
                    writer.flush()
                    event("teacher.imported")
        first_row += rows
    return store.seal()


def _open(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"--from-npy {path}: it cannot be read as a .npy without pickled objects ({' '.join(str(error).split())})") from None
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind != "f" or not array.shape[1]:
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        raise UserError(f"--from-npy {path} holds {found}; it must be one array of floats, [rows, dim]")
    return array


def _finite(array: np.ndarray, start: int, stop: int, dtype: str, path: Path) -> np.ndarray:
    with np.errstate(over="ignore"):
        rows = array[start:stop].astype(dtype)
    let_pages_go(array)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise UserError(f"--from-npy {path}: row {start + bad[0]} is not finite in {dtype}; make the file again")
    return rows


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()
