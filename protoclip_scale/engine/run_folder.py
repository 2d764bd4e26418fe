"""A run's directory: who may write to it, which attempt this is, and whether a run in it can go on."""

import json
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protoclip_scale.engine import checkpoint
from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_text
from protoclip_scale.recipe import Recipe, diff, dump, load_recipe


@dataclass(frozen=True)
class Start:
    """How a run begins: its id, its attempt, and the checkpoint it goes on from, if any."""

    run_id: str
    attempt: int
    checkpoint: Path | None
    manifest: dict[str, Any] | None
    warnings: tuple[str, ...]


def newest_attempt(folder: Path) -> int:
    """The highest attempt that has started in a run directory; 0 if none has."""
    return max((int(path.name) for path in (folder / "attempts").glob("[0-9]*")), default=0)


def _begin_attempt(folder: Path) -> tuple[str, int]:
    """The run's id, and the next attempt's number; the file system decides between two that start at once."""
    attempts = folder / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    first = attempts / "0001"
    run_id = json.loads(first.read_text())["run_id"] if first.exists() else uuid.uuid4().hex[:12]
    while True:
        number = newest_attempt(folder) + 1
        try:
            with open(attempts / f"{number:04d}", "x", encoding="utf-8") as file:
                json.dump({"run_id": run_id, "started": round(time.time(), 3)}, file)
            return run_id, number
        except FileExistsError:
            continue


def open_run(folder: Path, recipe: Recipe, resume: str, extend: bool) -> Start:
    """Take a run directory for a new attempt; for rank 0.

    Raises:
        UserError: it holds a run and ``resume`` is never; the recipe differs where it may not; the checkpoint is damaged.
    """
    used = folder.is_dir() and any(folder.iterdir())
    if used and resume == "never":
        raise UserError(f"{folder} already holds a run and --resume is never: choose another --run-dir, or resume it with --resume auto")
    has_attempt = (folder / "attempts" / "0001").exists()
    if used and not has_attempt:
        raise UserError(f"{folder} is not empty and holds no run: choose another --run-dir")
    found, manifest, warnings = None, None, []
    if used:
        changed = diff(load_recipe(folder / "recipe.yaml", []), recipe, extend=extend) if (folder / "recipe.yaml").exists() else []
        if changed:
            raise UserError(f"{folder} was trained with another recipe: {'; '.join(changed)}; restore these, or choose another --run-dir")
        if resume != "auto" or checkpoint.list_checkpoints(folder):
            found, manifest, warnings = checkpoint.find(folder, "latest" if resume == "auto" else resume)
    elif resume not in ("auto", "never"):
        raise UserError(f"--resume {resume}: there is no run in {folder}")
    run_id, attempt = _begin_attempt(folder)
    if found:
        checkpoint.set_aside(folder, int(found.name.removeprefix("step-")), attempt)
    publish_text(folder / "recipe.yaml", dump(recipe))
    return Start(run_id, attempt, found, manifest, tuple(warnings))
