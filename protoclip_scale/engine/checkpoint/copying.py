"""Copying published checkpoints in the background: in order, again and again where the place does not answer, and never in training's way."""

import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from protoclip_scale import standing
from protoclip_scale.data.sources.retry import FIRST_DELAY, retry_after, text_of
from protoclip_scale.engine.checkpoint.copies import RUN_FILES, Copies
from protoclip_scale.engine.checkpoint.finding import list_checkpoints, prototypes_folder
from protoclip_scale.engine.checkpoint.manifest import missing_file
from protoclip_scale.engine.checkpoint.retention import outdated
from protoclip_scale.engine.faults import event

LONGEST_DELAY = 60.0
STOPPED_SECONDS = 25.0  # a stopped run waits so long for its copies; batch systems kill after 30
IDLE_SECONDS = 1800.0  # a finished one, as long as nothing arrives


class Overtaken(Exception):
    """A newer attempt copies to the same place."""


class Copier:
    """A thread that copies what ``add`` is given to ``copies``, and deletes there what the run's retention deletes here.

    What an earlier attempt has not copied comes first. Nothing raises: ``news`` has the lines to show. ``in_use`` must not be deleted meanwhile.
    """

    def __init__(self, run_dir: Path, copies: Copies, attempt: int, run_id: str, keep: int, keep_every: int):
        self.run_dir, self.copies, self.attempt, self.run_id = run_dir, copies, attempt, run_id
        self.keep, self.keep_every = keep, keep_every
        self.in_use: frozenset[str] = frozenset()
        self._waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._news: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._added = self._done = 0  # each counted by one thread
        self._moved = time.monotonic()  # when something last arrived
        self._ended = threading.Event()
        for checkpoint in list_checkpoints(run_dir):
            for folder in (checkpoint, prototypes_folder(checkpoint)):
                if folder.is_dir():
                    self.add(folder)
        threading.Thread(target=self._work, name="copies", daemon=True).start()

    def add(self, folder: Path) -> None:
        """A checkpoint has been published, or what clustering adds to one."""
        self._added += 1
        self._waiting.put(folder)

    def news(self) -> Iterator[str]:
        """Lines that nobody has seen yet."""
        while not self._news.empty():
            yield self._news.get()

    def finish(self, seconds: float | None = None) -> None:
        """Wait for what is left: ``seconds`` at most, or until nothing has arrived for ``IDLE_SECONDS``."""
        began = time.monotonic()
        while (left := self._added - self._done) and not self._ended.is_set():
            if time.monotonic() > (max(began, self._moved) + IDLE_SECONDS if seconds is None else began + seconds):
                self._news.put(
                    f"warning: {left} checkpoints are not copied to {self.copies.shown} yet; the next start in this run directory goes on with them"
                )
                return
            standing.got_on()  # there is a limit here already
            time.sleep(0.02)

    def _work(self) -> None:
        try:
            self._persist(lambda: self._check_owner() or self.copies.announce(self.attempt, self.run_id))
            while True:
                folder = self._waiting.get()
                self.in_use = frozenset({folder.name})
                if folder.is_dir():  # else retention was faster
                    self._persist(lambda folder=folder: self._copy(folder), folder)
                    self._persist(self._prune)
                self.in_use = frozenset()
                self._done += 1
                self._moved = time.monotonic()
        except Overtaken as why:
            self._news.put(f"warning: {why}; nothing more is copied from here")
        finally:
            self._ended.set()

    def _copy(self, folder: Path) -> None:
        if problem := missing_file(folder):
            self._news.put(f"warning: checkpoints/{folder.name} is not copied: {problem}")
            return
        if self.copies.holds(folder):
            return
        self._check_owner()
        self.copies.put(folder)
        for name in RUN_FILES:
            if (self.run_dir / name).is_file():
                self.copies.put_bytes(name, (self.run_dir / name).read_bytes())
        self._check_owner()
        self.copies.complete(folder)
        self._news.put(f"copied checkpoints/{folder.name} to {self.copies.shown}")
        event("checkpoint.copied")

    def _prune(self) -> None:
        for step in sorted(outdated(self.copies.steps(), self.keep, self.keep_every)):
            self.copies.remove(step)

    def _check_owner(self) -> None:
        newest, run_id = self.copies.newest_attempt(), self.copies.run_id()
        if run_id not in (None, self.run_id):
            raise Overtaken(f"run.copy_to {self.copies.shown} holds copies of another run ({run_id})")
        if newest > self.attempt:
            raise Overtaken(f"run.copy_to {self.copies.shown}: attempt {newest} has taken this run over")

    def _persist(self, action: Callable[[], object], folder: Path | None = None) -> None:
        """``action()`` until it works; what fails is told when it changes. Given up when ``folder`` is gone."""
        told, delay = "", FIRST_DELAY
        while folder is None or folder.is_dir():
            try:
                action()
                return
            except Overtaken:
                raise
            except Exception as error:
                if (problem := text_of(error)) != told:
                    told = problem
                    what = f"checkpoints/{folder.name} cannot be copied to" if folder else "there is no access to"
                    self._news.put(f"warning: {what} run.copy_to {self.copies.shown} yet: {problem}; trying again")
                time.sleep(max(delay * random.uniform(0.5, 1.5), retry_after(error)))
                delay = min(2 * delay, LONGEST_DELAY)
