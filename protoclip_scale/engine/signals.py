"""Being asked to stop: SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) on any rank stops all ranks at the same place, after a checkpoint."""

import os
import signal
import time

from protoclip_scale import collectives
from protoclip_scale.errors import Stopped

SAME_SECONDS = 1.0  # a terminal and a launcher may both pass on one Ctrl-C


class StopFlag:
    """Remembers a signal until the ranks next agree. A second Ctrl-C ends at once, with a KeyboardInterrupt."""

    def __init__(self) -> None:
        self.raised = False
        self.agreed = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)
        self._interrupted_at: float | None = None
        signal.signal(signal.SIGINT, self._interrupt)

    def _remember(self, number: int, frame: object) -> None:
        self.raised = True

    def _interrupt(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._interrupted_at is not None and now - self._interrupted_at > SAME_SECONDS:
            raise KeyboardInterrupt
        if self._interrupted_at is None and os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nstopping after this step and a checkpoint; Ctrl-C once more ends at once, without one\n")  # print may be what was interrupted
        self._interrupted_at = self._interrupted_at or now
        self.raised = True

    def heed(self) -> None:
        """Raise Stopped if the ranks have agreed to in a step (``agreed``); no collective."""
        if self.agreed:
            self.raised = True
            raise Stopped

    def agree(self) -> None:
        """Raise Stopped on all ranks if any was asked to stop; a collective."""
        if collectives.any_rank(self.raised):
            self.raised = True  # never set back: a signal may have come while the ranks agreed
            raise Stopped
