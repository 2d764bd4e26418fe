"""Where this process stands: told by whatever moves it on, published by its rank's watch (engine/watch).

Whoever does a part of long work (a step, a block, an iteration, a shard) says ``got_on()``. That costs a few assignments; nothing is read or sent here.
"""

import contextlib
import time
from collections.abc import Iterator


class Standing:
    """``marks`` counts what was got done at this place, the last of it at ``since`` (monotonic seconds). ``waits``: whether a polling loop has nothing to
    do here but to wait for other ranks; None outside of such loops."""

    def __init__(self) -> None:
        self.phase, self.episode, self.step = "start", 0, 0
        self.marks, self.since = 0, time.monotonic()
        self.waits: bool | None = None


HERE = Standing()  # of this process; there is one


def got_on() -> None:
    """Another part is done."""
    HERE.marks += 1
    HERE.since = time.monotonic()


def at(episode: int, step: int) -> None:
    """The place in the run: the episode from 0, and the steps taken so far."""
    HERE.episode, HERE.step, HERE.marks = episode, step, 0
    got_on()


@contextlib.contextmanager
def inside(phase: str) -> Iterator[None]:
    """A phase; the one around it comes back afterwards."""
    outer, HERE.phase = HERE.phase, phase
    got_on()
    try:
        yield
    finally:
        HERE.phase = outer
        got_on()


@contextlib.contextmanager
def polling() -> Iterator[None]:
    """Around a loop that looks again and again whether all ranks are done, and sets ``HERE.waits``."""
    try:
        yield
    finally:
        HERE.waits = None
