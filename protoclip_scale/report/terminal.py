"""The three ways of putting the console on a stream: a panel, lines, or nothing."""

import contextlib
import io
import os
import sys
import time

import rich.console
from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

SECONDS_BETWEEN_DRAWINGS = 0.25
MAX_SCREEN_WIDTH = 100


def as_text(screen: RenderableType, width: int, encoding: str = "utf-8") -> str:
    """A screen as plain text without colours, its frames drawn with what the encoding has."""
    buffer = io.BytesIO()
    file = io.TextIOWrapper(buffer, encoding=encoding, errors="replace", newline="\n")
    rich.console.Console(file=file, width=width, height=100, color_system=None, force_terminal=False, force_jupyter=False, legacy_windows=False).print(screen)
    file.flush()
    return buffer.getvalue().decode(encoding)


class Terminal(rich.console.Console):
    """Rich's console ends the process when the reader of stdout is gone; this one raises like any other stream."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError("the reader of stdout is gone")


def let_go_of_stdout() -> None:
    """Point stdout at nothing once its reader is gone; else Python's last flush turns the run's exit code into 120."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Lines:
    """Output for files, pipes and schedulers: one line at a time, flushed, with the time of day."""

    def __init__(self, terminal: Terminal):
        self.terminal = terminal

        self.encoding = getattr(terminal.file, "encoding", None) or "utf-8"

    def _write(self, text: str) -> None:
        stream = self.terminal.file
        stream.write(text.encode(self.encoding, "replace").decode(self.encoding))
        stream.flush()

    def line(self, text: str, style: str = "") -> None:
        self._write("".join(f"{time.strftime('%H:%M:%S')} {line}\n" for line in text.splitlines()))

    step_line = line

    def screen(self, screen: RenderableType) -> None:
        self._write(as_text(screen, max(40, min(self.terminal.width, MAX_SCREEN_WIDTH)), self.encoding))

    def copyable(self, text: str) -> None:
        """A line that is never wrapped, so that a path or a command in it can be copied."""
        self._write(text + "\n")

    def draw(self, now: bool) -> None:
        pass

    def close(self) -> None:
        pass


class PanelOutput(Lines):
    """Output for terminals: a panel that is redrawn by the caller's thread (no thread of its own: forks stay safe)."""

    def __init__(self, terminal: Terminal, panel: RenderableType):
        super().__init__(terminal)
        self.panel = panel
        self.live: Live | None = None
        self.last_drawing = 0.0

    def line(self, text: str, style: str = "") -> None:
        self.terminal.print(Text(f"{time.strftime('%H:%M:%S')} {text}", style=style))

    def step_line(self, text: str) -> None:
        pass

    def screen(self, screen: RenderableType) -> None:
        self.terminal.print(screen)

    def copyable(self, text: str) -> None:
        self.terminal.print(Text(text), soft_wrap=True)

    def draw(self, now: bool) -> None:
        if self.live is None:
            self.live = Live(self.panel, console=self.terminal, auto_refresh=False)
            self.live.start()
        if now or time.monotonic() - self.last_drawing >= SECONDS_BETWEEN_DRAWINGS:
            self.live.refresh()
            self.last_drawing = time.monotonic()

    def close(self) -> None:
        if self.live is not None:
            live, self.live = self.live, None
            live.stop()


class Silence(Lines):
    """Output of last resort, when not even lines can be written."""

    def _write(self, text: str) -> None:
        pass
