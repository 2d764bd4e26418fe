"""What the console knows about the run at this moment; drawing reads it, and nothing else does."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from protoclip_scale.report.plain import as_number, count, counted, duration, percent

PHASES = ("fetch", "extract", "cluster", "train", "evaluate")


class LossHistory:
    """A curve of at most ``capacity`` points over the whole run: when full, neighbours are averaged and the stride doubles."""

    def __init__(self, capacity: int = 512):
        self.capacity, self.stride = capacity, 1
        self.values: list[float] = []
        self.pending: list[float] = []

    def add(self, value: Any) -> None:
        found = as_number(value)
        if found is None:
            return
        self.pending.append(found)
        if len(self.pending) == self.stride:
            self.values.append(sum(self.pending) / self.stride)
            self.pending = []
        if len(self.values) == self.capacity:
            self.values = [(first + second) / 2 for first, second in zip(self.values[::2], self.values[1::2], strict=True)]
            self.stride *= 2


@dataclass
class Phase:
    """One phase of one episode: a name of ``PHASES``, how far it is, and since when."""

    name: str
    episode: int
    num_episodes: int
    total: int | None
    unit: str
    started: float
    first: int = 0
    done: int = 0
    note: str = ""
    ended: bool = False
    estimated: bool = False  # a line with the time left was shown

    def place(self) -> str:
        return f"episode {count(self.episode)}/{count(self.num_episodes)}" if self.num_episodes else f"episode {count(self.episode)}"

    def amount(self) -> str:
        """'512/1,000 steps'."""
        return f"{count(self.done)}/{count(self.total)} {self.unit}" if self.total else f"{count(self.done)} {self.unit}"

    def eta_seconds(self, now: float) -> float | None:
        """The time left at the mean speed since the phase was opened; None until something was done."""
        moved = self.done - self.first
        if not self.total or moved <= 0:
            return None
        return (now - self.started) / moved * max(0, self.total - self.done)

    def progress_line(self, now: float) -> str:
        share = f" ({percent(self.done / self.total, 0)})" if self.total else ""
        parts = [f"{self.place()} {self.name}: {self.amount()}{share}", f"eta {duration(self.eta_seconds(now))}", self.note]
        return " | ".join(part for part in parts if part)

    def closing_line(self, now: float) -> str:
        elapsed, moved = now - self.started, self.done - self.first
        speed = f" ({count(moved / elapsed)} {self.unit}/s)" if moved > 0 and elapsed >= 1 and moved / elapsed >= 1 else ""
        return f"{self.place()} {self.name} ended: {self.amount()} in {duration(elapsed)}{speed}"


@dataclass
class Progress:
    """All that the live panel shows."""

    clock: Callable[[], float] = time.monotonic
    facts: dict[str, Any] = field(default_factory=dict)
    phase: Phase | None = None
    phase_seconds: dict[str, float] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)
    losses: LossHistory = field(default_factory=LossHistory)
    evaluation: dict[str, Any] = field(default_factory=dict)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """What is run; a resumed run's bar starts at its step."""
        self.facts = dict(facts)
        if "step" in facts:
            self.figures = {"step": facts["step"]}

    def open_phase(self, phase: Phase) -> None:
        """The seconds of the phases shown are those of the current episode."""
        if self.phase is None or self.phase.episode != phase.episode:
            self.phase_seconds = {}
        self.phase = phase

    def close_phase(self) -> str | None:
        """Adds the phase's seconds and gives its closing line; None if no phase is open."""
        if self.phase is None or self.phase.ended:
            return None
        self.phase.ended = True
        now = self.clock()
        self.phase_seconds[self.phase.name] = self.phase_seconds.get(self.phase.name, 0.0) + now - self.phase.started
        return self.phase.closing_line(now)

    def step(self, figures: Mapping[str, Any]) -> None:
        """Later figures replace earlier ones of the same name; the others stay."""
        self.figures.update(figures)
        self.losses.add(figures.get("loss"))

    def title(self) -> str:
        name = str(self.facts.get("name", "protoclip-scale"))
        return f"{name}, {self.where()}" if "ranks" in self.facts else name

    def where(self) -> str:
        return f"{counted(self.facts.get('ranks'), 'rank')} on {counted(self.facts.get('hosts', 1), 'host')}"
