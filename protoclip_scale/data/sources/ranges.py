"""Bytes of a file by their place in it: one range, or the whole from front to back, each remote request tried again before it fails.

A block of a table is a thousand requests, a shard some dozens: on a server that fails now and then, a block without a single failure would
be rare, so a request has a few attempts of its own. What fails them all goes to the reader, which waits longer.
"""

import io
import random
import time
from collections.abc import Callable
from typing import BinaryIO, TypeVar

from fsspec.implementations.local import LocalFileSystem

from protoclip_scale.data.sources.formats import Place
from protoclip_scale.data.sources.retry import causes, may_pass, status_of
from protoclip_scale.errors import UserError

Result = TypeVar("Result")

NUM_ATTEMPTS = 5
FIRST_DELAY = 0.1  # seconds, doubled after each attempt
WINDOW_BYTES = 4 << 20  # of one remote request, when a file is read from front to back

_jitter = random.SystemRandom()  # threads fail together and must not come back together


def is_local(filesystem) -> bool:
    return isinstance(filesystem, LocalFileSystem)


def attempt(action: Callable[[], Result]) -> Result:
    """``action()`` on a remote filesystem, tried up to NUM_ATTEMPTS times within about 2 s; the last error is raised as it is."""
    for number in range(NUM_ATTEMPTS):
        try:
            return action()
        except Exception as error:
            if isinstance(error, UserError) or number == NUM_ATTEMPTS - 1 or is_missing(error) or not may_pass(error, remote=True):
                raise
            time.sleep(FIRST_DELAY * 2**number * _jitter.uniform(0.5, 1.5))
    raise AssertionError


def is_missing(error: Exception) -> bool:
    """Whether a remote filesystem says that the file is not there. Some raise FileNotFoundError for a server that is busy, too, from what
    tells it."""
    if not isinstance(error, (FileNotFoundError, IsADirectoryError)):
        return False
    return all(
        isinstance(cause, (FileNotFoundError, IsADirectoryError, LookupError)) or status_of(cause) in (404, 410) for cause in causes(error)
    )


def read_range(place: Place, start: int, end: int) -> bytes:
    """Bytes [start, end) of the file. UserError if it has become shorter, or if its server ignores ranges."""
    if start == end:
        return b""
    if is_local(place.filesystem):
        with open(place.path, "rb") as file:
            file.seek(start)
            data = file.read(end - start)
        if len(data) < end - start:
            raise UserError(f"{place.url} changed while it was in use: it ends before byte {end}; start the run again")
        return data
    return attempt(lambda: _remote_range(place, start, end))


def _remote_range(place: Place, start: int, end: int) -> bytes:
    data = place.filesystem.cat_file(place.path, start=start, end=end)
    if len(data) > end - start:
        raise UserError(f"{place.url}: the server ignores range requests; use another server, or download the file")
    if len(data) < end - start:
        raise OSError(f"{len(data)} of {end - start} bytes came")
    return data


def file_size(place: Place) -> int:
    """Bytes of the file."""
    size = place.size
    if size is None:
        size = attempt(lambda: place.filesystem.size(place.path))
    if size is None:
        raise UserError(f"{place.url}: the server does not tell the size of the file, so its parts cannot be read; download it")
    return size


class RangeFile(io.RawIOBase):
    """A remote file as a seekable one; each read is one request."""

    def __init__(self, place: Place):
        self._place = place
        self._size = file_size(place)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer) -> int:
        end = min(self._position + len(buffer), self._size)
        data = read_range(self._place, self._position, end) if self._position < end else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_forward(place: Place) -> BinaryIO:
    """The file, for reading from front to back; remote, in requests of WINDOW_BYTES, and what a seek jumps over is not fetched."""
    if is_local(place.filesystem):
        return open(place.path, "rb")
    return io.BufferedReader(RangeFile(place), WINDOW_BYTES)
