"""A run as pandas frames: figures over samples and over hours of work, from metrics.jsonl and evaluation.csv."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from protoclip_scale.engine.cost import flops_per_sample
from protoclip_scale.engine.model_cost import measure
from protoclip_scale.errors import UserError
from protoclip_scale.evaluation import figures_csv
from protoclip_scale.objectives import build_objectives
from protoclip_scale.recipe import Recipe, load_recipe

HEAD = ("kind", "step", "samples", "attempt", "time")
EVALUATED = "eval"
WATCHED = "watch"
NOT_THE_METHOD = ("name", "notes", "expected", "run", "evaluation")
NOT_THE_METHOD_IN = {"data": ("root", "workers", "retry_seconds", "max_bad_fraction", "prepare"), "optim": ("microbatch", "compile_blocks")}


@dataclass(frozen=True, eq=False)
class ComparedRun:
    """``figures``: columns source (train, eval, watch), step, samples, hours, key, value. ``flops``: of the whole work for one sample (``engine.cost``); k-means at most.
    ``method``: a digest of all that its recipe fixes but the seeds."""

    label: str
    folder: Path
    recipe: Recipe
    figures: pd.DataFrame
    flops: float
    method: str

    @property
    def seeds(self) -> tuple[int, int]:
        return self.recipe.run.seed, self.recipe.data.plan.seed

    def evaluations(self) -> pd.DataFrame:
        return self.figures[self.figures["source"] != "train"]


def read_runs(folders: Sequence[Path]) -> list[ComparedRun]:
    """Raises UserError for a folder that holds no run, or one that has not logged anything yet."""
    labels = [folder.resolve().name for folder in folders]
    return [_read(folder, name if labels.count(name) == 1 else str(folder)) for folder, name in zip(folders, labels, strict=True)]


def _read(folder: Path, label: str) -> ComparedRun:
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} is no run directory: it holds no recipe.yaml")
    recipe = load_recipe(folder / "recipe.yaml")
    lines = _lines(folder / "metrics.jsonl")
    if not lines:
        raise UserError(f"{folder}: nothing has been logged yet (metrics.jsonl holds no line)")
    objectives = build_objectives(recipe)
    flops = sum(flops_per_sample(measure(recipe, objectives), recipe, objectives, _ranks(folder)).values())
    return ComparedRun(label, folder, recipe, _figures(folder, lines), flops, method_of(recipe))


def method_of(recipe: Recipe) -> str:
    """Equal for runs that differ in seeds, in where they ran and in what was measured, only."""
    tree = recipe.model_dump(mode="json")
    for key in NOT_THE_METHOD:
        tree.pop(key)
    for section, keys in NOT_THE_METHOD_IN.items():
        tree[section] = {key: value for key, value in tree[section].items() if key not in keys}
    tree["data"]["plan"].pop("seed")
    for settings in tree["objectives"].values():
        settings.pop("features", None)  # where a teacher's features lie
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def _ranks(folder: Path) -> int:
    try:
        return int(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["ranks"])
    except (OSError, ValueError, KeyError, TypeError):
        return 1


def _lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines, in the order in which they were written; a torn one is left out."""
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.keys() >= set(HEAD):
            found.append(line)
    return found


def hours_of_work(lines: list[dict[str, Any]], started: float | None) -> np.ndarray:
    """float64 [n], of each line: hours that the work which counts has taken so far.

    Within an attempt the time since the line before; the time of an evaluation, which ends with an ``eval`` line, is left out. Before the first line: since
    ``started``, seconds since 1970, if it is known. Lost are the time between attempts and what a resumed run did again: from one attempt to the next nothing counts but
    the samples of the new one's first ``train`` line since the last one before, at their own speed.
    """
    hours, total, trained, resumed = [], 0.0, 0, False
    for before, line in zip([None, *lines], lines, strict=False):
        if before is None:
            total += max(0.0, line["time"] - started) if started is not None else 0.0
        elif line["attempt"] != before["attempt"]:
            resumed = True
        elif not resumed and line["kind"] != EVALUATED:
            total += max(0.0, line["time"] - before["time"])
        if line["kind"] == "train":
            if resumed and (speed := line.get("samples_per_second")):
                total += max(0, line["samples"] - trained) / speed
            trained, resumed = line["samples"], False
        hours.append(total / 3600)
    return np.array(hours)


def _figures(folder: Path, lines: list[dict[str, Any]]) -> pd.DataFrame:
    hours = hours_of_work(lines, _started(folder, lines[0]["attempt"]))
    rows = []
    for line, hour in zip(lines, hours, strict=True):
        if line["kind"] in ("train", EVALUATED):
            values = {key: value for key, value in line.items() if key not in HEAD and isinstance(value, int | float) and not isinstance(value, bool)}
            rows += [(line["kind"], line["step"], line["samples"], hour, key, float(value)) for key, value in values.items() if key != "episode"]
    for row in figures_csv.current(figures_csv.read(folder)[0], lines):
        hour = float(np.interp(row.samples, [line["samples"] for line in lines], hours))
        rows.append((WATCHED, row.step, row.samples, hour, row.key, row.value))
    return pd.DataFrame(rows, columns=["source", "step", "samples", "hours", "key", "value"])


def _started(folder: Path, attempt: int) -> float | None:
    try:
        return float(json.loads((folder / "attempts" / f"{attempt:04d}").read_text(encoding="utf-8"))["started"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
