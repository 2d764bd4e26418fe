"""Small files that are replaced whole: a reader sees the old or the new one, also after a kill or a power cut."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_text(path: Path, text: str) -> None:
    """Replace a file by one atomic rename; several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def publish_json(path: Path, value: Any) -> None:
    publish_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time reads a file and replaces it; the lock goes with the process that holds it."""
    import fcntl

    with open(path.with_name(f".{path.name}.lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def overwrite_json(path: Path, value: Any) -> None:
    """Write into a file that exists, in place: for a disk that has no room for another one. A kill in between leaves a torn file."""
    data = (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()
    with open(path, "r+b") as file:
        file.write(data)
        file.truncate()
