"""Images that a table or a folder names by their paths: read in parallel; what is not there is a null, what the network keeps back is an
error."""

import errno
import os
import posixpath
import stat
import threading
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TypeVar

import fsspec
import pyarrow as pa

from protoclip_scale.data.sources.filesystems import is_url, open_filesystem, protocol_of, without_query
from protoclip_scale.data.sources.formats import IMAGE, Place
from protoclip_scale.data.sources.ranges import attempt, is_local, is_missing
from protoclip_scale.data.sources.retry import PASSING_STATUSES, causes, status_of
from protoclip_scale.errors import UserError
from protoclip_scale.recipe import schema

Item, Result = TypeVar("Item"), TypeVar("Result")

IMAGE_SUFFIXES = (
    "jpg",
    "jpeg",
    "jpe",
    "jfif",
    "png",
    "webp",
    "gif",
    "bmp",
    "tif",
    "tiff",
    "ppm",
    "pgm",
    "pbm",
    "pnm",
    "avif",
    "jp2",
    "j2k",
)
NUM_LOCAL_THREADS, NUM_REMOTE_THREADS = 8, 32
NUM_SIZES = 32  # images whose size is looked up to estimate the bytes of a block
RANGE_NOT_SATISFIABLE = 416
NOT_LOGGED_IN = {401, 407}
NOT_USABLE = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EACCES,
    errno.EPERM,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.EINVAL,
    errno.ENXIO,
}


def read_local(path: str, max_bytes: int) -> bytes | None:
    """A local file; None if it is missing, protected, longer than ``max_bytes`` or not a file. Errors of the disk are raised."""
    try:
        with open(
            os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0
        ) as file:  # does not wait for a pipe's writer
            status = os.fstat(file.fileno())
            return file.readall() if stat.S_ISREG(status.st_mode) and status.st_size <= max_bytes else None
    except ValueError:  # a null character in the path
        return None
    except OSError as error:
        if error.errno in NOT_USABLE:
            return None
        raise


def read_remote(filesystem: fsspec.AbstractFileSystem, path: str, max_bytes: int) -> bytes | None:
    """A remote file in one request that asks for no more than ``max_bytes`` and one; None if it is missing or longer."""
    try:
        data = attempt(lambda: filesystem.cat_file(path, start=0, end=max_bytes + 1))
    except Exception as error:
        if is_missing(error):
            return None
        if is_refused(error) and status_of(error) != RANGE_NOT_SATISFIABLE:
            raise
        if attempt(lambda: filesystem.info(path)).get("size") == 0:  # a range of an empty file cannot be satisfied
            return b""
        raise
    return data if len(data) <= max_bytes else None


def is_refused(error: Exception) -> bool:
    """Whether a server refuses this one file for good: any lasting 4xx but those that say that nobody is logged in (any more)."""
    codes = [cause.response.get("Error", {}).get("Code", "") for cause in causes(error) if isinstance(getattr(cause, "response", None), dict)]
    if any("Token" in code or "Expired" in code for code in codes):  # S3 answers 400 or 403 then
        return False
    status = status_of(error)
    if status is None:
        return isinstance(list(causes(error))[-1], PermissionError)
    return 400 <= status < 500 and status not in PASSING_STATUSES | NOT_LOGGED_IN


def in_parallel(function: Callable[[Item], Result], items: Sequence[Item], num_threads: int) -> list[Result]:
    """[function(item) ...]; after the first error no item is begun."""
    num_threads = min(num_threads, len(items))
    if num_threads < 2:
        return [function(item) for item in items]
    failed = threading.Event()

    def part(number: int) -> list[Result]:
        results = []
        for item in items[number::num_threads]:  # a task for each item would cost more than a small file
            if failed.is_set():
                break
            try:
                results.append(function(item))
            except BaseException:
                failed.set()
                raise
        return results

    results: list = [None] * len(items)
    with ThreadPoolExecutor(num_threads) as pool:
        futures = [pool.submit(part, number) for number in range(num_threads)]
        wait(futures)
    for future in futures:
        if future.exception() is not None:
            raise future.exception()
    for number, future in enumerate(futures):
        results[number::num_threads] = future.result()
    return results


@dataclass(frozen=True)
class ImageRoot:
    """Where relative image paths start. ``confined``: paths that lead out of it count as missing. ``absolute``: with a remote root, absolute
    paths are files of this machine; else they count as missing."""

    filesystem: fsspec.AbstractFileSystem
    path: str
    confined: bool = False
    absolute: bool = False

    def _locate(self, name: str | None) -> tuple[bool, str] | None:
        """(whether it lies on this machine, path), or None."""
        if not name:
            return None
        if self.confined and (posixpath.isabs(name) or ".." in name.split("/")):
            return None
        if is_local(self.filesystem):
            path = os.path.join(self.path, name)
            if self.confined and not within(self.path, path):
                return None
            return True, path
        if posixpath.isabs(name):
            return (True, name) if self.absolute else None
        try:
            quoted = urllib.parse.quote(name)
        except ValueError:  # half of a character
            return None
        return False, posixpath.join(self.path, quoted if protocol_of(self.path) in ("http", "https") else name)

    def _read(self, name: str | None, max_bytes: int) -> bytes | None:
        located = self._locate(name)
        if located is None:
            return None
        local, path = located
        return read_local(path, max_bytes) if local else read_remote(self.filesystem, path, max_bytes)

    def read(self, names: Sequence[str | None], max_bytes: int) -> list[bytes | None]:
        """The files' bytes in order; None where one is missing, not readable, refused or longer than ``max_bytes``. Remote errors are raised
        after some attempts, a refusal only if all remote files of the call are refused. 1,000 small files from a warm page cache take about
        20 ms."""
        refusals: list[Exception] = []

        def one(name: str | None) -> bytes | None:
            try:
                return self._read(name, max_bytes)
            except Exception as error:
                if is_local(self.filesystem) or not is_refused(error):
                    raise
                refusals.append(error)
                return None

        found = in_parallel(one, names, NUM_LOCAL_THREADS if is_local(self.filesystem) else NUM_REMOTE_THREADS)
        if refusals and len(refusals) == sum(located is not None and not located[0] for located in map(self._locate, names)):
            raise refusals[0]
        return found

    def read_images(self, names: Sequence[str | None], max_bytes: int) -> pa.Array:
        """``read`` as a column."""
        return pa.array(self.read(names, max_bytes), IMAGE)

    def mean_size(self, names: Sequence[str | None]) -> int:
        """Mean bytes of NUM_SIZES of the files, evenly spread; 0 if the size of none can be had."""
        step = max(1, len(names) // NUM_SIZES)
        sizes = [size for size in in_parallel(self._size, names[::step][:NUM_SIZES], NUM_SIZES) if size is not None]
        return sum(sizes) // len(sizes) if sizes else 0

    def _size(self, name: str | None) -> int | None:
        located = self._locate(name)
        if located is None:
            return None
        local, path = located
        try:
            return os.stat(path).st_size if local else attempt(lambda: self.filesystem.info(path)).get("size")
        except Exception:  # an estimate is worth no error; reading the file tells
            return None


def within(folder: str, path: str) -> bool:
    """Whether a local path lies in the folder when symbolic links are followed."""
    real = os.path.realpath(folder)
    try:
        return os.path.commonpath((real, os.path.realpath(path))) == real
    except ValueError:
        return False


def image_root(place: Place, source: schema.Source) -> ImageRoot:
    """``image_root`` of the source, or the folder of the table. Only a table on this machine may name any file of it, unless the user's
    ``image_root`` lies here too: what a server holds was written by others."""
    if source.image_root is not None:
        return ImageRoot(*open_filesystem(source.image_root), absolute=is_local(place.filesystem))
    return ImageRoot(place.filesystem, posixpath.dirname(without_query(place.path)))


def refuse_urls(names: Iterable[str | None], place: Place, source: schema.Source) -> None:
    """UserError if an image is named by a URL."""
    for name in names:
        if name and is_url(name):
            raise UserError(
                f"{place.url}: column {source.columns.image!r} holds URLs ({name[:100]}); download them once with tools/gather_images.py, "
                "or keep paths in it and set image_root"
            )
