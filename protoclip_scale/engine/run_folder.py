"""A run's directory: who may write to it, which attempt this is, and whether a run in it can go on."""

import json
import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protoclip_scale.data.sources import BlockReader
from protoclip_scale.data.sources.fingerprint import describe, difference
from protoclip_scale.engine import checkpoint
from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json, publish_text
from protoclip_scale.recipe import Recipe, diff, dump, load_recipe, schema


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


def guard_attempt(folder: Path, attempt: int) -> None:
    """Raise UserError if a newer attempt has taken the run over; nothing of an older one may be published then."""
    newest = newest_attempt(folder)
    if newest > attempt:
        raise UserError(f"{folder}: attempt {newest} has taken this run over; attempt {attempt} stops without saving")


def _begin_attempt(folder: Path) -> tuple[str, int]:
    """The run's id, and the next attempt's number; the file system decides between two that start at once."""
    attempts = folder / "attempts"
    while True:
        number = newest_attempt(folder) + 1
        run_id = json.loads((attempts / "0001").read_text())["run_id"] if number > 1 else uuid.uuid4().hex[:12]
        claim = attempts / f".{uuid.uuid4().hex}"
        publish_json(claim, {"run_id": run_id, "started": round(time.time(), 3)})
        try:
            os.link(claim, attempts / f"{number:04d}")
            return run_id, number
        except FileExistsError:
            continue
        finally:
            claim.unlink()


def open_run(folder: Path, recipe: Recipe, resume: str, extend: bool) -> Start:
    """Take a run directory for a new attempt; for rank 0.

    Raises:
        UserError: it holds a run and ``resume`` is never; the recipe differs where it may not; the checkpoint is damaged.
    """
    used = folder.is_dir() and any(path.name != "attempts" or newest_attempt(folder) for path in folder.iterdir())
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
    publish_text(folder / "recipe.yaml", dump(recipe))
    return Start(run_id, attempt, found, manifest, tuple(warnings))


def pinned(data: schema.Data, folder: Path) -> schema.Data:
    """``data`` with Hub datasets at the commits that the run began with: a branch that has moved on since is no other data."""
    path = folder / "sources.json"
    if not path.exists():
        return data
    commits = [source["commit"] for source in json.loads(path.read_text(encoding="utf-8"))["sources"]]
    sources = [source.model_copy(update={"revision": commit}) if commit else source for source, commit in zip(data.sources, commits, strict=True)]
    return data.model_copy(update={"sources": tuple(sources)})


def check_sources(folder: Path, readers: list[BlockReader], wordnet: str | None) -> None:
    """Keep what the run's data is made of in ``sources.json``, or compare it with what was kept; for rank 0. ``wordnet``: digest of the one in use.

    Raises:
        UserError: the data is not what the run began with, naming what changed.
    """
    path = folder / "sources.json"
    now = {"sources": [describe(reader) for reader in readers], "wordnet": wordnet}
    if not path.exists():
        publish_json(path, now)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    pairs = zip(before["sources"], now["sources"], strict=True)
    changed = [f"{new['name']}: {difference(old, new)}" for old, new in pairs if old["fingerprint"] != new["fingerprint"]]
    if before["wordnet"] != now["wordnet"]:
        changed.append(f"WordNet is another one, which gives other texts (digest {before['wordnet']}, now {now['wordnet']})")
    if changed:
        raise UserError(f"{folder}: the data changed since this run began: {'; '.join(changed)}; restore it, or choose another --run-dir")
