"""What a person sees of a run: a live panel on a terminal, plain lines anywhere else, and log.txt beside both.

Rank 0 draws; other ranks hold a ``Console`` that is silent. No call raises: a terminal that cannot be drawn on costs
the drawing (the panel gives way to lines, the lines to silence), never the run.
"""

import atexit
import contextlib
import functools
import io
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import rich.console
from rich.console import RenderableType

from protoclip_scale.redact import redact_text
from protoclip_scale.report import plain
from protoclip_scale.report.evaluation_table import evaluation_lines
from protoclip_scale.report.panel import LivePanel
from protoclip_scale.report.progress import Phase, Progress
from protoclip_scale.report.screens import first_screen, last_screen, place_lines
from protoclip_scale.report.terminal import Lines, PanelOutput, Silence, Terminal, as_text, let_go_of_stdout

SECONDS_BETWEEN_LINES = 30
SECONDS_BEFORE_ESTIMATE = 1
LOG_WIDTH = 100


class Console:
    """The calls of a run's console; this one is silent, as on every rank but 0."""

    problem: str | None = None
    """Why drawing or logging stopped, if it did."""

    def start(self, facts: Mapping[str, Any]) -> None:
        """First screen. Facts, all optional: name, ranks, hosts, device, precision, strategy, towers (or image_tower and
        text_tower), parameters, rows {source: rows}, total_steps, steps_per_episode, episodes, global_batch, objectives
        {name: weight}, phases, run_dir, resuming_from, step (of the checkpoint resumed from); others are listed under their own name."""

    def phase(self, name: str, episode: int, num_episodes: int, total: int | None, unit: str, done: int = 0) -> None:
        """Opens a phase and closes the one before. ``episode`` counts from 1; ``done`` is where a resumed phase goes on."""

    def advance(self, done: int, note: str = "", total: int | None = None) -> None:
        """How far the open phase is, in all; ``total`` for one that could not say so when it was opened."""

    def step(self, figures: Mapping[str, Any]) -> None:
        """One line of figures, all optional: step, total_steps, loss, loss/NAME, scale/NAME, lr, gradient_norm,
        samples_per_second, samples_per_second_per_rank, mfu, data_wait_share, memory_gb, eta_seconds; other numbers follow under their own name."""

    def event(self, text: str) -> None:
        """A line for what happens once: a checkpoint written, a quarantine, a resumption."""

    def evaluation(self, figures: Mapping[str, Any]) -> None:
        """A line per held-out set."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Last screen. Keys, all optional: evaluation and baseline (flat), expected (the recipe's), phase_shares, seconds,
        steps, samples, samples_per_second, memory_gb, run_dir, checkpoint, export, export_command, report, pictures, notes."""

    def failure(self, message: str) -> None:
        """One line on why the run ended."""

    def close(self) -> None:
        """Gives the terminal back; harmless when repeated."""

    def save_svg(self, path: Path, width: int = 100) -> None:
        """The live panel as it stands now, as an SVG picture."""


def _never_raises(method: Callable) -> Callable:
    @functools.wraps(method)
    def guarded(self, *arguments, **keywords):
        try:
            return method(self, *arguments, **keywords)
        except Exception as error:  # whatever a figure does, training goes on
            self._note_problem(f"console: {type(error).__name__} in {method.__name__}: {error}")

    return guarded


class DrawingConsole(Console):
    """Rank 0's console: every call goes to log.txt first, then to the terminal."""

    def __init__(self, terminal: Terminal, log_path: Path | None, live: bool, clock: Callable[[], float] = time.monotonic):
        self.progress = Progress(clock)
        self.terminal, self.log_path = terminal, log_path
        self.last_line = clock()
        self.output: Lines = PanelOutput(terminal, LivePanel(self.progress)) if live else Lines(terminal)

    def _note_problem(self, problem: str) -> None:
        self.problem = self.problem or problem
        self._log(problem)

    def _put(self, method: str, *arguments: Any) -> None:
        """Call the output; one that fails gives way to a simpler one, which is given the same."""
        while True:
            try:
                return getattr(self.output, method)(*arguments)
            except Exception as error:  # whatever a terminal does, training goes on
                assert not isinstance(self.output, Silence), error
                self._note_problem(f"console: {type(error).__name__} in {method}: {error}")
                if isinstance(error, BrokenPipeError):
                    let_go_of_stdout()
            with contextlib.suppress(Exception):
                self.output.close()
            self.output = Lines(self.terminal) if isinstance(self.output, PanelOutput) else Silence(self.terminal)

    def _log(self, text: str) -> None:
        if self.log_path is None:
            return
        try:
            plain.append_log(self.log_path, text)
        except OSError as error:
            self.problem = self.problem or f"log: {error}"
            self.log_path = None

    def _line(self, text: str, style: str = "") -> None:
        text = redact_text(text)
        self.last_line = self.progress.clock()
        self._log(text)
        self._put("line", text, style)

    def _screen(self, screen: RenderableType) -> None:
        self._log(as_text(screen, LOG_WIDTH))
        self._put("screen", screen)

    def _progress_line(self, text: str) -> None:
        """A line of the log and of plain output; the panel shows the same figures in place."""
        self.last_line = self.progress.clock()
        self._log(text)
        self._put("step_line", text)

    @_never_raises
    def start(self, facts: Mapping[str, Any]) -> None:
        self.progress.begin(facts)
        self._screen(first_screen(facts))

    @_never_raises
    def phase(self, name: str, episode: int, num_episodes: int, total: int | None, unit: str, done: int = 0) -> None:
        self._close_phase()
        self.progress.open_phase(Phase(name, episode, num_episodes, total, unit, self.progress.clock(), first=done, done=done))
        opened = self.progress.phase
        self._progress_line(f"{opened.place()} {name} begins: {opened.amount() if total else unit}")
        self._put("draw", True)

    def _close_phase(self) -> None:
        if line := self.progress.close_phase():
            self._progress_line(line)

    @_never_raises
    def advance(self, done: int, note: str = "", total: int | None = None) -> None:
        phase = self.progress.phase
        if phase is None:
            return
        phase.done, phase.note, phase.total = done, note or phase.note, total or phase.total
        # What could not be said when the phase was opened is said as soon as it is worth something.
        patience = SECONDS_BEFORE_ESTIMATE if total and not phase.estimated and phase.eta_seconds(self.progress.clock()) else SECONDS_BETWEEN_LINES
        if self.progress.clock() - self.last_line >= patience:
            phase.estimated = True
            self._progress_line(phase.progress_line(self.progress.clock()))
        self._put("draw", False)

    @_never_raises
    def step(self, figures: Mapping[str, Any]) -> None:
        self.progress.step(figures)
        self._progress_line(plain.step_line(figures, self.progress.phase.place() if self.progress.phase else ""))
        self._put("draw", False)

    @_never_raises
    def event(self, text: str) -> None:
        self._line(text)

    @_never_raises
    def evaluation(self, figures: Mapping[str, Any]) -> None:
        self.progress.evaluation = dict(figures)
        for line in evaluation_lines(figures):
            self._line(line)

    @_never_raises
    def finish(self, summary: Mapping[str, Any]) -> None:
        self._close_phase()
        self._stop_panel()
        self._screen(last_screen(summary))
        for line in place_lines(summary):
            self._log(line)
            self._put("copyable", line)

    @_never_raises
    def failure(self, message: str) -> None:
        self._stop_panel()
        self._line(" ".join(message.split()), "bold red")

    def _stop_panel(self) -> None:
        if isinstance(self.output, PanelOutput) and self.output.live is not None:
            self._put("draw", True)
        self._put("close")

    @_never_raises
    def close(self) -> None:
        self._put("close")

    @_never_raises
    def save_svg(self, path: Path, width: int = 100) -> None:
        recorder = rich.console.Console(record=True, width=width, file=io.StringIO(), height=100, force_terminal=True, force_jupyter=False, color_system="truecolor", no_color=False, legacy_windows=False)
        recorder.print(LivePanel(self.progress))
        # The picture must not load fonts from the network when a page shows it.
        svg = re.sub(r"@font-face \{.*?\}", "", recorder.export_svg(title=self.progress.title()), flags=re.DOTALL)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(svg, encoding="utf-8")


def make_console(is_main: bool, log_path: Path | None = None, live: bool | None = None, terminal: Terminal | None = None) -> Console:
    """The console of this rank. ``live`` None draws the panel where stdout is a UTF-8 terminal that can move its cursor."""
    if not is_main:
        return Console()
    if terminal is None:
        terminal = Terminal(force_terminal=True if live else None)
    if live is None:
        live = terminal.is_terminal and not terminal.is_dumb_terminal and terminal.encoding.startswith("utf")
    console = DrawingConsole(terminal, log_path, live)
    atexit.register(console.close)  # a traceback must not leave the terminal without its cursor
    return console
