"""A rank's watch: why a collective failed, who is late where nobody gets on, and an end to waiting for the lost.

Two threads beside the one that trains: the exchange, which hangs when the network does, and the judge, which waits for nobody.
"""

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from protoclip_scale import collectives, standing
from protoclip_scale.engine.watch import stacks
from protoclip_scale.engine.watch.exchange import Exchange, store_address
from protoclip_scale.engine.watch.heard import SILENT_SECONDS, Beat, Failure, View, this_member
from protoclip_scale.recipe.schema import Run

JUDGE_SECONDS = 0.5
GRACE_SECONDS = 10.0  # for the main thread to end by itself, as its collective fails
LEAVING_SECONDS = 60.0  # for it to end once it knows
LAST_WORDS_SECONDS = 5.0
FAREWELL_SECONDS = 3.0  # for the others to hear why this rank fails, before it takes its connections with it
GONE_SECONDS = 0.2  # between seeing that a process is gone and hearing that it did not say that it leaves
Tell = Callable[[str], None]


def aside(work: Callable[[], object]) -> threading.Thread:
    """``work()`` in a thread that nobody need wait for: the file system or the terminal that it writes to may hang, and what it raises of them is lost."""

    def attempt() -> None:
        with contextlib.suppress(OSError):
            work()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    return thread


class NoWatch:
    """Of a single process, which nobody waits for."""

    def report_to(self, folder: Path, tell: Tell, end: Tell) -> None:
        """From now on ``tell`` gets lines for the log, ``end`` the line on why this process is about to be ended, and stacks go to ``folder``."""

    def cause(self, error: BaseException) -> str | None:
        """One line on what happened to another rank, if that is why this one fails with ``error``; None if the error is this rank's own."""
        return None

    def speaks(self) -> bool:
        """Whether it is this rank that prints what all those on its machine know of a lost one: the first of them that is left."""
        return True

    def failed(self, line: str, own: bool) -> None:
        """Tell the others why this rank fails, and wait until they have heard it, some seconds at most. ``own``: False for what ``cause`` said."""

    def close(self) -> None:
        """This rank has nothing more to do with the others; harmless when repeated."""


def begin(settings: Run) -> NoWatch:
    """The watch of this process; a collective, after the process group has been made. A single process gets one that does nothing."""
    return Watch(settings) if collectives.world_size() > 1 else NoWatch()


class Watch(NoWatch):
    """Ends this process if its main thread still waits some seconds after another rank is known to have failed or to be gone, or after ranks have not answered
    for ``lost_seconds``, or the store for longer than a collective may wait (``timeout_minutes``), or in one collective for longer than that."""

    def __init__(self, settings: Run):
        self._longest = 60 * settings.timeout_minutes + GRACE_SECONDS
        self._lost_after = min(settings.lost_seconds, self._longest)
        self._hang_seconds, self._patience = settings.hang_seconds, 0.0
        self._me = collectives.rank()
        standing.got_on()  # what was before is nobody's business here
        members = collectives.all_gather_objects(this_member(self._me))
        prefix = collectives.broadcast_object(f"watch-{uuid.uuid4().hex}")
        self._view = View(members, self._me, time.monotonic())
        self._left, self._leaving_since = False, None
        self._stood: Beat | None = None
        self._gone: dict[int, float] = {}
        self._doomed_since: float | None = None
        self._folder: Path | None = None
        self._tell: Tell = lambda line: None
        self._end: Tell = lambda line: None
        self._exchange = Exchange(self._view, prefix, self._beat)
        self._exchange.publish_first()
        collectives.barrier()
        self._exchange.start()
        threading.Thread(target=self._judge, name="watch-judge", daemon=True).start()

    def report_to(self, folder: Path, tell: Tell, end: Tell) -> None:
        self._folder, self._tell, self._end = folder, tell, end

    def cause(self, error: BaseException) -> str | None:
        if not collectives.is_about_other_ranks(error):
            return None
        self._leaving_since = self._leaving_since or time.monotonic()
        self._exchange.wait_until(lambda: self._lost(time.monotonic()) is not None, SILENT_SECONDS + 2)
        now = time.monotonic()
        return self._lost(now) or f"other ranks were waited for in vain: {self._view.late(now)[0]} ({' '.join(str(error).split())[:200]})"

    def speaks(self) -> bool:
        view, own = self._view, self._view.members[self._me]
        missing = {*view.silent(SILENT_SECONDS), *(rank for rank in view.others() if view.members[rank].is_halted(own))}
        if view.failure is not None:  # the rank that told it shows its own failure in its own way, and another's like any rank
            (missing.add if view.failure.own else missing.discard)(view.failure.rank)
        return all(member.rank in missing for member in view.members[: self._me] if (member.machine or member.host) == (own.machine or own.host))

    def failed(self, line: str, own: bool) -> None:
        self._leaving_since = self._leaving_since or time.monotonic()
        self._exchange.tell(Failure(self._me, line, own))
        view = self._view
        unreachable = {*view.silent(SILENT_SECONDS), *view.ended()}

        def is_known() -> bool:
            return view.is_store_gone or (view.failure is not None and all(view.heard[rank].beat.knows for rank in {*view.others()} - unreachable))

        if time.monotonic() - view.answered < SILENT_SECONDS:
            self._exchange.wait_until(is_known, FAREWELL_SECONDS)

    def close(self) -> None:
        if not self._left:
            self._left = True
            self._exchange.end()

    def _beat(self, number: int) -> Beat:
        """Where this rank stands; one that is leaving, where it stood before."""
        if self._leaving_since is None:
            here, (where, in_collective) = standing.HERE, stacks.whereabouts()
            waits = in_collective if here.waits is None else here.waits
            self._since, self._stood = here.since, Beat(number, here.phase, here.episode, here.step, here.marks, 0.0, where, waits)
        age = round(time.monotonic() - self._since, 3)
        return replace(self._stood, number=number, age=age, left=self._left, knows=self._view.failure is not None)

    def _lost(self, now: float) -> str | None:
        """Why this job cannot go on, as far as it is known: what another rank told, processes that are gone, ranks or a store that do not answer."""
        view = self._view
        if line := self._surely_lost(now):
            return line
        if silent := view.silent(SILENT_SECONDS):
            return view.lost(silent, now)
        if now - view.answered > SILENT_SECONDS:
            return view.lost_store(store_address(), now)
        return None

    def _surely_lost(self, now: float) -> str | None:
        """Another rank has told why it fails, or the process of one is gone that did not say that it leaves."""
        view = self._view
        if view.failure is not None and view.failure.rank != self._me:
            return view.failed()
        self._gone = {rank: self._gone.get(rank, now) for rank in view.ended()}
        listened = now if view.is_store_gone else view.listened
        gone = [rank for rank, since in self._gone.items() if listened - since > GONE_SECONDS]
        return view.lost(gone, now) if gone else None

    def _judge(self) -> None:
        while not self._left:
            now = time.monotonic()
            if self._leaving_since is not None:
                if now - self._leaving_since > LEAVING_SECONDS:
                    os._exit(1)
            elif line := self._doom(now):
                self._give_up(line)
            else:
                self._look_for_hang(now)
            time.sleep(JUDGE_SECONDS)

    def _give_up(self, line: str) -> None:
        """End this process, and tell the others why: those on other machines, whose main threads hang like this one's, have perhaps only heard silence."""
        threading.Timer(LAST_WORDS_SECONDS, os._exit, (1,)).start()  # the disk or the terminal may hang, too
        last_words = aside(lambda: self._end(line))
        self.failed(line, own=False)
        self.close()
        last_words.join()
        os._exit(1)

    def _doom(self, now: float) -> str | None:
        """Why the main thread will not get on any more."""
        line = self._surely_lost(now)
        self._doomed_since = (self._doomed_since or now) if line else None
        if line and now - self._doomed_since > GRACE_SECONDS:
            return line
        waited = now - standing.HERE.since
        if waited > self._lost_after and (silent := self._view.silent(self._lost_after)):
            return self._view.lost(silent, now)
        if waited > self._longest and now - self._view.answered > self._longest:
            return self._view.lost_store(store_address(), now)
        if waited > self._longest and standing.HERE.waits is None and stacks.whereabouts()[1]:  # NCCL's own watchdog would end the process without a word
            return f"other ranks were waited for in vain for {waited:.0f} s: {self._view.late(now)[0]}"
        return None

    def _look_for_hang(self, now: float) -> None:
        """A line, from one rank, each time the time without progress anywhere has doubled; those who are late write where they are."""
        view = self._view
        seconds = min(*view.ages(now).values(), now - standing.HERE.since)
        if seconds < self._hang_seconds:
            self._patience = max(self._hang_seconds, SILENT_SECONDS + 2)
        if seconds < self._patience or self._folder is None:
            return
        self._patience = 2 * self._patience
        if now - view.answered > SILENT_SECONDS:
            line, late, told_by = f"no progress for {seconds:.0f} s: {view.lost_store(store_address(), now)}", [], view.first_elsewhere()
        else:
            text, late = view.late(now)
            line = f"no progress for {seconds:.0f} s: {text}"
            told_by = min({*view.others(), self._me} - {*view.silent(SILENT_SECONDS)})
        if self._me in late:
            aside(lambda: self._dump(line))
        if self._me == told_by:
            aside(lambda: self._tell(line))

    def _dump(self, line: str) -> None:
        if self._folder.is_dir():  # it may be another one here
            stacks.dump(self._folder / "hangs" / f"rank-{self._me:05d}.txt", line)
