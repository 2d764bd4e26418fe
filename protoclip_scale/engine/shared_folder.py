"""Whether all ranks look at one run directory: each machine may have a folder of that name of its own."""

import contextlib
import os
import socket
import time
from pathlib import Path

from protoclip_scale import collectives, standing
from protoclip_scale.errors import UserError

LOOKS = 10  # a second apart: network file systems show new files late


def check_shared(folder: Path, attempt: int) -> None:
    """UserError, on all ranks, if one of them does not see the attempt that rank 0 has begun in the run directory; a collective."""
    claim = folder / "attempts" / f"{attempt:04d}"
    expected = collectives.from_rank_zero(claim.read_text)
    for look in range(LOOKS):
        blind = [host for sees, host in collectives.all_gather_objects((_read(claim) == expected, socket.gethostname())) if not sees]
        if not blind:
            return
        standing.got_on()
        time.sleep(1 if look + 1 < LOOKS else 0)
    raise UserError(
        f"{folder} is another folder on {', '.join(sorted(set(blind)))} than on rank 0's host: attempt {attempt}, which rank 0 has begun, is not in it; "
        "put --run-dir on a file system that all hosts share (run.scratch_dir is what stays on each host's own disk)"
    )


def _read(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        os.listdir(path.parent)  # makes a network file system look again
        return path.read_text()
    return None
