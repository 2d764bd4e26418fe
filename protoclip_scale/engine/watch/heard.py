"""What a rank knows of all ranks, and the sentences that follow from it."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

MOST_NAMED = 4
SILENT_SECONDS = 4.0  # without a beat, of which there is one each second


@dataclass(frozen=True)
class Member:
    """A rank's process. ``machine``: the same for processes that can see each other; empty where that cannot be told. ``began``: tells
    processes apart that had one number after each other."""

    rank: int
    host: str
    pid: int
    machine: str
    began: int

    def has_ended(self, asking: "Member") -> bool:
        """Whether the process is known to be gone; False for one on a machine that ``asking`` does not see."""
        return self._state(asking) in ("Z", "X")

    def is_halted(self, asking: "Member") -> bool:
        """Whether the process is known to be gone, or stopped by a signal; False as above."""
        return self._state(asking) in ("Z", "X", "T", "t")

    def _state(self, asking: "Member") -> str:
        """The letter that the system has for it; '' for a process that ``asking`` does not see."""
        if not self.machine or self.machine != asking.machine:
            return ""
        state, began = _process(self.pid)
        return state if began == self.began else "X"


def _process(pid: int) -> tuple[str, int]:
    """A process's state, and when it began in clock ticks since its machine did, which no change of a clock bears on; ('X', 0) if there is none."""
    try:
        facts = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return facts[0], int(facts[19])
    except (OSError, IndexError):
        return "X", 0


def this_member(rank: int) -> Member:
    try:
        machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        machine = ""
    return Member(rank, socket.gethostname(), os.getpid(), machine, _process(os.getpid())[1])


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself each second. ``age``: seconds since it last got on; ``where``: the line of code that its main thread is at; ``waits``:
    whether it is there for other ranks; ``left``: it has nothing more to do with them; ``knows``: it knows of the
    failure."""

    number: int
    phase: str
    episode: int
    step: int
    marks: int
    age: float
    where: str
    waits: bool
    left: bool = False
    knows: bool = False


@dataclass(frozen=True)
class Heard:
    """A rank's newest beat, first heard at ``at``, by the hearer's own monotonic clock: clocks of other machines bear on nothing."""

    beat: Beat
    at: float


@dataclass(frozen=True)
class Failure:
    """Why the job ends, as its first rank to know has said. ``own``: it is that rank's own failure; otherwise ``line`` says whom it has lost."""

    rank: int
    line: str
    own: bool


def place(beat: Beat) -> str:
    return f"{beat.phase}, episode {beat.episode + 1}, step {beat.step}"


def ranks_named(ranks: list[int]) -> str:
    """'rank 3', 'ranks 0-2, 5'."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join("-".join(map(str, run)) for run in runs)


class View:
    """The ranks as one of them, ``me``, knows them."""

    def __init__(self, members: list[Member], me: int, now: float):
        self.members, self.me = members, me
        unheard = Beat(0, "start", 0, 0, 0, 0.0, "", waits=False)
        self.heard = [Heard(unheard, now) for _ in members]
        self.answered = self.listened = now  # when the store did last, and when all ranks were listened to
        self.is_store_gone = False  # its connection was closed
        self.failure: Failure | None = None

    def hear(self, rank: int, beat: Beat, now: float) -> None:
        if beat.number != self.heard[rank].beat.number:
            self.heard[rank] = Heard(beat, now)

    def others(self) -> list[int]:
        """Those that are still expected to take part."""
        return [member.rank for member in self.members if member.rank != self.me and not self.heard[member.rank].beat.left]

    def silent(self, seconds: float) -> list[int]:
        """Other ranks whose last beat was older than that when they were last listened to: where the store does not answer, none is known to be silent."""
        return [rank for rank in self.others() if self.listened - self.heard[rank].at > seconds]

    def ended(self) -> list[int]:
        """Other ranks of this machine whose processes are gone."""
        return [rank for rank in self.others() if self.members[rank].has_ended(self.members[self.me])]

    def ages(self, now: float) -> dict[int, float]:
        """Seconds since each rank that takes part last got on."""
        return {rank: self.heard[rank].beat.age + now - self.heard[rank].at for rank in (*self.others(), self.me)}

    def failed(self) -> str:
        """The failure that another rank told."""
        assert self.failure is not None
        if not self.failure.own:
            return self.failure.line
        return f"rank {self.failure.rank} on {self.members[self.failure.rank].host} failed: {self.failure.line}"

    def lost(self, ranks: list[int], now: float) -> str:
        """The sentence that names lost ranks: hosts, how long ago they were heard, and where they stood then."""
        hosts: dict[str, list[int]] = {}
        for rank in ranks:
            hosts.setdefault(self.members[rank].host, []).append(rank)
        parts = []
        for host, there in hosts.items():
            last = max((self.heard[rank] for rank in there), key=lambda heard: heard.at)
            pid = f" (pid {self.members[there[0]].pid})" if len(there) == 1 else ""
            parts.append(f"{ranks_named(there)} on {host}{pid}, last heard {max(0.0, now - last.at):.0f} s ago in {place(last.beat)}")
        return f"lost {'; '.join(parts)}"

    def lost_store(self, address: str, now: float) -> str:
        """The sentence for a store that does not answer: it runs on the machine of rank 0, whose ranks are then lost, or cut off."""
        first, own = self.members[0], self.members[self.me]
        there = [member.rank for member in self.members if member.host == first.host and member.machine != own.machine]
        return f"{self.lost(there or [0], now)}: the store that the launcher keeps there, at {address}, {'is gone' if self.is_store_gone else 'does not answer'}"

    def first_elsewhere(self) -> int:
        """The lowest rank on another machine than rank 0's; 1 if there is none."""
        return min((member.rank for member in self.members if member.host != self.members[0].host), default=1)

    def late(self, now: float) -> tuple[str, list[int]]:
        """Who is late where nobody gets on, and their ranks: those that do not answer; else, of those that do not wait for others, or of all, the ones that have
        come least far; and who waits for them."""
        taking_part = sorted([*self.others(), self.me])
        silent = self.silent(SILENT_SECONDS)
        suspects = [rank for rank in taking_part if not self.heard[rank].beat.waits] or taking_part
        come = {rank: (self.heard[rank].beat.step, self.heard[rank].beat.marks) for rank in suspects}
        late = silent or [rank for rank in suspects if come[rank] == min(come.values())]
        told = "; ".join(self._late(rank, rank in silent, now) for rank in late[:MOST_NAMED]) + (f"; and {len(late) - MOST_NAMED} more" if len(late) > MOST_NAMED else "")
        waiting = [rank for rank in taking_part if rank not in late]
        if not waiting:
            return told, late
        return f"{told}; {ranks_named(waiting)} {'waits' if len(waiting) == 1 else 'wait'} for {'it' if len(late) == 1 else 'them'}{self._at(waiting[0])}", late

    def _late(self, rank: int, is_silent: bool, now: float) -> str:
        heard, host = self.heard[rank], self.members[rank].host
        if is_silent:
            return f"rank {rank} on {host} does not answer, last heard {now - heard.at:.0f} s ago in {place(heard.beat)}"
        return f"rank {rank} on {host} is late, {'waiting' if heard.beat.waits else 'working'} in {place(heard.beat)}{self._at(rank)} for {self.ages(now)[rank]:.0f} s"

    def _at(self, rank: int) -> str:
        where = self.heard[rank].beat.where
        return f" at {where}" if where else ""
