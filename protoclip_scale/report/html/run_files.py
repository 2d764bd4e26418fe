"""What a run directory holds, read for its report: every file may be missing, torn or of a run that is being written."""

import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from protoclip_scale.data.quarantine import read_quarantine
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation import figures_csv
from protoclip_scale.redact import redact_text

KEPT_KINDS = ("checkpoint", "episode", "eval", "phases", "warning")
WARNINGS_SHOWN = 40
HANG_CHARACTERS = 6000
_LOG_WARNING = re.compile(r"^(\S+ \S+) (?:.*?)warning: (.*)$")


@dataclass
class Table:
    """Lines of one kind as columns of floats, NaN where a line lacks a figure; a hundred thousand lines are a few megabytes."""

    columns: dict[str, array] = field(default_factory=dict)
    length: int = 0

    def add(self, line: dict[str, Any]) -> None:
        for name, value in line.items():
            if isinstance(value, int | float):
                column = self.columns.setdefault(name, array("d"))
                column.extend([np.nan] * (self.length - len(column)))
                column.append(value)
        self.length += 1

    def __getitem__(self, name: str) -> np.ndarray:
        """float64 [length]; all NaN for a figure that no line has."""
        found = np.frombuffer(self.columns.get(name, array("d")) or array("d", [np.nan]), dtype=np.float64)[: self.length]
        return np.concatenate([found, np.full(self.length - len(found), np.nan)])

    def __contains__(self, name: str) -> bool:
        return name in self.columns


@dataclass
class RunFiles:
    """``train``: metrics.jsonl's lines of that kind; ``lines``: those of other kinds, oldest first. ``last_seen``: by attempt the time of its newest line and the
    highest step it reached, lines that a resumption took back included; ``taken_back``: how many train lines those are, by attempt."""

    folder: Path
    train: Table = field(default_factory=Table)
    lines: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {kind: [] for kind in KEPT_KINDS})
    lost_phases: list[dict[str, Any]] = field(default_factory=list)
    last_seen: dict[int, tuple[float, int]] = field(default_factory=dict)
    taken_back: dict[int, int] = field(default_factory=dict)

    def attempts(self) -> dict[int, float | None]:
        """The time at which each attempt started, if it is known."""
        started: dict[int, float | None] = dict.fromkeys(sorted(self.last_seen))
        for path in self.folder.glob("attempts/[0-9]*"):
            about = _json(path)
            started[int(path.name)] = about.get("started") if isinstance(about, dict) else None
        return dict(sorted(started.items()))

    def json(self, name: str) -> dict[str, Any]:
        """A small JSON file of the run; {} if it is not there, cannot be read, or is no object."""
        found = _json(self.folder / name)
        return found if isinstance(found, dict) else {}

    def recipe(self) -> str:
        """The resolved recipe as it was written, secrets already left out; '' without one."""
        try:
            return redact_text((self.folder / "recipe.yaml").read_text(encoding="utf-8", errors="replace"))
        except OSError:
            return ""

    def evaluations(self) -> list[dict[str, Any]]:
        """Evaluations by step: the run's own and those that tools/watch.py added; figures of both for one step are one entry."""
        found: dict[int, dict[str, Any]] = {}
        for line in self.lines["eval"]:
            found.setdefault(line["step"], {}).update(line)
        trained = ({"kind": "train", "attempt": int(attempt), "step": int(step)} for attempt, step in zip(self.train["attempt"], self.train["step"], strict=True))
        for row in figures_csv.current(figures_csv.read(self.folder)[0], [*self.lines["checkpoint"], *trained]):
            found.setdefault(row.step, {"step": row.step, "samples": row.samples})[row.key] = row.value
        return [found[step] for step in sorted(found)]

    def quarantine(self) -> list[dict[str, Any]]:
        """Rows that could not be used."""
        entries = [entry for entry in read_quarantine(self.folder / "quarantine").values() if "reason" in entry]
        return sorted(entries, key=lambda entry: entry["row_id"])

    def warnings(self) -> list[tuple[str, str]]:
        """(when, text) of the log's newest warnings; one that came several times stands once, with its last time."""
        found: dict[str, str] = {}
        for line in _text_lines(self.folder / "log.txt"):
            if "warning: " in line and (match := _LOG_WARNING.match(line)):
                found.pop(match[2], None)
                found[match[2]] = match[1]
        return [(when, redact_text(text)) for text, when in list(found.items())[-WARNINGS_SHOWN:]]

    def hangs(self) -> list[tuple[str, str]]:
        """(file, its end) of the stacks that ranks wrote when nobody got on."""
        found = []
        for path in sorted(self.folder.glob("hangs/*.txt")):
            text = "\n".join(_text_lines(path))
            found.append((path.name, redact_text(text[-HANG_CHARACTERS:])))
        return found

    def newest_prototypes(self) -> list[dict[str, Any]]:
        """What engine/pictures.py kept of the last clustering that was drawn, one entry for each labeling."""
        cards = sorted(self.folder.glob("pictures/prototypes-[0-9]*-*.json"))
        newest = [path for path in cards if path.name.split("-")[1] == cards[-1].name.split("-")[1]]
        return [entry for path in newest if isinstance(entry := _json(path), dict) and "sections" in entry]


def read_run(folder: Path) -> RunFiles:
    """Raises UserError if there is no run."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; name a run directory")
    if not any((folder / name).exists() for name in ("recipe.yaml", "metrics.jsonl", "attempts")):
        raise UserError(f"{folder} holds no run (no recipe.yaml, metrics.jsonl or attempts); name a run directory")
    run = RunFiles(folder)
    for line in _json_lines(folder / "metrics.jsonl"):
        _see(run, line)
        if line["kind"] == "train":
            run.train.add(line)
        elif line["kind"] in run.lines:
            run.lines[line["kind"]].append(line)
    for line in _json_lines(folder / "metrics.discarded.jsonl"):
        _see(run, line)
        if line["kind"] == "train":
            run.taken_back[line["attempt"]] = run.taken_back.get(line["attempt"], 0) + 1
        elif line["kind"] == "phases":
            run.lost_phases.append(line)
    return run


def _see(run: RunFiles, line: dict[str, Any]) -> None:
    time, step = run.last_seen.get(line["attempt"], (0.0, 0))
    run.last_seen[line["attempt"]] = max(time, line["time"]), max(step, line["step"])


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return None


def _text_lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in file:
                yield line.rstrip("\n")
    except OSError:
        return


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of metrics; torn ones are left out."""
    for text in _text_lines(path):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.keys() >= {"kind", "step", "samples", "attempt", "time"}:
            yield line
