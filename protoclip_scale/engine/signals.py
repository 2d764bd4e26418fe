"""Being asked to stop: SIGTERM or SIGUSR1 on any rank stops all ranks at the same place, after a checkpoint."""

import signal

from protoclip_scale import collectives
from protoclip_scale.errors import Stopped


class StopFlag:
    """Remembers a signal until the ranks next agree."""

    def __init__(self) -> None:
        self.raised = False
        self.agreed = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: object) -> None:
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
