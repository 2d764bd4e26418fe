"""When things happened in the life of a run: hours of work, without the time between attempts, and where attempts took over."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from protoclip_scale.report.html.run_files import RunFiles


@dataclass(frozen=True)
class Attempt:
    """One start of the run. ``before``: hours of work of all earlier attempts. ``from_samples``, ``from_step``: where it took the run over (0 for the first)."""

    number: int
    started: float
    ended: float
    before: float
    from_step: int
    from_samples: int
    to_step: int
    lines_taken_back: int

    @property
    def hours(self) -> float:
        return max(0.0, self.ended - self.started) / 3600


class Timeline:
    """Hours of work count from the first attempt's start; work that a resumption took back counts, waiting in a queue does not."""

    def __init__(self, run: RunFiles):
        self.attempts: list[Attempt] = []
        before = 0.0
        for number, started in run.attempts().items():
            last, step = run.last_seen.get(number, (0.0, 0))
            started = started if started is not None else _first_time(run, number)
            if started is None:
                continue
            from_step, from_samples = _taken_over_at(run, number)
            attempt = Attempt(number, started, max(last, started), before, from_step, from_samples, max(step, from_step), run.taken_back.get(number, 0))
            self.attempts.append(attempt)
            before += attempt.hours
        self._by_number = {attempt.number: attempt for attempt in self.attempts}

    @property
    def hours(self) -> float:
        return sum(attempt.hours for attempt in self.attempts)

    def hours_at(self, attempts: np.ndarray, times: np.ndarray) -> np.ndarray:
        """float64 [n] of lines of these attempts [n] at these times [n] (seconds since 1970)."""
        hours = np.full(len(times), np.nan)
        for number in np.unique(attempts):
            if attempt := self._by_number.get(int(number)):
                own = attempts == number
                hours[own] = attempt.before + (times[own] - attempt.started) / 3600
        return hours

    def hours_of(self, line: dict[str, Any]) -> float:
        """Of one line; NaN where it does not say when it was written (evaluations of tools/watch.py)."""
        if not isinstance(line.get("time"), int | float):
            return float("nan")
        return float(self.hours_at(np.array([line["attempt"]]), np.array([line["time"]]))[0])

    def restarts(self) -> list[Attempt]:
        """Attempts after the first that trained."""
        return [attempt for attempt in self.attempts[1:] if attempt.to_step > attempt.from_step or attempt.from_step]


def _first_time(run: RunFiles, number: int) -> float | None:
    own = run.train["time"][run.train["attempt"] == number]
    return float(own[0]) if len(own) else None


def _taken_over_at(run: RunFiles, number: int) -> tuple[int, int]:
    """(step, samples) of the newest line that earlier attempts have left."""
    earlier = run.train["attempt"] < number
    if not earlier.any():
        return 0, 0
    last = np.flatnonzero(earlier)[-1]
    return int(run.train["step"][last]), int(run.train["samples"][last])
