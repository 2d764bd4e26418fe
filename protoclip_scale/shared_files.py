"""Files that another machine has just made: a network file system may show them late, since its clients remember for a while what was not there."""

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from protoclip_scale import collectives

LATE_SECONDS = 90.0  # NFS remembers a folder for up to acdirmax, 60 s unless the mount says otherwise
LOOK_SECONDS = 1.0  # between two looks
T = TypeVar("T")


def look_again(path: Path) -> None:
    """Read the folders above ``path``, which lets a network file system ask its server for what is in them."""
    for folder in (path.parent.parent, path.parent):
        with contextlib.suppress(OSError):
            os.listdir(folder)


def once_seen(path: Path, action: Callable[[], T]) -> T:
    """``action()`` on what rank 0 says is at ``path``. On other ranks it is tried again for ``LATE_SECONDS`` while nothing is seen there, or what has been
    replaced; rank 0 has made it or seen it itself. Raises the action's OSError."""
    deadline = time.monotonic() + LATE_SECONDS
    while True:
        try:
            return action()
        except OSError as error:
            is_late = isinstance(error, FileNotFoundError) or error.errno == errno.ESTALE
            if collectives.rank() == 0 or not is_late or time.monotonic() > deadline:
                raise
        time.sleep(LOOK_SECONDS)
        look_again(path)


def wait_for(path: Path) -> None:
    """Until this machine sees what rank 0 says is at ``path``; see ``once_seen``."""
    once_seen(path, path.stat)
