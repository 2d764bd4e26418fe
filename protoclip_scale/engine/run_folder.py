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
from protoclip_scale.engine.checkpoint.copies import Copies
from protoclip_scale.engine.restore import Known, ask, ask_once, bring, copies_of, recipe_of
from protoclip_scale.errors import UserError
from protoclip_scale.files import publish_json, publish_text
from protoclip_scale.recipe import Recipe, diff, dump, load_recipe, schema

SOURCES_SCHEMA = 1


@dataclass(frozen=True)
class Start:
    """How a run begins: its id, its attempt, the checkpoint it goes on from, if any, and what there is to say about that."""

    run_id: str
    attempt: int
    checkpoint: Path | None
    manifest: dict[str, Any] | None
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()


def newest_attempt(folder: Path) -> int:
    """The highest attempt that has started in a run directory; 0 if none has."""
    return max((int(path.name) for path in (folder / "attempts").glob("[0-9]*")), default=0)


def guard_attempt(folder: Path, attempt: int) -> None:
    """Raise UserError if a newer attempt has taken the run over; nothing of an older one may be published then."""
    newest = newest_attempt(folder)
    if newest > attempt:
        raise UserError(f"{folder}: attempt {newest} has taken this run over; attempt {attempt} stops without saving")


def _run_id(folder: Path) -> str:
    """Of a run directory in which an attempt has started."""
    return json.loads((folder / "attempts" / f"{newest_attempt(folder):04d}").read_text())["run_id"]


def _begin_attempt(folder: Path, known: Known) -> tuple[str, int]:
    """The run's id, and the next attempt's number; the file system decides between two that start at once."""
    attempts = folder / "attempts"
    while True:
        newest = newest_attempt(folder)
        run_id = _run_id(folder) if newest else known.run_id or uuid.uuid4().hex[:12]
        number = max(newest, known.attempt) + 1
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
    """Take a run directory for a new attempt; for rank 0. Where ``run.copy_to`` holds a later checkpoint than the directory, it is brought here.

    Raises:
        UserError: it holds a run and ``resume`` is never; the recipe differs where it may not; the checkpoint is damaged; the copies are another
            run's, or do not answer where the run cannot go on without them.
    """
    used = folder.is_dir() and any(path.name != "attempts" or newest_attempt(folder) for path in folder.iterdir())
    if used and resume == "never":
        raise UserError(f"{folder} already holds a run and --resume is never: choose another --run-dir, or resume it with --resume auto")
    if used and not newest_attempt(folder):
        raise UserError(f"{folder} is not empty and holds no run: choose another --run-dir")
    if (folder / "recipe.yaml").exists():
        _refuse_another_recipe(folder, load_recipe(folder / "recipe.yaml"), recipe, extend)
    copies = copies_of(recipe)
    known, warnings = _ask(copies, folder, recipe, resume, extend, used) if copies else (Known(), [])
    if not used and not known.run_id and resume not in ("auto", "never"):
        raise UserError(f"--resume {resume}: there is no run in {folder}")
    begun = None if used else _begin_attempt(folder, known)  # before anything is brought: an interrupted start can be repeated
    found, manifest, told, notes = _choose(folder, resume, copies, known)
    run_id, attempt = begun or _begin_attempt(folder, known)
    if copies and found and resume != "auto":
        after = checkpoint.cursor_of(manifest).step
        copies.patiently("renaming later copies", lambda: copies.set_aside(after, attempt))
    publish_text(folder / "recipe.yaml", dump(recipe))
    return Start(run_id, attempt, found, manifest, (*warnings, *told), notes)


def _choose(folder: Path, resume: str, copies: Copies | None, known: Known) -> tuple[Path | None, dict[str, Any] | None, list[str], tuple[str, ...]]:
    """The checkpoint to go on from and its manifest (None for a new run), warnings, and where it came from if that is worth saying."""
    found, manifest, warnings, problem = None, None, [], None
    if checkpoint.list_checkpoints(folder) or resume not in ("auto", "never"):
        try:
            found, manifest, warnings = checkpoint.find(folder, "latest" if resume == "auto" else resume)
        except UserError as error:
            problem = error
    here = checkpoint.cursor_of(manifest).step if manifest else -1
    wanted = [step for step in reversed(known.steps) if step > here and resume in ("auto", str(step))]
    step, told = bring(copies, wanted, folder) if wanted else (None, [])
    if step is not None:
        found, manifest, _ = checkpoint.find(folder, str(step))
        return found, manifest, [*([str(problem)] if problem and resume == "auto" else warnings), *told], (f"went on from the copy of checkpoints/{found.name} in {copies.shown}",)
    if found is None and (problem or told):
        raise problem or UserError(told[0])
    return found, manifest, [*warnings, *told], ()


def _refuse_another_recipe(place: object, before: Recipe, now: Recipe, extend: bool) -> None:
    if changed := diff(before, now, extend=extend):
        raise UserError(f"{place} was trained with another recipe: {'; '.join(changed)}; restore these, or choose another --run-dir")


def _ask(copies: Copies, folder: Path, recipe: Recipe, resume: str, extend: bool, used: bool) -> tuple[Known, list[str]]:
    """What the place of the copies holds, and a warning if it does not answer but the run can go on without; UserError if it is another run's."""
    warnings: list[str] = []
    if used and resume == "auto" and checkpoint.list_checkpoints(folder):
        known, warnings = ask_once(copies)
    else:
        known = copies.patiently("asking for copies", lambda: ask(copies))
    if known.run_id and resume == "never":
        raise UserError(f"run.copy_to {copies.shown} holds copies of a run and --resume is never: name another place, or go on from there with --resume auto")
    if known.run_id and used and known.run_id != _run_id(folder):
        raise UserError(f"run.copy_to {copies.shown} holds copies of another run ({known.run_id}); name a place of this run's own")
    if known.run_id and not used and (before := recipe_of(copies)):
        _refuse_another_recipe(copies.shown, before, recipe, extend)
    return known, warnings


def pinned(data: schema.Data, folder: Path) -> schema.Data:
    """``data`` with Hub datasets at the commits that the run began with: a branch that has moved on since is no other data."""
    path = folder / "sources.json"
    if not path.exists():
        return data
    commits = [source["commit"] for source in _read_sources(path)["sources"]]
    sources = [source.model_copy(update={"revision": commit}) if commit else source for source, commit in zip(data.sources, commits, strict=True)]
    return data.model_copy(update={"sources": tuple(sources)})


def _read_sources(path: Path) -> dict[str, Any]:
    """sources.json; one that does not say its schema has the first."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if found.get("schema", 1) != SOURCES_SCHEMA:
        raise UserError(f"{path}: its format is version {found['schema']}, this release reads version {SOURCES_SCHEMA}; go on with the release that wrote it")
    return found


def check_sources(folder: Path, readers: list[BlockReader], wordnet: str | None) -> None:
    """Keep what the run's data is made of in ``sources.json``, or compare it with what was kept; for rank 0. ``wordnet``: digest of the one in use.

    Raises:
        UserError: the data is not what the run began with, naming what changed.
    """
    path = folder / "sources.json"
    now = {"schema": SOURCES_SCHEMA, "sources": [describe(reader) for reader in readers], "wordnet": wordnet}
    if not path.exists():
        publish_json(path, now)
        return
    before = _read_sources(path)
    pairs = zip(before["sources"], now["sources"], strict=True)
    changed = [f"{new['name']}: {difference(old, new)}" for old, new in pairs if old["fingerprint"] != new["fingerprint"]]
    if before["wordnet"] != now["wordnet"]:
        changed.append(f"WordNet is another one, which gives other texts (digest {before['wordnet']}, now {now['wordnet']})")
    if changed:
        raise UserError(f"{folder}: the data changed since this run began: {'; '.join(changed)}; restore it, or choose another --run-dir")
