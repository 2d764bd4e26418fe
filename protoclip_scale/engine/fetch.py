"""The fetch phase: an episode's rows onto this machine's disk, in a thread of its first rank, ahead of time if possible."""

import threading
import time

from protoclip_scale import collectives, standing
from protoclip_scale.data.sources.retry import Cancelled
from protoclip_scale.engine.context import RunContext
from protoclip_scale.engine.faults import event
from protoclip_scale.errors import UserError

LONGEST_PAUSE = 1.0


class _Cancelled(Exception):
    """Leaves a fetch that nobody waits for any more; the lanes it has finished stay."""


class Fetch:
    """Fills the spool with an episode. Ranks that are not the first of their machine only know the plan."""

    def __init__(self, run: RunContext, episode: int):
        self.run = run
        self.plan = run.plan.episode(episode)
        self.error: BaseException | None = None
        self.blocks_done, self.num_blocks = 0, None
        self._cancelled = False
        self._thread = threading.Thread(target=self._work, daemon=True) if collectives.local_rank() == 0 else None
        if self._thread:
            self._thread.start()

    def _work(self) -> None:
        try:
            self.run.spool.fill(self.plan, self.plan.number, self.run.lanes_of_node, self.run.readers, on_block=self._on_block)
        except (_Cancelled, Cancelled):
            pass
        except BaseException as error:
            self.error = error

    def _on_block(self, done: int, total: int) -> None:
        self.blocks_done, self.num_blocks = done, total
        event("fetch.block")
        if self._cancelled:
            raise _Cancelled

    def cancel(self) -> None:
        """Stop at the next block, or while a server is waited for, and wait for that."""
        self._cancelled = True
        if self._thread and self._thread.is_alive():
            for reader in self.run.readers:
                reader.cancel()
            self._thread.join()
            for reader in self.run.readers:
                reader.resume()

    def wait(self) -> None:
        """Until every machine has the episode; a collective that looks for stops in between, so it may take longer than a collective may.

        Raises:
            UserError: on all ranks, if one machine's fetch failed.
        """
        pause, told = 0.01, 0
        with standing.polling():
            while collectives.any_rank(works := self._thread is not None and self._thread.is_alive()):
                standing.HERE.waits = not works
                self.run.stop.agree()
                if self.blocks_done > told:
                    standing.got_on()
                told = self.blocks_done
                self.run.console.advance(self.blocks_done, total=self.num_blocks)
                if self._thread:
                    self._thread.join(pause)
                else:
                    time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
        self.run.console.advance(self.blocks_done, total=self.num_blocks)
        if self.error and not isinstance(self.error, UserError):
            raise self.error

        def tell() -> None:
            if self.error:
                raise self.error

        collectives.on_each_machine(tell)
