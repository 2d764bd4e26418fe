"""How far a tool is: a bar on a terminal, a line now and then everywhere else."""

import sys
import time
from typing import Any, TextIO

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from protoclip_scale.report.plain import count, duration, percent

SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """``with ProgressBar("encoding", total=39_102, unit="rows") as bar: bar.advance(64)``. ``bar.note`` is shown behind it."""

    def __init__(self, title: str, total: int, unit: str = "rows", done: int = 0, stream: TextIO | None = None):
        self.title, self.total, self.unit = title, total, unit
        self.done, self.first, self.note = done, done, ""
        self.stream = stream or sys.stderr
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "ProgressBar":
        console = rich.console.Console(file=self.stream)
        if console.is_terminal and not console.is_dumb_terminal:
            columns: tuple[Any, ...] = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, console=console, refresh_per_second=5)
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, completed=self.done, speed="", note="")
        return self

    def __exit__(self, *problem: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif problem[0] is None:
            self._line(f"{self.title}: {count(self.done)} {self.unit} in {duration(time.monotonic() - self._started)}{self._speed()}{self._noted()}")

    def advance(self, amount: int) -> None:
        self.done += amount
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, speed=self._speed().strip(" ()"), note=self.note)
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._line(f"{self.title}: {count(self.done)}/{count(self.total)} {self.unit} ({percent(self.done / max(1, self.total), 0)}){self._speed()}, eta {duration(self._eta())}{self._noted()}")

    def _line(self, text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, file=self.stream, flush=True)

    def _speed(self) -> str:
        elapsed = time.monotonic() - self._started
        return f" ({count((self.done - self.first) / elapsed)} {self.unit}/s)" if elapsed > 0.5 and self.done > self.first else ""

    def _eta(self) -> float | None:
        moved = self.done - self.first
        return (time.monotonic() - self._started) / moved * (self.total - self.done) if moved else None

    def _noted(self) -> str:
        return f", {self.note}" if self.note else ""
