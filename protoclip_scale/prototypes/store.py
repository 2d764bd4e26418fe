"""Memory-mapped feature arrays on disk: one file per column and part, one byte per row that says "written".

A store is created, written part by part (each part by one writer, in any order, over any number of interruptions) and
sealed; only a sealed store can be opened. Reading never takes an unwritten or non-finite row for a feature.

    folder/layout.json         columns, dtype, rows of each part, info; written by create
    folder/<column>.<part>.npy rows x dim
    folder/written.<part>.npy  one uint8 per row
    folder/manifest.json       written last, by seal: the layout and the parts that are complete
"""

import errno
import fcntl
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json

SCHEMA_VERSION = 1
DTYPES = ("float16", "float32")
FLUSH_ROWS = 8192
BLOCK_ROWS = 16384


def let_pages_go(array: np.ndarray) -> None:
    """Takes a file-backed array's pages out of this process's resident memory; they are read again when touched."""
    if isinstance(array, np.memmap) and array.filename is not None and array.mode in ("r", "r+"):
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)


class FeatureStore:
    """Columns of float16 or float32 features in numbered parts (the lanes of an episode, or the sources of a teacher)."""

    def __init__(self, folder: str | Path, layout: dict[str, Any], complete: Iterable[int]):
        self.folder = Path(folder)
        self._layout = layout
        self.columns: dict[str, int] = dict(layout["columns"])
        self.dtype = np.dtype(layout["dtype"])
        self.part_rows: list[int] = list(layout["rows"])
        self.info: dict[str, Any] = dict(layout["info"])
        self.complete = frozenset(complete)

    # -- making one

    @classmethod
    def create(
        cls,
        folder: str | Path,
        columns: dict[str, int],
        parts: int,
        rows: int | Sequence[int],
        dtype: str = "float32",
        info: dict[str, Any] | None = None,
    ) -> "FeatureStore":
        """A store to write to. ``rows``: of each part, or one number for all. A second call with the same arguments (another rank, or
        after an interruption) goes on with what is there; with other arguments it raises UserError and touches nothing."""
        part_rows = [rows] * parts if isinstance(rows, int) else [int(number) for number in rows]
        assert len(part_rows) == parts and dtype in DTYPES
        assert all(re.fullmatch(r"[A-Za-z0-9_-]+", name) and name != "written" for name in columns), columns
        layout = {"schema_version": SCHEMA_VERSION, "columns": dict(columns), "dtype": dtype, "rows": part_rows, "info": info or {}}
        layout = json.loads(json.dumps(layout))
        path = Path(folder) / "layout.json"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                publish_json(path, layout)
        except OSError as error:
            raise UserError(f"feature store {folder} cannot be written: {error.strerror}; choose another folder") from None
        found = read_facts(path)
        if found != layout:
            different = [key for key in layout if found.get(key) != layout[key]]
            raise UserError(
                f"feature store {folder}: it was begun with other {' and '.join(different)} (there {_short(found, different)}, "
                f"now {_short(layout, different)}); remove that folder or choose another"
            )
        return cls(folder, layout, ())

    def writer(self, part: int) -> "Writer":
        """The one writer of a part; it goes on where an earlier one was interrupted. UserError while another process has it."""
        return Writer(self, part)

    def unfinished(self) -> list[int]:
        """Parts of which rows are not on disk yet."""
        marks = {part: self.folder / f"written.{part:05d}.npy" for part in range(self.num_parts)}
        return [part for part, path in marks.items() if not path.exists() or not (self._load(path.name, (self.part_rows[part],), np.dtype(np.uint8)) == 1).all()]

    def seal(self, parts: Iterable[int] | None = None) -> "FeatureStore":
        """Checks every row of ``parts`` (default: all; a node with its own scratch folder passes its lanes) and publishes the manifest.

        For one process, once all writers are closed. Raises UserError for unwritten or non-finite rows. Reads all features once.
        """
        complete = sorted(range(len(self.part_rows)) if parts is None else parts)
        reader = FeatureStore(self.folder, self._layout, complete)
        for part in complete:
            reader._check_part(part)
            for column in self.columns:
                for _ in reader.blocks(column, part):
                    pass
            (self.folder / f".lock.{part:05d}").unlink(missing_ok=True)
        publish_json(self.folder / "manifest.json", {**self._layout, "complete": complete})
        return FeatureStore.open(self.folder)

    # -- reading one

    @classmethod
    def open(cls, folder: str | Path) -> "FeatureStore":
        """A sealed store, read-only. Raises UserError if it is missing or unfinished, or a file is missing or of another length."""
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            state = (
                "it was never finished: run what writes it again" if (folder / "layout.json").exists() else "there is none: check the path"
            )
            raise UserError(f"feature store {folder}: no manifest.json; {state}")
        manifest = read_facts(folder / "manifest.json")
        if manifest.get("schema_version") != SCHEMA_VERSION:
            raise UserError(
                f"feature store {folder}: schema version {manifest.get('schema_version')}, not {SCHEMA_VERSION}; make it again"
            )
        try:
            complete = manifest.pop("complete")
            store = cls(folder, manifest, complete)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"feature store {folder}: manifest.json is damaged ({error!r}); remove that folder and make the store again") from None
        for part in complete:
            store._check_part(part)
        return store

    @property
    def num_parts(self) -> int:
        return len(self.part_rows)

    @property
    def num_rows(self) -> int:
        return sum(self.part_rows)

    def read(self, column: str, part: int) -> np.ndarray:
        """[rows, dim] memory-mapped, in the store's dtype. Cheap; its pages stay resident until ``let_pages_go``."""
        assert part in self.complete, f"part {part} of {self.folder} is not among the sealed ones {sorted(self.complete)}"
        return self._load(f"{column}.{part:05d}.npy", (self.part_rows[part], self.columns[column]), self.dtype)

    def blocks(self, column: str, part: int, block_rows: int = BLOCK_ROWS) -> Iterator[tuple[int, np.ndarray]]:
        """(first row, float32 copy of up to ``block_rows`` rows) over a part; resident memory stays at one block.

        Raises UserError for a non-finite row."""
        features = self.read(column, part)
        for start in range(0, len(features), block_rows):
            block = features[start : start + block_rows].astype(np.float32)
            let_pages_go(features)
            self._check_finite(block, column, part, np.arange(start, start + len(block)))
            yield start, block

    def rows(self, column: str, part: int, rows: np.ndarray) -> np.ndarray:
        """float32 copies [len(rows), dim] of the given rows of a part. UserError for a non-finite one."""
        features = self.read(column, part)
        taken = np.asarray(features[rows]).astype(np.float32)
        let_pages_go(features)
        self._check_finite(taken, column, part, rows)
        return taken

    @staticmethod
    def bytes_needed(columns: dict[str, int], num_rows: int, dtype: str = "float32") -> int:
        """Disk space of a store in bytes, up to a few hundred bytes per file."""
        return num_rows * (1 + sum(columns.values()) * np.dtype(dtype).itemsize)

    # -- checks

    def _load(self, name: str, shape: tuple[int, ...], dtype: np.dtype, mode: str = "r") -> np.ndarray:
        path = self.folder / name
        try:
            array = np.load(path, mmap_mode=mode, allow_pickle=False)
        except FileNotFoundError:
            raise UserError(f"feature store {self.folder}: {name} is missing; make the store again") from None
        except (ValueError, OSError, EOFError) as error:
            raise UserError(
                f"feature store {self.folder}: {name} cannot be read, it was cut short or damaged ({error}); make it again"
            ) from None
        if array.shape != shape or array.dtype != dtype:
            raise UserError(
                f"feature store {self.folder}: {name} holds {array.dtype} {list(array.shape)}, the manifest says {dtype} "
                f"{list(shape)}; make it again"
            )
        return array

    def _check_part(self, part: int) -> None:
        rows = self.part_rows[part]
        written = self._load(f"written.{part:05d}.npy", (rows,), np.dtype(np.uint8))
        missing = np.flatnonzero(written != 1)
        if len(missing):
            raise UserError(
                f"feature store {self.folder}: {len(missing)} of {rows} rows of part {part} were never written, the first is row "
                f"{missing[0]}; run what writes it again"
            )
        for column in self.columns:
            self.read(column, part)

    def _check_finite(self, block: np.ndarray, column: str, part: int, rows: np.ndarray) -> None:
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            raise UserError(
                f"feature store {self.folder}: column {column}, part {part}, row {rows[int(np.argmin(finite))]} is not finite "
                f"in {self.dtype} ({int((~finite).sum())} such rows in this block)"
            )


class Writer:
    """Writes rows of one part. A row counts as written once ``flush`` has put it on disk, features before marks, so that neither a
    killed process nor a lost machine leaves a marked row without its features. Use as a context manager."""

    def __init__(self, store: FeatureStore, part: int):
        self._store, self._part = store, part
        rows = store.part_rows[part]
        # Makes the files (each whole, by rename) if this is the first writer; the lock then keeps a second one out.
        paths = {name: store.folder / f"{name}.{part:05d}.npy" for name in ("written", *store.columns)}
        self._lock = open(store.folder / f".lock.{part:05d}", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"feature store {store.folder}: part {part} is being written by another process; stop it, or choose another folder"
            ) from None
        for column, dim in store.columns.items():
            _make(paths[column], (rows, dim), store.dtype)
        _make(paths["written"], (rows,), np.dtype(np.uint8))
        self._features = {column: store._load(paths[column].name, (rows, dim), store.dtype, "r+") for column, dim in store.columns.items()}
        self._written = store._load(paths["written"].name, (rows,), np.dtype(np.uint8), "r+")
        self._unflushed: list[np.ndarray] = []

    @property
    def written(self) -> np.ndarray:
        """bool [rows]: which rows are safely on disk."""
        return np.asarray(self._written) == 1

    def pending(self) -> np.ndarray:
        """Row numbers still to be written, ascending; rows not yet flushed are among them."""
        return np.flatnonzero(~self.written)

    def write(self, rows: slice | Sequence[int] | np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Puts [n, dim] values of every column at n rows. Raises UserError for a value that is not finite in the store's dtype."""
        indexes = np.arange(*rows.indices(len(self._written))) if isinstance(rows, slice) else np.asarray(rows)
        assert values.keys() == self._features.keys(), (sorted(values), sorted(self._features))
        with np.errstate(over="ignore"):
            stored = {column: np.asarray(array).astype(self._store.dtype) for column, array in values.items()}
        for column, array in stored.items():
            assert array.shape == (len(indexes), self._store.columns[column]), (column, array.shape, len(indexes))
            self._store._check_finite(array, column, self._part, indexes)
        for column, array in stored.items():
            self._features[column][indexes] = array
        self._unflushed.append(indexes)
        if sum(map(len, self._unflushed)) >= FLUSH_ROWS:
            self.flush()

    def flush(self) -> None:
        """Puts everything written so far on disk, then marks it."""
        if not self._unflushed:
            return
        for features in self._features.values():
            features.flush()
            let_pages_go(features)
        self._written[np.concatenate(self._unflushed)] = 1
        self._written.flush()
        self._unflushed = []

    def close(self) -> None:
        self.flush()
        self._lock.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
        else:
            self._lock.close()


def check_folder(out: Path) -> None:
    """UserError if a folder ``out`` cannot be made, or written into if it is there: before hours of work that would end in it. Touches nothing."""
    existing = next(place for place in (out.absolute(), *out.absolute().parents) if os.path.exists(place))
    if not existing.is_dir():
        raise UserError(f"--out {out}: {existing} is a file; name a folder")
    if out.name in ("", ".."):
        raise UserError(f"--out {out}: features get a folder of their own, and one beside it while they are made; name a new one")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {out}: {existing} cannot be written; choose another folder")


def _make(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """A file of zeros, unless it exists. Its whole size is taken from the disk at once: a mapped page without a place there ends the process by a signal."""
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}")
    try:
        np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape).flush()
        if hasattr(os, "posix_fallocate"):
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"disk full: the feature store {path.parent} needs {np.dtype(dtype).itemsize * math.prod(shape) / 1e6:.1f} MB for {path.name}; free space there or choose another folder, then start again") from error
    os.replace(temporary, path)


def read_facts(path: Path) -> dict[str, Any]:
    """layout.json or manifest.json. UserError if it is no JSON object."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"feature store {path.parent}: {path.name} cannot be read ({error}); remove that folder and make the store again") from None
    return facts


def _short(layout: dict[str, Any], keys: list[str], limit: int = 160) -> str:
    text = json.dumps({key: layout.get(key) for key in keys})
    return text if len(text) <= limit else text[:limit] + "..."
