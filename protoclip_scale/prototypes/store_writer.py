"""Writing a part of a feature store, so that neither a killed process nor a lost machine leaves a row that only seems to be there."""

import fcntl
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from protoclip_scale.errors import UserError
from protoclip_scale.prototypes.mapped import let_pages_go, make_file

if TYPE_CHECKING:
    from protoclip_scale.prototypes.store import FeatureStore

MARKS, ROW_IDS = "written", "row_ids"
FLUSH_ROWS = 8192


class Writer:
    """Writes rows of one part. A row counts as written once ``flush`` has put it on disk, features before marks; a marked row that is written again
    loses its mark first. Use as a context manager.

    A call of ``write`` is a copy into the system's page cache, 0.1 ms for 128 rows of 128 columns; each ``FLUSH_ROWS`` rows wait for the disk.
    """

    def __init__(self, store: "FeatureStore", part: int):
        self._store, self._part = store, part
        rows = store.part_rows[part]
        shapes = {column: ((rows, dim), store.dtype) for column, dim in store.columns.items()}
        if store.named_rows:
            shapes[ROW_IDS] = ((rows,), np.dtype(np.int64))
        shapes[MARKS] = ((rows,), np.dtype(np.uint8))
        # Makes the files (each whole, by rename) if this is the first writer; the lock then keeps a second one out.
        self._lock = open(store.folder / f".lock.{part:05d}", "w")  # noqa: SIM115
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"feature store {store.folder}: part {part} is being written by another process; stop it, or choose another folder"
            ) from None
        paths = {name: store.folder / f"{name}.{part:05d}.npy" for name in shapes}
        for name, (shape, dtype) in shapes.items():
            make_file(paths[name], shape, dtype)
        self._features = {name: store.load(paths[name].name, *shape_dtype, "r+") for name, shape_dtype in shapes.items()}
        self._written = self._features.pop(MARKS)
        self._unflushed: list[np.ndarray] = []

    @property
    def written(self) -> np.ndarray:
        """bool [rows]: which rows are safely on disk."""
        return np.asarray(self._written) == 1

    def pending(self) -> np.ndarray:
        """Row numbers still to be written, ascending; rows not yet flushed are among them."""
        return np.flatnonzero(~self.written)

    def write(self, rows: slice | Sequence[int] | np.ndarray, values: dict[str, np.ndarray], row_ids: np.ndarray | None = None) -> None:
        """Puts [n, dim] values of every column at n rows, and their row ids [n] where the store has them; rows may be written again. Raises UserError
        for a value that is not finite in the store's dtype."""
        indexes = np.arange(*rows.indices(len(self._written))) if isinstance(rows, slice) else np.asarray(rows)
        assert (row_ids is not None) == self._store.named_rows, f"row ids go with a store created with row_ids, and only with one: {self._store.folder}"
        assert values.keys() == self._store.columns.keys(), (sorted(values), sorted(self._store.columns))
        with np.errstate(over="ignore"):
            stored = {column: np.asarray(array).astype(self._store.dtype, copy=False) for column, array in values.items()}
        for column, array in stored.items():
            assert array.shape == (len(indexes), self._store.columns[column]), (column, array.shape, len(indexes))
            self._store.check_finite(array, column, self._part, indexes)
        if row_ids is not None:
            stored[ROW_IDS] = np.asarray(row_ids, dtype=np.int64)
            assert stored[ROW_IDS].shape == indexes.shape, (stored[ROW_IDS].shape, len(indexes))
        self._unmark(indexes)
        for name, array in stored.items():
            self._features[name][indexes] = array
        self._unflushed.append(indexes)
        if sum(map(len, self._unflushed)) >= FLUSH_ROWS:
            self.flush()

    def forget(self, rows: slice | Sequence[int] | np.ndarray) -> None:
        """Takes the marks of rows that will be written again, or not at all; on disk too. Free for rows without one."""
        self.flush()
        self._unmark(rows)

    def _unmark(self, rows: slice | Sequence[int] | np.ndarray) -> None:
        if self._written[rows].any():
            self._written[rows] = 0
            self._written.flush()

    def flush(self) -> None:
        """Puts everything written so far on disk, then marks it."""
        if not self._unflushed:
            return
        for features in self._features.values():
            features.flush()
            let_pages_go(features)
        self._written[np.concatenate(self._unflushed)] = 1
        self._written.flush()
        let_pages_go(self._written)
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
