"""Named events at which a test may kill the process: the survival laws are proved at exact places, not by timers.

``PROTOCLIP_KILL_AT="cluster.iteration:3@1"`` sends SIGKILL to rank 1 when the event ``cluster.iteration`` happens for
the third time on it; without ``@rank`` it is rank 0, and several places stand between commas. Without the variable an event costs one
comparison. In the same form: ``PROTOCLIP_STOP_AT`` sends a SIGTERM, ``PROTOCLIP_INTERRUPT_AT`` a SIGINT, ``PROTOCLIP_HANG_AT`` a SIGSTOP, ``PROTOCLIP_STALL_AT`` lets the thread sleep
for ever, and ``PROTOCLIP_RAISE_AT`` raises a RuntimeError.
"""

import functools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable

from protoclip_scale import collectives, standing


def _fail() -> None:
    raise RuntimeError("as PROTOCLIP_RAISE_AT asks for")


_ACTIONS: dict[str, Callable[[], None]] = {
    "PROTOCLIP_KILL_AT": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "PROTOCLIP_STOP_AT": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "PROTOCLIP_INTERRUPT_AT": lambda: os.kill(os.getpid(), signal.SIGINT),
    "PROTOCLIP_HANG_AT": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "PROTOCLIP_STALL_AT": lambda: time.sleep(1e9),
    "PROTOCLIP_RAISE_AT": _fail,
}
_seen: Counter = Counter()


@functools.cache
def _armed() -> dict[tuple[str, int], list[Callable[[], None]]]:
    """What happens at 'event:n' on a rank."""
    armed: dict[tuple[str, int], list[Callable[[], None]]] = {}
    for variable, action in _ACTIONS.items():
        for place in filter(None, os.environ.get(variable, "").split(",")):
            wanted, _, on_rank = place.partition("@")
            armed.setdefault((wanted, int(on_rank or 0)), []).append(action)
    return armed


def event(name: str) -> None:
    """Tell that something worth dying at has just happened on this rank; in the main thread that is progress."""
    if threading.current_thread() is threading.main_thread():
        standing.got_on()
    if not _armed():
        return
    _seen[name] += 1
    for action in _armed().get((f"{name}:{_seen[name]}", collectives.rank()), ()):
        action()
