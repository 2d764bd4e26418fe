"""Each machine's own folder in ``run.scratch_dir``, which may lie on its own disk or be one for all machines."""

import contextlib
import shutil
import socket
from pathlib import Path

from protoclip_scale import collectives


def open_scratch(parent: Path, run_id: str) -> Path:
    """The folder in ``parent`` of this run on this machine; a collective. It is named by the host, so that a start which numbers the machines in another
    way finds what its predecessor has left. Folders of this run that no machine of this start owns are removed."""
    machine = collectives.rank() // collectives.local_world_size()
    hosts = dict(collectives.all_gather_objects((machine, socket.gethostname())))
    names = {number: f"{run_id}-{host}-{sum(hosts[lower] == host for lower in range(number))}" for number, host in hosts.items()}

    def remove_others() -> None:
        for left in parent.glob(f"{run_id}-*"):
            if left.name not in names.values():
                shutil.rmtree(left, ignore_errors=True)

    collectives.on_each_machine(remove_others)
    return parent / names[machine]


def remove_scratch(folder: Path) -> None:
    """A machine's folder, and the one around it if nothing else is in it."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()
