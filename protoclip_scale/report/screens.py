"""The first screen (what will be run) and the last one (what came out, and where it lies)."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from protoclip_scale.report.evaluation_table import evaluation_rows, figure
from protoclip_scale.report.plain import count, counted, duration, number, percent
from protoclip_scale.report.progress import PHASES


def _join(items: Iterable[str]) -> str:
    return ", ".join(items)


def _named(value: Any, write) -> str:
    """{'cc3m': 3000000} -> 'cc3m 3,000,000'; anything else as it is."""
    return _join(f"{name} {write(item)}" for name, item in value.items()) if isinstance(value, Mapping) else write(value)


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return _join(f"{key} {item}" for key, item in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return _join(str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def first_screen_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, text) of what will be run; facts without a line of their own follow under their own name."""
    known = {
        "name": ("recipe", _text),
        "device": ("device", _text),
        "precision": ("precision", _text),
        "strategy": ("strategy", _text),
        "towers": ("towers", _text),
        "image_tower": ("image tower", _text),
        "text_tower": ("text tower", _text),
        "parameters": ("parameters", lambda value: _named(value, count)),
        "rows": ("rows", lambda value: _named(value, count)),
        "global_batch": ("global batch", count),
        "objectives": ("objectives", lambda value: _join(f"{name} x {number(weight)}" for name, weight in value.items()) if isinstance(value, Mapping) else _text(value)),
        "phases": ("phases", _text),
        "run_dir": ("run directory", _text),
        "resuming_from": ("resuming from", _text),
    }
    used = {"ranks", "hosts", "steps_per_episode", "total_steps", "episodes", "step"}
    for key, (label, write) in known.items():
        if facts.get(key) is not None:
            at_step = f" at step {count(facts['step'])}" if key == "resuming_from" and "step" in facts else ""
            yield label, write(facts[key]) + at_step
        if key == "name" and "ranks" in facts:
            yield "ranks", f"{counted(facts['ranks'], 'rank')} on {counted(facts.get('hosts', 1), 'host')}"
        if key == "rows" and any(facts.get(name) is not None for name in ("total_steps", "steps_per_episode", "episodes")):
            lengths = [("total_steps", "{} in all"), ("steps_per_episode", "{} per episode"), ("episodes", "{} episodes")]
            yield "steps", _join(template.format(count(facts[name])) for name, template in lengths if facts.get(name) is not None)
    for key, value in facts.items():
        if key not in known and key not in used and value is not None:
            yield key.replace("_", " "), _text(value)


def _grid(rows: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(label, Text(text))
    return grid


def first_screen(facts: Mapping[str, Any]) -> RenderableType:
    return Panel(_grid(first_screen_rows(facts)), title="what will be run", title_align="left", box=box.ROUNDED)


def _evaluation_tables(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    for name, rows in evaluation_rows(summary.get("evaluation") or {}, summary.get("baseline") or {}).items():
        table = Table(title=name, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        table.add_column("figure", ratio=1, overflow="fold")
        for column in ("model", "untrained", "best constant\nor chance"):
            table.add_column(column, justify="right", style="bold" if column == "model" else "")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        yield table


def _field(item: Any, name: str) -> Any:
    return item.get(name) if isinstance(item, Mapping) else getattr(item, name, None)


def _expected_table(summary: Mapping[str, Any]) -> Iterator[RenderableType]:
    """The recipe's expected figures beside those reached; a figure that was not measured is a dash."""
    expected, reached = summary.get("expected") or (), summary.get("evaluation") or {}
    if not expected:
        return
    table = Table(title="expected and reached", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    table.add_column("figure", ratio=3, overflow="fold")
    table.add_column("expected", justify="right")
    table.add_column("reached", justify="right", style="bold")
    table.add_column("protocol; source", ratio=4, overflow="fold")
    for item in expected:
        metric = str(_field(item, "metric"))
        origin = "; ".join(str(text) for text in (_field(item, "protocol"), _field(item, "source")) if text)
        table.add_row(*map(Text, (metric, figure(metric, _field(item, "value")), figure(metric, reached.get(metric)), origin)))
    yield table


def _effort_rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    shares = summary.get("phase_shares") or {}
    if shares:
        order = [name for name in PHASES if name in shares] + [name for name in shares if name not in PHASES]
        yield "time per phase", _join(f"{name} {percent(shares[name], 0)}" for name in order)
    lengths = [("seconds", "time", duration), ("steps", "steps", count), ("samples", "samples", count), ("samples_per_second", "samples/s", lambda value: number(value, 3))]
    for key, label, write in [*lengths, ("memory_gb", "peak memory", lambda value: f"{number(value, 3)} GB")]:
        if summary.get(key) is not None:
            yield label, write(summary[key])


def place_lines(summary: Mapping[str, Any]) -> Iterator[str]:
    """Where everything lies, a path or command a line; they stand outside the frame, to be copied whole."""
    for key, label in [("run_dir", "run"), ("checkpoint", "checkpoint"), ("export", "export"), ("export_command", "export it with"), ("report", "report"), ("pictures", "pictures")]:
        value = summary.get(key)
        for item in value if isinstance(value, list | tuple) else [value] if value else []:
            yield f"{label + ':':<16}{item}"


def last_screen(summary: Mapping[str, Any]) -> RenderableType:
    """See ``Console.finish`` for the keys; whatever is absent is left out."""
    parts: list[RenderableType] = [*_evaluation_tables(summary), *_expected_table(summary)]
    rows = [*_effort_rows(summary), *(("note", str(note)) for note in summary.get("notes") or ())]
    parts.append(_grid(rows))
    return Panel(Group(*parts), title="what came out", title_align="left", box=box.ROUNDED)
