"""``evaluation.csv`` of a run directory: figures of its checkpoints that were measured beside training; one figure a line, columns step, samples, attempt, key, value.

A checkpoint's figures come in one piece, followed by a line whose key begins with ``watch/``: it says by which suite, and its value is the beginning of the manifest's SHA-256 as a number.
"""

import contextlib
import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from protoclip_scale.files import alone, publish_text

NAME = "evaluation.csv"
COLUMNS = ("step", "samples", "attempt", "key", "value")
WATCH = "watch/"
DIGITS = 12  # of a digest, as a number that a float64 holds


class Row(NamedTuple):
    step: int
    samples: int
    attempt: int
    key: str
    value: float


class Mark(NamedTuple):
    """A checkpoint that was evaluated: which one, and by which suite."""

    step: int
    attempt: int
    digest: str
    suite: str


def append(run_dir: Path, step: int, samples: int, attempt: int, figures: Mapping[str, float], digest: str, suite: str) -> None:
    """Add a checkpoint's figures and its mark: all of them or, after a kill, none. Several processes may do so at once. ``digest``: of its manifest, hexadecimal."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    for key, value in {**figures, WATCH + suite: int(digest[:DIGITS], 16)}.items():
        lines.writerow((step, samples, attempt, key, value))
    path = run_dir / NAME
    with alone(path):
        before = path.read_text(encoding="utf-8") if path.exists() else ",".join(COLUMNS) + "\n"
        publish_text(path, before + text.getvalue())


def read(run_dir: Path) -> tuple[list[Row], set[Mark]]:
    """Figures and marks; none if nothing has been measured. Lines that are no rows are left out, figures that are not finite too."""
    path = run_dir / NAME
    rows, marks = [], set()
    if path.exists():
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            for line in csv.DictReader(file):
                with contextlib.suppress(ValueError, TypeError):
                    row = Row(int(line["step"]), int(line["samples"]), int(line["attempt"]), line["key"], float(line["value"]))
                    if row.key.startswith(WATCH):
                        marks.add(Mark(row.step, row.attempt, f"{int(row.value):0{DIGITS}x}", row.key.removeprefix(WATCH)))
                    elif math.isfinite(row.value):
                        rows.append(row)
    return rows, marks


def current(rows: Iterable[Row], lines: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Figures that are of the run as it went on, ``lines`` of its metrics.jsonl: not of steps that a resumed run has taken back or trained again. The last one of a step and key."""
    published, first_step = set(), {}
    for line in lines:
        if line["kind"] == "checkpoint":
            published.add(line["step"])
        elif line["kind"] == "train":
            first_step[line["attempt"]] = min(line["step"], first_step.get(line["attempt"], line["step"]))
    kept: dict[tuple[int, str], Row] = {}
    for row in rows:
        trained_again = any(attempt > row.attempt and step <= row.step for attempt, step in first_step.items())
        if row.step in published and not trained_again:
            kept[row.step, row.key] = row
    return list(kept.values())
