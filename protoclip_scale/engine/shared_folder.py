"""Whether all ranks look at one run directory: each machine may have a folder of that name of its own."""

import contextlib
import socket
import time
from pathlib import Path

from protoclip_scale import collectives, standing
from protoclip_scale.errors import UserError
from protoclip_scale.shared_files import LATE_SECONDS, LOOK_SECONDS, look_again


def check_shared(folder: Path, attempt: int) -> None:
    """UserError, on all ranks, if one of them does not see the attempt that rank 0 has begun in the run directory; a collective."""
    claim = folder / "attempts" / f"{attempt:04d}"
    expected = collectives.from_rank_zero(claim.read_text)
    looks = int(LATE_SECONDS / LOOK_SECONDS)
    for look in range(looks):
        blind = [host for sees, host in collectives.all_gather_objects((_read(claim) == expected, socket.gethostname())) if not sees]
        if not blind:
            return
        standing.got_on()
        time.sleep(LOOK_SECONDS if look + 1 < looks else 0)
    raise UserError(
        f"{folder} is another folder on {', '.join(sorted(set(blind)))} than on rank 0's host: attempt {attempt}, which rank 0 has begun, is not in it "
        f"after {LATE_SECONDS:.0f} s; put --run-dir on a file system that all hosts share (run.scratch_dir is what stays on each host's own disk), mounted so that it shows "
        "new files within a minute (NFS: acdirmax=60 or less, or lookupcache=positive)"
    )


def _read(path: Path) -> str | None:
    with contextlib.suppress(OSError):
        look_again(path)
        return path.read_text()
    return None
