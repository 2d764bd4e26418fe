"""Disks that are full, read-only or not ours: one line on what to do instead of a traceback."""

import contextlib
import errno
import re
from collections.abc import Iterator
from pathlib import Path

from protoclip_scale.errors import UserError

ADVICE = {
    errno.ENOSPC: "disk full",
    errno.EDQUOT: "disk quota exceeded",
    errno.EROFS: "read-only file system",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.ESTALE: "the file system was unmounted or its server restarted",
}
_NUMBER = re.compile(r"\(os error (\d+)\)")  # safetensors is written in Rust


def disk_problem(error: BaseException, folder: Path) -> str | None:
    """The line for an error that a disk gave while the run directory ``folder`` was written to; None for any other error."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and type(error).__name__ == "SafetensorError" and (found := _NUMBER.search(str(error))):
        number = int(found[1])
    if number not in ADVICE:
        return None
    where = Path(str(error.filename)) if isinstance(error, OSError) and error.filename else folder
    ours = where.is_relative_to(folder) or folder.is_relative_to(where)
    if not ours and number not in (errno.ENOSPC, errno.EDQUOT):
        return None  # perhaps data that cannot be read
    return f"{ADVICE[number]}: {where} could not be written; what has been published is whole: make room or make it writable, then start the same command again"


@contextlib.contextmanager
def disk_told(folder: Path) -> Iterator[None]:
    """Turns an error of ``disk_problem`` into a UserError: where rank 0 writes for all, they end with the same one, which is told once."""
    try:
        yield
    except Exception as error:
        if line := disk_problem(error, folder):
            raise UserError(line) from None
        raise
