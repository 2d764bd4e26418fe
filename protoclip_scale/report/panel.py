"""The live panel: phase and run progress with times left, losses and their curve, scales, speed, memory."""

import math
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from protoclip_scale.report import plain
from protoclip_scale.report.evaluation_table import evaluation_lines
from protoclip_scale.report.progress import PHASES, Progress

LEVELS = "▁▂▃▄▅▆▇█"
MAX_SETS = 4


def sparkline(values: Sequence[float], width: int) -> str:
    """At most ``width`` characters, each the mean of a part of the values, from the lowest level to the highest."""
    if not values or width < 1:
        return ""
    width = min(width, len(values))
    edges = [index * len(values) // width for index in range(width + 1)]
    means = [sum(values[start:end]) / (end - start) for start, end in zip(edges, edges[1:], strict=False)]
    low, high = min(means), max(means)
    if not math.isfinite(high - low) or high == low:
        return LEVELS[0] * width
    return "".join(LEVELS[min(len(LEVELS) - 1, int((mean - low) / (high - low) * len(LEVELS)))] for mean in means)


class LivePanel:
    """A rich renderable of a ``Progress``; it fits any width."""

    def __init__(self, progress: Progress):
        self.progress = progress

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        inner = max(10, options.max_width - 4)
        parts = [self._bars(inner), self._phases(), self._losses(inner), self._figures(inner), *self._evaluation()]
        yield Panel(Group(*(part for part in parts if part is not None)), title=Text(self.progress.title()), title_align="left", box=box.ROUNDED)

    def _bars(self, width: int) -> RenderableType:
        progress, phase, figures = self.progress, self.progress.phase, self.progress.figures
        rows: list[tuple[str, float, float | None, str, float | None]] = []
        if phase is not None:
            rows.append((f"{phase.place()} {phase.name}", phase.done, phase.total, phase.amount(), 0.0 if phase.ended else phase.eta_seconds(progress.clock())))
        step, total = plain.as_number(figures.get("step")), plain.as_number(figures.get("total_steps") or progress.facts.get("total_steps"))
        if total:
            rows.append(("run", step or 0, total, f"{plain.count(step or 0)}/{plain.count(total)} steps", plain.as_number(figures.get("eta_seconds"))))
        grid = Table.grid(padding=(0, 1), expand=True)
        grid.add_column(no_wrap=True, style="bold", overflow="ellipsis")
        if width >= 60:
            grid.add_column(ratio=1)
        grid.add_column(justify="right", no_wrap=True, overflow="ellipsis")
        grid.add_column(justify="right", no_wrap=True, style="cyan", overflow="ellipsis")
        for label, done, of, amount, eta in rows:
            bar = [ProgressBar(total=max(of or 1.0, 1.0), completed=done if of else 0)] if width >= 60 else []
            grid.add_row(Text(label), *bar, Text(amount), Text(f"{plain.duration(eta)} left"))
        return grid

    def _phases(self) -> RenderableType | None:
        """The episode's phases with their seconds; the open one stands out."""
        phase, seconds = self.progress.phase, self.progress.phase_seconds
        if phase is None:
            return None
        line = Text(overflow="ellipsis", no_wrap=True)
        for name in [*PHASES, *(name for name in seconds if name not in PHASES)]:
            is_open = name == phase.name and not phase.ended
            elapsed = seconds.get(name, 0.0) + (self.progress.clock() - phase.started if is_open else 0.0)
            shown = f"{name} {plain.duration(elapsed)}" if is_open or name in seconds else name
            line.append(f"{shown}   ", "bold magenta" if is_open else "green" if name in seconds else "dim")
        if phase.note and not phase.ended:
            line.append(phase.note, "italic")
        return line

    def _losses(self, width: int) -> RenderableType | None:
        figures = self.progress.figures
        if "loss" not in figures:
            return None
        line = Text(overflow="fold")
        line.append("loss ", "cyan").append(plain.loss(figures["loss"]), "bold")
        for name, value in plain.terms(figures, plain.LOSS).items():
            line.append(f"   {name} ", "cyan").append(plain.loss(value))
        return Group(line, Text(sparkline(self.progress.losses.values, width), style="yellow", no_wrap=True))

    def _cells(self) -> Iterator[tuple[str, str]]:
        figures = self.progress.figures
        for name, value in plain.terms(figures, plain.SCALE).items():
            yield f"{name} scale", plain.number(value)
        shown = {
            "lr": ("learning rate", plain.learning_rate),
            "gradient_norm": ("gradient norm", plain.number),
            "samples_per_second": ("samples/s", lambda value: plain.number(value, 3) + plain.per_rank(figures)),
            "mfu": ("MFU", plain.percent),
            "data_wait_share": ("waiting for data", plain.percent),
            "memory_gb": ("memory", lambda value: f"{plain.number(value, 3)} GB"),
        }
        for key, (label, write) in shown.items():
            if key in figures:
                yield label, write(figures[key])
        for key, value in plain.other_figures(figures).items():
            yield key, plain.number(value)

    def _figures(self, width: int) -> RenderableType | None:
        """Label and value cells in as many columns as fit."""
        cells = list(self._cells())
        if not cells:
            return None
        num_columns = max(1, min(4, width // max(len(label) + len(value) + 4 for label, value in cells)))
        grid = Table.grid(padding=(0, 1), expand=True)
        for _ in range(num_columns):
            grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        texts = [Text.assemble((f"{label} ", "cyan"), value) for label, value in cells]
        for start in range(0, len(texts), num_columns):
            grid.add_row(*texts[start : start + num_columns])
        return grid

    def _evaluation(self) -> Iterator[RenderableType]:
        for line in evaluation_lines(self.progress.evaluation)[:MAX_SETS]:
            yield Text(line, style="dim", no_wrap=True, overflow="ellipsis")
