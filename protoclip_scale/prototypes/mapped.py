"""Arrays in files, mapped into memory: made whole, and let go so that resident memory does not grow with them."""

import errno
import math
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np

from protoclip_scale.errors import UserError

SCATTERED_ROWS = 32  # touched at once: the system may map 2 MB around each


def let_pages_go(array: np.ndarray) -> None:
    """Takes a file-backed array's pages out of this process's resident memory; they are read again when touched."""
    if isinstance(array, np.memmap) and array.filename is not None and array.mode in ("r", "r+"):
        base: Any = array
        while isinstance(base, np.ndarray):
            base = base.base
        if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            base.madvise(mmap.MADV_DONTNEED)


def take_rows(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """float32 copies [n, ...] of the given rows of an array, mapped or not. Resident memory stays at the copies and some 64 MB, wherever the rows lie."""
    taken = np.empty((len(rows), *array.shape[1:]), dtype=np.float32)
    for start in range(0, len(rows), SCATTERED_ROWS):
        taken[start : start + SCATTERED_ROWS] = array[rows[start : start + SCATTERED_ROWS]]
        let_pages_go(array)
    return taken


def make_file(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
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
