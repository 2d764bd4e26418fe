"""The thread that tells the other ranks where this one stands, and hears where they do, over a connection of its own to the launcher's store."""

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, TCPStore

from protoclip_scale.engine.watch.heard import Beat, Failure, View

BEAT_SECONDS = 1.0
URGENT_SECONDS = 0.1  # between beats while a cause is looked for
RANKS_PER_SECOND = 16  # heard by each rank, so that the store of many ranks is not asked for W x W values each second
PATIENCE = timedelta(days=1)  # the thread may hang as long as the network does: nobody waits for it


def store_address() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


class Exchange:
    """Keeps ``view`` up to date. ``prefix``: of the keys, the same on all ranks and of this start alone. ``standing`` gives this rank's beat of a number.

    Costs per rank and second one write and at most ``RANKS_PER_SECOND`` + 1 reads of some hundred bytes.
    """

    def __init__(self, view: View, prefix: str, standing: Callable[[int], Beat]):
        self.view, self._standing = view, standing
        self._store = PrefixStore(prefix, TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), None, False, timeout=PATIENCE, wait_for_workers=False))
        self._keys = [str(member.rank) for member in view.members]
        self._number = 0
        self._told: Failure | None = None
        self._urgent, self._wake, self._end = False, threading.Event(), False
        self._answers = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="watch-exchange", daemon=True)

    def publish_first(self) -> None:
        """Put this rank's keys into the store: none may be read before all ranks have."""
        self._store.set(self._keys[self.view.me], self._beat())
        if self.view.me == 0:
            self._store.set("failure", "null")

    def start(self) -> None:
        self._thread.start()

    def tell(self, failure: Failure) -> None:
        """Say why the job ends, unless another rank has already."""
        self._told = failure
        self.hurry()

    def hurry(self) -> None:
        """Beat, and hear all ranks, as often as makes sense."""
        self._urgent = True
        self._wake.set()

    def wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        """Wait, in a hurry, until what is heard of the other ranks makes ``condition`` true, for so long at most."""
        self.hurry()
        deadline = time.monotonic() + seconds
        with self._answers:
            while not condition() and time.monotonic() < deadline:
                self._answers.wait(URGENT_SECONDS)

    def end(self) -> None:
        """One last beat, and no more."""
        self._end = True
        self.hurry()
        self._thread.join(3 * BEAT_SECONDS)

    def _beat(self) -> str:
        self._number += 1
        return json.dumps(asdict(self._standing(self._number)))

    def _work(self) -> None:
        next_hearing = 0.0
        try:
            while True:
                self._wake.clear()
                ending = self._end
                self._store.set(self._keys[self.view.me], self._beat())
                if ending:
                    return
                if self._told is not None:
                    self._store.compare_set("failure", "null", json.dumps(asdict(self._told)))
                    self._told = None
                failure = json.loads(self._store.get("failure"))
                heard = {}
                if self._urgent or time.monotonic() >= next_hearing:
                    heard = dict(enumerate(map(json.loads, self._store.multi_get(self._keys))))
                    next_hearing = time.monotonic() + len(self._keys) / RANKS_PER_SECOND
                with self._answers:
                    now = time.monotonic()
                    for rank, beat in heard.items():
                        self.view.hear(rank, Beat(**beat), now)
                    self.view.answered = now
                    if heard:
                        self.view.listened = now
                    if failure:
                        self.view.failure, self._urgent = Failure(**failure), True  # the rank that fails waits to hear that it is known
                    self._answers.notify_all()
                self._wake.wait(URGENT_SECONDS if self._urgent else BEAT_SECONDS)
        except (DistNetworkError, DistStoreError, RuntimeError):
            with self._answers:
                self.view.is_store_gone = not self._end
                self._answers.notify_all()
